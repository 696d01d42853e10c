"""`Watchdog`: sees from a thread that a worker's event loop stands still, and says who keeps it.

IO: one daemon thread, which looks a few times a second. It names the agent whose
handler is running (`BlackBox.now`) and shows what the main thread is doing, the
user's line first, while it lasts: the log has it even if it never ends. When the
loop goes on, `on_over` is called on it with how long it took.

Not seen: native code that holds the interpreter's lock, while it does, because this
thread waits for that lock, too. It is told right after; and the manager, another
process, ends a worker that does not come back at all, and asks it for its stack
before (`blackbox.ask_stack`), which native code can't refuse.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from foundation_nats.base import frames
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import Logger
from foundation_nats.node.blackbox import STARTING, BlackBox, Suspect

_PLACES_MAX = 200
_AGAIN_S = 60.0
"""What blocks at the same place again is counted meanwhile, not told."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The loop stood still, and goes on."""

    suspect: Suspect | None
    """The handler that ran; None: something else of this process."""
    type: str
    """Of the signal in hand; empty where there is none."""
    seconds: float
    times: int
    """How often it did so at this place since that was last told, with this time."""
    place: str
    source: str
    stack: str

    @property
    def what(self) -> str:
        """In words: what kept the loop."""
        return what_kept(self.suspect, self.type)


def what_kept(suspect: Suspect | None, type: str) -> str:
    """Who kept a loop, in words."""
    if suspect is None:
        return "Code outside of handlers"
    if suspect.sequence == STARTING:
        return f"{suspect.agent} (starting)"
    return f"{suspect.agent} (handling {type or 'a signal'})"


class Watchdog:
    """Watches the event loop of the thread that makes it.

    Args:
        warn_s: a step of a handler, or the loop's being late, for so long is told.
        type_of: the type of the signal that an agent has in hand; called from a thread.
        on_over: called on the loop when it goes on.
    """

    def __init__(
        self,
        box: BlackBox,
        log: Logger,
        *,
        warn_s: float,
        type_of: Callable[[str], str],
        on_over: Callable[[Blocked], None],
    ) -> None:
        self._box = box
        self._log = log
        self._warn_s = warn_s
        self._type_of = type_of
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._ident = threading.get_ident()
        self._closed = threading.Event()
        self._due = float("inf")
        self._told: dict[tuple[str | None, str], tuple[float, int]] = {}
        self.incidents = 0
        """How often the loop has stood still."""
        threading.Thread(target=self._watch, name="foundation-watchdog", daemon=True).start()

    def promise(self, due: float) -> None:
        """The loop will be back at *due* (`monotonic`); called on the loop."""
        self._due = due

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _watch(self) -> None:
        period = self._warn_s / 2
        told: object = None
        """The step, or the promise, that was told already."""
        before = monotonic()
        while not self._closed.wait(period):
            now = monotonic()
            running = self._box.now
            # Where this thread was late itself, the process stood still, or native code held the lock.
            was_late = now - before > period * 3
            before = now
            if running is not None:
                if now - running[2] >= self._warn_s and told is not running:
                    told = running
                    self._tell(running, running[2])
            elif now - self._due >= self._warn_s and told != self._due and not was_late:
                told = self._due
                self._tell(None, self._due)

    def _tell(self, step: tuple[str, int, float] | None, since: float) -> None:
        stack = frames.of_thread(self._ident)
        if self._box.now is not step:
            return  # it has just gone on
        suspect = None if step is None else Suspect(*step[:2])
        frame = frames.user_frame(stack)
        place, source = ("", "") if frame is None else (frame.place, frame.source)
        type_ = "" if suspect is None else self._type_of(suspect.agent)
        text = frames.stack_text(stack)
        key = (None if suspect is None else suspect.agent, place)
        now = monotonic()
        last, times = self._told.get(key, (-_AGAIN_S, 0))
        is_news = now - last >= _AGAIN_S
        self._told.pop(key, None)
        self._told[key] = (now, 0) if is_news else (last, times + 1)
        while len(self._told) > _PLACES_MAX:
            del self._told[next(iter(self._told))]
        if is_news:
            self._log.warning(
                "the event loop stands still",
                by=what_kept(suspect, type_),
                seconds=round(now - since, 2),
                stack=f"\n{text}",
            )
        try:
            self._loop.call_soon_threadsafe(
                self._over, suspect, type_, since, times + 1 if is_news else 0, place, source, text
            )
        except RuntimeError:
            self._closed.set()  # the loop has ended

    def _over(
        self,
        suspect: Suspect | None,
        type_: str,
        since: float,
        times: int,
        place: str,
        source: str,
        stack: str,
    ) -> None:
        self.incidents += 1
        if times:
            seconds = round(monotonic() - since, 3)
            self._on_over(Blocked(suspect, type_, seconds, times, place, source, stack))


__all__ = ["Blocked", "Watchdog", "what_kept"]
