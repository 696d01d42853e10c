"""Background tasks that cannot die in silence, and the process's event loop.

A `TaskScope` owns its tasks: closing it cancels and awaits them; a task that
fails reports through `on_failure` (default: cancels the scope's owner by
setting `failure`), because an exception always propagates to somebody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from foundation_nats.base.logs import get_logger

T = TypeVar("T")


class TaskScope:
    """A set of background tasks with one owner.

    Not a `TaskGroup`: its life is not a ``with`` block, because services start
    and stop in different functions. `failure` resolves with the first error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run *coroutine* until it ends or the scope is closed."""
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            get_logger("tasks").error(
                "background task failed", task=task.get_name(), exc_info=error
            )
            if not self.failure.done():
                self.failure.set_result(error)

    async def close(self, timeout: float = 5.0) -> None:
        """Cancel what still runs and wait for it; at most *timeout* seconds."""
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run *main* to its end on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:  # pragma: no cover - uvloop is a dependency wherever it exists
        with asyncio.Runner() as runner:
            return runner.run(main())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())
