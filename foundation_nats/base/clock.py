"""The readers of clocks: durations from `monotonic`, texts for people from `utc_text`.

`monotonic` counts suspended time too where the platform can (CLOCK_BOOTTIME),
so that a laptop that slept knows that its rights have lapsed. Its values are
comparable between processes of one machine and between no two machines.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

if hasattr(time, "CLOCK_BOOTTIME"):

    def monotonic() -> float:
        """Seconds on this machine's clock that never steps and counts suspension."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:  # pragma: no cover - platforms without CLOCK_BOOTTIME

    def monotonic() -> float:
        """Seconds on this machine's clock that never steps."""
        return time.monotonic()


def utc_now() -> datetime:
    """Now, by the wall clock: for deadlines that people and other machines set.

    It may step, and machines differ; never measure a duration by it. Everything here asks this
    and not `datetime.now`, so that a test which moves a process's wall clock moves all of it.
    """
    return datetime.fromtimestamp(time.time(), UTC)


_last_text: tuple[int, str] = (0, "")


def utc_text() -> str:
    """Now, as RFC 3339 in UTC, for people and records; never compared."""
    global _last_text
    now_ms = time.time_ns() // 1_000_000
    if now_ms != _last_text[0]:
        text = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds")
        _last_text = (now_ms, text.replace("+00:00", "Z"))
    return _last_text[1]


def wall_ms() -> int:
    """Milliseconds since 1970, to make a new incarnation newer than a forgotten one."""
    return time.time_ns() // 1_000_000
