"""`ClusterEvent`: a fact in the past tense, for taps, `foundation events` and the dashboard.

Pure.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_schemas.base import WireModel


class ClusterEvent(WireModel):
    """Something that happened; published on ``fnd.C.event.<topic>.<what>`` and kept in EVENTS."""

    topic: str
    """``node``, ``agent``, ``leader``, ``deployment``, ``cluster``, ``worker``, ``resources``, …"""
    what: str
    """``joined``, ``down``, ``started``, ``failed_over``, ``elected``, …"""
    at: str
    """UTC, RFC 3339."""
    source: str
    """The node or client that says so."""
    message: str = ""
    """One sentence for people."""
    data: dict[str, Any] = Field(default_factory=dict)
