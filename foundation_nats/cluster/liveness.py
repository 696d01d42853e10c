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
more likely that the observer is the sick one.

Obligations of the caller: feed `step` with every heartbeat and probe result,
and call it no later than `deadline`; answer each `Confirm`; say `Forgot` when a
node's record is gone, which is what bounds the memory here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import assert_never

PROBES_NEEDED = 3
PROBE_SPAN_S = 0.4
CONFIRM_TIMEOUT_S = 1.0
CONFIRM_AGAIN_S = 1.0
STORM_WINDOW_S = 10.0
LAG_BUDGET_S = 0.5
PATIENCE_MAX = 8.0


class Verdict(StrEnum):
    """What is believed of one incarnation of a node."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat (or the first sight of a record) of this incarnation."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Left:
    """The node said good-bye."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Forgot:
    """The node's record is gone: nothing more will be asked about it."""

    node: str


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer to `Confirm`; *reachable* None: there was nobody to ask."""

    node: str
    incarnation: int
    reachable: bool | None


@dataclass(frozen=True, slots=True)
class ProbeMissed:
    """Nobody listens: neither the manager nor any worker."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """Somebody listens; no proof that the node is well."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class BusDisturbed:
    """Our connection dropped or came back, a write stalled, or a stream changed its leader."""


@dataclass(frozen=True, slots=True)
class OwnLag:
    """How late our own event loop is: a sick observer is patient with others."""

    lag_s: float


@dataclass(frozen=True, slots=True)
class ForceFailover:
    """A person says that the mass failure is real."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Heard
    | Left
    | Forgot
    | Confirmed
    | ProbeMissed
    | ProbeAnswered
    | BusDisturbed
    | OwnLag
    | ForceFailover
    | Tick
)


@dataclass(frozen=True, slots=True)
class VerdictChanged:
    """The belief about a node has changed; *old* None: it was unknown."""

    node: str
    incarnation: int
    old: Verdict | None
    new: Verdict
    cause: str
    """``heard``, ``silence``, ``no_responders`` or ``left``."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Ask another node whether it can reach this one."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class StormBegan:
    """Many nodes seem dead at once; no verdicts until *until* (or `ForceFailover`)."""

    nodes: tuple[str, ...]
    until: float


@dataclass(frozen=True, slots=True)
class StormEnded:
    """Verdicts are given again."""


Effect = VerdictChanged | Confirm | StormBegan | StormEnded


@dataclass(slots=True)
class _Peer:
    incarnation: int
    heard_at: float
    verdict: Verdict
    down_at: float | None = None
    """When it was declared down, other than by leaving."""
    misses: int = 0
    first_miss_at: float = 0.0
    confirm_sent_at: float | None = None
    confirm_next_at: float | None = None
    condemned: str | None = None
    """The cause for which it would be down, were it not for the storm."""


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
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _grace_until: float = float("-inf")
    _storm_until: float | None = None
    _patience: float = 1.0

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

    def statistics(self) -> LivenessStatistics:
        """Numbers for debugging."""
        verdicts = [peer.verdict for peer in self._peers.values()]
        return LivenessStatistics(
            peers=len(verdicts),
            up=verdicts.count(Verdict.UP),
            suspect=verdicts.count(Verdict.SUSPECT),
            down=verdicts.count(Verdict.DOWN),
            storm_until=self._storm_until,
            grace_until=None if self._grace_until == float("-inf") else self._grace_until,
        )

    def deadline(self) -> float | None:
        """When `step` must be called next, if nothing happens before."""
        times = [self._next(peer) for peer in self._peers.values()]
        known = [time for time in times if time is not None]
        if self._storm_until is not None:
            known.append(self._storm_until)
        return min(known) if known else None

    def _next(self, peer: _Peer) -> float | None:
        if peer.verdict is Verdict.DOWN or peer.condemned is not None:
            return None
        if peer.confirm_sent_at is not None:
            return peer.confirm_sent_at + CONFIRM_TIMEOUT_S
        if peer.verdict is Verdict.UP:
            return peer.heard_at + self.suspect_after_s * self._patience
        due = peer.heard_at + self.down_after_s * self._patience
        if peer.confirm_next_at is not None:
            due = max(due, peer.confirm_next_at)
        return max(due, self._grace_until)

    # ---- stepping ---------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take note of *event* and of the time; return what changed and what to ask."""
        effects: list[Effect] = []
        match event:
            case Heard(node, incarnation):
                effects.extend(self._heard(node, incarnation, now))
            case Left(node, incarnation):
                effects.extend(self._left(node, incarnation))
            case Forgot(node):
                self._peers.pop(node, None)
            case Confirmed(node, incarnation, reachable):
                effects.extend(self._confirmed(node, incarnation, reachable, now))
            case ProbeMissed(node, incarnation):
                effects.extend(self._missed(node, incarnation, now))
            case ProbeAnswered(node, incarnation):
                peer = self._live(node, incarnation)
                if peer is not None:
                    peer.misses = 0
            case BusDisturbed():
                self._disturbed(now)
            case OwnLag(lag_s):
                self._patience = min(PATIENCE_MAX, 1.0 + max(0.0, lag_s) / LAG_BUDGET_S)
            case ForceFailover():
                if self._storm_until is not None:
                    self._storm_until = now
            case Tick():
                pass
            case _:
                assert_never(event)
        effects.extend(self._end_storm(now))
        effects.extend(self._expire(now))
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
            yield VerdictChanged(node, incarnation, None, Verdict.UP, "heard")
        elif incarnation == peer.incarnation and peer.verdict is not Verdict.DOWN:
            peer.heard_at = now
            peer.misses = 0
            peer.confirm_sent_at = peer.confirm_next_at = None
            peer.condemned = None
            yield from self._turn(node, peer, Verdict.UP, "heard", now)
        # Otherwise a ghost is speaking: an older incarnation, or one already
        # declared down. Its agents may be running elsewhere by now.

    def _left(self, node: str, incarnation: int) -> Iterator[Effect]:
        peer = self._live(node, incarnation)
        if peer is not None:
            old, peer.verdict = peer.verdict, Verdict.DOWN
            yield VerdictChanged(node, incarnation, old, Verdict.DOWN, "left")

    def _disturbed(self, now: float) -> None:
        self._grace_until = max(self._grace_until, now + self.bus_grace_s)
        for peer in self._peers.values():
            peer.heard_at = now
            peer.misses = 0
            peer.confirm_sent_at = peer.confirm_next_at = None
            peer.condemned = None

    def _missed(self, node: str, incarnation: int, now: float) -> Iterator[Effect]:
        peer = self._live(node, incarnation)
        if peer is None or now < self._grace_until:
            return
        if peer.misses == 0:
            peer.first_miss_at = now
        peer.misses += 1
        if peer.misses >= PROBES_NEEDED and now - peer.first_miss_at >= PROBE_SPAN_S - 1e-6:
            yield from self._condemn(node, peer, "no_responders", now)

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
            yield from self._condemn(node, peer, "silence", now)

    def _condemn(self, node: str, peer: _Peer, cause: str, now: float) -> Iterator[Effect]:
        """Declare a node down, unless that would be one of too many."""
        if now < self._grace_until or peer.condemned is not None:
            return
        recent = [
            other
            for other in self._peers.values()
            if other.down_at is not None and now - other.down_at <= STORM_WINDOW_S
        ]
        alive = [other for other in self._peers.values() if other.verdict is not Verdict.DOWN]
        dying = len(recent) + 1
        known = len(recent) + len(alive)
        if self._storm_until is None and dying >= 2 and dying >= self.storm_fraction * known:
            self._storm_until = now + self.storm_hold_s
            peer.condemned = cause
            yield StormBegan(self._condemned(), self._storm_until)
        elif self._storm_until is not None:
            peer.condemned = cause
        else:
            yield from self._turn(node, peer, Verdict.DOWN, cause, now)

    def _condemned(self) -> tuple[str, ...]:
        return tuple(node for node, peer in self._peers.items() if peer.condemned is not None)

    def _end_storm(self, now: float) -> Iterator[Effect]:
        if self._storm_until is None or now < self._storm_until:
            return
        self._storm_until = None
        yield StormEnded()
        for node, peer in self._peers.items():
            if peer.condemned is not None:
                cause, peer.condemned = peer.condemned, None
                yield from self._turn(node, peer, Verdict.DOWN, cause, now)

    def _turn(
        self, node: str, peer: _Peer, new: Verdict, cause: str, now: float
    ) -> Iterator[Effect]:
        if new is peer.verdict:
            return
        if new is Verdict.DOWN:
            if peer.verdict is Verdict.UP:
                # Nobody skips SUSPECT.
                yield from self._turn(node, peer, Verdict.SUSPECT, cause, now)
            peer.down_at = now
        old, peer.verdict = peer.verdict, new
        yield VerdictChanged(node, peer.incarnation, old, new, cause)

    def _expire(self, now: float) -> Iterator[Effect]:
        for node, peer in self._peers.items():
            if peer.verdict is Verdict.DOWN or peer.condemned is not None:
                continue
            silent_s = now - peer.heard_at
            if peer.verdict is Verdict.UP and silent_s >= self.suspect_after_s * self._patience:
                yield from self._turn(node, peer, Verdict.SUSPECT, "silence", now)
            if (
                silent_s < self.down_after_s * self._patience
                or now < self._grace_until
                or (peer.confirm_next_at is not None and now < peer.confirm_next_at)
            ):
                continue
            if peer.confirm_sent_at is None:
                peer.confirm_sent_at = now
                yield Confirm(node, peer.incarnation)
            elif now - peer.confirm_sent_at >= CONFIRM_TIMEOUT_S:
                peer.confirm_sent_at = None
                yield from self._condemn(node, peer, "silence", now)
