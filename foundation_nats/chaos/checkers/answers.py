"""No two activations of an agent answer at once: once a later epoch was at work, no earlier one answers (invariant 5).

An activation may answer until its right has lapsed, and its successor begins
after that (`cluster.validity`). So of the answers that callers got, those of an
earlier epoch were all made before the first of a later one. Instants are of one
machine's monotonic clock; what was answered on another is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable

from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.history import Operation


def check_answers(operations: Iterable[Operation]) -> Judgement:
    """Asks that were answered; `by` names ``epoch``, ``at_ns`` and ``host``."""
    judgement = Judgement("answers", 5)
    given: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for item in operations:
        if item.outcome == "ok" and item.by is not None:
            judgement.looked_at += 1
            by = item.by
            given.setdefault((item.key, by["host"]), []).append((by["at_ns"], by["epoch"]))
    for (agent, _), answers in sorted(given.items()):
        newest, since = 0, 0
        for at, epoch in sorted(answers):
            if epoch < newest:
                judgement.violated(
                    f"{agent} answered under epoch {epoch} {(at - since) / 1e6:.1f} ms after it "
                    f"had answered under epoch {newest}"
                )
            elif epoch > newest:
                newest, since = epoch, at
    return judgement
