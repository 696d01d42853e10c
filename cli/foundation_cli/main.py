"""The `foundation` command: its groups, and how every end of it becomes an exit code.

Importing this module imports neither NATS nor pydantic nor rich, so that
``--help`` and completion are quick; commands import what they need when run.

Exit codes: 0 ok, 1 failed, 2 usage, 3 cluster unreachable, 4 not found, 5 not
settled in time, 6 plan has differences, 7 permission denied, 130 interrupted.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence

import typer

from foundation_cli import (
    bench,
    breakers,
    chaos,
    consensus,
    dashboard,
    dead,
    deploy,
    discovery,
    doctor,
    gateway,
    history,
    init,
    mcp,
    moves,
    node,
    nodes,
    render,
    resources,
    rollout,
    schedules,
    schema,
    signal,
    status,
    steps,
    tap,
    top,
    topology,
    up,
    why,
)
from foundation_cli import run as patterns
from foundation_cli.connection import group_callback

_HELP = """Clusters of stateful agents over nothing but NATS.

Start with `foundation init demo`, or `foundation up`. Options such as --server and -o may stand before or after the command.
"""

_ClickError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"foundation {version('foundation-nats')}")
        raise typer.Exit()


app = typer.Typer(
    name="foundation",
    help=_HELP,
    callback=group_callback(_HELP, _version),
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

for _module in (
    init,
    up,
    node,
    nodes,
    deploy,
    rollout,
    moves,
    status,
    top,
    dashboard,
    topology,
    resources,
    signal,
    schedules,
    tap,
    history,
    dead,
    breakers,
    steps,
    doctor,
    discovery,
    consensus,
    patterns,
    bench,
    chaos,
    why,
    schema,
    gateway,
    mcp,
):
    _module.register(app)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether ``-o json`` is among the arguments, for errors found before they are parsed."""
    found = False
    for index, argument in enumerate(arguments):
        if argument in ("-o", "--output"):
            found = arguments[index + 1 : index + 2] == ["json"]
        elif argument.startswith("--output="):
            found = argument == "--output=json"
        elif argument.startswith("-o") and not argument.startswith("--"):
            found = argument[2:] in ("json", "=json")
        elif argument == "--":
            break
    return found


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    as_json = _wants_json(arguments)
    try:
        result = app(list(arguments), prog_name="foundation", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return render.INTERRUPTED
    except render.ReaderGoneError:
        return render.OK
    except _ClickError as error:
        return _usage(error, as_json)
    except Exception as error:  # the top of the program: whatever it is, say it and end
        return render.report(error, as_json=as_json)
    return result if isinstance(result, int) else render.OK


def _usage(error: Exception, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", None) or "foundation"
    if type(error).__name__ == "NoArgsIsHelpError":
        # Asking for nothing shows the help, which is a usage error all the same.
        render.talk(context.get_help() if context is not None else "See `foundation --help`.")
        return render.USAGE
    text = getattr(error, "format_message", lambda: str(error))().replace("\n\t", " ")
    text = text.removeprefix("Invalid value: ").rstrip()
    text, hint = _elsewhere(text) or (text, f"See `{command} --help`.")
    render.print_error(
        text if text.endswith((".", "?")) else f"{text}.", code="usage", hint=hint, as_json=as_json
    )
    return render.USAGE


def _elsewhere(text: str) -> tuple[str, str] | None:
    """What to say of a command that was looked for in the wrong group; None: it is nowhere else."""
    missed = re.match(r"No such command '([^']+)'\.", text)
    if missed is None:
        return None
    root = typer.main.get_command(app)
    found = [f"`{path}`" for path in _paths("foundation", root) if path.endswith(f" {missed[1]}")]
    return (missed[0], f"Did you mean {' or '.join(found)}?") if found else None


def _paths(prefix: str, group: object) -> Iterator[str]:
    for name, command in getattr(group, "commands", {}).items():
        yield f"{prefix} {name}"
        yield from _paths(f"{prefix} {name}", command)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
