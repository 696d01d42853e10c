"""Does what is due, and is called again when something else is.

No loop that sleeps: who is woken by a message anyway does then what is nearly due,
by `tick`, and needs no timer of its own. The function says how long it may be left
alone, and is told by how much it is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from foundation_nats.base.clock import monotonic


class Ticker:
    """One function, called again and again.

    Args:
        do_due: gets the time, and by how much it was called later than it had asked for;
            returns after how many seconds to call it next, or None to end.
    """

    def __init__(self, do_due: Callable[[float, float], float | None]) -> None:
        self._do_due = do_due
        self._done: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expected = 0.0
        """When we meant to look at the clock next: what it is later by, we stood still."""

    async def run(self, began_at: float) -> None:
        """Tick until the function ends it; what it raises is raised here. Ends when cancelled."""
        self._done = asyncio.get_running_loop().create_future()
        self._expected = began_at
        try:
            self.tick()
            await self._done
        finally:
            self._done.cancel()
            if self._timer is not None:
                self._timer.cancel()

    def tick(self) -> None:
        """Do what is due now; nothing before `run` has begun and after it has ended."""
        if self._timer is not None:
            self._timer.cancel()
        if self._done is None or self._done.done():
            return
        now = monotonic()
        try:
            pause = self._do_due(now, now - self._expected)
        except Exception as error:  # `run` raises it, as its own
            self._done.set_exception(error)
            return
        if pause is None:
            self._done.set_result(None)
            return
        self._expected = monotonic() + pause
        self._timer = asyncio.get_running_loop().call_later(pause, self.tick)
