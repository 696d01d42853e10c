"""`foundation history`: what a mailbox still holds; `foundation replay`: handle it again, apart from the cluster.

Both only read. A replay runs the agent's class in this process, on signals and a state that were read
before, and refuses what reaches outside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.render import Column

_PAYLOAD_MAX = 120
_SHOWN = 20

_Agent = Annotated[
    str, typer.Argument(metavar="AGENT", help="Its id.", autocompletion=complete.agents)
]


def _short(value: Any) -> str:
    text = render.json_text(value) if value is not None else ""
    return text if len(text) <= _PAYLOAD_MAX else text[:_PAYLOAD_MAX] + "…"


def _note(signal: dict[str, Any]) -> str:
    effects = signal["effects"]
    parts = [
        f"dead letter {signal['dead_number']}" if signal["dead_number"] else "",
        signal["reason"] or "",
        f"{signal['attempts']} attempts" if (signal["attempts"] or 1) > 1 else "",
        ", ".join(f"→ {e['type']} to {e['target']}" for e in effects) if effects else "",
        f"because of {signal['cause']}" if signal["cause"] else "",
    ]
    return "; ".join(part for part in parts if part)


_COLUMNS = (
    Column("sequence", lambda s: s["sequence"], right=True),
    Column("at", lambda s: s["at"][:23].replace("T", " ")),
    Column("outcome", lambda s: s["outcome"]),
    Column("type", lambda s: s["type"]),
    Column("source", lambda s: s["source"]),
    Column("ms", lambda s: "" if s["took_ms"] is None else f"{s['took_ms']:.2f}", right=True),
    Column("data", lambda s: _short(s["data"]), free=True),
    Column("note", _note, free=True),
)


@with_shared
def history(
    shared: Shared,
    agent: _Agent,
    last: Annotated[
        int, typer.Option("--last", metavar="N", min=1, max=100_000, help="The newest N.")
    ] = 50,
    effects: Annotated[
        bool, typer.Option("--effects", help="Also look in all mailboxes for what each has caused.")
    ] = False,
) -> None:
    """List the signals that an agent's mailbox still holds: handled ones and unread ones.

    Handled ones stay about a minute, and as many as its class or mailbox.history says.

    Example: foundation history visits --last 20 --effects
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            found = await cluster.agents.history(agent, last=last, effects=effects)
            return {"schema": f"{render.SCHEMA}/history", **render.plain(found)}

    found = run(main)
    if render.document(shared, found):
        return
    render.table(_COLUMNS, found["signals"], empty="Its mailbox holds nothing.")
    total = found["kept"] + found["unread"]
    more = f", of which the newest {last} are shown" if total > last else ""
    start = found["replay_from"]
    render.talk(
        f"{found['kept']} handled, {found['unread']} unread{more}; "
        + (
            f"`foundation replay {agent}` can begin at #{start}."
            if start is not None
            else "no state to begin a replay with is kept (`history` of its class)."
        )
    )


@with_shared
def replay(
    shared: Shared,
    agent: _Agent,
    until: Annotated[
        int | None,
        typer.Option(metavar="SEQ", min=0, help="Show the state after this signal."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help=f"Show only N signals up to there ({_SHOWN})."),
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside", help="Let handlers connect, write and do their steps again."
        ),
    ] = False,
) -> None:
    """Handle again what an agent has handled, apart from the cluster, and show its state.

    Its class is imported from the working directory or PYTHONPATH. Nothing is sent or stored. In the
    end the state is compared with the stored one: exit code 1 if the replay is not exact.

    Example: foundation replay visits --until 1234
    """
    import asyncio

    from foundation_cli.schema import on_path
    from foundation_nats.agent.loading import load_class
    from foundation_nats.testing.replay import replay as handle_again

    async def read() -> Any:
        async with connected(shared) as cluster:
            return await cluster.agents.recording(agent)

    recording = run(read)
    on_path(Path.cwd())
    cls = load_class(recording.run)
    # Not uvloop's: that one connects without the interpreter's knowledge.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        result = runner.run(handle_again(recording, cls, until=until, allow_outside=allow_outside))
    found = {"schema": f"{render.SCHEMA}/replay", **render.plain(result)}
    shown = [step for step in found["steps"] if step["sequence"] <= found["until"]]
    if last is not None:
        found["steps"] = shown[len(shown) - last :] if last < len(shown) else shown
    if not render.document(shared, found):
        _show(found, shown, _SHOWN if last is None else last)
    if not found["exact"]:
        raise typer.Exit(render.FAILED)


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What a signal has changed, field by field."""
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "  ".join(f"{key}: {_short(before.get(key))} → {_short(after.get(key))}" for key in keys)


def _show(found: dict[str, Any], steps: list[dict[str, Any]], last: int) -> None:
    first = max(0, len(steps) - last)
    before = found["begins_with"] if first == 0 else steps[first - 1]["state"]
    render.write(f"begins at #{found['begins_at']}: {render.json_text(found['begins_with'])}")
    if first:
        render.write(f"… {first} signals")
    for step in steps[first:]:
        told = step["reason"] or _changes(before, step["state"]) or "no change"
        word = "" if step["outcome"] == "applied" else f"{step['outcome']}: "
        render.write(
            f"#{step['sequence']}  {step['at'][:23].replace('T', ' ')}  "
            f"{render.clean(step['type'])}  {word}{render.clean(told)}"
        )
        before = step["state"]
    render.write(f"state at #{found['until']}: {render.json_text(found['state'])}")
    for remark in found["remarks"]:
        render.write(f"!!  {render.clean(remark)}")
    end = found["checks"][-1]
    if found["exact"]:
        render.write(f"ok  the replay ends at #{end['cursor']} in the state that is stored")


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command()(history)
    app.command()(replay)
