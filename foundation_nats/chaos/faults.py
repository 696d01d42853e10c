"""Which faults there are, and the plan of a round: pure, decided by its seed before anything runs.

A plan is data. It names victims by role ("the leader", "node 2"), because who
leads is only known when the fault is due. It is the same on every machine: what a
machine doesn't allow is skipped when it is due, with the reason.

New kinds change what a seed draws. So kinds have editions, and a seed that found
something is repeated in the edition it was found in.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Part = Literal["worker", "node", "manager", "leader", "broker", "link", "client", "agent", "disk"]

EDITION = 2
"""The latest edition of the kinds."""
_CANDIDATES = 32
"""So many seeds are drawn for one of a campaign."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of fault."""

    name: str
    part: Part
    shortest_s: float
    longest_s: float
    """How long it lasts; a killed process is started again after that."""
    weight: float = 1.0
    brokers: int = 1
    """Needs at least so many brokers."""
    what: str = ""
    edition: int = 1
    """Since which edition it is drawn."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("worker.kill", "worker", 0, 0, 3, what="SIGKILL of a worker process"),
        Kind("worker.freeze", "worker", 0.5, 4, what="SIGSTOP of a worker, SIGCONT later"),
        Kind("node.kill", "node", 0.5, 3, 3, what="SIGKILL of a manager and its workers"),
        Kind("manager.kill", "manager", 0.5, 3, what="SIGKILL of a manager alone"),
        Kind("node.freeze", "node", 0.5, 8, 2, what="SIGSTOP of a whole node, SIGCONT later"),
        Kind("node.stop", "node", 0.5, 3, what="SIGTERM of a node: it drains"),
        Kind("node.stop_kill", "node", 1, 3, what="SIGTERM, and SIGKILL within a second"),
        Kind("leader.kill", "leader", 0.5, 3, 2, what="SIGKILL of the node that leads"),
        Kind("leader.freeze", "leader", 0.5, 8, what="SIGSTOP of the node that leads"),
        Kind("broker.kill", "broker", 0.1, 2, 2, what="SIGKILL of a broker, restart on its store"),
        Kind("broker.freeze", "broker", 0.2, 4, what="SIGSTOP of a broker"),
        Kind("broker.stop", "broker", 0.1, 1, what="clean stop of a broker, and its restart"),
        Kind(
            "broker.leader_kill",
            "broker",
            0.5,
            3,
            2,
            3,
            "SIGKILL of the broker that leads a stream",
        ),
        Kind(
            "broker.step_down", "broker", 0, 0, 1, 3, "the leader of a stream is told to step down"
        ),
        Kind("broker.roll", "broker", 1, 1, 0.5, 3, "a rolling restart of every broker"),
        Kind("broker.cut", "broker", 1, 8, 1, 3, "one broker is cut off from the others"),
        Kind("link.cut", "link", 0.1, 3, 2, what="a node's connections are closed and refused"),
        Kind("link.hold", "link", 0.5, 8, 2, what="a node's packets are swallowed, both ways"),
        Kind("link.hold_up", "link", 0.5, 8, what="what a node sends is swallowed"),
        Kind("link.hold_down", "link", 0.5, 8, what="what a node should receive is swallowed"),
        Kind("link.delay", "link", 1, 6, what="a node's packets are late by 50 to 300 ms"),
        Kind("link.flap", "link", 2, 6, what="a node's link is cut and healed every 200 ms"),
        Kind("link.storm", "link", 0.1, 0.5, what="every node's connections are cut at once"),
        Kind(
            "link.mangle",
            "link",
            2,
            6,
            2,
            what="live copies are dropped, doubled and swapped on their way to a node",
        ),
        Kind("client.hold_down", "client", 0.2, 3, what="senders don't get their receipts"),
        Kind("client.cut", "client", 0.1, 1, what="the senders' connections are cut"),
        Kind("clock.jump", "node", 2, 6, what="a node's wall clock jumps by up to an hour"),
        Kind("agent.exit", "agent", 0, 0, what="a handler ends its worker process"),
        Kind("agent.crash", "agent", 0, 0, what="a handler crashes in native code"),
        Kind("agent.block", "agent", 0.5, 3, what="a handler holds its worker's event loop"),
        Kind("agent.leak", "agent", 0, 0, 0.5, what="a handler leaks 32 MB"),
        Kind("agent.hang", "agent", 1, 6, what="a handler waits and does not end", edition=2),
        Kind("agent.raise", "agent", 0, 0, what="a handler fails at every try", edition=2),
        Kind("worker.cut", "worker", 0.1, 3, what="a worker's connections are cut", edition=2),
        Kind(
            "worker.hold",
            "worker",
            0.5,
            8,
            what="a worker's packets are swallowed, its manager's pass",
            edition=2,
        ),
        Kind("worker.hold_up", "worker", 0.5, 8, what="what a worker sends is lost", edition=2),
        Kind("worker.hold_down", "worker", 0.5, 8, what="a worker hears nothing", edition=2),
        Kind(
            "worker.squeeze",
            "worker",
            0.5,
            3,
            what="a worker gets no more memory than it has",
            edition=2,
        ),
        Kind("manager.cut", "manager", 0.1, 3, what="a manager's connections are cut", edition=2),
        Kind(
            "manager.hold",
            "manager",
            0.5,
            8,
            what="a manager's packets are swallowed, its workers' pass",
            edition=2,
        ),
        Kind("link.choke", "link", 1, 6, what="a node's line is narrow: 4 to 64 KB/s", edition=2),
        Kind(
            "client.slow_read", "client", 1, 4, what="clients read slowly: 2 to 32 KB/s", edition=2
        ),
        Kind("client.churn", "client", 1, 4, what="clients come and go all the time", edition=2),
        Kind(
            "clock.split",
            "node",
            2,
            6,
            what="the clocks of a manager and of its workers jump apart",
            edition=2,
        ),
        Kind("disk.slow", "disk", 1, 4, what="a broker's disk does few writes a second", edition=2),
        Kind("disk.full", "disk", 0.5, 2, 0.5, what="a broker's disk is full", edition=2),
    )
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a plan."""

    at_s: float
    """Seconds after the round's trouble begins."""
    kind: str
    victim: int
    """Which of the candidates, modulo how many there are then."""
    duration_s: float
    strength: float
    """Between 0 and 1: how far to jump, how late to be, which stream …"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan(
    seed: int,
    seconds: float,
    *,
    kinds: Collection[str] | None = None,
    brokers: int = 1,
    pause_s: tuple[float, float] = (0.3, 2.0),
    overlap: float = 0.3,
    edition: int = EDITION,
) -> list[Fault]:
    """The faults of one round.

    One follows the other after a pause, and now and then (*overlap*) before the
    last one has ended. Every seed leaves some kinds out ("swarm testing": Groce
    et al., 2012), so that a frequent fault doesn't hide what a rare one does.

    Raises:
        ValueError: an unknown kind, or none that these brokers allow.
    """
    allowed = possible(kinds, brokers=brokers, edition=edition)
    chance = random.Random(seed)
    if kinds is None:
        allowed = [kind for kind in allowed if chance.random() < 0.6] or allowed
    faults: list[Fault] = []
    at = chance.uniform(*pause_s)
    while at < seconds:
        (kind,) = chance.choices(allowed, [kind.weight for kind in allowed])
        duration = chance.uniform(kind.shortest_s, kind.longest_s)
        faults.append(
            Fault(
                round(at, 3),
                kind.name,
                chance.randrange(1 << 16),
                round(duration, 3),
                round(chance.random(), 3),
            )
        )
        at += chance.uniform(*pause_s)
        if chance.random() >= overlap:
            at += duration
    return faults


def possible(
    kinds: Collection[str] | None = None, *, brokers: int = 1, edition: int = EDITION
) -> list[Kind]:
    """The kinds that may be drawn with so many brokers, in their order.

    Raises:
        ValueError: an unknown kind, or none that these brokers allow.
    """
    if not 1 <= edition <= EDITION:
        raise ValueError(f"there is no edition {edition} of the faults; the latest is {EDITION}")
    unknown = set(kinds or ()) - KINDS.keys()
    if unknown:
        raise ValueError(
            f"unknown fault {', '.join(sorted(unknown))}; there are: {', '.join(KINDS)}"
        )
    allowed = [
        kind
        for kind in KINDS.values()
        if (kind.name in kinds if kinds is not None else kind.edition <= edition)
        and kind.brokers <= brokers
    ]
    if not allowed:
        raise ValueError("none of these faults is possible with so few brokers")
    return allowed


def next_seed(
    draw: Callable[[], int],
    happened: Iterable[str],
    planned: Callable[[int], Sequence[Fault]],
) -> int:
    """A seed for the next round of a campaign: of several, the one with most that is new.

    The rounds of a campaign are short and the kinds many; drawn blindly, rare ones never come.
    What a seed does stays its own: this chooses between seeds and changes no plan.

    Args:
        draw: gives seeds.
        happened: the kind of each fault that took effect so far.
        planned: the plan of a seed.
    """
    often = Counter(happened)

    def news(seed: int) -> float:
        # A kind that has not been there counts 1, one that was there thrice a quarter.
        return sum(1 / (1 + often[kind]) for kind in {fault.kind for fault in planned(seed)})

    return max((draw() for _ in range(_CANDIDATES)), key=news)


def describe(faults: Sequence[Fault]) -> str:
    """The plan for people, a line per fault."""
    return "\n".join(
        f"{fault.at_s:7.2f} s  {fault.kind:<20} victim {fault.victim % 10}  "
        f"for {fault.duration_s:.2f} s"
        for fault in faults
    )
