"""What the keys of locks, elections, semaphores and counters hold.

Pure. None of these keys is ever deleted, so that tokens only grow.
"""

from __future__ import annotations

from pydantic import Field

from foundation_schemas.base import WireModel


class LockRecord(WireModel):
    """Who holds a lock; the key is never deleted, so that tokens only grow."""

    holder: str | None = None
    """Unique per acquisition; None: released."""
    owner: str = ""
    """Who that is, for people."""
    token: int = 0
    ttl_s: float = 10.0
    """Without a renewal for this long others may take it."""
    since: str = ""
    """When it was acquired, for people."""


class ElectionRecord(WireModel):
    """Who leads, in which term; the term is the fencing token."""

    leader: str | None = None
    """None: nobody; the last one has resigned."""
    incarnation: int = 0
    """Tells two candidacies of the same name apart."""
    term: int = 0
    ttl_s: float = 15.0
    """Without a renewal for this long others may take over."""
    value: str = ""
    """What the leader wants others to know, such as its address."""
    since: str = ""
    """When it was elected, for people."""


class PermitRecord(WireModel):
    """One permit of a semaphore that is held."""

    holder: str
    """Unique per acquisition."""
    owner: str = ""
    token: int
    ttl_s: float
    beat: int = 0
    """Raised at every renewal: where it stands still for `ttl_s` the holder is gone."""
    since: str = ""


class SemaphoreRecord(WireModel):
    """Who holds the permits of a semaphore."""

    permits: int
    holders: list[PermitRecord] = Field(default_factory=list)
    token: int = 0
    """The highest fencing token given so far."""


class CounterRecord(WireModel):
    """One writer's part of a counter; both sums only grow."""

    plus: int = 0
    minus: int = 0
    sequence: int = 0
    """The number of the writer's last increment: a repeat of it counts once."""
