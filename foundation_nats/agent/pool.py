"""`RunnerPool`: a few long-lived tasks that run many agents, one more whenever all are waiting.

A task per signal would cost as much as handling it. A runner takes ready
activations one after the other; while a handler waits for something, its
runner waits with it, and another takes over. Agents are isolated from each
other's waiting, and never run twice at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope

_SLICE_S = 0.005


class Runnable(Protocol):
    """What a pool runs."""

    scheduled: bool


T = TypeVar("T", bound=Runnable)


class RunnerPool(Generic[T]):
    """Runs activations that have something to do.

    Args:
        run: does what is ready to be done, in the task that it is given; must not raise.
    """

    def __init__(
        self,
        scope: TaskScope,
        run: Callable[[T, asyncio.Task[Any]], Coroutine[Any, Any, None]],
        *,
        idle_max: int = 16,
    ) -> None:
        self._scope = scope
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._ready: deque[T] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._idle_max = idle_max
        self._kick_planned = False
        self.runners = 0

    def submit(self, activation: T) -> None:
        """Run *activation* soon; once, however often it is submitted before it runs."""
        if activation.scheduled:
            return
        activation.scheduled = True
        self._ready.append(activation)
        self._plan_kick()

    @property
    def waiting(self) -> int:
        """Activations that are ready and not yet run."""
        return len(self._ready)

    def _plan_kick(self) -> None:
        if not self._kick_planned:
            self._kick_planned = True
            self._loop.call_soon(self._kick)

    def _kick(self) -> None:
        # A runner that is at work never returns to the loop unless it waits, so
        # whatever is ready now has nobody to run it.
        self._kick_planned = False
        if not self._ready:
            return
        while self._idle:
            gate = self._idle.popleft()
            if not gate.done():
                gate.set_result(None)
                return
        self.runners += 1
        self._scope.start(self._runner(), "runner")

    async def _runner(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            slice_end = monotonic() + _SLICE_S
            while True:
                while self._ready:
                    activation = self._ready.popleft()
                    activation.scheduled = False
                    if self._ready:
                        self._plan_kick()
                    await self._run(activation, task)
                    del activation  # an idle runner shall not keep what it ran last
                    if monotonic() > slice_end:
                        await asyncio.sleep(0)
                        slice_end = monotonic() + _SLICE_S
                if len(self._idle) >= self._idle_max:
                    return
                gate: asyncio.Future[None] = self._loop.create_future()
                self._idle.append(gate)
                await gate
                slice_end = monotonic() + _SLICE_S
        finally:
            self.runners -= 1
