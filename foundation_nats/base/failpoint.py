"""Named points at which a test may crash, freeze or fail this process, and bugs it may plant.

``FOUNDATION_FAILPOINTS="commit.before_cas=kill;claim.read=1in5(sleep(2))"``
makes the named points act: ``kill`` (SIGKILL to oneself), ``raise``,
``sleep(S)`` (blocks the whole process, as a freeze would), ``freeze(S)`` (the same, and in a
worker its manager is stopped for as long: the whole node of one worker), each optionally as
``after(N,ACTION)`` (from the N-th passing on), ``once(N,ACTION)`` (at the N-th alone) or
``1inN(ACTION)``. Without the variable a point costs one
call of an empty function.

``FOUNDATION_TEST_BUG="drop_outbox"`` removes one safeguard on purpose, so that
a test can show that a checker notices. Whoever starts with it is warned.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable

POINTS = frozenset(
    {
        "send.before_publish",
        "send.after_publish_before_ack",
        "expand.before",
        "expand.mid",
        "expand.before_ack",
        "live.received",
        "catchup.page",
        "handle.before",
        "handle.after",
        "commit.before_cas",
        "commit.after_cas_before_outbox",
        "outbox.mid",
        "outbox.after",
        "trim.before",
        "trim.after",
        "claim.read",
        "claim.after_cas",
        "claim.after_outbox",
        "claim.after_subscribe",
        "report_running",
        "release.before",
        "release.after",
        "plan.computed",
        "plan.mid_execute",
        "start.sent",
        "lease.acquired",
        "lease.renew",
        "drain.mid",
        "moves.ordered",
        "move.before_handover",
        "move.after_handover",
        "deadletter.before_ack",
        "reserve.after",
        "reroute.after_fence",
        "reroute.before_delete",
        "step.begun",
        "step.happened",
        "step.done",
        "sleep.before",
        "wake.read",
        "child.before_wish",
        "child.after_wish",
        "kin.after_signal",
        "timer.before",
        "timer.after_publish",
        "timer.before_ack",
        "cell.after_cas",
        "desk.after_ask",
        "pipeline.before_handed_out",
        "map.before_counted",
        "lock.taken",
        "counter.after_cas",
    }
)
"""Every name in the code; a typo in a test is an error, not a test that can't fail."""


KILLED = "failpoint {name} kills process {pid}"
"""What a process writes to its standard error before it kills itself at a point."""

_WORKER = "FOUNDATION_BLACKBOX"
"""A variable that workers have, and their managers have not."""


class FailpointError(RuntimeError):
    """Raised by a failpoint set to ``raise``."""


def _action(text: str, name: str) -> Callable[[], None]:
    if match := re.fullmatch(r"1in(\d+)\((.+)\)", text):
        odds, inner = int(match[1]), _action(match[2], name)
        return lambda: inner() if random.randrange(odds) == 0 else None
    if match := re.fullmatch(r"after\((\d+),(.+)\)", text):
        left, inner = [int(match[1])], _action(match[2], name)

        def later() -> None:
            left[0] -= 1
            if left[0] <= 0:
                inner()

        return later
    if match := re.fullmatch(r"once\((\d+),(.+)\)", text):
        wait, then = [int(match[1])], _action(match[2], name)

        def once() -> None:
            wait[0] -= 1
            if wait[0] == 0:
                then()

        return once
    if match := re.fullmatch(r"freeze\(([\d.]+)\)", text):
        frozen_s = float(match[1])
        return lambda: _freeze(frozen_s)
    if match := re.fullmatch(r"sleep\(([\d.]+)\)", text):
        seconds = float(match[1])
        return lambda: time.sleep(seconds)
    if text == "kill":
        return lambda: _kill(name)
    if text == "raise":

        def fail() -> None:
            raise FailpointError("failpoint")

        return fail
    raise ValueError(f"unknown failpoint action {text!r}")


def _kill(name: str) -> None:
    """SIGKILL to oneself, and a word about it, so that nobody looks for another cause."""
    pid = os.getpid()
    with contextlib.suppress(OSError):
        os.write(2, (KILLED.format(name=name, pid=pid) + "\n").encode())
    os.kill(pid, signal.SIGKILL)


def _freeze(seconds: float) -> None:
    """Stop this process and, in a worker, its manager, which has nobody else who could."""
    manager = os.getppid() if _WORKER in os.environ else None
    if manager is not None:
        os.kill(manager, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        if manager is not None:
            os.kill(manager, signal.SIGCONT)


def parse(text: str) -> dict[str, Callable[[], None]]:
    """Read the variable's value.

    Raises:
        ValueError: a name or an action is unknown.
    """
    points = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, action = item.partition("=")
        if name not in POINTS:
            raise ValueError(f"unknown failpoint {name!r}")
        points[name] = _action(action, name)
    return points


BUGS = frozenset(
    {
        "skip_epoch_check",
        "ack_before_store",
        "drop_outbox",
        "double_expand",
        "trim_past_cursor",
        "reserve_without_cas",
        "answer_after_deadline",
    }
)
"""Every safeguard that can be removed."""

_SPEC = os.environ.get("FOUNDATION_FAILPOINTS", "")

if _SPEC:
    _armed = parse(_SPEC)

    def failpoint(name: str) -> None:
        """Do what ``FOUNDATION_FAILPOINTS`` says about *name*."""
        action = _armed.get(name)
        if action is not None:
            action()

else:

    def failpoint(name: str) -> None:
        """Do nothing: no failpoints are set in this process."""


_BUGS = frozenset(filter(None, os.environ.get("FOUNDATION_TEST_BUG", "").split(",")))

if _BUGS:
    if not _BUGS <= BUGS:
        raise ValueError(f"unknown bug in FOUNDATION_TEST_BUG: {', '.join(sorted(_BUGS - BUGS))}")

    def planted(name: str) -> bool:
        """Whether the safeguard *name* is removed in this process."""
        return name in _BUGS

else:

    def planted(name: str) -> bool:
        """No: every safeguard is in place."""
        return False


def planted_bugs() -> frozenset[str]:
    """The safeguards that are removed in this process."""
    return _BUGS
