"""`foundation init`: a project that runs and whose tests pass, to begin with.

The files are those below ``templates/``: one folder for all projects and one for
each kind. Nothing that exists is overwritten: if one file is in the way, none is
written.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, with_shared

_TEMPLATES = Path(__file__).parent / "templates"
_SUFFIX = ".in"
_MANIFEST_SCHEMA = ".foundation/manifest.schema.json"
"""What the first line of a new manifest names, for editors."""
_NAMED_MAX = 5


class Template(StrEnum):
    """What the agent of the new project does."""

    COUNTER = "counter"
    CHAT = "chat"
    SAGA = "saga"


_ASKS = {
    Template.COUNTER: """ask visits counter.add '{"amount": 1}'""",
    Template.CHAT: """ask chat-0 chat.say '{"text": "hello"}'""",
    Template.SAGA: """ask orders order.place '{"id": "o1", "item": "lamp", "price": 30}'""",
}


def project_name(folder: Path) -> str:
    """A name for the project in *folder* that packaging tools take."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.resolve().name).strip("-").lower()
    return name or "agents"


def files_of(template: Template, name: str) -> dict[str, str]:
    """The files of a new project: their paths in it, and what is in them."""
    from foundation_nats.control.manifest_schema import manifest_schema

    found = {}
    for base in (_TEMPLATES / "shared", _TEMPLATES / template):
        for path in sorted(base.rglob(f"*{_SUFFIX}")):
            relative = path.relative_to(base).as_posix().removesuffix(_SUFFIX)
            relative = ".gitignore" if relative == "gitignore" else relative
            found[relative] = path.read_text(encoding="utf-8").replace("@NAME@", name)
    found[_MANIFEST_SCHEMA] = json.dumps(manifest_schema(), indent=2) + "\n"
    return found


def create(folder: Path, template: Template) -> list[str]:
    """Write the project; the paths of its files in it.

    Raises:
        AlreadyExistsError: a file is in the way; nothing was written.
        ConfigError: the folder can't be written.
    """
    from foundation_nats.errors import AlreadyExistsError, ConfigError

    files = files_of(template, project_name(folder))
    if folder.exists() and not folder.is_dir():
        raise AlreadyExistsError(f"{folder} is a file.", hint="Name a folder.")
    in_the_way = [name for name in files if (folder / name).exists()]
    if in_the_way:
        more = len(in_the_way) - _NAMED_MAX
        raise AlreadyExistsError(
            f"{folder} has {', '.join(in_the_way[:_NAMED_MAX])}"
            f"{f' and {more} more' if more > 0 else ''} already; nothing was written.",
            hint="Name another folder.",
            files=in_the_way,
        )
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} can't be written: {error.strerror}."
        ) from error
    return sorted(files)


def next_steps(folder: Path, template: Template) -> list[str]:
    """The commands to go on with."""
    where = [] if folder.resolve() == Path.cwd() else [f"cd {_quoted(folder)}"]
    reload = " --reload" if find_spec("watchfiles") is not None else ""
    return [
        *where,
        f"foundation up agents.yaml{reload}",
        f"foundation {_ASKS[template]}",
        "python -m pytest",
    ]


def _quoted(folder: Path) -> str:
    import shlex

    return shlex.quote(str(folder))


@with_shared
def init(
    shared: Shared,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; made if it isn't there.")],
    template: Annotated[
        Template,
        typer.Option("--template", "-t", metavar="counter|chat|saga", help="What the agent does."),
    ] = Template.COUNTER,
) -> None:
    """Make a project that runs: an agent, a manifest, tests.

    Example: foundation init demo
    """
    files = create(folder, template)
    steps = next_steps(folder, template)
    document = {
        "schema": f"{render.SCHEMA}/init",
        "directory": str(folder.resolve()),
        "template": str(template),
        "files": files,
        "next": steps,
    }
    if render.document(shared, document):
        return
    render.write(f"Made {folder} with {', '.join(files)}.")
    render.write("Go on with:")
    for step in steps:
        another = "    # in another terminal" if step.startswith("foundation ask") else ""
        render.write(f"  {step}{another}")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(init)
