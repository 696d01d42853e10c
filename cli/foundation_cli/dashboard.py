"""`foundation dashboard`: the cluster in a browser, from this process, read-only."""

from __future__ import annotations

from typing import Annotated

import typer

from foundation_cli import render
from foundation_cli.connection import Output, Shared, connected, run, with_shared


@with_shared
def dashboard(
    shared: Shared,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; there is no log-in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free.")
    ] = 8322,
    hide_data: Annotated[
        bool, typer.Option("--hide-data", help="Leave out states and payloads.")
    ] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Serve a read-only page of the cluster until Ctrl-C; needs the extra `web`.

    Nodes, agents, deployments, topology, live traffic, and why things are as they are.

    Example: foundation dashboard --port 8322
    """

    async def main() -> None:
        import asyncio
        import signal

        from foundation_nats.api.dashboard import is_loopback, serving

        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with (
            connected(shared) as cluster,
            serving(cluster, host=host, port=port, hide_data=hide_data) as url,
        ):
            said = {"schema": f"{render.SCHEMA}/dashboard", "url": url, "cluster": cluster.name}
            if shared.format is Output.JSON:
                render.print_line(said)
            elif not render.document(shared, said):
                render.write(f"{cluster.name} at {url}   Ctrl-C ends it.")
            if not is_loopback(host):
                render.talk(
                    "warning: whoever reaches this address sees everything: there is no log-in."
                )
            if open_:
                import webbrowser

                webbrowser.open(url)
            await stop.wait()

    run(main)


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(dashboard)
