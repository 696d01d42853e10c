"""How long a fault takes away what it hits: one fault at a time, default timers, agents that are asked all the while.

A campaign's faults overlap, and its verdicts are made quicker than the defaults,
so its times say nothing about yours. Here each fault befalls a cluster at rest:
three nodes, agents that answer questions, nothing else going on. What is
measured, from the moment at which the fault began:

- *verdict*: the victim's node is declared down;
- *running*: the last of its agents is registered as running again;
- *answers*: the last of them has answered a question again, under a later epoch.

A broker takes no agents with it. There it is the longest time between two
receipts, and between two answers, that count, and how many agents moved
although they need not have.

An agent that is not back after `_PATIENCE_S` is counted, not left out. IO; the
statistics are `summary`, which is pure.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foundation_nats import Cluster
from foundation_nats.base.tasks import TaskScope
from foundation_nats.chaos.campaign import not_once
from foundation_nats.chaos.faults import KINDS, Fault
from foundation_nats.chaos.history import now_ns
from foundation_nats.chaos.lab import Lab
from foundation_nats.chaos.nemesis import Done, Nemesis
from foundation_nats.chaos.observer import Observer
from foundation_nats.chaos.workloads.base import manifest_text
from foundation_nats.errors import FoundationError

NODE_KINDS = {
    "worker.kill": 4.0,
    "node.kill": 4.0,
    "manager.kill": 7.0,
    "leader.kill": 4.0,
    "node.stop": 4.0,
    "node.freeze": 12.0,
    "link.hold": 12.0,
}
"""What takes agents away, and for how long it lasts: for longer than a failover takes."""
BROKER_KINDS = {1: ("broker.kill", "broker.stop"), 3: ("broker.leader_kill", "broker.step_down")}
"""What takes no agents away, by how many brokers there are."""

_BROKER_S = 3.0
_AGENTS = 12
_NAME = "probe"
_PATIENCE_S = 60.0
_SETTLE_S = 90.0
_TRIES = 4
"""To find a victim: agents are not always spread over all nodes, and the one that leads may have none."""
_REST_S = 2.0
"""Of quiet before the next fault."""
_ASK_TIMEOUT_S = 0.5
_SEND_TIMEOUT_S = 2.0
_EVERY_S = 0.02
_AFTER_BROKER_S = {1: 3.0, 3: 8.0}
"""By brokers: so long gaps are looked for after one is back; an election takes up to 9 s in all."""

Say = Callable[[str], None]

DEFAULTS: dict[str, Any] = {"liveness": {}, "control": {}, "worker": {}, "mailbox": {}}
"""In place of the lab's own timers."""


@dataclass(slots=True)
class Taken:
    """One fault that took agents away."""

    kind: str
    agents: int
    verdict_s: float | None = None
    """None: nobody was declared down, as with a worker that is started again."""
    running_s: dict[str, float] = field(default_factory=dict)
    """Agent to when it was registered as running again."""
    answers_s: dict[str, float] = field(default_factory=dict)
    """Agent to when it answered again."""

    @property
    def is_back(self) -> bool:
        """Whether every agent runs and answers again."""
        return len(self.running_s) == len(self.answers_s) == self.agents


@dataclass(slots=True)
class Gap:
    """One fault of a broker."""

    kind: str
    brokers: int
    write_s: float
    """The longest time without a receipt."""
    ask_s: float
    """The longest time without an answer of any agent."""
    moved: int


@dataclass(slots=True)
class Measured:
    """All faults that were measured."""

    taken: list[Taken] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    skipped: int = 0
    """Faults that found no victim."""


async def measure(
    per_kind: int,
    *,
    seed: int = 0,
    kinds: Mapping[str, float] = NODE_KINDS,
    broker_kinds: Mapping[int, Sequence[str]] = BROKER_KINDS,
    say: Say = lambda _: None,
) -> Measured:
    """Inflict *per_kind* faults of each kind, one at a time, on labs of their own.

    Raises:
        AssertionError: the cluster did not come to rest between two faults.
    """
    chance = random.Random(seed)
    found = Measured()
    # Kinds take turns, so that a slow minute of the machine is shared by all.
    plan = [kind for _ in range(per_kind) for kind in kinds]
    if plan:
        async with Lab(seed=seed, settings=DEFAULTS) as lab, _Probes(lab) as probes:
            for kind in plan:
                for _ in range(_TRIES):
                    await _rest(lab)
                    taken = await probes.take(kind, kinds[kind], chance)
                    if taken is not None:
                        found.taken.append(taken)
                        say(f"{kind}: {_told(taken)}")
                        break
                    found.skipped += 1
    for brokers, names in broker_kinds.items():
        async with (
            Lab(seed=seed, settings=DEFAULTS, brokers=brokers) as lab,
            _Probes(lab) as probes,
        ):
            for kind in [kind for _ in range(per_kind) for kind in names]:
                await _rest(lab)
                gap = await probes.interrupt(kind, brokers, chance)
                if gap is None:
                    found.skipped += 1
                    continue
                found.gaps.append(gap)
                say(
                    f"{kind} of {brokers}: no receipt for {gap.write_s:.2f} s, no answer for "
                    f"{gap.ask_s:.2f} s, {gap.moved} moved"
                )
    return found


def _told(taken: Taken) -> str:
    verdict = "" if taken.verdict_s is None else f"down after {taken.verdict_s:.2f} s, "
    if not taken.is_back:
        return f"{verdict}{len(taken.answers_s)} of {taken.agents} agents came back"
    last = max(taken.answers_s.values(), default=0.0)
    return f"{verdict}{taken.agents} agents answer after {last:.2f} s"


async def _rest(lab: Lab) -> None:
    """Heal, spread the agents anew, and wait until everybody is up and every agent runs once."""
    await lab.heal()
    await lab.wait_up(_SETTLE_S)
    # A node that came back is empty, and would be a victim that nobody misses.
    for replicas in (0, _AGENTS):
        await lab.eye.deployments.scale(_NAME, replicas)
        await _once(lab)
    await asyncio.sleep(_REST_S)


async def _once(lab: Lab) -> None:
    deadline = asyncio.get_running_loop().time() + _SETTLE_S
    while True:
        try:
            why = await not_once(lab.eye)
            if why is None and await lab.eye.leader() is None:
                why = "nobody leads"
        except FoundationError as error:
            why = str(error)
        if why is None:
            return
        assert asyncio.get_running_loop().time() < deadline, f"no rest between two faults: {why}"
        await asyncio.sleep(0.1)


class _Probes:
    """Agents that answer, and who asks them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._scope = TaskScope("failover")
        self._observer = Observer(lab.eye, watch_state=False)
        self._names = [f"{_NAME}-{number}" for number in range(_AGENTS)]
        self._count = 0

    async def __aenter__(self) -> _Probes:
        entry = {
            "name": _NAME,
            "run": "foundation_nats.chaos.agents:Register",
            "replicas": _AGENTS,
            "critical": True,
            "placement": {"strategy": "spread"},
        }
        eye = self._lab.eye
        await eye.deployments.apply(manifest_text([entry]))
        await eye.deployments.wait_settled([_NAME], timeout=60)
        await self._observer.open(self._scope)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()

    # ---- what takes agents away ---------------------------------------------------

    async def take(self, kind: str, lasts_s: float, chance: random.Random) -> Taken | None:
        """One fault; None: it found no victim."""
        leader = await self._lab.leader()
        running = self._lab.running()
        before = {name: dict(self._observer.hosted_by(name)) for name in self._lab.names}
        # Of nodes that do not lead, so that one figure means one thing; an empty one is no victim.
        others = [i for i, name in enumerate(running) if name != leader and before[name]]
        if not others:
            return None
        fault = Fault(0.0, kind, chance.choice(others), lasts_s, chance.random())
        nemesis = Nemesis(self._lab, [fault])
        trouble = asyncio.create_task(nemesis.run(), name=kind)
        try:
            while not nemesis.done or not (nemesis.done[0].victim or nemesis.done[0].skipped):
                await asyncio.sleep(0.001)
            done = nemesis.done[0]
            if done.skipped or not before[done.victim]:
                return None
            mine = before[done.victim]
            found = Taken(kind, len(mine))
            async with asyncio.TaskGroup() as group:
                for agent, epoch in mine.items():
                    group.create_task(self._until_it_answers(agent, epoch, done, found))
            await self._until_they_run(mine, done, found)
            found.verdict_s = next(
                (
                    down.at_s - done.begin_ns / 1e9
                    for down in self._observer.downs
                    if down.node == done.victim and down.at_s * 1e9 >= done.begin_ns
                ),
                None,
            )
            return found
        finally:
            await asyncio.wait([trouble])

    async def _until_it_answers(self, agent: str, epoch: int, done: Done, found: Taken) -> None:
        client = self._lab.clients[0]
        until = done.begin_ns + int(_PATIENCE_S * 1e9)
        while now_ns() < until:
            by = await _ask(client, agent)
            if by is not None and by["epoch"] > epoch:
                found.answers_s[agent] = (now_ns() - done.begin_ns) / 1e9
                return
            await asyncio.sleep(_EVERY_S)

    async def _until_they_run(self, mine: Mapping[str, int], done: Done, found: Taken) -> None:
        until = done.begin_ns + int(_PATIENCE_S * 1e9)
        while len(found.running_s) < len(mine) and now_ns() < until:
            for agent, epoch in mine.items():
                back = self._observer.back_after(agent, epoch, done.begin_ns)
                if back is not None:
                    found.running_s.setdefault(agent, (back - done.begin_ns) / 1e9)
            await asyncio.sleep(_EVERY_S)

    # ---- what takes none away -------------------------------------------------------

    async def interrupt(self, kind: str, brokers: int, chance: random.Random) -> Gap | None:
        """One fault of a broker; None: it found no victim."""
        before = {agent: seen.epoch for agent, seen in self._observer.homes.items()}
        lasts_s = 0.0 if kind == "broker.step_down" else _BROKER_S
        # Strength 0 names the stream of the signals, for faults that befall a stream.
        fault = Fault(0.0, kind, chance.randrange(1 << 16), lasts_s, 0.0)
        nemesis = Nemesis(self._lab, [fault])
        writes, answers = [now_ns()], [now_ns()]
        stop = asyncio.Event()
        probing = [
            asyncio.create_task(self._write(writes, stop)),
            *(asyncio.create_task(self._ask_all(n, answers, stop)) for n in range(3)),
        ]
        try:
            await asyncio.sleep(0.5)
            await nemesis.run()
            await asyncio.sleep(_AFTER_BROKER_S[brokers])
        finally:
            stop.set()
            await asyncio.gather(*probing)
        done = nemesis.done[0]
        if done.skipped:
            return None
        after = {agent: seen.epoch for agent, seen in self._observer.homes.items()}
        moved = sum(after.get(agent) != epoch for agent, epoch in before.items())
        return Gap(kind, brokers, longest_gap(writes), longest_gap(answers), moved)

    async def _write(self, at: list[int], stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._count += 1
            target = self._names[self._count % len(self._names)]
            with contextlib.suppress(FoundationError):
                await self._lab.clients[1].send(
                    target, "register.write", self._count, timeout=_SEND_TIMEOUT_S
                )
                at.append(now_ns())
            await asyncio.sleep(_EVERY_S)
        at.append(now_ns())

    async def _ask_all(self, first: int, at: list[int], stop: asyncio.Event) -> None:
        number = first
        while not stop.is_set():
            number += 1
            if await _ask(self._lab.clients[0], self._names[number % len(self._names)]) is not None:
                at.append(now_ns())
            await asyncio.sleep(_EVERY_S)
        at.append(now_ns())


async def _ask(client: Cluster, agent: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = await client.ask(agent, "register.read", timeout=_ASK_TIMEOUT_S)
    except FoundationError:
        return None
    return found


# ---- figures ----------------------------------------------------------------------


def longest_gap(at: Iterable[int]) -> float:
    """Seconds of the longest time between two of these instants."""
    ordered = sorted(at)
    return max((b - a for a, b in itertools.pairwise(ordered)), default=0) / 1e9


def summary(found: Measured) -> dict[str, Any]:
    """Figures by kind, as plain values."""
    nodes = {}
    for kind in dict.fromkeys(item.kind for item in found.taken):
        items = [item for item in found.taken if item.kind == kind]
        back = [item for item in items if item.is_back]
        nodes[kind] = {
            "what": KINDS[kind].what,
            "faults": len(items),
            "agents": sum(item.agents for item in items),
            "agents_not_back": sum(item.agents - len(item.answers_s) for item in items),
            # A fault whose agents are not all back has no time, and is counted beside it.
            "faults_not_back": len(items) - len(back),
            "verdict_s": _spread([i.verdict_s for i in items if i.verdict_s is not None]),
            "running_s": _spread([max(i.running_s.values()) for i in back]),
            "answers_s": _spread([max(i.answers_s.values()) for i in back]),
        }
    brokers = {}
    for kind, count in dict.fromkeys((item.kind, item.brokers) for item in found.gaps):
        gaps = [item for item in found.gaps if (item.kind, item.brokers) == (kind, count)]
        brokers[f"{kind}/{count}"] = {
            "what": KINDS[kind].what,
            "brokers": count,
            "faults": len(gaps),
            "write_s": _spread([item.write_s for item in gaps]),
            "ask_s": _spread([item.ask_s for item in gaps]),
            "moved": sum(item.moved for item in gaps),
        }
    return {"nodes": nodes, "brokers": brokers, "skipped": found.skipped, "patience_s": _PATIENCE_S}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Of so few values: how many, the median, and both ends."""
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "min": round(min(values), 3),
        "p50": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


__all__ = [
    "BROKER_KINDS",
    "NODE_KINDS",
    "Gap",
    "Measured",
    "Taken",
    "longest_gap",
    "measure",
    "summary",
]
