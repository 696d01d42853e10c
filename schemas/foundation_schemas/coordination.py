"""`LockRecord`: what the key of a lock holds.

Pure.
"""

from __future__ import annotations

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
