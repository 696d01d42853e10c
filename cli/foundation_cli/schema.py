"""`foundation schema export`: what crosses the wire, as files for editors, tools and other languages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, group_callback, with_shared

_HELP = "Descriptions of the wire and of manifests: JSON Schema and AsyncAPI."


@with_shared
def export(
    shared: Shared,
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to; what is there is replaced.")
    ] = Path("schemas"),
    import_: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Describe the agents of this module too; repeatable."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; exit code 6 if a file is not as it should be."
        ),
    ] = False,
) -> None:
    """Write JSON Schemas of the wire models and of manifests, and asyncapi.yaml, into DIR.

    It needs no cluster. Editors check a manifest whose first line names the schema:
    `# yaml-language-server: $schema=schemas/manifest.schema.json`.

    Example: foundation schema export schemas --import my_agents
    """
    from foundation_nats.api.contract import agent_classes, documents
    from foundation_nats.control.manifest_schema import MODELINE

    classes = agent_classes([_module(name) for name in import_ or ()])
    found = documents(classes)
    changed = {name: text for name, text in found.items() if _differs(folder / name, text)}
    if not check:
        _write(folder, changed)
    told: dict[str, Any] = {
        "schema": f"{render.SCHEMA}/schema-export",
        "folder": str(folder),
        "files": list(found),
        "changed": list(changed),
        "agents": list(classes),
    }
    if not render.document(shared, told):
        verb = "would change" if check else "changed"
        render.write(f"{folder}: {len(found)} files, {len(changed)} {verb}")
        for name in changed if len(changed) <= 10 else ():
            render.write(f"  {name}")
        if not check:
            render.talk(f"First line of a manifest: {MODELINE}{folder / 'manifest.schema.json'}")
    if check and changed:
        raise typer.Exit(render.DIFFERENCES)


def on_path(folder: Path) -> None:
    """Let modules be found in *folder*."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _module(name: str) -> Any:
    """A module of the user's, found as `node start --import` finds it.

    Raises:
        ConfigError: it can't be imported; says why.
    """
    import importlib

    from foundation_nats.errors import ConfigError

    on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module does
        raise ConfigError(
            f"The module {name!r} can't be imported: {type(error).__name__}: {error}.",
            hint="It is looked for in the working directory and on PYTHONPATH.",
        ) from error


def _differs(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") != text
    except (OSError, UnicodeDecodeError):
        return True


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write *files* below *folder*.

    Raises:
        ConfigError: one can't be written; says why.
    """
    from foundation_nats.errors import ConfigError

    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}.") from error


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="schema",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command()(export)
    app.add_typer(group)
