"""Commands that talk to agents: `send` stores a signal, `ask` waits for replies, `signal` looks one up.

`send` to an id nobody knows is refused with exit code 4, because a typing
error would otherwise wait in a mailbox for ever; ``--queue`` stores it all the
same. A repeated `send` with the same ``--id`` takes effect once. With ``--at``, ``--after``,
``--every`` or ``--cron`` it is sent later; `foundation schedules` lists and cancels.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.render import Column
from foundation_cli.status import get_agent

_ATTEMPTS = 4
_KINDS = ("capability:", "any:", "deployment:", "label:", "topic:")

_Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="ID, capability:NAME, any:NAME, deployment:NAME, label:EXPR, topic:NAME or everyone.",
        autocompletion=complete.targets,
    ),
]
_Type = Annotated[str, typer.Argument(metavar="TYPE", help="The signal's type: counter.add")]
_Json = Annotated[
    str | None, typer.Argument(metavar="[JSON]", help="The payload; - reads it from stdin.")
]


def _checked(target: str, type: str) -> None:
    from foundation_schemas.signal import Target

    try:
        Target.parse(target)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="TARGET") from None
    if not type or len(type) > 256 or any(c.isspace() or not c.isprintable() for c in type):
        raise typer.BadParameter(
            f"{type[:40]!r} is no signal type: write a word such as counter.add.",
            param_hint="TYPE",
        )


def _agent_id(target: str) -> str | None:
    """The id where the target is one agent."""
    if target == "everyone" or target.startswith(_KINDS):
        return None
    return target.removeprefix("agent:")


@with_shared
def send(
    shared: Shared,
    target: _Target,
    type: _Type,
    data: _Json = None,
    id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Its id: repeats with one id take effect once."),
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Store it even if no such agent exists yet.")
    ] = False,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Send it then: 2030-01-31T12:00:00Z.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Send it so much later: 90s, 2h.")
    ] = None,
    every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Send it again and again.")
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(metavar="EXPR", help="Send it again and again: '30 9 * * MON-FRI'."),
    ] = None,
    zone: Annotated[str, typer.Option(metavar="ZONE", help="In which --cron is meant.")] = "UTC",
    ttl: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Don't handle it later than so much after."),
    ] = None,
    attempts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=100, help="How often its handling is tried."),
    ] = None,
    urgent: Annotated[
        bool, typer.Option("--urgent", help="It overtakes what waits and is not urgent.")
    ] = False,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines", help="Send one signal for each line of stdin, which is its payload."
        ),
    ] = False,
    wait_handled: Annotated[
        bool,
        typer.Option(
            "--wait-handled",
            help="Wait until it is handled, for --timeout at most; later it is not begun any more.",
        ),
    ] = False,
) -> None:
    """Store a signal for an agent: it takes effect once.

    What can't take effect is found by `foundation dead list`. With --wait-handled: print what its
    handler returned, or fail with why it was given up.

    Example: foundation send visits counter.add '{"amount": 3}'
    Example: foundation send visits counter.add '{"amount": 3}' --wait-handled --attempts 5
    Example: jq -c '.[]' orders.json | foundation send shop order.placed --lines --id import-7
    Example: foundation send visits counter.add --cron '0 9 * * *' --zone Europe/Berlin
    """
    _checked(target, type)
    if lines:
        if data is not None:
            raise typer.BadParameter("with --lines it comes from stdin.", param_hint="JSON")
        if wait_handled or any(x is not None for x in (at, after, every, cron)):
            raise typer.BadParameter("they are sent now, and not waited for.", param_hint="--lines")
        ttl_s = None if ttl is None else values.duration(ttl)
        _send_lines(
            shared, target, type, id=id, queue=queue, ttl=ttl_s, attempts=attempts, urgent=urgent
        )
        return
    payload = values.json_value(data, sys.stdin)
    when: dict[str, Any] = {
        "at": at,
        "after": None if after is None else values.duration(after),
        "every": None if every is None else values.duration(every),
        "cron": cron,
    }
    is_later = any(value is not None for value in when.values())
    ttl_s = None if ttl is None else values.duration(ttl)
    if is_later and (wait_handled or urgent or attempts is not None):
        raise typer.BadParameter(
            "a signal for later has none.", param_hint="--wait-handled, --urgent or --attempts"
        )
    if wait_handled:
        if ttl is not None or urgent:
            raise typer.BadParameter(
                "not with --wait-handled; --timeout ends it.", param_hint="--ttl or --urgent"
            )
        _send_supervised(shared, target, type, payload, id, queue, attempts)
        return

    async def main() -> Any:
        async with connected(shared) as cluster:
            agent = _agent_id(target)
            if agent is not None and not queue:
                await _known(cluster, agent)
            timeout = shared.timeout_s
            if not is_later:
                return await cluster.send(
                    target,
                    type,
                    payload,
                    id=id,
                    timeout=timeout,
                    ttl=ttl_s,
                    attempts=attempts,
                    urgent=urgent,
                )
            return await cluster.signals.schedule(
                target, type, payload, id=id, timeout=timeout, ttl=ttl_s, zone=zone, **when
            )

    receipt = render.plain(run(main))
    if render.document(shared, receipt):
        return
    if is_later:
        known = " (set before: nothing was added)" if receipt["duplicate"] else ""
        name = render.clean(receipt["id"])
        render.write(f"set {name} for {render.clean(receipt['target'])}, to be sent later{known}")
        render.talk(f"End it with `foundation schedules cancel {name}`.")
    else:
        known = " (stored before: nothing was added)" if receipt["duplicate"] else ""
        render.write(
            f"stored {render.clean(receipt['id'])} for {render.clean(receipt['target'])}, "
            f"sequence {receipt['sequence']} of {render.clean(receipt['stream'])}{known}"
        )


def _send_lines(
    shared: Shared,
    target: str,
    type: str,
    *,
    id: str | None,
    queue: bool,
    ttl: float | None,
    attempts: int | None,
    urgent: bool,
) -> None:
    """One signal for each line; what can't be sent is named, and the rest is sent all the same."""
    import asyncio
    import json
    from collections import deque
    from collections.abc import AsyncIterator

    from foundation_nats.api.signals import Outgoing
    from foundation_nats.errors import FoundationError

    numbers: deque[int] = deque()
    counts = {"stored": 0, "repeated": 0, "failed": 0}

    def failed(number: int, reason: str) -> None:
        counts["failed"] += 1
        render.talk(f"line {number}: {reason}")

    async def outgoing() -> AsyncIterator[Outgoing]:
        number = 0
        while text := await asyncio.to_thread(sys.stdin.readline):
            number += 1
            if not text.strip():
                continue
            try:
                payload = json.loads(text)
            except ValueError as error:
                failed(number, f"not JSON: {error}")
                continue
            numbers.append(number)
            key = None if id is None else f"{id}-{number}"
            yield Outgoing(target, type, payload, key, ttl, attempts, urgent)

    async def main() -> None:
        async with connected(shared) as cluster:
            agent = _agent_id(target)
            if agent is not None and not queue:
                await _known(cluster, agent)
            results = cluster.signals.send_each(outgoing(), timeout=shared.timeout_s)
            async for result in results:
                number = numbers.popleft()
                if isinstance(result, FoundationError):
                    failed(number, str(result))
                else:
                    counts["repeated" if result.duplicate else "stored"] += 1

    run(main)
    if not render.document(shared, counts):
        again = f", {counts['repeated']} were stored before" if counts["repeated"] else ""
        render.write(f"stored {counts['stored']} for {render.clean(target)}{again}")
    if counts["failed"]:
        raise typer.Exit(1)


def _send_supervised(
    shared: Shared,
    target: str,
    type: str,
    payload: Any,
    id: str | None,
    queue: bool,
    attempts: int | None,
) -> None:
    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            agent = _agent_id(target)
            if agent is not None and not queue:
                await _known(cluster, agent)
            found = await cluster.signals.send_supervised(
                target,
                type,
                payload,
                id=id,
                timeout=shared.timeout_s,
                retries=(attempts or _ATTEMPTS) - 1,
                on_error="raise",
            )
            return {
                "id": found.id,
                "target": found.target,
                "state": str(found.state),
                "result": found.result,
            }

    found = render.plain(run(main))
    if not render.document(shared, found):
        render.write(f"{found['state']} {render.clean(found['id'])} for {found['target']}")
        if found["result"] is not None:
            render.write(render.json_text(found["result"], indent=2))


async def _known(cluster: Any, agent: str) -> None:
    from foundation_nats.errors import AgentNotFoundError

    try:
        await get_agent(cluster, agent)
    except AgentNotFoundError as error:
        raise AgentNotFoundError(
            error.message,
            hint=f"{error.hint} --queue stores the signal for an agent that is yet to come.",
            **error.details,
        ) from error


@with_shared
def ask(
    shared: Shared,
    target: _Target,
    type: _Type,
    data: _Json = None,
    all: Annotated[bool, typer.Option("--all", help="Ask everybody behind TARGET.")] = False,
    quorum: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --all: enough; fewer is an error."),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Print each item of the answer as it comes, one per line."),
    ] = False,
) -> None:
    """Ask an agent and print its reply; --timeout bounds the wait, with --stream that for each item.

    Example: foundation ask visits counter.add '{"amount": 1}' --timeout 2s
    Example: foundation ask capability:counting counter.get --all --quorum 2
    Example: foundation ask search find '"tea"' --stream
    """
    _checked(target, type)
    payload = values.json_value(data, sys.stdin)
    if quorum is not None and not all:
        raise typer.BadParameter("it needs --all.", param_hint="--quorum")
    if all and stream:
        raise typer.BadParameter("one agent is asked: leave out --all.", param_hint="--stream")
    if all:
        _ask_all(shared, target, type, payload, quorum)
        return
    if stream:
        _ask_stream(shared, target, type, payload)
        return

    from foundation_nats.errors import AgentNotFoundError

    async def main() -> Any:
        async with connected(shared) as cluster:
            try:
                return await cluster.ask(target, type, payload, timeout=shared.timeout_s)
            except AgentNotFoundError:
                if (agent := _agent_id(target)) is not None:
                    await get_agent(cluster, agent)  # says which id was meant
                raise

    reply = render.plain(run(main))
    if not render.document(shared, reply):
        render.write(render.json_text(reply, indent=2))


def _ask_stream(shared: Shared, target: str, type: str, payload: Any) -> None:
    async def main() -> None:
        from contextlib import aclosing

        async with (
            connected(shared) as cluster,
            aclosing(cluster.ask_stream(target, type, payload, timeout=shared.timeout_s)) as items,
        ):
            async for item in items:
                render.print_line(item)

    run(main)


def _ask_all(shared: Shared, target: str, type: str, payload: Any, quorum: int | None) -> None:
    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            answers = await cluster.signals.ask_all(
                target, type, payload, quorum=quorum, timeout=shared.timeout_s
            )
            return {
                "asked": len(answers.asked),
                "results": answers.results,
                "errors": {agent: str(error) for agent, error in answers.errors.items()},
            }

    found = render.plain(run(main))
    if not render.document(shared, found):
        rows = [
            {"agent": agent, "text": render.json_text(reply)}
            for agent, reply in sorted(found["results"].items())
        ]
        rows += [
            {"agent": agent, "text": f"! {error}"}
            for agent, error in sorted(found["errors"].items())
        ]
        columns = (
            Column("agent", lambda row: row["agent"]),
            Column("reply", lambda row: row["text"], free=True),
        )
        render.table(columns, rows, empty="Nobody is behind it.")
        render.talk(f"{len(found['results'])} of {found['asked']} have answered.")


_DELIVERIES = (
    Column("agent", lambda d: d["agent"]),
    Column("state", lambda d: d["state"]),
    Column("accepted", lambda d: render.age(d["accepted_at"]) if d["accepted_at"] else None),
    Column("sequence", lambda d: d["sequence"], right=True),
    Column("node", lambda d: d["handled_by"]),
    Column("epoch", lambda d: d["epoch"], right=True),
    Column("took ms", lambda d: d["took_ms"], right=True),
    Column("tries", lambda d: d["attempts"], right=True),
    Column("emitted", lambda d: d["emitted"], right=True),
    Column("dead", lambda d: d["dead_number"], right=True),
    Column("reason", lambda d: d["reason"], free=True),
)


@with_shared
def signal(
    shared: Shared,
    id: Annotated[str, typer.Argument(metavar="ID", help="As `send` printed it.")],
    agent: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Look into its mailbox alone.", autocompletion=complete.agents
        ),
    ] = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Show causes and effects, from the first cause on.")
    ] = False,
) -> None:
    """Show what became of a signal: accepted, handled where, how long, with what effects.

    With --tree: which signal caused it, and all that has come of that. Handled signals are known for
    a minute or so, dead letters until they are discarded.

    Example: foundation signal order-17
    """
    if tree:
        _tree(shared, id)
        return

    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.signals.get(id, agent=agent)

    found = render.plain(run(main))
    if render.document(shared, found):
        return
    counts = ", ".join(f"{count} {state}" for state, count in sorted(found["counts"].items()))
    rows = [
        ("signal", found["id"]),
        ("state", found["state"]),
        ("type", found["type"]),
        ("from", found["source"]),
        ("for", found["target"]),
        ("due", found["due"]),
        ("deadline", found["deadline"]),
        ("receivers", counts or None),
    ]
    render.record([row for row in rows if row[1] is not None])
    if found["deliveries"]:
        render.table(_DELIVERIES, found["deliveries"], empty="")
    for effect in found["effects"]:
        render.write(
            f"emitted {render.clean(effect['type'])} for {render.clean(effect['target'])}, "
            f"sequence {effect['sequence']}"
        )


def _tree(shared: Shared, id: str) -> None:
    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.signals.journal(id)

    root = run(main)
    if render.document(shared, render.plain(root)):
        return
    for depth, node in root.walk():
        if not node.is_known:
            text = f"{node.id} (not known any more)"
        else:
            agents = ", ".join(node.agents[:3]) + (" …" if len(node.agents) > 3 else "")
            text = f"{node.type}  {node.source} -> {agents or node.target}  {node.id}"
            if node.dead:
                text += f"  given up by {', '.join(node.dead)}"
        sign = " <" if node.id == id and depth else ""
        render.write("  " * depth + render.clean(text) + sign)


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command()(send)
    app.command()(ask)
    app.command()(signal)
