"""A per-process clock shim: the wall clock shows as many seconds more as a file says.

Put this directory first on ``PYTHONPATH`` and name the file in
``FOUNDATION_TEST_CLOCK``. A file of that name with ``.PID`` behind it is for that
process alone and goes first. Only the wall clock moves, as when an operator or NTP
steps it; the monotonic clocks of a machine never step.

What moves is `time.time`, `time.time_ns` and all that asks them: `foundation_nats.base.clock`,
which everything of this project asks. `datetime.now` of an agent's own code doesn't move.
"""

from __future__ import annotations

import os
import time

_FILE = os.environ.get("FOUNDATION_TEST_CLOCK", "")
_EVERY_S = 0.05

if _FILE:
    _time, _time_ns, _monotonic = time.time, time.time_ns, time.monotonic
    _seen: list[float] = [0.0, -1e9]

    def _read() -> float:
        for name in (f"{_FILE}.{os.getpid()}", _FILE):
            try:
                with open(name) as file:
                    return float(file.read() or 0)
            except (OSError, ValueError):
                continue
        return 0.0

    def _offset() -> float:
        now = _monotonic()
        if now - _seen[1] > _EVERY_S:
            _seen[1] = now
            _seen[0] = _read()
        return _seen[0]

    def _shifted() -> float:
        return _time() + _offset()

    def _shifted_ns() -> int:
        return _time_ns() + int(_offset() * 1e9)

    time.time = _shifted
    time.time_ns = _shifted_ns
