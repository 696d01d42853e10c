"""Nodes that ended though no fault of the plan ended them: why, and whether that is in order.

A node may end of its own accord: at a crash point that is armed, or because it gives
up, as after too many deaths of its workers. It says so, in its log and by its exit
code. Whatever else ends it is a finding: an error of its own, a crash, and a SIGKILL
of which nobody here knows.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from foundation_nats.base.failpoint import KILLED
from foundation_nats.chaos.checkers.judgement import Judgement

Sort = Literal["crash point", "gave up", "failed", "killed", "left"]

_GAVE_UP = re.compile(r"node ends\b.*?reason=(.+)")
_SERVICE_FAILED = re.compile(r"node ends\b.*?reason=\W*(a service failed: .+)")
_INTERNAL = re.compile(r"error: (This should not have happened: .+)")
_ERROR = re.compile(r"error: (.+)")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_LONGEST = 300


@dataclass(slots=True)
class ExitSeen:
    """One end of a node that was not planned."""

    node: str
    code: int
    """Its exit code; negative: the signal that ended it."""
    sort: Sort
    why: str
    begin_s: float
    """When it was seen to have ended, on the clock of histories."""
    end_s: float = 0.0
    """When it was started again."""

    def __str__(self) -> str:
        return f"{self.node} ended by itself ({self.sort}, exit code {self.code}): {self.why}"


def explain(code: int, pid: int, said: str) -> tuple[Sort, str]:
    """Why a node ended; pure.

    Args:
        code: its exit code; negative: a signal.
        said: what it logged in its life.
    """
    said = _COLOURS.sub("", said)
    if code == -signal.SIGKILL:
        point = re.findall(KILLED.format(name=r"([\w.]+)", pid=pid) + r"\b", said)
        if point:
            return "crash point", point[-1]
        return "killed", "by a SIGKILL that was not sent from here; was the memory used up?"
    if code < 0:
        return "failed", f"it was ended by {_signal_name(-code)}"
    if code == 0:
        return "left", "it stopped in good order, and nobody here had told it to"
    for pattern in (_SERVICE_FAILED, _INTERNAL):
        if found := pattern.findall(said):
            why = found[-1].strip()[:_LONGEST]
            return ("crash point" if "FailpointError" in why else "failed"), why
    for pattern in (_GAVE_UP, _ERROR):
        if found := pattern.findall(said):
            return "gave up", found[-1].strip()[:_LONGEST]
    return "failed", "it did not say why"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def check_exits(seen: Iterable[ExitSeen]) -> Judgement:
    """An end by a crash point is wanted, giving up is allowed; the others are not."""
    judgement = Judgement("exits", 10, may_be_idle=True)
    for item in seen:
        judgement.looked_at += 1
        if item.sort == "failed":
            judgement.violated(str(item))
        elif item.sort in ("killed", "left"):
            # By whom, nobody here can know.
            judgement.undecided.append(str(item))
    return judgement


def count_exits(seen: Iterable[ExitSeen]) -> dict[str, int]:
    """How many there were of each sort; crash points by their names."""
    return dict(
        Counter(
            f"crash point {item.why}" if item.sort == "crash point" else item.sort for item in seen
        )
    )


__all__ = ["ExitSeen", "check_exits", "count_exits", "explain"]
