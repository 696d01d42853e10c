"""`foundation gateway`: agents that answer prompts, for those that speak other protocols.

Each runs until SIGTERM or Ctrl-C, and ends with code 0.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from foundation_cli import render, values
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

TOKEN = "FOUNDATION_GATEWAY_TOKEN"  # noqa: S105 - the name of a variable
"""What requests over HTTP must bring, if it is set."""
PATIENCE_S = 30.0
ANSWER_S = 300.0
KEEP_S = 86400.0
_HELP = "Gateways: agents for clients that speak other protocols."

Only = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TARGET]...",
        help="Agents, deployment:NAME or capability:NAME; all that answer prompts unless given.",
    ),
]
Patience = Annotated[
    float | None,
    typer.Option(
        metavar="DURATION",
        parser=values.duration,
        help="How long a prompt waits for an agent that is moved or recovered (30s).",
    ),
]
AnswerTimeout = Annotated[
    float | None,
    typer.Option(
        "--answer-timeout",
        metavar="DURATION",
        parser=values.duration,
        help="How long an agent may take for a piece of its answer (5m).",
    ),
]


async def serve_until_told(
    cluster: Cluster,
    begin: Callable[[], Awaitable[str]],
    end: Callable[[], Awaitable[None]],
) -> None:
    """Begin, say so on stderr, and end at SIGTERM or Ctrl-C."""
    import asyncio
    import signal

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        render.talk(await begin())
        await stop.wait()
    finally:
        await end()


@with_shared
def nats_agents(
    shared: Shared,
    only: Only = None,
    owner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The owner in subjects (the cluster's name)."),
    ] = None,
    stored: Annotated[
        bool,
        typer.Option(
            "--stored",
            help="Prompts survive an agent's death in the middle; answers come as a whole.",
        ),
    ] = False,
    patience: Patience = None,
    answer_timeout: AnswerTimeout = None,
    heartbeat: Annotated[
        int, typer.Option(metavar="S", min=1, max=3600, help="Seconds between heartbeats.")
    ] = 30,
) -> None:
    """Serve agents by the Synadia Agent Protocol for NATS.

    They are found by `$SRV.INFO.agents` and prompted at agents.prompt.AGENT.OWNER.SESSION.
    Run two of these, and either may die.

    Example: foundation gateway nats-agents deployment:chat --patience 10s
    """

    async def main() -> None:
        from foundation_nats.gateways.nats_agents import NatsAgents

        async with connected(shared) as cluster:
            gateway = NatsAgents(
                cluster,
                owner=owner,
                only=only or (),
                stored=stored,
                patience_s=PATIENCE_S if patience is None else patience,
                answer_s=ANSWER_S if answer_timeout is None else answer_timeout,
                beat_s=heartbeat,
            )

            async def begin() -> str:
                await gateway.open()
                found = sorted(gateway.served)
                shown = "".join(f"\n  {subject}" for subject in found[:20])
                more = f"\n  … and {len(found) - 20} more" if len(found) > 20 else ""
                return f"Serving {len(found)} agents; Ctrl-C ends it.{shown}{more}"

            await serve_until_told(cluster, begin, gateway.close)

    run(main)


@with_shared
def a2a(
    shared: Shared,
    only: Only = None,
    http: Annotated[
        str, typer.Option(metavar="[HOST:]PORT", help="Where to listen; port 0: any that is free.")
    ] = "127.0.0.1:8088",
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where others reach it, for the agent cards."),
    ] = None,
    patience: Patience = None,
    answer_timeout: Annotated[
        float | None,
        typer.Option(
            "--answer-timeout",
            metavar="DURATION",
            parser=values.duration,
            help="How long a request waits for its task, which goes on (5m).",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="How long a task that is over is kept (24h).",
        ),
    ] = None,
) -> None:
    """Serve agents by A2A 1.0: agent cards, and JSON-RPC over HTTP.

    Tasks are kept in the cluster: they outlive this process.

    Example: foundation gateway a2a deployment:chat --http 0.0.0.0:8088 --url https://agents.example.org
    """

    async def main() -> None:
        from foundation_nats.gateways.a2a import CARD, A2AGateway
        from foundation_nats.gateways.web import Web, read_address

        async with connected(shared) as cluster:
            gateway = A2AGateway(
                cluster,
                only=only or (),
                patience_s=PATIENCE_S if patience is None else patience,
                answer_s=ANSWER_S if answer_timeout is None else answer_timeout,
                keep_s=KEEP_S if keep is None else keep,
            )
            web = Web(gateway.app(), read_address(http), token=os.environ.get(TOKEN) or None)

            async def begin() -> str:
                await web.open()
                gateway.url = (url or web.url).rstrip("/")
                await gateway.open()
                return f"Serving A2A at {gateway.url} ({CARD}); Ctrl-C ends it."

            async def end() -> None:
                await gateway.close()
                await web.close()

            await serve_until_told(cluster, begin, end)

    run(main)


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="gateway",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command(name="nats-agents")(nats_agents)
    group.command(name="a2a")(a2a)
    app.add_typer(group)
