"""Whether this process itself is well: does it hear itself, and has it stood still?

Pure; ``now`` is this process's monotonic time. Heartbeats come back to their
sender; while ours don't, silence is our own, and nobody's counts. And who looks at
the clock later than it meant to has stood still, while what others said went unread.
"""

from __future__ import annotations

_DEAF_BEATS = 2.5
_LAG_MIN_S = 0.05
_LAG_MEMORY_S = 5.0


class Senses:
    """What one process knows of its own ears and of its own pace."""

    def __init__(self, *, beat_every_s: float, now: float) -> None:
        self._deaf_after_s = beat_every_s * _DEAF_BEATS
        self._own_heard_at = now
        self._was_deaf = False
        self._deaf_at: float | None = None
        self._lag_s = 0.0
        self._lag_at = 0.0

    def heard_itself(self, now: float) -> None:
        """One of our own heartbeats has come back (or none was sent so far)."""
        self._own_heard_at = now

    def is_deaf(self, now: float) -> bool:
        """Whether our own heartbeats don't come back; for a member."""
        is_deaf = now - self._own_heard_at > self._deaf_after_s
        if is_deaf:
            self._deaf_at = now
        return is_deaf

    def has_turned(self, is_deaf: bool) -> bool:
        """Whether that is another answer than the last time."""
        before, self._was_deaf = self._was_deaf, is_deaf
        return before != is_deaf

    def hears_itself(self, for_s: float, now: float) -> bool:
        """Whether what we send has come back to us for so long."""
        if now - self._own_heard_at > self._deaf_after_s:
            return False
        return self._deaf_at is None or now - self._deaf_at > for_s

    def lag(self, lag_s: float, now: float) -> float | None:
        """We looked at the clock so late: by how much we are late now; None: as before.

        The greatest is remembered for a while.
        """
        if lag_s >= max(_LAG_MIN_S, self._lag_s):
            self._lag_s, self._lag_at = lag_s, now
            return lag_s
        if self._lag_s and now - self._lag_at > _LAG_MEMORY_S:
            self._lag_s = 0.0
            return 0.0
        return None
