"""A story: the size of a small cluster, how bad its network is, and what befalls it when; drawn from a seed.

Pure. The story is data, made before the run, so that one that fails can be cut
down event by event, stored, read by people and told again. Times are true
seconds from the start; everything is over at `until`, when the world heals.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from random import Random
from typing import Any


class Kind(StrEnum):
    """What may befall a cluster."""

    CUT = "cut"
    """The packets between a node and the bus are swallowed: ``both`` ways, or only ``out``/``in``."""
    RESET = "reset"
    """A node's connections to the bus are closed, and it can't get new ones for a while."""
    PAIR = "pair"
    """Messages from a node don't reach another one (or neither way); both reach the store."""
    FREEZE = "freeze"
    """A node stands still, as by SIGSTOP, and goes on with everything that came meanwhile."""
    CRASH = "crash"
    """A node ends, and begins anew later: ``kill`` (its connections close) or ``silent`` (they don't)."""
    STALL = "stall"
    """The store has no leader: nothing is written or read, while core messages flow."""
    LOSSY = "lossy"
    """Many core messages are lost or come twice."""
    SLOW = "slow"
    """Core messages, watches and the store take up to a second."""
    DRAIN = "drain"
    """A node leaves in good order and comes back."""
    WORKER = "worker"
    """The worker process of a node dies, and its agents with it."""
    WISH = "wish"
    """Somebody scales, changes, deletes or wishes for a deployment."""


LASTING = frozenset({Kind.CUT, Kind.RESET, Kind.PAIR, Kind.FREEZE, Kind.STALL, Kind.SLOW})
_DEFAULT_KINDS = tuple(kind for kind in Kind if kind is not Kind.PAIR)


@dataclass(frozen=True, slots=True)
class Fault:
    """One event of a story."""

    at: float
    kind: Kind
    node: str = ""
    other: str = ""
    length: float = 0.0
    how: str = ""

    @property
    def end(self) -> float:
        """When it is over."""
        return self.at + self.length

    def text(self) -> str:
        """One line for people."""
        who = self.node if not self.other else f"{self.node}, {self.other}"
        parts = [f"{self.at:7.2f}  {self.kind:<6}", who, self.how]
        if self.length:
            parts.append(f"for {self.length:.2f} s")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Wish:
    """One deployment of the world."""

    name: str
    replicas: int | None
    critical: bool = False
    policy: str | None = None
    strategy: str = "load_balanced"


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that is decided before the run; `seed` decides the rest."""

    seed: int
    nodes: int = 3
    slots: int = 4
    until: float = 40.0
    core_loss: float = 0.0
    """The share of core messages that get lost, at all times."""
    repeats: float = 0.0
    """The share of core messages that come twice."""
    kv_loss: float = 0.0
    """The share of requests to the store whose answer gets lost, at all times before `until`."""
    late_s: float = 0.05
    """How late core messages may be."""
    watch_late_s: float = 0.1
    """How far a watch may be behind."""
    wishes: tuple[Wish, ...] = ()
    faults: tuple[Fault, ...] = field(default=())
    without: tuple[str, ...] = ()
    """Names of the safeguards that were missing when the story was found; for people and tests."""

    @property
    def names(self) -> list[str]:
        """The nodes."""
        return [f"n{i}" for i in range(self.nodes)]

    def text(self) -> str:
        """The story for people."""
        lines = [
            f"seed {self.seed}: {self.nodes} nodes of {self.slots} slots; of core messages "
            f"{self.core_loss:.0%} are lost and {self.repeats:.0%} come twice, up to "
            f"{self.late_s:.2f} s late; {self.kv_loss:.0%} of the store's answers are lost, its "
            f"watches are up to {self.watch_late_s:.2f} s behind; all is well from "
            f"{self.until:.0f} s on",
            *(
                f"wish {wish.name}: {wish.replicas or 'one'}"
                f"{' critical' if wish.critical else ''}, {wish.strategy}"
                f"{', when its node is lost: ' + wish.policy if wish.policy else ''}"
                for wish in self.wishes
            ),
            *(fault.text() for fault in sorted(self.faults, key=lambda item: item.at)),
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The story as stored."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Story:
        """A stored story."""
        data: dict[str, Any] = json.loads(text)
        data["wishes"] = tuple(Wish(**item) for item in data["wishes"])
        data["without"] = tuple(data.get("without", ()))
        data["faults"] = tuple(
            Fault(**{**item, "kind": Kind(item["kind"])}) for item in data["faults"]
        )
        return cls(**data)


def _freeze_length(rng: Random) -> float:
    low, high = rng.choice(((0.2, 1.4), (1.4, 4.5), (4.5, 9.0), (9.0, 18.0)))
    return rng.uniform(low, high)


def _fault(rng: Random, kind: Kind, at: float, names: list[str], wishes: tuple[Wish, ...]) -> Fault:
    node = rng.choice(names)
    match kind:
        case Kind.CUT:
            length = rng.choice((rng.uniform(0.5, 4.0), rng.uniform(4.0, 18.0)))
            how = rng.choice(("both", "both", "out", "in"))
            return Fault(at, kind, node, length=length, how=how)
        case Kind.RESET:
            return Fault(at, kind, node, length=rng.choice((0.05, rng.uniform(0.1, 6.0))))
        case Kind.PAIR:
            other = rng.choice([name for name in names if name != node])
            how = rng.choice(("both", "one way"))
            return Fault(at, kind, node, other, rng.uniform(2.0, 20.0), how)
        case Kind.FREEZE:
            return Fault(at, kind, node, length=_freeze_length(rng))
        case Kind.CRASH:
            how = rng.choice(("kill", "kill", "silent"))
            return Fault(at, kind, node, length=rng.uniform(0.3, 15.0), how=how)
        case Kind.STALL:
            return Fault(at, kind, length=rng.uniform(4.0, 9.0))
        case Kind.LOSSY:
            return Fault(at, kind, length=rng.uniform(1.0, 10.0))
        case Kind.SLOW:
            return Fault(at, kind, length=rng.uniform(2.0, 15.0))
        case Kind.DRAIN:
            return Fault(at, kind, node, length=rng.uniform(0.5, 8.0))
        case Kind.WORKER:
            return Fault(at, kind, node)
        case Kind.WISH:
            wish = rng.choice(wishes)
            hows = ["change", "delete", "restore", "restore"]
            if wish.replicas is not None:
                hows += ["scale 0", "scale 1", "scale 3"]
            return Fault(at, kind, wish.name, how=rng.choice(hows))


def generate(seed: int, *, pairs: bool = False) -> Story:
    """The story of *seed*; with *pairs* nodes may also be cut from each other alone."""
    rng = Random(seed)
    nodes = rng.choice((3, 3, 3, 4, 5))
    names = [f"n{i}" for i in range(nodes)]
    slots = rng.choice((3, 4, 8))
    # Who waits for one node alone may wait for ever where others can take its place.
    policies = (None, None, "restart", "unavailable" if slots == 8 else None)
    strategies = (
        "load_balanced",
        "load_balanced",
        "random",
        "spread",
        "pack",
        "consistent_hash",
        "local_preferred",
    )
    wishes = (
        Wish("core", 2, critical=True, strategy=rng.choice(strategies)),
        Wish("side", rng.choice((2, 3)), policy=rng.choice(policies)),
        Wish("solo", None, policy=rng.choice(policies), strategy=rng.choice(strategies)),
    )
    until = rng.uniform(25.0, 45.0)
    # Swarm testing: a run with few kinds of faults reaches states that one with all never does.
    kinds = [kind for kind in (tuple(Kind) if pairs else _DEFAULT_KINDS) if rng.random() < 0.4]
    if pairs and Kind.PAIR not in kinds:
        kinds.append(Kind.PAIR)
    faults = []
    if kinds:
        for _ in range(rng.choice((2, 4, 6, 9))):
            at = rng.uniform(3.0, until - 1.0)
            fault = _fault(rng, rng.choice(kinds), round(at, 3), names, wishes)
            length = min(fault.length, until - fault.at)
            faults.append(replace(fault, length=round(length, 3)))
    bad = rng.random() < 0.5
    return Story(
        seed=seed,
        nodes=nodes,
        slots=slots,
        until=round(until, 3),
        core_loss=rng.choice((0.0, 0.01)) if bad else 0.0,
        repeats=rng.choice((0.0, 0.05)) if bad else 0.0,
        kv_loss=rng.choice((0.0, 0.02, 0.1)) if bad else 0.0,
        late_s=rng.choice((0.02, 0.2, 0.5)) if bad else 0.02,
        watch_late_s=rng.choice((0.05, 0.5, 2.0)) if bad else 0.05,
        wishes=wishes,
        faults=tuple(sorted(faults, key=lambda item: item.at)),
    )
