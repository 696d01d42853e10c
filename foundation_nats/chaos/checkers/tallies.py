"""Counted without gap or repetition: each sender numbers its signals, each receiver notes where it stands.

What `check_effects` decides with lists, in memory that doesn't grow with the
number of signals, so that a round can have a million: a receiver that is sent
1, 2, 3 … by one sender, in order, needs only the last number to know that one
came twice or that one is missing. Invariants 1, 2 and 12 in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.history import Operation


@dataclass(frozen=True, slots=True)
class Tally:
    """What a receiver's state says."""

    last: Mapping[str, int] = field(default_factory=dict)
    """Sender to the highest number applied."""
    applied: int = 0
    repeated: int = 0
    """Signals that came although their number, or a later one, had been applied."""
    skipped: int = 0
    """Numbers that were passed over."""


def check_tallies(
    operations: Iterable[Operation],
    tallies: Mapping[str, Tally],
    receivers: Mapping[str, Collection[str]],
) -> Judgement:
    """Compare what was sent with what was counted.

    Args:
        operations: sends; `process` is the sender, `value` its number, `key` the target. A
            sender sends its next number once the last one has a receipt.
        tallies: receiver to what its state says; one that is missing counted nothing.
        receivers: target to everybody who must count what is sent to it.
    """
    judgement = Judgement("tallies", 1)
    receipted: dict[tuple[str, str], int] = {}
    possible: dict[tuple[str, str], int] = {}
    for operation in operations:
        judgement.looked_at += 1
        for receiver in receivers[operation.key]:
            pair = receiver, operation.process
            if operation.outcome != "fail":
                possible[pair] = max(possible.get(pair, 0), operation.value)
            if operation.outcome == "ok":
                receipted[pair] = max(receipted.get(pair, 0), operation.value)
    everybody = {receiver for group in receivers.values() for receiver in group}
    for receiver in sorted(everybody):
        tally = tallies.get(receiver, Tally())
        for (name, sender), number in receipted.items():
            if name == receiver and tally.last.get(sender, 0) < number:
                last = tally.last.get(sender, 0)
                text = f"{receiver} stands at {last} of {sender}, which has receipts up to {number}"
                judgement.violated(text, "lost")
        for sender, number in tally.last.items():
            if number > possible.get((receiver, sender), 0):
                judgement.violated(f"{receiver} stands at {number} of {sender}", "ghost")
        if tally.repeated:
            judgement.violated(f"{receiver} was given {tally.repeated} twice", "repeated")
        if tally.skipped:
            judgement.violated(f"{receiver} passed over {tally.skipped}", "lost")
        expected = sum(tally.last.values()) - tally.skipped + tally.repeated
        if tally.applied != expected:
            judgement.violated(f"{receiver} counted {tally.applied} and not {expected}", "sum")
    return judgement
