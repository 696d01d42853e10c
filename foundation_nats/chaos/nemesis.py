"""Carries out a plan of faults on a lab, and writes down what it did to whom and when.

One coroutine per fault: begin, wait, end. A fault whose victim can't be found (no
other node is alive) is noted as skipped, so that a report doesn't count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from foundation_nats.bus.streams import api
from foundation_nats.chaos.attached import Attached
from foundation_nats.chaos.faults import Fault
from foundation_nats.chaos.history import now_ns
from foundation_nats.chaos.lab import Lab
from foundation_nats.errors import FoundationError
from foundation_nats.testing.mangling import Mangling
from foundation_nats.testing.server import TestServer

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
        }

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
        node = await self._a_node(done)
        done.touches.clear()  # its manager lives, so the node does
        if self._lab.signal_worker(node, done.fault.victim // 7, signal.SIGKILL) is None:
            raise SkippedError("it has no worker now")
        yield

    @asynccontextmanager
    async def _worker_freeze(self, done: Done) -> AsyncIterator[None]:
        node = await self._a_node(done)
        worker = self._lab.signal_worker(node, done.fault.victim // 7, signal.SIGSTOP)
        if worker is None:
            raise SkippedError("it has no worker now")
        try:
            yield
        finally:
            with contextlib.suppress(Exception):
                worker.send_signal(signal.SIGCONT)

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
        links = self._lab.links[await self._a_node(done)]
        for link in links:
            link.cut()
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_hold(self, done: Done) -> AsyncIterator[None]:
        links = self._lab.links[await self._a_node(done)]
        for link in links:
            match done.fault.kind:
                case "link.hold_up":
                    link.hold("up")
                case "link.hold_down":
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
        links = self._lab.links[await self._a_node(done)]
        done.touches.clear()  # slow is not dead
        for link in links:
            link.delay(0.05 + 0.25 * done.fault.strength)
        try:
            yield
        finally:
            for link in links:
                link.heal()

    @asynccontextmanager
    async def _link_flap(self, done: Done) -> AsyncIterator[None]:
        links = self._lab.links[await self._a_node(done)]

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
        links = self._lab.links[await self._a_node(done)]
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
    async def _sabotage(self, done: Done) -> AsyncIterator[None]:
        if not self._saboteurs:
            raise SkippedError("nobody to do it")
        agent = self._saboteurs[done.fault.victim % len(self._saboteurs)]
        done.victim = agent
        verb = done.fault.kind.partition(".")[2]
        data: Awaitable[Any] | float | None = {"block": done.fault.duration_s, "leak": 32}.get(verb)
        await self._lab.eye.send(agent, f"sabotage.{verb}", data)
        yield


__all__ = ["Done", "Nemesis"]
