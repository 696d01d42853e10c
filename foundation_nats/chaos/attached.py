"""A running cluster as the thing to break: for users who want to know about their own.

Its workloads' agents are deployed beside whatever runs there, and removed with
all they stored afterwards. What can be broken is what can be reached: processes
of nodes on this machine (by signals), others by the commands that are given.
Brokers and links are not touched. A node that is killed must be brought back by
whoever supervises it, or by the command that is given to start it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import socket
from collections.abc import Collection, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

import psutil

from foundation_nats import Cluster
from foundation_nats.api.refs import NodeInfo
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import StreamReader
from foundation_nats.chaos.checkers import ExitSeen
from foundation_nats.chaos.faults import KINDS
from foundation_nats.config import Config
from foundation_nats.errors import ConfigError, FoundationError
from foundation_nats.testing.disks import SlowDisk
from foundation_nats.testing.links import Link
from foundation_nats.testing.probes import eventually
from foundation_nats.testing.server import TestServer

_COMMAND_TIMEOUT_S = 60.0

SAFE_KINDS: tuple[str, ...] = (
    "worker.kill",
    "worker.freeze",
    "node.freeze",
    "leader.freeze",
    "agent.exit",
)
"""Faults that every cluster must survive without anybody's help."""
KILL_KINDS: tuple[str, ...] = (
    "node.kill",
    "manager.kill",
    "node.stop",
    "node.stop_kill",
    "leader.kill",
)
"""Faults after which somebody must start the node again."""
OTHER_KINDS: tuple[str, ...] = (
    "agent.crash",
    "agent.block",
    "agent.hang",
    "agent.leak",
    "agent.raise",
    "client.churn",
    "worker.squeeze",
)
"""Faults that are possible, and only done when they are named."""


def chosen_kinds(kinds: Collection[str] | None, *, start: str | None) -> tuple[str, ...]:
    """The faults to do to a running cluster: those that are named, else those that are safe.

    Raises:
        ConfigError: some of them can't be done to processes and brokers that are not ours. They
            would be counted, and nothing would have happened.
    """
    if kinds is None:
        return SAFE_KINDS + (KILL_KINDS if start is not None else ())
    able = {*SAFE_KINDS, *KILL_KINDS, *OTHER_KINDS}
    unable = [kind for kind in kinds if kind in KINDS and kind not in able]
    if unable:
        raise ConfigError(
            f"{', '.join(sorted(unable))}: not possible with a cluster that runs already, "
            "because its brokers, links, disks and clocks are not ours.",
            hint=f"Possible are: {', '.join(sorted(able))}. Without --attach, all are.",
        )
    return tuple(kinds)


class AttachedNode:
    """One node of the cluster, as far as it can be reached."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.log = Path("/dev/null")
        self.is_local = info.host == socket.gethostname() and psutil.pid_exists(info.pid)

    @property
    def is_running(self) -> bool:
        """Whether its manager lives, as far as we can tell."""
        return not self.is_local or psutil.pid_exists(self.info.pid)

    def family(self) -> list[psutil.Process]:
        """Manager and workers, of a node on this machine."""
        if not self.is_local:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            manager = psutil.Process(self.info.pid)
            return [manager, *manager.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        return self.family()[1:]

    def _signal(self, number: signal.Signals, members: Sequence[psutil.Process]) -> None:
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the manager."""
        self._signal(signal.SIGKILL, self.family()[:1])

    def kill_all(self) -> None:
        """SIGKILL manager and workers."""
        self._signal(signal.SIGKILL, self.family())

    def pause(self) -> None:
        """SIGSTOP manager and workers."""
        self._signal(signal.SIGSTOP, self.family())

    def resume(self) -> None:
        """SIGCONT manager and workers."""
        self._signal(signal.SIGCONT, self.family())

    def terminate(self) -> None:
        """SIGTERM: drain and stop."""
        self._signal(signal.SIGTERM, self.family()[:1])

    async def wait(self, timeout: float = 30.0) -> None:
        """Wait for its end."""
        await eventually(lambda: not self.is_running, timeout=timeout, message="the node ends")


def _not_ours(what: str) -> ConfigError:
    return ConfigError(f"{what} that was not started here can't be broken from here.")


class Attached:
    """An ``async with`` around somebody's cluster; offers the verbs of `Lab` that make sense."""

    def __init__(self, config: Config, *, start: str | None = None) -> None:
        self._config = config
        self._start = start
        self._nodes: dict[str, AttachedNode] = {}
        self.names: list[str] = []
        self.servers: list[TestServer] = []
        self.links: dict[str, list[Link]] = {}
        self.manager_links: dict[str, list[Link]] = {}
        self.worker_links: dict[str, list[Link]] = {}
        self.disks: list[SlowDisk] = []
        self.no_disks = "the brokers are not ours"
        self.client_links: list[Link] = []
        self.clients: list[Cluster] = []
        self.exits: list[ExitSeen] = []
        """None: who ends a node here, and who starts it again, is not ours to know."""
        self.eye: Cluster

    async def __aenter__(self) -> Self:
        # A name of its own: ids of an earlier run's signals must not be taken for repeats.
        self.eye = await Cluster.connect(config=self._config, name=f"chaos-{token_hex(4)}")
        self.clients = [self.eye]
        await self._look()
        if not any(node.is_local for node in self._nodes.values()):
            await self.eye.close()
            if not self._nodes:
                raise ConfigError(
                    f"Cluster {self._config.cluster} has no nodes, so nothing can be broken.",
                    hint="Name the cluster with --cluster, or start nodes.",
                )
            raise ConfigError(
                "None of the cluster's nodes runs on this machine, so nothing can be broken.",
                hint="Run this where a node runs.",
            )
        return self

    async def _look(self) -> None:
        infos = [info for info in await self.eye.nodes.list() if info.status != "down"]
        self._nodes.update({info.name: AttachedNode(info) for info in infos})
        self.names = sorted(self._nodes)

    def node(self, name: str) -> AttachedNode:
        """One node."""
        return self._nodes[name]

    def running(self) -> list[str]:
        """The nodes that can be reached and live."""
        return [n for n in self.names if self._nodes[n].is_local and self._nodes[n].is_running]

    async def leader(self) -> str | None:
        """The node that leads, if it can be reached."""
        lease = await self.eye.leader()
        return lease.holder if lease is not None and lease.holder in self.running() else None

    def worker(self, name: str, index: int) -> psutil.Process | None:
        """One of the node's workers; None if it has none."""
        workers = self._nodes[name].workers()
        return workers[index % len(workers)] if workers else None

    def connect(self, name: str) -> AbstractAsyncContextManager[Cluster]:
        """One more client; to be opened with ``async with``."""
        return Cluster.connect(config=self._config, name=name)

    # ---- what is not ours (`chosen_kinds` refuses it before anything begins) -----

    def set_clock(self, name: str, offset_s: float) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise _not_ours("the clock of a process")

    def split_clock(self, name: str, offset_s: float) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise _not_ours("the clock of a process")

    def cut_off(self, server: TestServer) -> None:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise _not_ours("a broker")

    def join_brokers(self) -> None:
        """Nothing: they were never parted."""

    # ---- nodes ------------------------------------------------------------------

    async def restart_node(self, name: str) -> None:
        """Run the command that starts the node, if there is one; else its supervisor will."""
        if self._start is None or self._nodes[name].is_running:
            return
        command = self._start.replace("{node}", shlex.quote(name))
        process = await asyncio.create_subprocess_shell(command)
        async with asyncio.timeout(_COMMAND_TIMEOUT_S):
            await process.wait()

    async def heal(self) -> None:
        """Let everybody go on, and start what was killed."""
        for name in self.names:
            self._nodes[name].resume()
            await self.restart_node(name)

    async def wait_up(self, timeout: float) -> None:
        """Wait until every node is up.

        Raises:
            AssertionError: not in time.
        """
        deadline = monotonic() + timeout
        while True:
            with contextlib.suppress(FoundationError):
                infos = {info.name: info for info in await self.eye.nodes.list()}
                late = [n for n in self.names if n not in infos or infos[n].status != "up"]
                if not late:
                    await self._look()
                    return
            if monotonic() >= deadline:
                raise AssertionError(f"not up again: {', '.join(late)}")
            await asyncio.sleep(0.1)

    async def remove(self, deployments: Sequence[str]) -> None:
        """Delete these deployments, their agents' states and their mailboxes."""
        wishes = await self.eye.deployments.wishes()
        agents = [
            f"{name}-{number}"
            for name in deployments
            if name in wishes
            for number in range(wishes[name].replicas or 0)
        ]
        for name in deployments:
            if name in wishes:
                await self.eye.deployments.delete(name)

        async def gone() -> bool:
            known = {info.id for info in await self.eye.agents.list()}
            return not known & set(agents)

        await eventually(gone, timeout=30, message="the workloads' agents are gone")
        state = Bucket(self.eye.bus, self.eye.subjects, "state")
        signals = StreamReader(self.eye.bus, self.eye.subjects.signals_stream)
        last = int((await signals.info())["state"]["last_seq"])
        for agent in agents:
            await state.delete(agent)
            await signals.purge(self.eye.subjects.mailbox(agent), below=last + 1)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(FoundationError, AssertionError):
            await self.heal()
        await self.eye.close()
