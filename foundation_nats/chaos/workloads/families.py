"""Parents and children: who is killed comes back, each end is told once, and in the end the tree is as the parents have it.

Guardians are told to have children and to have them no more, and children to end.
Each guardian writes down what it did and heard, in the order of its commits, so the
life of each child can be followed in it: it is had, starts, ends, is told of, and
may be had again. A permanent child comes back by itself, a transient one after
failures alone, a sick one fails at each start and is given up, and a head has a
child of its own, which ends with it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.agents import CHILDREN, LEAF
from foundation_nats.chaos.checkers import Judgement, check_answers, check_effects
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    SEND_TIMEOUT_S,
    Workload,
    dead_keys,
    in_parallel,
    send_until_receipted,
    states,
)

_ASK_TIMEOUT_S = 1.0


class Families(Workload):
    """Parents that have children and end them, and children that end by themselves."""

    name = "family"
    functions = ("send", "done", "who")
    needs_lab = True  # states of children outlive them
    guardians = 2

    def names(self) -> list[str]:
        """The parents."""
        return [f"guardian-{number}" for number in range(self.guardians)]

    def children(self) -> list[str]:
        """All that there may be, those of heads included."""
        found = [f"{parent}_{tag}" for parent in self.names() for tag in CHILDREN]
        return [*found, *(f"{parent}_head_{LEAF}" for parent in self.names())]

    def manifest(self) -> list[dict[str, Any]]:
        """The parents."""
        return [
            {
                "name": "guardian",
                "run": "foundation_nats.chaos.agents:Guardian",
                "replicas": self.guardians,
                "critical": True,
            }
        ]

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Per parent one who orders, one who tells children to end, and one who asks them."""
        await in_parallel(
            [
                partial(loop, clients[number % len(clients)], history, stopping, parent)
                for number, parent in enumerate(self.names())
                for loop in (self._order, self._end, self._ask)
            ]
        )

    async def _order(
        self, client: Cluster, history: History, stopping: asyncio.Event, parent: str
    ) -> None:
        process = f"{self.name}.order.{parent}"
        count = itertools.count(1)

        async def order(tag: str) -> None:
            # Mostly there is a child.
            verb = "have" if self.chance.random() < 0.7 else "end"
            key = f"{process}.{next(count)}"
            data = {"key": key, "tag": tag}
            await send_until_receipted(
                client, history, stopping, process, parent, f"family.{verb}", data, key
            )

        for tag in chain(CHILDREN, self._tags()):
            if stopping.is_set():
                break
            await order(tag)
            await asyncio.sleep(self.pause_s(0.25))
        # A tree of those alone who never ended by themselves would prove little.
        for tag in CHILDREN:
            await order(tag)

    async def _end(
        self, client: Cluster, history: History, stopping: asyncio.Event, parent: str
    ) -> None:
        process = f"{self.name}.done.{parent}"
        for count, tag in enumerate(self._tags(), 1):
            await asyncio.sleep(self.pause_s(0.6))
            if stopping.is_set():
                return
            key = f"{process}.{count}"
            child = f"{parent}_{tag}"
            with history.operation(process, "done", child, key) as operation:
                await client.send(child, "child.done", {"key": key}, id=key, timeout=SEND_TIMEOUT_S)
                operation.ok()

    async def _ask(
        self, client: Cluster, history: History, stopping: asyncio.Event, parent: str
    ) -> None:
        process = f"{self.name}.who.{parent}"
        for tag in self._tags():
            await asyncio.sleep(self.pause_s(0.05))
            if stopping.is_set():
                return
            child = f"{parent}_{tag}"
            with history.operation(process, "who", child) as operation:
                answer = await client.ask(child, "child.who", timeout=_ASK_TIMEOUT_S)
                operation.ok(by=answer)

    def _tags(self) -> Iterator[str]:
        """Without end."""
        while True:
            yield self.chance.choice(list(CHILDREN))

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """What is not applied, or who is not yet as the parents have it."""
        found = await self.collect(eye)
        for operation in self.mine(history):
            if operation.f != "send" or operation.outcome != "ok":
                continue
            applied = found["states"][operation.key].get("applied", ())
            buried = found["dead"].get(operation.key, ())
            if operation.value not in applied and operation.value not in buried:
                return f"{operation.key} has not applied {operation.value}"
        return next(iter(check_tree(found).violations), None)

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """States, dead letters, and which children are wished for and how they are."""
        wishes = await eye.deployments.wishes()
        agents = {info.id: info.status for info in await eye.agents.list()}
        children = self.children()
        return {
            "states": await states(eye, [*self.names(), *children]),
            "dead": await dead_keys(eye),
            "wished": {
                name: wish.spec.parent.id
                for name, wish in wishes.items()
                if name in children and wish.spec.parent is not None
            },
            "status": {child: str(agents[child]) for child in children if child in agents},
        }

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Each order was applied once, each end told once, one activation answered, and the tree is right."""
        mine = self.mine(history)
        sends = [item for item in mine if item.f == "send"]
        applied = {name: found["states"][name].get("applied", ()) for name in self.names()}
        receivers = {name: [name] for name in self.names()}
        answers = check_answers([item for item in mine if item.f == "who"])
        # Only of children that are there, at that moment.
        answers.may_be_idle = True
        return [
            check_effects(sends, applied, receivers, dead=found["dead"]),
            check_told(found["states"]),
            check_tree(found),
            answers,
        ]


# ---- what a parent wrote down -----------------------------------------------------


@dataclass(slots=True)
class _Life:
    """One child, as its parent knows it."""

    is_there: bool = False
    is_ending: bool = False
    again: bool = False
    """It shall be had again once it has ended."""
    order: int = 0
    """Of its newest life that was heard of."""
    started: int = 0
    """The newest life whose start was told."""
    ended: int = 0
    """The newest life whose end was told."""
    by_itself: int = 0
    """How often it ended without an order."""


def follow(log: Sequence[Sequence[Any]], judgement: Judgement, parent: str) -> dict[str, _Life]:
    """The children of one parent at the end of its log; what can't follow is a violation."""
    lives: dict[str, _Life] = {}
    for what, tag, *rest in log:
        judgement.looked_at += 1
        life = lives.setdefault(tag, _Life())
        match what:
            case "have" | "end":
                (was_there,) = rest
                if was_there != life.is_there:
                    sort = "forgotten" if life.is_there else "ghost"
                    judgement.violated(f"{parent} was told to {what} {tag}: {was_there}", sort)
                    life.is_there = was_there
                if what == "have":
                    life.again = life.is_ending
                    life.is_there = True
                else:
                    life.is_ending, life.again = life.is_there, False
            case "started":
                (order,) = rest
                if order <= life.started:
                    judgement.violated(
                        f"{parent} heard of start {order} of {tag} again", "repeated"
                    )
                elif order <= life.ended:
                    judgement.violated(f"{parent} heard of start {order} of {tag} after its end")
                life.started = max(order, life.started)
            case "exited":
                _exited(life, tag, rest, judgement, parent)
    return lives


def _exited(life: _Life, tag: str, rest: Sequence[Any], judgement: Judgement, parent: str) -> None:
    order, status, reason, is_there = rest
    if order <= life.ended:
        judgement.violated(f"{parent} heard of end {order} of {tag} again", "repeated")
        return
    life.ended = order
    if not life.is_there:
        judgement.violated(f"{parent} heard of an end of {tag}, which it did not have", "ghost")
    if is_there != life.again:
        judgement.violated(f"{parent} has {tag} after its end: {is_there}")
    if not life.is_ending:
        life.by_itself += 1
        expected = {"keen": "nothing", "sick": "failed"}.get(tag, "stopped")
        if status != expected:
            judgement.violated(f"{parent} heard that {tag} has {status}, unasked: {reason}")
    elif status == "refused":
        judgement.violated(f"{parent} was refused {tag}: {reason}")
    life.is_there, life.is_ending, life.again = is_there, False, False


def check_told(states: Mapping[str, Mapping[str, Any]]) -> Judgement:
    """Each start and each end was told at most once, in order, and no end without a cause.

    Args:
        states: of guardians and of their children.
    """
    judgement = Judgement("told", 2)
    for agent, state in sorted(states.items()):
        if "applied" in state:
            for tag, life in follow(state["log"], judgement, agent).items():
                said = states.get(f"{agent}_{tag}", {}).get("log", ())
                ends = len([key for key in said if key != "start"])
                if tag not in ("keen", "sick") and life.by_itself > ends:
                    judgement.violated(
                        f"{agent} heard {life.by_itself} times that {tag} had ended by itself, "
                        f"which it did {ends} times",
                        "ghost",
                    )
            continue
        counts = Counter(key for key in state.get("log", ()) if key != "start")
        for key, count in counts.items():
            if count > 1:
                judgement.violated(f"{agent} was ended by {key} {count} times", "repeated")
        for order, count in Counter(order for order, _ in state.get("ends", ())).items():
            if count > 1:
                judgement.violated(f"{agent} heard of end {order} {count} times", "repeated")
    return judgement


def check_tree(found: Mapping[str, Any]) -> Judgement:
    """Whom a parent has is there, runs and has been told of; whom it does not have is not there.

    Args:
        found: as `Families.collect` gives it, after everything has come to rest.
    """
    judgement = Judgement("tree", 6)
    states, wished, status = found["states"], found["wished"], found["status"]

    def expect(child: str, parent: str, *, is_there: bool) -> None:
        judgement.looked_at += 1
        if not is_there:
            if child in wished or child in status:
                judgement.violated(f"{child} is {status.get(child, 'wished for')}", "left behind")
            return
        if wished.get(child) != parent:
            judgement.violated(f"{child} of {parent} is not wished for", "lost")
        elif status.get(child) != "running":
            judgement.violated(f"{child} of {parent} is {status.get(child, 'nowhere')}", "lost")

    for parent, state in sorted(states.items()):
        if "applied" not in state:
            continue
        lives = follow(state["log"], Judgement("", 0), parent)
        for tag, life in lives.items():
            child = f"{parent}_{tag}"
            if life.is_ending:
                judgement.violated(f"{parent} waits for the end of {child}", "untold")
                continue
            if tag == "sick" and life.is_there:
                judgement.violated(f"{parent} has not heard that {child} has failed", "untold")
                continue
            expect(child, parent, is_there=life.is_there)
            log = states.get(child, {}).get("log") or ["start"]
            if life.is_there and log[-1] != "start":
                judgement.violated(f"{child} has ended by {log[-1]}, and {parent} has it", "untold")
            if life.is_there and life.started <= life.ended:
                judgement.violated(f"{parent} has not heard that {child} has started", "untold")
            if tag == "head":
                expect(f"{child}_{LEAF}", child, is_there=life.is_there)
    return judgement


__all__ = ["Families", "check_told", "check_tree", "follow"]
