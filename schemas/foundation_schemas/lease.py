"""`LeaseRecord`: who holds a lease, for which term.

Pure.
"""

from __future__ import annotations

from foundation_schemas.base import NodeId, WireModel


class LeaseRecord(WireModel):
    """The value of a lease's key; its revision is the fencing token."""

    holder: NodeId
    incarnation: int
    term: int
    ttl_s: float
