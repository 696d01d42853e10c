"""Which faults there are, and the plan of a round: pure, decided by its seed before anything runs.

A plan is data. It names victims by role ("the leader", "node 2"), because who
leads is only known when the fault is due.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Part = Literal["worker", "node", "manager", "leader", "broker", "link", "client", "agent"]


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
) -> list[Fault]:
    """The faults of one round.

    One follows the other after a pause, and now and then (*overlap*) before the
    last one has ended. Every seed leaves some kinds out ("swarm testing": Groce
    et al., 2012), so that a frequent fault doesn't hide what a rare one does.

    Raises:
        ValueError: an unknown kind, or none that these brokers allow.
    """
    unknown = set(kinds or ()) - KINDS.keys()
    if unknown:
        raise ValueError(
            f"unknown fault {', '.join(sorted(unknown))}; there are: {', '.join(KINDS)}"
        )
    chance = random.Random(seed)
    allowed = [
        kind
        for kind in KINDS.values()
        if (kinds is None or kind.name in kinds) and kind.brokers <= brokers
    ]
    if not allowed:
        raise ValueError("none of these faults is possible with so few brokers")
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


def describe(faults: Sequence[Fault]) -> str:
    """The plan for people, a line per fault."""
    return "\n".join(
        f"{fault.at_s:7.2f} s  {fault.kind:<20} victim {fault.victim % 10}  "
        f"for {fault.duration_s:.2f} s"
        for fault in faults
    )
