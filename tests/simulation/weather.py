"""What the network and the store do to a message at a given time, as the story says.

Pure. A message over a silent cut is held until the cut ends if TCP would still
deliver it then (the cut is shorter than the client takes to notice), and is lost
otherwise. Between two nodes that are cut from each other alone it is lost.
"""

from __future__ import annotations

from random import Random

from tests.simulation.story import Fault, Kind, Story

LOST = float("inf")
SERVER_NOTICES_S = 12.0
"""After so long a silence the server drops a client: its subscriptions are gone."""
CALM_AFTER_S = 15.0
"""So long after a disturbance is over a node may still suffer from it."""


class Weather:
    """The story as seen by messages."""

    def __init__(self, story: Story) -> None:
        self.story = story
        names = story.names
        self._cuts: dict[str, list[tuple[Fault, float]]] = {name: [] for name in names}
        self._pairs: dict[tuple[str, str], list[Fault]] = {}
        self._stalls: list[Fault] = []
        self._slow: list[Fault] = []
        self._lossy: list[Fault] = []
        self._trouble: dict[str, list[Fault]] = {name: [] for name in names}
        for fault in story.faults:
            match fault.kind:
                case Kind.CUT:
                    self._cuts[fault.node].append((fault, self.notice_s(fault)))
                case Kind.RESET:
                    self._cuts[fault.node].append((fault, 0.0))
                case Kind.PAIR:
                    self._pairs.setdefault((fault.node, fault.other), []).append(fault)
                    if fault.how == "both":
                        self._pairs.setdefault((fault.other, fault.node), []).append(fault)
                    self._trouble[fault.other].append(fault)
                case Kind.STALL:
                    self._stalls.append(fault)
                case Kind.SLOW:
                    self._slow.append(fault)
                case Kind.LOSSY:
                    self._lossy.append(fault)
                    for name in names:
                        self._trouble[name].append(fault)
                case Kind.FREEZE | Kind.CRASH | Kind.DRAIN | Kind.WORKER | Kind.WISH:
                    pass
            if fault.node in self._trouble and fault.kind is not Kind.WORKER:
                self._trouble[fault.node].append(fault)

    def notice_s(self, fault: Fault) -> float:
        """How long a client takes to notice this cut: two pings of 2 s without an answer."""
        return Random(f"{self.story.seed} {fault.at}").uniform(4.0, 6.0)

    def _link(self, name: str, way: str, at: float, rng: Random) -> float:
        """When a message that reaches this link at *at* has passed it."""
        for fault, notice in self._cuts[name]:
            if fault.at <= at < fault.end and fault.how in ("", "both", way):
                if fault.length > notice:
                    return LOST
                at = fault.end + rng.uniform(0.0, 0.3)
        return at

    def out(self, name: str, at: float, rng: Random) -> float:
        """When a message of *name* arrives at the bus."""
        return self._link(name, "out", at, rng) if self._cuts[name] else at

    def into(self, name: str, at: float, rng: Random) -> float:
        """When a message arrives from the bus at *name*."""
        return self._link(name, "in", at, rng) if self._cuts[name] else at

    def core(self, source: str, target: str, at: float, rng: Random) -> float:
        """When a core message arrives."""
        if self._pairs:
            for fault in self._pairs.get((source, target), ()):
                if fault.at <= at < fault.end:
                    return LOST
        at = self.out(source, at, rng)
        return at if at == LOST else self.into(target, at, rng)

    def is_cut(self, name: str, at: float) -> bool:
        """Whether nothing passes between *name* and the bus, one way at least."""
        return any(fault.at <= at < fault.end for fault, _ in self._cuts[name])

    def is_dropped(self, name: str, at: float) -> bool:
        """Whether the server has given this client up."""
        return any(
            fault.at + (SERVER_NOTICES_S if fault.kind is Kind.CUT else 0.0) <= at < fault.end
            and fault.how != "in"
            for fault, _ in self._cuts[name]
        )

    def stalled_until(self, at: float) -> float | None:
        """When the store goes on; None: it works."""
        for fault in self._stalls:
            if fault.at <= at < fault.end:
                return fault.end
        return None

    def late_s(self, at: float) -> float:
        """How late a core message may be."""
        if any(fault.at <= at < fault.end for fault in self._slow):
            return 1.0
        return self.story.late_s

    def loss(self, at: float) -> float:
        """The share of core messages that get lost."""
        if any(fault.at <= at < fault.end for fault in self._lossy):
            return 0.15
        return self.story.core_loss if at < self.story.until else 0.0

    def was_disturbed(self, name: str, at: float) -> bool:
        """Whether *name* suffers, or did lately, from anything of its own."""
        return any(
            fault.at <= at <= fault.end + CALM_AFTER_S for fault in self._trouble.get(name, ())
        )
