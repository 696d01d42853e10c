"""Carries out a plan of faults on a lab, and writes down what it did to whom and when.

One coroutine per fault: begin, wait, end. A fault whose victim can't be found (no
other node is alive) is noted as skipped, so that a report doesn't count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

from foundation_nats.bus.streams import api
from foundation_nats.chaos.attached import Attached
from foundation_nats.chaos.faults import Fault
from foundation_nats.chaos.history import now_ns
from foundation_nats.chaos.lab import Lab
from foundation_nats.errors import FoundationError
from foundation_nats.testing.disks import SlowDisk
from foundation_nats.testing.links import Link
from foundation_nats.testing.mangling import Mangling
from foundation_nats.testing.server import TestServer

_PASSERS_BY = 4
_LEAVE_TIMEOUT_S = 15.0
_STREAMS = ("signals", "state", "agents", "leases", "routes")


class SkippedError(Exception):
    """There is nobody to do this to now."""


@dataclass(slots=True)
class Done:
    """One fault as it really happened."""

    fault: Fault
    victim: str = ""
    begin_ns: int = 0
    end_ns: int = 0
    skipped: str = ""
    touches: list[str | None] = field(default_factory=list)
    """Nodes that can't be called healthy because of it; None: all of them."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.fault.kind,
            "victim": self.victim,
            "begin_s": round(self.begin_ns / 1e9, 4),
            "end_s": round(self.end_ns / 1e9, 4),
            **({"skipped": self.skipped} if self.skipped else {}),
        }


class Nemesis:
    """Makes the trouble of one round."""

    def __init__(
        self, lab: Lab | Attached, plan: Sequence[Fault], saboteurs: Sequence[str] = ()
    ) -> None:
        self._lab = lab
        self._plan = plan
        self._saboteurs = saboteurs
        self.done: list[Done] = []
        self._verbs: dict[str, Callable[[Done], Any]] = {
            "worker.kill": self._worker_kill,
            "worker.freeze": self._worker_freeze,
            "node.kill": self._node_kill,
            "manager.kill": self._manager_kill,
            "node.freeze": self._node_freeze,
            "node.stop": self._node_stop,
            "node.stop_kill": self._node_stop_kill,
            "leader.kill": self._node_kill,
            "leader.freeze": self._node_freeze,
            "broker.kill": self._broker_kill,
            "broker.freeze": self._broker_freeze,
            "broker.stop": self._broker_stop,
            "broker.leader_kill": self._broker_kill,
            "broker.step_down": self._step_down,
            "broker.roll": self._broker_roll,
            "broker.cut": self._broker_cut,
            "link.cut": self._link_cut,
            "link.hold": self._link_hold,
            "link.hold_up": self._link_hold,
            "link.hold_down": self._link_hold,
            "link.delay": self._link_delay,
            "link.flap": self._link_flap,
            "link.storm": self._link_storm,
            "link.mangle": self._link_mangle,
            "client.hold_down": self._client_hold,
            "client.cut": self._client_cut,
            "clock.jump": self._clock_jump,
            "agent.exit": self._sabotage,
            "agent.crash": self._sabotage,
            "agent.block": self._sabotage,
            "agent.leak": self._sabotage,
            "agent.hang": self._sabotage,
            "agent.raise": self._sabotage,
            "worker.cut": self._link_cut,
            "worker.hold": self._link_hold,
            "worker.hold_up": self._link_hold,
            "worker.hold_down": self._link_hold,
            "worker.squeeze": self._worker_squeeze,
            "manager.cut": self._link_cut,
            "manager.hold": self._link_hold,
            "link.choke": self._link_choke,
            "client.slow_read": self._client_slow_read,
            "client.churn": self._client_churn,
            "clock.split": self._clock_split,
            "disk.slow": self._disk_slow,
            "disk.full": self._disk_full,
        }

    def verbs(self) -> Set[str]:
        """The kinds of faults that it can carry out."""
        return self._verbs.keys()

    async def run(self) -> None:
        """Carry out the plan; returns when the last fault has ended."""
        begun = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for fault in self._plan:
                left = begun + fault.at_s - asyncio.get_running_loop().time()
                if left > 0:
                    await asyncio.sleep(left)
                group.create_task(self._carry_out(fault), name=fault.kind)

    async def _carry_out(self, fault: Fault) -> None:
        done = Done(fault, begin_ns=now_ns())
        self.done.append(done)
        try:
            async with self._verbs[fault.kind](done):
                await asyncio.sleep(fault.duration_s)
        except (SkippedError, FoundationError) as error:
            done.skipped = str(error)
        finally:
            done.end_ns = now_ns()

    # ---- choosing ---------------------------------------------------------------

    async def _a_node(self, done: Done) -> str:
        if done.fault.kind.startswith("leader."):
            leader = await self._lab.leader()
            if leader is None or not self._lab.node(leader).is_running:
                raise SkippedError("nobody leads")
            chosen = leader
        else:
            running = self._lab.running()
            if not running:
                raise SkippedError("no node is alive")
            chosen = running[done.fault.victim % len(running)]
        done.victim = chosen
        done.touches.append(chosen)
        return chosen

    async def _a_worker(self, done: Done) -> psutil.Process:
        node = await self._a_node(done)
        done.touches.clear()  # its manager lives, so the node does
        worker = self._lab.worker(node, done.fault.victim // 7)
        if worker is None:
            raise SkippedError("it has no worker now")
        return worker

    async def _some_links(self, done: Done) -> Sequence[Link]:
        """The links of a node, or of its manager or workers alone, as the kind says."""
        node = await self._a_node(done)
        match done.fault.kind.partition(".")[0]:
            case "manager":
                return self._lab.manager_links[node]
            case "worker":
                done.touches.clear()
                return self._lab.worker_links[node]
        return self._lab.links[node]

    def _a_disk(self, done: Done) -> tuple[TestServer, SlowDisk]:
        disks = self._lab.disks
        if not disks:
            raise SkippedError(self._lab.no_disks)
        index = done.fault.victim % len(disks)
        done.victim = f"disk of broker {index + 1}"
        return self._lab.servers[index], disks[index]

    async def _a_broker(self, done: Done) -> TestServer:
        servers = self._lab.servers
        alive = [server for server in servers if server.is_running]
        if len(servers) > 1 and len(alive) < len(servers):
            raise SkippedError("another broker is down")
        if not alive:
            raise SkippedError("the broker is down")
        chosen = alive[done.fault.victim % len(alive)]
        if done.fault.kind == "broker.leader_kill":
            stream = self._a_stream(done)
            info = await api(self._lab.eye.bus, "STREAM.INFO", stream)
            leader = info.get("cluster", {}).get("leader")
            chosen = next((server for server in alive if server.name == leader), chosen)
            done.victim = f"leader of {stream}"
        else:
            done.victim = f"broker {servers.index(chosen) + 1}"
        return chosen

    def _a_stream(self, done: Done) -> str:
        names = self._lab.eye.subjects
        kind = _STREAMS[int(done.fault.strength * len(_STREAMS)) % len(_STREAMS)]
        if kind == "signals":
            return names.signals_stream
        if kind == "routes":
            return names.routes_stream
        return names.bucket_stream(kind)

    # ---- processes --------------------------------------------------------------

    @asynccontextmanager
    async def _worker_kill(self, done: Done) -> AsyncIterator[None]:
        worker = await self._a_worker(done)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGKILL)
        yield

    @asynccontextmanager
    async def _worker_freeze(self, done: Done) -> AsyncIterator[None]:
        worker = await self._a_worker(done)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(Exception):
                worker.send_signal(signal.SIGCONT)

    @asynccontextmanager
    async def _worker_squeeze(self, done: Done) -> AsyncIterator[None]:
        worker = await self._a_worker(done)
        limit = getattr(psutil, "RLIMIT_AS", None)
        if limit is None:
            raise SkippedError("this platform can't limit the memory of a process that runs")
        try:
            before = worker.rlimit(limit)
            # What it has, and at most 2 MB more: soon its allocations fail.
            soft = worker.memory_info().vms + int(done.fault.strength * 2**21)
            worker.rlimit(limit, (soft, before[1]))
        except psutil.Error as error:
            raise SkippedError(f"it could not be limited: {error}") from error
        try:
            yield
        finally:
            with contextlib.suppress(psutil.Error):
                worker.rlimit(limit, before)

    @asynccontextmanager
    async def _node_kill(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        self._lab.node(node).kill_all()
        yield
        await self._lab.restart_node(node)

    @asynccontextmanager
    async def _manager_kill(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        self._lab.node(node).kill()
        yield
        await self._lab.restart_node(node)

    @asynccontextmanager
    async def _node_freeze(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        process = self._lab.node(node)
        process.pause()
        try:
            yield
        finally:
            process.resume()

    @asynccontextmanager
    async def _node_stop(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        process = self._lab.node(node)
        process.terminate()
        yield
        with contextlib.suppress(AssertionError):
            await process.wait(timeout=15)
        await self._lab.restart_node(node)

    @asynccontextmanager
    async def _node_stop_kill(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        process = self._lab.node(node)
        process.terminate()
        await asyncio.sleep(done.fault.strength)
        if process.is_running:
            process.kill_all()
        yield
        await self._lab.restart_node(node)

    # ---- brokers ----------------------------------------------------------------

    @asynccontextmanager
    async def _broker_kill(self, done: Done) -> AsyncIterator[None]:
        server = await self._a_broker(done)
        server.kill()
        yield
        await server.restart()

    @asynccontextmanager
    async def _broker_stop(self, done: Done) -> AsyncIterator[None]:
        server = await self._a_broker(done)
        await server.end()
        yield
        await server.restart()

    @asynccontextmanager
    async def _broker_freeze(self, done: Done) -> AsyncIterator[None]:
        server = await self._a_broker(done)
        server.freeze()
        try:
            yield
        finally:
            server.thaw()

    @asynccontextmanager
    async def _broker_roll(self, done: Done) -> AsyncIterator[None]:
        await self._a_broker(done)
        done.victim = "every broker"
        for server in self._lab.servers:
            await server.end()
            await server.restart()
            await asyncio.sleep(done.fault.duration_s)
        yield

    @asynccontextmanager
    async def _broker_cut(self, done: Done) -> AsyncIterator[None]:
        server = await self._a_broker(done)
        # Whoever is connected to it is parted from the others as it is.
        done.touches.append(None)
        self._lab.cut_off(server)
        try:
            yield
        finally:
            self._lab.join_brokers()

    @asynccontextmanager
    async def _step_down(self, done: Done) -> AsyncIterator[None]:
        stream = self._a_stream(done)
        done.victim = f"leader of {stream}"
        await api(self._lab.eye.bus, "STREAM.LEADER.STEPDOWN", stream)
        yield

    # ---- links ------------------------------------------------------------------

    @asynccontextmanager
    async def _link_cut(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)
        for link in links:
            link.cut()
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_hold(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)
        for link in links:
            match done.fault.kind.partition(".")[2]:
                case "hold_up":
                    link.hold("up")
                case "hold_down":
                    link.hold("down")
                case _:
                    link.hold()
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_delay(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)
        done.touches.clear()  # slow is not dead
        for link in links:
            link.delay(0.05 + 0.25 * done.fault.strength)
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_choke(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)
        for link in links:
            link.choke(_rate(4, 64, done))
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_flap(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)

        async def flap() -> None:
            while True:
                for link in links:
                    link.cut()
                await asyncio.sleep(0.2)
                for link in links:
                    link.heal()
                await asyncio.sleep(0.2)

        task = asyncio.create_task(flap())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_storm(self, done: Done) -> AsyncIterator[None]:
        done.victim = "every node"
        done.touches.append(None)
        every = [link for links in self._lab.links.values() for link in links]
        for link in every:
            link.cut()
        try:
            yield
        finally:
            for link in every:
                link.heal()

    @asynccontextmanager
    async def _link_mangle(self, done: Done) -> AsyncIterator[None]:
        links = await self._some_links(done)
        done.touches.clear()
        for link in links:
            link.mangle(Mangling(drop=0.05, double=0.1, swap=0.1))
        try:
            yield
        finally:
            for link in links:
                link.mangle(None)

    @asynccontextmanager
    async def _client_hold(self, done: Done) -> AsyncIterator[None]:
        done.victim = "clients"
        for link in self._lab.client_links:
            link.hold("down")
        try:
            yield
        finally:
            for link in self._lab.client_links:
                link.heal()

    @asynccontextmanager
    async def _client_cut(self, done: Done) -> AsyncIterator[None]:
        done.victim = "clients"
        for link in self._lab.client_links:
            link.cut()
        try:
            yield
        finally:
            for link in self._lab.client_links:
                link.heal()

    @asynccontextmanager
    async def _client_slow_read(self, done: Done) -> AsyncIterator[None]:
        done.victim = "clients"
        for link in self._lab.client_links:
            link.choke(_rate(2, 32, done), "down")
        try:
            yield
        finally:
            for link in self._lab.client_links:
                link.heal()

    @asynccontextmanager
    async def _client_churn(self, done: Done) -> AsyncIterator[None]:
        opened = 0
        leaving = asyncio.Event()

        async def come_and_go(number: int) -> None:
            nonlocal opened
            life = 0
            while not leaving.is_set():
                life += 1
                with contextlib.suppress(FoundationError):
                    async with self._lab.connect(f"passer-by-{number}-{life}") as client:
                        await client.leader()
                        opened += 1

        tasks = [asyncio.create_task(come_and_go(number)) for number in range(_PASSERS_BY)]
        try:
            yield
        finally:
            # They leave in good order; a cancellation might end between two lives unheard.
            leaving.set()
            _, late = await asyncio.wait(tasks, timeout=_LEAVE_TIMEOUT_S)
            for task in late:
                task.cancel()
            done.victim = f"{opened} connections"
        for task in tasks:
            if task.done():
                task.result()  # a bug of a client is not weather
        if not opened:
            raise SkippedError("nobody got in")

    # ---- disks ------------------------------------------------------------------

    @asynccontextmanager
    async def _disk_slow(self, done: Done) -> AsyncIterator[None]:
        _, disk = self._a_disk(done)
        disk.slow(3 + int(done.fault.strength * 40))
        try:
            yield
        finally:
            disk.slow(0)

    @asynccontextmanager
    async def _disk_full(self, done: Done) -> AsyncIterator[None]:
        server, disk = self._a_disk(done)
        if not server.is_running:
            raise SkippedError("the broker is down")
        await asyncio.to_thread(disk.fill)
        try:
            yield
        finally:
            disk.free()
        # A server that could not write stops taking anything until it is started anew.
        await server.end()
        await server.restart()

    # ---- clocks and agents ------------------------------------------------------

    @asynccontextmanager
    async def _clock_jump(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        done.touches.clear()  # a wrong clock is no excuse
        self._lab.set_clock(node, (done.fault.strength - 0.5) * 7200)
        try:
            yield
        finally:
            self._lab.set_clock(node, 0.0)

    @asynccontextmanager
    async def _clock_split(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        done.touches.clear()
        self._lab.split_clock(node, (done.fault.strength - 0.5) * 7200 or 1.0)
        try:
            yield
        finally:
            self._lab.set_clock(node, 0.0)

    @asynccontextmanager
    async def _sabotage(self, done: Done) -> AsyncIterator[None]:
        if not self._saboteurs:
            raise SkippedError("nobody to do it")
        agent = self._saboteurs[done.fault.victim % len(self._saboteurs)]
        done.victim = agent
        verb = done.fault.kind.partition(".")[2]
        seconds = done.fault.duration_s
        data = {"block": seconds, "hang": seconds, "leak": 32}.get(verb)
        await self._lab.eye.send(agent, f"sabotage.{verb}", data)
        yield


def _rate(slowest: float, fastest: float, done: Done) -> float:
    """Bytes a second between so many KB, by the fault's strength."""
    return 1024 * (slowest + (fastest - slowest) * done.fault.strength)


__all__ = ["Done", "Nemesis"]
