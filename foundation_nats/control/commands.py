"""What the planner wants done: each command is one compare-and-set of one record.

Pure. A command carries the whole new record and the revision that the decision
was based on, so that carrying it out twice, late, or by a leader that is no
longer one does no harm: the write is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from foundation_schemas import AgentRecord


class Cause(StrEnum):
    """Why an agent is given to a node."""

    NEW = "new"
    """It never ran."""
    WAITED = "waited"
    """It was pending: no node qualified before, or it was drained."""
    NODE_DOWN = "node_down"
    NODE_RESTARTED = "node_restarted"
    """Its node lives again under a new incarnation; the activation is lost all the same."""
    RETURNED = "returned"
    """It waited for its lost node, and that is back."""
    RETRY = "retry"
    """It failed, and its back-off is over."""
    LATE = "late"
    """It was starting for too long, and was stopped there."""
    RESTARTED = "restarted"
    """It was stopped: for a changed spec, or by itself."""


@dataclass(frozen=True, slots=True)
class Assign:
    """Give the agent to a node, under the next epoch."""

    agent: str
    record: AgentRecord
    expected: int
    cause: Cause
    before: AgentRecord | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Tell the node that holds the agent to stop it."""

    agent: str
    record: AgentRecord
    expected: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete the record: nobody wants the agent, and nobody runs it."""

    agent: str
    record: None
    expected: int


@dataclass(frozen=True, slots=True)
class MarkUnavailable:
    """Its node is down, and it waits for the node's return."""

    agent: str
    record: AgentRecord
    expected: int


@dataclass(frozen=True, slots=True)
class MarkPending:
    """No node qualifies."""

    agent: str
    record: AgentRecord
    expected: int
    reasons: Mapping[str, str]
    """Node to why it doesn't."""


@dataclass(frozen=True, slots=True)
class MarkStopped:
    """Its node is down, and its wish for that case is to be stopped."""

    agent: str
    record: AgentRecord
    expected: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """It fails to start again and again: it is not tried any more by itself."""

    agent: str
    record: AgentRecord
    expected: int


@dataclass(frozen=True, slots=True)
class Move:
    """Tell the node that runs the agent to stop it and to hand it over to another one."""

    agent: str
    record: AgentRecord
    expected: int
    before: AgentRecord


Command = Assign | Stop | Forget | MarkUnavailable | MarkPending | MarkStopped | Quarantine | Move


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to look again if nothing happens before."""

    commands: tuple[Command, ...]
    next_wake_s: float | None = None
    """Until the next timer of some agent runs out; None: there is none."""
    is_truncated: bool = False
    """There was more to do than one pass may hold: plan again at once."""
