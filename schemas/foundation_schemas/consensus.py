"""`DomainEntry` and `DomainSnapshot`: what the stream of a replicated domain holds.

Pure.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_schemas.base import WireModel


class DomainEntry(WireModel):
    """One accepted operation; its stream sequence is its revision."""

    id: str
    """The proposal's id: an id takes effect once."""
    after: int
    """The revision it was validated at, which is that of the entry before it; 0: none."""
    after_id: str = ""
    """The id of that entry, by which a log that went back in time is noticed."""
    operation: Any
    by: str = ""
    """Who proposed it, for people."""
    at: str = ""
    version: int = 1
    """The domain's version in the process that proposed it."""


class DomainRecent(WireModel):
    """An id that took effect, or that was skipped."""

    id: str
    revision: int
    skipped: str | None = None
    """Why it changed nothing."""


class DomainSnapshot(WireModel):
    """A domain's state at a revision; what is needed to go on from there."""

    revision: int
    last_id: str = ""
    state: dict[str, Any] = Field(default_factory=dict)
    recent: list[DomainRecent] = Field(default_factory=list)
    """The newest ids, oldest first: repeats of them are answered and not applied."""
    entries: int = 0
    """How many entries there have been up to here."""
    by: str = ""
    at: str = ""
    version: int = 1
