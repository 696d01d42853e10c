"""What became of the latest signals that this worker has handled: kept in memory, told when asked.

Bounded, and gone with the process: who asks (`cluster.signals.get`) takes the state records and
the streams as the truth, and this as what they can't say: how long it took, in how many tries.
"""

from __future__ import annotations

import orjson

TRACED_MAX = 10_000
"""Signals per worker; of twice as many at most the older half is forgotten at once."""


class Trace:
    """The latest signals of all agents of one worker."""

    __slots__ = ("_before", "_handled")

    def __init__(self) -> None:
        self._handled: dict[tuple[str, int], tuple[int, float, int, int]] = {}
        self._before = self._handled
        """The generation before: to forget one by one would cost more than the signals do."""

    def add(
        self, agent: str, sequence: int, epoch: int, took_s: float, attempts: int, emitted: int
    ) -> None:
        """Remember one."""
        if len(self._handled) >= TRACED_MAX:
            self._before, self._handled = self._handled, {}
        self._handled[agent, sequence] = epoch, took_s, attempts, emitted

    def _get(self, agent: str, sequence: int) -> tuple[int, float, int, int] | None:
        key = agent, sequence
        return self._handled.get(key) or self._before.get(key)

    def answer(self, agent: str, question: bytes) -> bytes:
        """The reply to a question for the sequences of some of *agent*'s signals: a list of JSON."""
        found = {}
        try:
            for sequence in orjson.loads(question)["sequences"][:1000]:
                known = self._get(agent, sequence)
                if known is not None:
                    epoch, took_s, attempts, emitted = known
                    found[str(sequence)] = {
                        "epoch": epoch,
                        "took_ms": took_s * 1000,
                        "attempts": attempts,
                        "emitted": emitted,
                    }
        except (ValueError, KeyError, TypeError):
            found = {}
        return b'{"ok":%b}' % orjson.dumps(found)
