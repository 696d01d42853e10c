"""The cluster that a campaign breaks: brokers, nodes behind links, and the verbs of trouble.

IO. Everything is of its own making: servers, nodes and links on free ports of
this machine. A node's manager and its workers reach the brokers through links of their
own, so that the two can be parted. `heal` undoes whatever is broken, so that convergence can be judged.

A node that ends though nobody here told it to (at a crash point, because it gave up, or
by a bug) is started again after a moment, as a service manager would, and written down
in `exits` with the reason, so that nothing is healed unseen.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.chaos.checkers import ExitSeen, explain
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.node.worker import OTHER_SERVERS
from foundation_nats.testing.brokers import Brokers
from foundation_nats.testing.clocks import SHIM, WallClock
from foundation_nats.testing.cluster import NodeProcess, TestCluster
from foundation_nats.testing.disks import SlowDisk, can_throttle
from foundation_nats.testing.links import Link
from foundation_nats.testing.server import TestServer

_END_TIMEOUT_S = 20.0
_DISK_MB = 192
_LOOK_EVERY_S = 0.05
_AGAIN_S = 0.5
"""After so long a node that ended by itself is started again."""

GPUS = 6
"""What each node declares of a scarce resource."""

SETTINGS: dict[str, Any] = {
    # A broker that restarts knows the ids of what is still stored; consumed signals stay for
    # longer than a route waits for another expander.
    # Faults come faster than in life, so verdicts must, too; the relations stay.
    "liveness": {
        "suspect_after_s": 1.0,
        "down_after_s": 3.0,
        "bus_grace_s": 4.0,
        "storm_hold_s": 6.0,
    },
    "control": {"unavailable_grace_s": 3.0},
    "worker": {"hang_after_s": 2.5, "restarts_max": 50},
    "mailbox": {"trim_every_s": 0.5, "trim_min_age_s": 15.0, "mailbox_max": 5000},
}


class Lab:
    """An ``async with`` around brokers, nodes and their links."""

    def __init__(
        self,
        *,
        seed: int,
        nodes: int = 3,
        workers: int = 1,
        brokers: int = 1,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        path: list[str] | None = None,
        disks: bool = False,
    ) -> None:
        """*disks*: give each broker a disk that can be slow and full, where the machine allows."""
        self._chance = random.Random(seed)
        self._count = nodes
        self._brokers_count = brokers
        self._brokers: Brokers | None = None
        self._stack = AsyncExitStack()
        self._settings = {**SETTINGS, **(settings or {})}
        if brokers >= 3:
            self._settings["replicas"] = 3
            # A replicated stream elects a leader for up to 9 s (F1): the grace must be longer.
            liveness = {**self._settings["liveness"], "bus_grace_s": 12.0}
            self._settings["liveness"] = liveness
        self._environment = dict(environment or {})
        self._workers = workers
        self._path = path or []
        self._clocks: dict[str, WallClock] = {}
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.servers: list[TestServer] = []
        self._wants_disks = disks
        self.disks: list[SlowDisk] = []
        """The disks of the brokers, in their order; empty: they are the machine's own."""
        self.no_disks = "the brokers have no disks of their own in this lab"
        """Why there are none."""
        self.manager_links: dict[str, list[Link]] = {}
        """Node to its manager's links, one per broker."""
        self.worker_links: dict[str, list[Link]] = {}
        """Node to its workers' links, one per broker."""
        self.client_links: list[Link] = []
        self.exits: list[ExitSeen] = []
        """Ends of nodes that nobody here ordered, in their order."""
        self._noted: dict[NodeProcess, ExitSeen] = {}
        self._scope: TaskScope
        self.cluster: TestCluster
        self.clients: list[Cluster] = []
        """Connections of the workloads; they go through `client_links`."""

    @property
    def eye(self) -> Cluster:
        """A connection that is never disturbed, for observers and checkers."""
        return self.cluster.client

    @property
    def links(self) -> dict[str, list[Link]]:
        """Node to all its links."""
        return {n: [*self.manager_links[n], *self.worker_links[n]] for n in self.manager_links}

    # ---- life -------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _open(self) -> None:
        if self._wants_disks:
            self._mount_disks()
        stores = [disk.path for disk in self.disks] or None
        if self._brokers_count == 1:
            config = EmbeddedConfig(store=stores[0]) if stores else None
            self.servers = [await self._stack.enter_async_context(TestServer(config))]
        else:
            brokers = Brokers(self._brokers_count, stores=stores)
            self._brokers = await self._stack.enter_async_context(brokers)
            self.servers = self._brokers.servers
        mailbox = dict(self._settings.get("mailbox", {}))
        mailbox.setdefault("signals_max_bytes", self.servers[0].signals_max_bytes)
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="foundation-lab-"))
        self.cluster = TestCluster(
            nodes=0,
            workers=self._workers,
            path=[*self._path, SHIM],
            settings={**self._settings, "mailbox": mailbox},
            urls=[server.url for server in self.servers],
            environment=self._environment,
        )
        await self._stack.enter_async_context(self.cluster)
        for name in self.names:
            self.manager_links[name] = await self._open_links()
            self.worker_links[name] = await self._open_links()
            self._clocks[name] = WallClock(Path(directory) / f"{name}.clock")
            self.start_node(name)
        self.client_links = await self._open_links()
        await self.cluster.wait_up(self.names, timeout=30)
        self._scope = TaskScope("lab")
        self._stack.push_async_callback(self._scope.close)
        self._scope.start(self._look_after_nodes(), "nodes")
        for number in range(2):
            client = self.connect(f"client-{number}")
            self.clients.append(await self._stack.enter_async_context(client))

    def _mount_disks(self) -> None:
        reason = can_throttle()
        if reason is not None:
            self.no_disks = reason
            return
        self.disks = [
            self._stack.enter_context(SlowDisk(_DISK_MB)) for _ in range(self._brokers_count)
        ]

    async def _open_links(self) -> list[Link]:
        links = []
        for server in self.servers:
            host, _, port = server.url.removeprefix("nats://").partition(":")
            link = await Link.open(host, int(port), mangles=random.Random(self._chance.random()))
            links.append(await self._stack.enter_async_context(link))
        # Not every node shall use the first broker.
        self._chance.shuffle(links)
        return links

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self.servers:
            if server.is_running:
                server.thaw()
        await self._stack.__aexit__(kind, error, trace)

    # ---- nodes ------------------------------------------------------------------

    def start_node(self, name: str) -> NodeProcess:
        """Start the node; returns at once."""
        return self.cluster.start_node(
            name,
            "--capacity",
            f"gpu={GPUS}",
            environment={
                "FOUNDATION_BUS__SERVERS": ",".join(link.url for link in self.manager_links[name]),
                OTHER_SERVERS: ",".join(link.url for link in self.worker_links[name]),
                **self._clocks[name].environment,
            },
        )

    def node(self, name: str) -> NodeProcess:
        """The node's process; it may have ended."""
        return self.cluster.nodes[name]

    def running(self) -> list[str]:
        """The nodes whose managers live."""
        return [name for name in self.names if self.node(name).is_running]

    async def leader(self) -> str | None:
        """The node that leads, if one of ours does."""
        lease = await self.eye.leader()
        return lease.holder if lease is not None and lease.holder in self.names else None

    def worker(self, name: str, index: int) -> psutil.Process | None:
        """One of the node's workers; None if it has none."""
        workers = self.node(name).workers()
        return workers[index % len(workers)] if workers else None

    def set_clock(self, name: str, offset_s: float) -> None:
        """Let the node's wall clock show so many seconds more; 0: the truth again, everywhere."""
        if offset_s:
            self._clocks[name].move(offset_s)
        else:
            self._clocks[name].set_right()

    def split_clock(self, name: str, offset_s: float) -> None:
        """Let the manager's wall clock show so many seconds more, and its workers' as many less."""
        for index, process in enumerate(self.node(name).family()):
            self._clocks[name].move(-offset_s if index else offset_s, pid=process.pid)

    def connect(self, name: str) -> AbstractAsyncContextManager[Cluster]:
        """One more client, by the way of all clients; to be opened with ``async with``."""
        urls = [link.url for link in self.client_links]
        return Cluster.connect(urls, config=self.cluster.config, name=name)

    async def restart_node(self, name: str) -> None:
        """Start the node anew if it has ended."""
        node = self.node(name)
        if node.is_running:
            return
        exit = self._note_exit(node)
        node.process.wait()
        self.start_node(name)
        if exit is not None:
            exit.end_s = monotonic()

    def _note_exit(self, node: NodeProcess) -> ExitSeen | None:
        """Write down, once, that the process ended, unless it was told to; None: it was."""
        if node.was_told:
            return None
        if node not in self._noted:
            code = node.process.wait()
            now = monotonic()
            found = ExitSeen(node.name, code, *explain(code, node.pid, node.said()), now, now)
            self._noted[node] = found
            self.exits.append(found)
        return self._noted[node]

    async def _look_after_nodes(self) -> None:
        """Start again whoever ends by itself."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            for name in self.names:
                exit = None if self.node(name).is_running else self._note_exit(self.node(name))
                if exit is not None and monotonic() - exit.begin_s >= _AGAIN_S:
                    await self.restart_node(name)

    # ---- brokers ----------------------------------------------------------------

    def cut_off(self, server: TestServer) -> None:
        """Part one broker from the others."""
        assert self._brokers is not None
        self._brokers.cut_off(server)

    def join_brokers(self) -> None:
        """Let the brokers reach each other again."""
        if self._brokers is not None:
            self._brokers.heal()

    # ---- all --------------------------------------------------------------------

    async def heal(self) -> None:
        """Undo everything: thaw, release, restart, set clocks right."""
        self.join_brokers()
        for disk in self.disks:
            disk.slow(0)
            disk.free()
        for server in self.servers:
            if server.is_running:
                server.thaw()
            else:
                await server.restart()
        for link in (
            *self.client_links,
            *(link for links in self.links.values() for link in links),
        ):
            link.heal()
        for name in self.names:
            self.set_clock(name, 0.0)
            node = self.node(name)
            with contextlib.suppress(psutil.NoSuchProcess):
                node.resume()
            await self.restart_node(name)

    async def wait_up(self, timeout: float) -> None:
        """Wait until every node is up; one that gives up by itself is started again.

        Raises:
            AssertionError: not in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            for name in self.names:
                await self.restart_node(name)
            left = deadline - asyncio.get_running_loop().time()
            try:
                await self.cluster.wait_up(self.names, timeout=max(0.1, left))
                return
            except RuntimeError:
                # It ended of its own accord, as it should after too many crashes.
                if left <= 0:
                    raise AssertionError("a node ends again and again") from None
                await asyncio.sleep(0.2)


__all__ = ["SETTINGS", "Lab"]
