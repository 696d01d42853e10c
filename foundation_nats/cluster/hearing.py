"""Whom this process hears, what the others say of whom they hear, and when to say it.

Pure; ``now`` is this process's monotonic time. A node is heard while its last
heartbeat is younger than `within_s`.

Every heartbeat is read by every node, so the list of names is left out of most:
it goes into a heartbeat when it has changed (and into the one after that, since
a heartbeat may be lost), while a node that should be heard isn't, and otherwise
into every `every_beats`-th, for those who have just begun to listen.
"""

from __future__ import annotations

from collections.abc import Collection

EVERY_BEATS = 10
"""Of 0.5 s: who begins to listen knows all within 5 s, and may ask before."""
_REPEATS = 2
_KEPT_S = 60.0


class Hearing:
    """The ears of one process."""

    def __init__(self, within_s: float, *, every_beats: int = EVERY_BEATS) -> None:
        self._within_s = within_s
        self._every_beats = every_beats
        self._heard_at: dict[str, float] = {}
        self._reports: dict[str, tuple[int, frozenset[str]]] = {}
        self._said: frozenset[str] | None = None
        self._repeats = 0
        self._silent_beats = 0

    def heard(self, node: str, incarnation: int, hears: list[str] | None, now: float) -> bool:
        """Take note of a heartbeat; whether what its sender says of its own hearing is new."""
        self._heard_at[node] = now
        before = self._reports.get(node)
        if hears is None:
            if before is not None and before[0] != incarnation:
                del self._reports[node]  # another life said it
                return True
            return False
        report = (incarnation, frozenset(hears))
        self._reports[node] = report
        return before != report

    def forget(self, node: str) -> None:
        """It is gone."""
        self._heard_at.pop(node, None)
        self._reports.pop(node, None)

    def excuse(self, seconds: float) -> None:
        """We stood still: what came meanwhile is unread, and not silence."""
        for node in self._heard_at:
            self._heard_at[node] += seconds

    def names(self, now: float) -> frozenset[str]:
        """Who is heard now."""
        limit = now - self._within_s
        return frozenset(node for node, at in self._heard_at.items() if at >= limit)

    def report(self, node: str) -> frozenset[str] | None:
        """Whom *node* last said it hears; None if it said nothing in this life."""
        found = self._reports.get(node)
        return None if found is None else found[1]

    def to_say(self, now: float, expected: Collection[str]) -> list[str] | None:
        """What the heartbeat that is sent now should say; None: nothing.

        Args:
            expected: the other nodes that are not down.
        """
        for node in [node for node, at in self._heard_at.items() if now - at > _KEPT_S]:
            del self._heard_at[node]
        names = self.names(now)
        self._silent_beats += 1
        if names != self._said:
            self._said, self._repeats = names, _REPEATS
        elif self._silent_beats >= self._every_beats or not names.issuperset(expected):
            self._repeats = max(self._repeats, 1)
        if self._repeats == 0:
            return None
        self._repeats -= 1
        self._silent_beats = 0
        return sorted(names)
