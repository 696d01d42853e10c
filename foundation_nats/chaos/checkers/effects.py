"""Every receipted signal takes effect exactly once, in its sender's order, and none from nowhere (invariants 1, 2, 12).

Receivers keep the keys of what they applied as a list in their state, which
shows for ever what a counter would hide: what came twice, and in which order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.history import Operation


def check_effects(
    operations: Iterable[Operation],
    applied: Mapping[str, Sequence[str]],
    receivers: Mapping[str, Collection[str]],
    *,
    dead: Mapping[str, Collection[str]] | None = None,
) -> Judgement:
    """Compare what was sent with what was applied.

    Args:
        operations: sends; `value` is the key, `key` the target.
        applied: receiver to the keys it applied, in order.
        receivers: target to everybody who must apply what is sent to it.
        dead: receiver to keys in its dead letters; these count as answered for.
    """
    judgement = Judgement("effects", 1)
    receipted: dict[str, set[str]] = {}
    possible: dict[str, set[str]] = {}
    for operation in operations:
        judgement.looked_at += 1
        for receiver in receivers[operation.key]:
            if operation.outcome != "fail":
                possible.setdefault(receiver, set()).add(operation.value)
            if operation.outcome == "ok":
                receipted.setdefault(receiver, set()).add(operation.value)
    everybody = {receiver for group in receivers.values() for receiver in group}
    for receiver in sorted(everybody):
        found = Counter(applied.get(receiver, ()))
        buried = set(dead.get(receiver, ())) if dead else set()
        for key in sorted(receipted.get(receiver, set()) - found.keys() - buried):
            judgement.violated(f"{receiver} never applied {key}, which has a receipt", "lost")
        for key, count in found.items():
            if count > 1:
                judgement.violated(f"{receiver} applied {key} {count} times", "repeated")
            if key not in possible.get(receiver, ()):
                judgement.violated(f"{receiver} applied {key}, which was not sent", "ghost")
        for key in sorted(buried & found.keys()):
            judgement.violated(f"{receiver} applied {key}, which is a dead letter too", "both")
    return judgement


def check_order(
    operations: Iterable[Operation],
    applied: Mapping[str, Sequence[str]],
    receivers: Mapping[str, Collection[str]],
) -> Judgement:
    """One sender's signals are applied in the order in which it sent them, each after the last's receipt."""
    judgement = Judgement("order", 12)
    place: dict[tuple[str, str], dict[str, int]] = {}
    for operation in operations:
        for receiver in receivers[operation.key]:
            places = place.setdefault((receiver, operation.process), {})
            places.setdefault(operation.value, len(places))
    for (receiver, sender), places in sorted(place.items()):
        last, last_key = -1, ""
        for key in applied.get(receiver, ()):
            number = places.get(key)
            if number is None:
                continue
            judgement.looked_at += 1
            if number < last:
                judgement.violated(f"{receiver} applied {key} of {sender} after {last_key}")
            last, last_key = number, key
    return judgement
