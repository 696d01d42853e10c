"""`render`: a command template and its values as a list of arguments, without a shell.

Pure. The template is split like a shell would, then placeholders are filled
in, so that a value is never split and never becomes another command:

- ``{labels}`` as a word of its own becomes as many arguments as it has;
- within a longer word values are joined by blanks;
- ``{command:q}`` quotes each for one more shell, as ``ssh HOST`` and ``sh -c``
  have one. After ``ssh`` an unquoted value that a shell would take apart is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePath

from foundation_nats.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(:q)?\}")


def render(template: str, values: Mapping[str, Sequence[str]]) -> list[str]:
    """The arguments.

    Raises:
        ConfigError: the template is empty, badly quoted, or names what there is not; or it
            hands something to a remote shell that should have been quoted.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ConfigError(f"The command {template!r} can't be read: {error}.") from error
    if not words:
        raise ConfigError("The command is empty.")
    has_shell = PurePath(words[0]).name == "ssh"
    arguments: list[str] = []
    for word in words:
        alone = _PLACEHOLDER.fullmatch(word)
        if alone is not None:
            found = _values(alone, values, template, has_shell)
            arguments += [" ".join(found)] if alone[2] else found
            continue
        arguments.append(
            _PLACEHOLDER.sub(
                lambda match: " ".join(_values(match, values, template, has_shell)), word
            )
        )
    return arguments


def _values(
    match: re.Match[str], values: Mapping[str, Sequence[str]], template: str, has_shell: bool
) -> list[str]:
    name = match[1]
    if name not in values:
        near = get_close_matches(name, list(values), n=1)
        raise ConfigError(
            f"The command {template!r} has {{{name}}}, which is not known.",
            hint=f"Did you mean {{{near[0]}}}?"
            if near
            else f"Known: {', '.join(f'{{{known}}}' for known in sorted(values))}.",
        )
    found = list(values[name])
    quoted = [shlex.quote(value) for value in found]
    if match[2]:
        return quoted
    if has_shell and quoted != found:
        raise ConfigError(
            f"ssh hands its arguments to a shell, which would take {' '.join(found)!r} apart.",
            hint=f"Write {{{name}:q}} in the command.",
        )
    return found
