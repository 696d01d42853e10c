"""Decide which nodes are up, suspect or down, from when each was last heard and who answers.

Pure. ``now`` is this process's monotonic time; a timestamp written by another
node is never compared with it. Every verdict is about one *incarnation* of a
node, and DOWN is final for that incarnation: a node that was declared down
comes back only under a higher one. That rule is what lets failover restart its
agents without asking it first.

Two roads lead to DOWN. *Silence*: nothing heard for `down_after_s`, and a second
node, asked through `Confirm`, can't reach it either. *No responders*: nobody
listens on the subjects of its manager and of every worker, three times over
0.4 s. Neither is taken within `bus_grace_s` of a bus disturbance (F3), because
a client that reconnects looks dead too; and when many nodes seem dead at once
the storm brake holds the verdicts for `storm_hold_s` (F4), because then it is
more likely that the observer is the sick one. An observer that doesn't hear its
own heartbeats (`Deaf`) surely is, and silence counts from when it hears again.

Obligations of the caller: feed `step` with every heartbeat and probe result,
and call it no later than `deadline`; answer each `Confirm`; say `Forgot` when a
node's record is gone, which is what bounds the memory here. Of a forgotten node
nothing is known, not even which of its lives are over: the caller must keep a
ghost's heartbeats away from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import assert_never

from foundation_nats.cluster.verdict import (
    BusDisturbed,
    Confirm,
    Confirmed,
    Deaf,
    Effect,
    Event,
    ForceFailover,
    Forgot,
    Heard,
    Left,
    OwnLag,
    ProbeAnswered,
    ProbeMissed,
    StormBegan,
    StormEnded,
    Tick,
    Verdict,
    VerdictChanged,
)

__all__ = [
    "BusDisturbed",
    "Confirm",
    "Confirmed",
    "Deaf",
    "Effect",
    "Event",
    "ForceFailover",
    "Forgot",
    "Heard",
    "Left",
    "LivenessDetector",
    "LivenessStatistics",
    "OwnLag",
    "ProbeAnswered",
    "ProbeMissed",
    "StormBegan",
    "StormEnded",
    "Tick",
    "Verdict",
    "VerdictChanged",
]

PROBES_NEEDED = 3
PROBE_SPAN_S = 0.4
CONFIRM_TIMEOUT_S = 1.0
CONFIRM_AGAIN_S = 1.0
LAG_BUDGET_S = 0.5
PATIENCE_MAX = 8.0

_NEVER = float("-inf")
_EVER = float("inf")
_EPSILON = 1e-6


@dataclass(slots=True)
class _Peer:
    incarnation: int
    heard_at: float
    verdict: Verdict
    misses: int = 0
    first_miss_at: float = 0.0
    confirm_sent_at: float | None = None
    confirm_next_at: float = _NEVER
    condemned: str | None = None
    """The cause for which it would be down, were it not for the storm."""

    def absolve(self, now: float) -> None:
        """Start all over with this life: whatever spoke for its death is void."""
        self.heard_at = now
        self.misses = 0
        self.confirm_sent_at = None
        self.confirm_next_at = _NEVER
        self.condemned = None


@dataclass(frozen=True, slots=True)
class LivenessStatistics:
    """Numbers for debugging."""

    peers: int
    up: int
    suspect: int
    down: int
    storm_until: float | None
    grace_until: float | None


@dataclass(slots=True)
class LivenessDetector:
    """The failure detector of one node, about every node it has heard of.

    Feed it with `step`; call it again no later than `deadline`.
    """

    suspect_after_s: float = 1.5
    down_after_s: float = 5.0
    bus_grace_s: float = 12.0
    storm_fraction: float = 0.4
    storm_hold_s: float = 30.0
    storm_window_s: float = 10.0
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _fallen: dict[str, float] = field(default_factory=dict)
    """When each node was last declared down, other than by leaving; kept for `storm_window_s`."""
    _grace_until: float = _NEVER
    _storm_until: float | None = None
    _patience: float = 1.0
    _nothing_before: float = _NEVER
    """No silence has a consequence before this time: an early guess costs a look, no more."""

    def __post_init__(self) -> None:
        assert 0 < self.suspect_after_s < self.down_after_s

    # ---- asking -----------------------------------------------------------------

    def verdict(self, node: str) -> Verdict | None:
        """The verdict on the newest incarnation known of *node*."""
        peer = self._peers.get(node)
        return None if peer is None else peer.verdict

    def incarnation(self, node: str) -> int | None:
        """The newest incarnation known of *node*."""
        peer = self._peers.get(node)
        return None if peer is None else peer.incarnation

    def snapshot(self) -> Mapping[str, tuple[int, Verdict]]:
        """Node to (incarnation, verdict), as of now."""
        return MappingProxyType(
            {node: (peer.incarnation, peer.verdict) for node, peer in self._peers.items()}
        )

    def held(self) -> tuple[str, ...]:
        """The nodes that would be down, were it not for the storm."""
        return tuple(node for node, peer in self._peers.items() if peer.condemned is not None)

    def statistics(self) -> LivenessStatistics:
        """Numbers for debugging."""
        verdicts = [peer.verdict for peer in self._peers.values()]
        return LivenessStatistics(
            peers=len(verdicts),
            up=verdicts.count(Verdict.UP),
            suspect=verdicts.count(Verdict.SUSPECT),
            down=verdicts.count(Verdict.DOWN),
            storm_until=self._storm_until,
            grace_until=None if self._grace_until == _NEVER else self._grace_until,
        )

    def deadline(self) -> float | None:
        """When `step` must be called next, if nothing happens before; later than the last step."""
        times = [self._due(peer) for peer in self._peers.values()]
        known = [time for time in times if time is not None]
        if self._storm_until is not None:
            known.append(self._storm_until)
        return min(known) if known else None

    def _due(self, peer: _Peer) -> float | None:
        """When silence has its next consequence for *peer*."""
        if peer.verdict is Verdict.DOWN or peer.condemned is not None:
            return None
        if peer.verdict is Verdict.UP:
            return peer.heard_at + self.suspect_after_s * self._patience
        due = max(peer.heard_at + self.down_after_s * self._patience, self._grace_until)
        if peer.confirm_sent_at is not None:
            return max(due, peer.confirm_sent_at + CONFIRM_TIMEOUT_S)
        return max(due, peer.confirm_next_at)

    # ---- stepping ---------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take note of *event* and of the time; return what changed and what to ask."""
        effects: list[Effect] = []
        match event:
            case Heard(node, incarnation):
                effects.extend(self._heard(node, incarnation, now))
            case Left(node, incarnation):
                effects.extend(self._left(node, incarnation, now))
            case Forgot(node):
                self._peers.pop(node, None)
            case Confirmed(node, incarnation, reachable):
                effects.extend(self._confirmed(node, incarnation, reachable, now))
            case ProbeMissed(node, incarnation):
                effects.extend(self._missed(node, incarnation, now))
            case ProbeAnswered(node, incarnation):
                self._answered(node, incarnation)
            case BusDisturbed():
                self._grace_until = max(self._grace_until, now + self.bus_grace_s)
                for peer in self._peers.values():
                    peer.absolve(now)
            case Deaf():
                for peer in self._peers.values():
                    peer.absolve(now)
            case OwnLag(lag_s):
                self._patience = min(PATIENCE_MAX, 1.0 + max(0.0, lag_s) / LAG_BUDGET_S)
            case ForceFailover():
                if self._storm_until is not None:
                    self._storm_until = now
                    effects.extend(self._end_storm(now))
                # What a person says is real makes no storm of what falls next.
                self._fallen.clear()
            case Tick():
                pass
            case _:
                assert_never(event)
        effects.extend(self._end_storm(now))
        # Whoever is heard only puts things off: no need to look at everybody each time.
        if not isinstance(event, Heard) or now >= self._nothing_before:
            effects.extend(self._expire(now))
            self._nothing_before = min(
                (due for due in map(self._due, self._peers.values()) if due is not None),
                default=_EVER,
            )
        return effects

    def _live(self, node: str, incarnation: int) -> _Peer | None:
        peer = self._peers.get(node)
        if peer is None or peer.incarnation != incarnation or peer.verdict is Verdict.DOWN:
            return None
        return peer

    def _heard(self, node: str, incarnation: int, now: float) -> Iterator[Effect]:
        peer = self._peers.get(node)
        if peer is None or incarnation > peer.incarnation:
            self._peers[node] = _Peer(incarnation, now, Verdict.UP)
            # It is back: it doesn't seem dead together with whoever fails next.
            self._fallen.pop(node, None)
            yield VerdictChanged(node, incarnation, None, Verdict.UP, "heard")
        elif incarnation == peer.incarnation and peer.verdict is not Verdict.DOWN:
            peer.absolve(now)
            yield from self._turn(node, peer, Verdict.UP, "heard")
        if (due := self._due(self._peers[node])) is not None:
            self._nothing_before = min(self._nothing_before, due)
        # Otherwise a ghost is speaking: an older incarnation, or one already
        # declared down. Its agents may be running elsewhere by now.

    def _left(self, node: str, incarnation: int, now: float) -> Iterator[Effect]:
        peer = self._peers.get(node)
        if peer is not None and incarnation > peer.incarnation:
            # A life that was over before anybody was heard to begin it.
            self._peers[node] = _Peer(incarnation, now, Verdict.DOWN)
            yield VerdictChanged(node, incarnation, None, Verdict.DOWN, "left")
        elif (peer := self._live(node, incarnation)) is not None:
            peer.absolve(now)
            old, peer.verdict = peer.verdict, Verdict.DOWN
            yield VerdictChanged(node, incarnation, old, Verdict.DOWN, "left")

    def _missed(self, node: str, incarnation: int, now: float) -> Iterator[Effect]:
        peer = self._live(node, incarnation)
        if peer is None or now < self._grace_until:
            return
        if peer.misses == 0:
            peer.first_miss_at = now
        peer.misses += 1
        if peer.misses >= PROBES_NEEDED and now - peer.first_miss_at >= PROBE_SPAN_S - _EPSILON:
            yield from self._condemn({node: "no_responders"}, now)

    def _answered(self, node: str, incarnation: int) -> None:
        peer = self._live(node, incarnation)
        if peer is not None:
            peer.misses = 0
            if peer.condemned == "no_responders":
                peer.condemned = None

    def _confirmed(
        self, node: str, incarnation: int, reachable: bool | None, now: float
    ) -> Iterator[Effect]:
        peer = self._live(node, incarnation)
        if peer is None or peer.confirm_sent_at is None:
            return
        peer.confirm_sent_at = None
        if reachable:
            peer.confirm_next_at = now + CONFIRM_AGAIN_S
        else:
            yield from self._condemn({node: "silence"}, now)

    # ---- verdicts ---------------------------------------------------------------

    def _condemn(self, causes: Mapping[str, str], now: float) -> Iterator[Effect]:
        """Declare nodes down, unless that would make too many at once."""
        dying = {n: cause for n, cause in causes.items() if self._peers[n].condemned is None}
        if not dying:
            return
        if self._storm_until is None and self._is_storm(dying, now):
            self._storm_until = now + self.storm_hold_s
            yield StormBegan(tuple(dying), self._storm_until)
        for node, cause in dying.items():
            peer = self._peers[node]
            if self._storm_until is None:
                yield from self._declare_down(node, peer, cause, now)
            else:
                peer.condemned = cause
                yield from self._turn(node, peer, Verdict.SUSPECT, cause)

    def _is_storm(self, dying: Mapping[str, str], now: float) -> bool:
        self._fallen = {n: t for n, t in self._fallen.items() if now - t <= self.storm_window_s}
        alive = {node for node, peer in self._peers.items() if peer.verdict is not Verdict.DOWN}
        doomed = self._fallen.keys() | dying.keys()
        known = alive | self._fallen.keys()
        return len(doomed) >= max(2.0, self.storm_fraction * len(known) - _EPSILON)

    def _end_storm(self, now: float) -> Iterator[Effect]:
        if self._storm_until is None or now < self._storm_until:
            return
        self._storm_until = None
        yield StormEnded()
        for node, peer in self._peers.items():
            if peer.condemned is not None:
                yield from self._declare_down(node, peer, peer.condemned, now)

    def _declare_down(self, node: str, peer: _Peer, cause: str, now: float) -> Iterator[Effect]:
        peer.condemned = None
        self._fallen[node] = now
        if peer.verdict is Verdict.UP:
            yield from self._turn(node, peer, Verdict.SUSPECT, cause)  # nobody skips SUSPECT
        yield from self._turn(node, peer, Verdict.DOWN, cause)

    def _turn(self, node: str, peer: _Peer, new: Verdict, cause: str) -> Iterator[Effect]:
        if new is not peer.verdict:
            old, peer.verdict = peer.verdict, new
            yield VerdictChanged(node, peer.incarnation, old, new, cause)

    def _expire(self, now: float) -> Iterator[Effect]:
        unconfirmed: dict[str, str] = {}
        for node, peer in self._peers.items():
            due = self._due(peer)
            if due is not None and due <= now and peer.verdict is Verdict.UP:
                yield from self._turn(node, peer, Verdict.SUSPECT, "silence")
                due = self._due(peer)
            if due is None or now < due:
                continue
            if peer.confirm_sent_at is None:
                peer.confirm_sent_at = now
                yield Confirm(node, peer.incarnation)
            else:
                peer.confirm_sent_at = None
                unconfirmed[node] = "silence"
        # All at once, so that the brake sees those that fall in the same step together.
        yield from self._condemn(unconfirmed, now)
