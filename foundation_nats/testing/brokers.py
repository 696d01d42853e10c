"""Three nats-servers as one cluster on loopback, each pair behind links that a test can cut.

Every server dials every other through a `Link` of its own and advertises an
address where nobody is, so that gossip makes no route around the links.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing.links import Link
from foundation_nats.testing.server import TestServer

ROUTE_PINGS = 'ping_interval: "2s", ping_max: 2'
"""Of a ``cluster`` section: a server that has fallen silent is noticed by the others in 6 s, as
docker/nats.conf has it; by default it takes them half a minute and more."""


class Brokers:
    """An ``async with`` that gives a NATS cluster of *count* servers, ready for R3 streams.

    Args:
        stores: a directory for each server; None: private ones.
        binary: the nats-server that all begin with; None: the one of the project.
    """

    def __init__(
        self, count: int = 3, *, stores: Sequence[Path] | None = None, binary: str | None = None
    ) -> None:
        if stores is not None and len(stores) != count:
            raise ValueError(f"{count} servers need {count} stores, not {len(stores)}")
        self._count = count
        self._stores = stores
        self._binary = binary
        self._stack = AsyncExitStack()
        self._routes: dict[tuple[int, int], Link] = {}
        self.servers: list[TestServer] = []

    @property
    def urls(self) -> list[str]:
        """Where clients connect."""
        return [server.url for server in self.servers]

    def named(self, name: str) -> TestServer:
        """The server that calls itself *name*."""
        return next(server for server in self.servers if server.name == name)

    def cut_off(self, server: TestServer) -> None:
        """Swallow everything between *server* and the others; its clients still reach it."""
        index = self.servers.index(server)
        for pair, link in self._routes.items():
            if index in pair:
                link.hold()

    def heal(self) -> None:
        """Connect all servers again."""
        for link in self._routes.values():
            link.heal()

    async def __aenter__(self) -> Self:
        try:
            ports = [free_port() for _ in range(self._count)]
            for here in range(self._count):
                for there in range(self._count):
                    if here != there:
                        link = await Link.open("127.0.0.1", ports[there])
                        self._routes[here, there] = await self._stack.enter_async_context(link)
            self.servers = [
                TestServer(
                    EmbeddedConfig(
                        extra=self._settings(index, ports),
                        store=None if self._stores is None else self._stores[index],
                        binary=self._binary,
                    )
                )
                for index in range(self._count)
            ]
            await asyncio.gather(
                *(self._stack.enter_async_context(server) for server in self.servers)
            )
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    def _settings(self, index: int, ports: list[int]) -> str:
        routes = ", ".join(
            f'"{link.url.replace("nats://", "nats-route://")}"'
            for (here, _), link in self._routes.items()
            if here == index
        )
        return (
            f'cluster {{ name: C, listen: "127.0.0.1:{ports[index]}", advertise: "127.0.0.1:1", '
            f"no_advertise: true, {ROUTE_PINGS}, routes: [{routes}] }}"
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self.servers:
            if server.is_running:
                server.thaw()
        await self._stack.aclose()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """The first of *count* neighbouring ports that were free a moment ago."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first


__all__ = ["ROUTE_PINGS", "Brokers", "free_port", "free_ports"]
