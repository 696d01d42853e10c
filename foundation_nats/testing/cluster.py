"""`TestCluster`: a real server and real nodes in processes of their own, for a test.

The same processes as in production, started the same way; a test kills,
freezes and cuts them by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from foundation_nats.api.cluster import Cluster
from foundation_nats.base.process import die_with_parent
from foundation_nats.config import Config
from foundation_nats.testing.probes import eventually
from foundation_nats.testing.server import TestServer

_LOG_TAIL = 4000


class NodeProcess:
    """One node of a test cluster: a manager process and its workers."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], log: Path, *, log_begin: int = 0
    ) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.was_told = False
        """Whether its end was ordered here: by a kill, or by a request to stop."""
        self._log_begin = log_begin

    @property
    def pid(self) -> int:
        """The manager's process id."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the manager lives."""
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The manager and its workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            manager = psutil.Process(self.pid)
            return [manager, *manager.children(recursive=True)]
        return []

    def workers(self) -> list[psutil.Process]:
        """The worker processes."""
        return self.family()[1:]

    def kill(self) -> None:
        """SIGKILL the manager; its workers die with it."""
        self.was_told |= self.is_running
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """SIGKILL the manager and every worker at once."""
        self.was_told |= self.is_running
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP the manager and every worker."""
        for member in self.family():
            member.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT the manager and every worker."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: drain and stop."""
        self.was_told |= self.is_running
        self.process.terminate()

    async def wait(self, timeout: float = 30.0) -> int:
        """The exit code, once it has ended.

        Raises:
            AssertionError: it still runs after *timeout* seconds.
        """
        await eventually(lambda: not self.is_running, timeout=timeout, message=f"{self.name} ends")
        return self.process.wait()

    def said(self) -> str:
        """What this process and its workers logged; those of its name before it left out."""
        with self.log.open("rb") as file:
            file.seek(self._log_begin)
            return file.read().decode(errors="replace")

    def log_tail(self) -> str:
        """The end of what it logged."""
        return self.log.read_text(errors="replace")[-_LOG_TAIL:]


class TestCluster:
    """An ``async with`` that gives a running cluster, and leaves nothing behind.

    It starts a server of its own unless it is given one, or *urls* of a NATS cluster.

    Example:
        >>> async with TestCluster(nodes=2, path=["directory/of/my_agents"]) as cluster:
        ...     await cluster.client.agents.start("my_agents:Counter", id="visits")
    """

    __test__ = False

    def __init__(
        self,
        *,
        nodes: int = 2,
        workers: int = 1,
        path: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
        server: TestServer | None = None,
        urls: Sequence[str] = (),
        cluster: str = "test",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._count = nodes
        self._workers = workers
        self._path = list(path)
        self._settings = dict(settings or {})
        self._own_server = server is None and not urls
        self.server = server or TestServer()
        self._urls = tuple(urls)
        self._name = cluster
        self._environment = dict(environment or {})
        self._directory = tempfile.TemporaryDirectory(prefix="foundation-test-")
        self.nodes: dict[str, NodeProcess] = {}
        self.client: Cluster

    async def __aenter__(self) -> Self:
        try:
            if self._own_server:
                await self.server.start()
            if self._own_server:
                mailbox = dict(self._settings.get("mailbox", {}))  # type: ignore[call-overload]
                mailbox.setdefault("signals_max_bytes", self.server.signals_max_bytes)
                self._settings["mailbox"] = mailbox
            self.config = Config.load(
                cluster=self._name,
                bus={"servers": self._urls or (self.server.url,)},
                **self._settings,
            )
            for number in range(1, self._count + 1):
                self.start_node(f"n{number}")
            self.client = await Cluster.connect(config=self.config, name="test")
            if self.nodes:
                await self.wait_up(list(self.nodes))
        except BaseException:
            await self._close()
            raise
        return self

    def start_node(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> NodeProcess:
        """Start a node process; returns at once (`wait_up` waits).

        Args:
            prefix: a command that runs another by becoming it, such as ``nsenter --net=…``.
        """
        log = Path(self._directory.name) / f"{name}.log"
        path = [*self._path, os.environ.get("PYTHONPATH", "")]
        variables = {
            **os.environ,
            **self.config.to_environment(),
            **self._environment,
            **(environment or {}),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        command = [*prefix, sys.executable, "-m", "foundation_cli.main", "node", "start"]
        command += ["--name", name, "--workers", str(self._workers), *arguments]
        with log.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
        node = NodeProcess(name, process, log, log_begin=begin)
        self.nodes[name] = node
        return node

    async def wait_up(self, names: Sequence[str], timeout: float = 15.0) -> None:
        """Wait until these nodes are up and somebody leads.

        Raises:
            AssertionError: not in time; shows the log of a node that has ended.
        """

        async def all_up() -> bool:
            for name in names:
                node = self.nodes.get(name)
                if node is not None and not node.is_running:
                    raise RuntimeError(f"node {name} has ended:\n{node.log_tail()}")
            up = {node.name for node in await self.client.nodes.list() if node.status == "up"}
            return set(names) <= up and await self.client.leader() is not None

        await eventually(all_up, timeout=timeout, message=f"nodes {', '.join(names)} are up")

    async def leader(self, timeout: float = 10.0) -> NodeProcess:
        """The node that leads."""

        async def found() -> NodeProcess | None:
            lease = await self.client.leader()
            return None if lease is None else self.nodes.get(lease.holder)

        node = await eventually(found, timeout=timeout, message="a leader")
        assert node is not None
        return node

    async def _close(self) -> None:
        if hasattr(self, "client"):
            await self.client.close()
        for node in self.nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                node.resume()
            if node.is_running:
                node.kill_all()
        if self._own_server:
            await self.server.stop()
        self._directory.cleanup()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for node in self.nodes.values():
                error.add_note(f"--- {node.name} ---\n{node.log_tail()}")
        await self._close()
        # Children are reaped; give their pipes a turn to close.
        await asyncio.sleep(0)


__all__ = ["NodeProcess", "TestCluster"]
