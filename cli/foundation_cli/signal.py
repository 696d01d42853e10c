"""Commands that talk to agents: `send` stores a signal, `ask` waits for the reply.

`send` to an id nobody knows is refused with exit code 4, because a typing
error would otherwise wait in a mailbox for ever; ``--queue`` stores it all the
same. A repeated `send` with the same ``--id`` takes effect once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.status import get_agent

_KINDS = ("capability:", "any:", "deployment:")

_Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="ID, capability:NAME, any:NAME, deployment:NAME or everyone.",
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
) -> None:
    """Store a signal for an agent: it takes effect once.

    What can't take effect is found by `foundation dead list`.

    Example: foundation send visits counter.add '{"amount": 3}'
    """
    _checked(target, type)
    payload = values.json_value(data, sys.stdin)

    async def main() -> Any:
        async with connected(shared) as cluster:
            agent = _agent_id(target)
            if agent is not None and not queue:
                await _known(cluster, agent)
            return await cluster.send(target, type, payload, id=id, timeout=shared.timeout_s)

    receipt = render.plain(run(main))
    if not render.document(shared, receipt):
        known = " (stored before: nothing was added)" if receipt["duplicate"] else ""
        render.write(
            f"stored {render.clean(receipt['id'])} for {render.clean(receipt['target'])}, "
            f"sequence {receipt['sequence']} of {render.clean(receipt['stream'])}{known}"
        )


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
def ask(shared: Shared, target: _Target, type: _Type, data: _Json = None) -> None:
    """Ask an agent and print its reply; --timeout bounds the wait.

    Example: foundation ask visits counter.add '{"amount": 1}' --timeout 2s
    """
    _checked(target, type)
    payload = values.json_value(data, sys.stdin)

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


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    app.command()(send)
    app.command()(ask)
