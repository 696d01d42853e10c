"""The worker processes of one node: spawn, watch, restart with bounded intensity, end with the manager.

A worker process is spawned before it is told who it is, so that its imports
overlap with the manager's own start. It dies with its manager by the end of
its standard input and, on Linux, by PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from foundation_nats.base import frames
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import WorkerConfig
from foundation_nats.errors import BusError, BusTimeoutError, FoundationError
from foundation_nats.node import blackbox
from foundation_nats.node.blackbox import Suspect
from foundation_nats.node.preparing import discard, prepare
from foundation_nats.node.spawning import Child, spawn
from foundation_nats.node.supervision import (
    Escalate,
    Exited,
    GiveUp,
    Removed,
    Restart,
    Started,
    Supervisor,
)
from foundation_nats.node.worker import WorkerOrders
from foundation_schemas import Pong

RELOADED = "reloaded"
"""Why a worker, and every agent in it, ends to go on with new code."""
_PING_EVERY_S = 1.0
_QUIET_S = 2.5
"""Longer than an idle worker takes from one report to the next."""
_READY_TIMEOUT_S = 30.0
_STACK_S = 0.5
"""How long a worker that hangs has to say what it is doing."""


@dataclass(slots=True)
class WorkerProcess:
    """One slot of the node, and the process that fills it now."""

    id: str
    process: subprocess.Popen[bytes]
    box: IO[bytes]
    """What the process was doing when it ended."""
    ready: bool = False
    started_at: float = 0.0
    answered_at: float = 0.0
    cause: str = ""
    """Why it was killed from here."""
    stack: str = ""
    """What it was doing when it was killed because it hung."""
    successor: Child | None = None
    """It ends in order to be replaced by this one."""

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid


class Workers:
    """The worker processes of one node.

    *on_ready* and *on_died* are called with a worker's id, the latter also with the
    cause, the handler that was running, and the stack of one that hung; *may_judge* says whether silence has proved
    something for so many seconds; *on_exhausted* when
    workers die more often than `restarts_max` in `restart_window_s`, those apart that died
    in an agent's handler.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        count: int,
        module: str,
        on_ready: Callable[[str], None],
        on_died: Callable[[str, str, Suspect | None, str], None],
        on_exhausted: Callable[[str], None],
        may_judge: Callable[[float], bool] = lambda _: True,
        spare: Sequence[Child] = (),
    ) -> None:
        self._config = config
        self._module = module
        self._on_ready = on_ready
        self._on_died = on_died
        self._on_exhausted = on_exhausted
        self._may_judge = may_judge
        self._spare = list(spare)
        self._spare += [spawn(module) for _ in range(count - len(self._spare))]
        self._workers: dict[str, WorkerProcess] = {}
        self._supervisor = Supervisor(
            max_restarts=config.restarts_max, window_s=config.restart_window_s
        )
        self._closing = False
        self._log = get_logger("workers")

    def open(
        self, bus: Bus, subjects: Subjects, scope: TaskScope, orders: Sequence[WorkerOrders]
    ) -> None:
        """Tell the spawned processes who they are, and watch over them."""
        self._bus = bus
        self._subjects = subjects
        self._scope = scope
        self._orders = {item.worker: item for item in orders}
        for item in orders:
            self._begin(item.worker, self._spare.pop())

    def _begin(self, worker: str, child: Child) -> None:
        process = child.process
        entry = WorkerProcess(worker, process, child.box, started_at=monotonic())
        self._workers[worker] = entry
        self._supervisor.step(Started(worker), entry.started_at)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._orders[worker].model_dump_json().encode() + b"\n")
            process.stdin.flush()
        self._scope.start(self._watch(entry), f"watch-{worker}")

    @property
    def ids(self) -> list[str]:
        """The workers' ids."""
        return list(self._orders)

    def ready(self) -> list[str]:
        """The workers that answer."""
        return [entry.id for entry in self._workers.values() if entry.ready]

    def pids(self) -> dict[str, int]:
        """Worker id to process id."""
        return {entry.id: entry.pid for entry in self._workers.values()}

    async def _watch(self, entry: WorkerProcess) -> None:
        """From spawn to death: wait until it answers, then ping it, then restart it."""
        exited = asyncio.create_task(_wait_exit(entry.process))
        try:
            await self._wait_ready(entry, exited)
            while not exited.done():
                if self._config.hang_after_s is None:
                    await asyncio.wait([exited])
                    break
                left = entry.answered_at + self._quiet_s - monotonic()
                await asyncio.wait([exited], timeout=max(_PING_EVERY_S / 2, left))
                if not exited.done() and monotonic() - entry.answered_at >= self._quiet_s:
                    await self._check_hang(entry, self._config.hang_after_s)
            await self._restart(entry, exited.result())
        finally:
            exited.cancel()

    @property
    def _quiet_s(self) -> float:
        """For how long a worker may say nothing by itself before it is asked whether it hangs."""
        return max(_PING_EVERY_S, min(_QUIET_S, (self._config.hang_after_s or _QUIET_S) / 4))

    def heard(self, worker: str) -> None:
        """It has reported: it needn't be asked whether it hangs."""
        if (entry := self._workers.get(worker)) is not None:
            entry.answered_at = monotonic()

    async def _wait_ready(self, entry: WorkerProcess, exited: asyncio.Task[int]) -> None:
        while not exited.done():
            if await self._ping(entry, timeout=0.5):
                entry.ready = True
                self._on_ready(entry.id)
                return
            await asyncio.sleep(0.01)
            if monotonic() - entry.started_at > _READY_TIMEOUT_S:
                self._log.error("worker did not get ready; killed", worker=entry.id)
                entry.process.kill()
                await exited

    async def _ping(self, entry: WorkerProcess, *, timeout: float) -> bool:
        subject = self._subjects.control_worker(entry.id, "ping")
        try:
            await rpc.call(self._bus, subject, None, Pong, timeout=timeout)
        except FoundationError:
            return False
        entry.answered_at = monotonic()
        return True

    async def _check_hang(self, entry: WorkerProcess, limit: float) -> None:
        subject = self._subjects.control_worker(entry.id, "ping")
        # What it was quiet before counts, as if it had been asked every second.
        now = monotonic()
        since = max(now - self._quiet_s, min(now, entry.answered_at + _PING_EVERY_S))
        while not self._closing:
            timeout = max(limit / 2, limit - (monotonic() - since))
            try:
                await rpc.call(self._bus, subject, None, Pong, timeout=timeout)
                entry.answered_at = monotonic()
                return
            except BusTimeoutError:
                # A connection that dropped or swallows everything is not a hanging worker.
                if (
                    self._bus.is_connected
                    and self._may_judge(limit)
                    and monotonic() - since >= limit * 0.9
                ):
                    # It may have been cut off itself, and be back: its agents are worth a question.
                    if await self._ping(entry, timeout=min(2.0, limit / 2)):
                        return
                    await self._kill_hung(entry, monotonic() - since)
                    return
                await asyncio.sleep(0.2)
            except BusError:
                return

    async def _kill_hung(self, entry: WorkerProcess, seconds: float) -> None:
        """Let it write down what it is doing, and end it."""
        with contextlib.suppress(OSError):
            blackbox.ask_stack(entry.pid)
            deadline = monotonic() + _STACK_S
            while monotonic() < deadline and entry.process.poll() is None:
                await asyncio.sleep(0.02)
                found = blackbox.read_stack(entry.box)
                if found and found == entry.stack:
                    break  # it has been written to its end
                entry.stack = found
        stack = frames.of_fault(entry.stack)
        frame = frames.user_frame(stack)
        place = "" if frame is None else f" at {frame.place}"
        entry.stack = frames.stack_text(stack) if stack else ""
        entry.cause = f"killed, because it had not answered for {seconds:.2g} s{place}"
        self._log.error(
            "worker hangs; killed", worker=entry.id, seconds=round(seconds, 1), stack=entry.stack
        )
        entry.process.kill()

    async def _restart(self, entry: WorkerProcess, code: int) -> None:
        if self._closing:
            return
        if entry.successor is not None:
            entry.box.close()
            entry.ready = False
            self._on_died(entry.id, RELOADED, None, "")
            self._supervisor.step(Removed(entry.id), monotonic())
            self._begin(entry.id, entry.successor)
            return
        cause = entry.cause or (f"signal {-code}" if code < 0 else f"exit code {code}")
        suspect = blackbox.read(entry.box)
        if suspect is None and entry.cause:
            suspect = blackbox.read_in_threads(entry.box)
        entry.box.close()
        self._log.warning(
            "worker died",
            worker=entry.id,
            cause=cause,
            agent=None if suspect is None else suspect.agent,
        )
        entry.ready = False
        self._on_died(entry.id, cause, suspect, entry.stack)
        # Whose handler ended it has a back-off of its own, and its signal a limit of attempts.
        # Were the node to end instead, they would end the next one, too.
        ended = Exited(entry.id, cause, is_blamed=suspect is not None)
        for effect in self._supervisor.step(ended, monotonic()):
            match effect:
                case Restart(worker, delay_s):
                    await asyncio.sleep(delay_s)
                    if not self._closing:
                        self._begin(worker, entry.successor or spawn(self._module))
                case Escalate(_, reason) | GiveUp(_, reason):
                    self._on_exhausted(f"worker {entry.id} is not restarted: {reason}")

    async def prepare(self, imports: Sequence[str]) -> list[Child]:
        """New processes for all workers, which have imported *imports*.

        Raises:
            ConfigError: one can't be imported; none is left.
        """
        tries = [prepare(self._module, imports, timeout=_READY_TIMEOUT_S) for _ in self._orders]
        found = await asyncio.gather(*tries, return_exceptions=True)
        children = [item for item in found if isinstance(item, Child)]
        for item in found:
            if isinstance(item, BaseException):
                for child in children:
                    discard(child)
                raise item
        return children

    async def replace(self, worker: str, child: Child, *, timeout: float) -> None:
        """End a worker's process, and go on with *child*; returns when that answers, or is late."""
        entry = self._workers[worker]
        entry.ready = False
        entry.successor = child
        entry.process.kill()
        deadline = monotonic() + timeout
        while monotonic() < deadline:
            now = self._workers[worker]
            if now is not entry and now.ready:
                return
            await asyncio.sleep(0.005)

    def replace_all(self, orders: Sequence[WorkerOrders]) -> None:
        """End every worker and start each anew under new orders: the node has a new incarnation."""
        self._orders = {item.worker: item for item in orders}
        for entry in list(self._workers.values()):
            entry.ready = False
            entry.process.kill()

    async def close(self) -> None:
        """End every worker process and reap it."""
        self._closing = True
        processes = [entry.process for entry in self._workers.values()]
        spare = [*self._spare]
        spare += [entry.successor for entry in self._workers.values() if entry.successor]
        processes += [child.process for child in spare]
        for box in [entry.box for entry in self._workers.values()] + [c.box for c in spare]:
            box.close()
        for process in processes:
            if process.poll() is None:
                process.kill()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for process in processes:
            await _wait_exit(process)


async def _wait_exit(process: subprocess.Popen[bytes]) -> int:
    """The exit code, once there is one; a pidfd wakes us where the platform has it."""
    loop = asyncio.get_running_loop()
    if not hasattr(os, "pidfd_open"):  # pragma: no cover - platforms other than Linux
        while process.poll() is None:
            await asyncio.sleep(0.02)
        return process.returncode
    if process.poll() is None:
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return process.wait()
        done: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, lambda: None if done.done() else done.set_result(None))
        try:
            await done
        finally:
            loop.remove_reader(fd)
            os.close(fd)
    return process.wait()
