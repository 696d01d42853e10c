"""`Storm`: processes that take part in a pattern are killed at random moments and started anew.

One for all patterns: whoever starts it says by *start* how a life of a participant begins, and reads what
all lives of it have said. Everything that is random comes from the dice, so that ``--seed`` repeats it
(not the timing of processes).
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from foundation_nats.base.clock import monotonic
from foundation_nats.chaos.checkers import Judgement
from foundation_nats.chaos.checkers.exclusion import Holding
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.cluster.children import Child

Start = Callable[[str, int], Child]
"""The life number n (from 0) of a participant."""


async def said(child: Child, word: str, timeout: float = 60) -> list[str]:
    """Wait until it has said *word*; its end before that fails the test."""
    await eventually(
        lambda: child.said(word) or child.process.poll() is not None, timeout=timeout, message=word
    )
    assert child.said(word), child.lines()
    return child.said(word)


async def crashed(child: Child, timeout: float = 30) -> None:
    """Wait until it has killed itself at a failpoint."""
    await eventually(lambda: child.process.poll() is not None, timeout=timeout, message="it dies")
    assert child.process.returncode == -signal.SIGKILL, child.lines()


def broker_dies(server: TestServer) -> Callable[[], Awaitable[None]]:
    """A blow: SIGKILL of the broker, and its restart."""

    async def blow() -> None:
        server.kill()
        await server.restart()

    return blow


def worker_dies(nodes: TestCluster, dice: random.Random) -> Callable[[], Awaitable[None]]:
    """A blow: SIGKILL of a worker, with all the agents that it runs."""

    async def blow() -> None:
        workers = [w for name in sorted(nodes.nodes) for w in nodes.nodes[name].workers()]
        dice.choice(workers).kill()

    return blow


def node_dies(nodes: TestCluster, dice: random.Random) -> Callable[[], Awaitable[None]]:
    """A blow: SIGKILL of a node, manager and workers."""

    async def blow() -> None:
        nodes.nodes[dice.choice(sorted(nodes.nodes))].kill_all()

    return blow


async def survived(
    start: Callable[[], Child],
    dice: random.Random,
    *,
    kills: int,
    blows: Mapping[int, Callable[[], Awaitable[None]]] | None = None,
    within: float = 0.15,
) -> Child:
    """Start an initiator, kill it within so many seconds, start it again …; the last one, which is not killed.

    *blows* are dealt besides, before the kill of that number.
    """
    for number in range(kills):
        child = start()
        await said(child, "begins")
        await asyncio.sleep(dice.uniform(0, within))
        if blows is not None and number in blows:
            await blows[number]()
        child.kill()
    return start()


class Storm:
    """Participants by name, each with all of its lives."""

    def __init__(self, start: Start, names: Iterable[str], dice: random.Random) -> None:
        self.lives: defaultdict[str, list[Child]] = defaultdict(list)
        self.killed_at: dict[Child, int] = {}
        """In nanoseconds of the clock of histories."""
        self._start = start
        self._dice = dice
        for name in names:
            self.begin(name)

    def begin(self, name: str) -> None:
        """The next life of *name*."""
        self.lives[name].append(self._start(name, len(self.lives[name])))

    def now(self, name: str) -> Child:
        """Its present life."""
        return self.lives[name][-1]

    def lines(self, name: str, word: str) -> list[str]:
        """What all lives of *name* have said that begins with *word*."""
        return [line for child in self.lives[name] for line in child.said(word)]

    async def kill(
        self,
        among: Collection[str],
        *,
        within: float = 0.3,
        ready: str = "begins",
        again: bool = True,
        who: Callable[[Collection[str]], str | None] | None = None,
    ) -> str:
        """SIGKILL one of *among* at a random moment, once it has begun; perhaps it comes *again*.

        Args:
            who: says whom to kill of those, at the moment itself; None: nobody is fit for it yet.
        """
        for name in sorted(among):
            await said(self.now(name), ready, timeout=30)
        await asyncio.sleep(self._dice.uniform(0, within))
        names = sorted(among)
        if who is None:
            victim = self._dice.choice(names)
        else:
            victim = await eventually(lambda: who(names), timeout=20, message="a victim")
        child = self.now(victim)
        child.kill()
        self.killed_at[child] = int(monotonic() * 1e9)
        if again:
            self.begin(victim)
        return victim

    async def until(
        self, word: str, more: int, names: Collection[str] | None = None, timeout: float = 30
    ) -> None:
        """Wait until each (of *names*) has said *word* so many times *more*, in its present life."""
        for name in self.lives if names is None else names:
            child = self.now(name)
            done = len(child.said(word))
            await eventually(
                lambda child=child, done=done: len(child.said(word)) >= done + more,
                timeout=timeout,
                message=f"{name} has said {word!r} {more} times",
            )

    async def ended(self, timeout: float = 60) -> None:
        """Wait until the last life of each has ended by itself, and well."""
        await eventually(
            lambda: all(lives[-1].process.poll() is not None for lives in self.lives.values()),
            timeout=timeout,
            message="all have ended",
        )
        for name in self.lives:
            assert self.now(name).process.returncode == 0, self.now(name).lines()

    def stop(self) -> None:
        """Kill all that still run."""
        for lives in self.lives.values():
            lives[-1].kill()
            self.killed_at.setdefault(lives[-1], int(monotonic() * 1e9))

    # ---- who was inside -------------------------------------------------------------

    def holdings(self, what: str) -> list[Holding]:
        """From ``inside TOKEN NS`` and ``outside TOKEN NS``; who was killed inside was there until then."""
        found: list[Holding] = []
        for name in self.lives:
            for child in self.lives[name]:
                ends = {int(t): int(ns) for _, t, ns in map(str.split, child.said("outside"))}
                for line in child.said("inside"):
                    _, token, begin = line.split()
                    end = ends.get(int(token), self.killed_at.get(child, 0))
                    found.append(Holding(what, name, int(token), int(begin), end))
        return found

    def insiders(self, names: Collection[str]) -> list[str]:
        """Who of *names* is inside, as far as they have said."""
        return [n for n in names if (self.now(n).lines() or [""])[-1].startswith("inside")]


def check_permits(holdings: Iterable[Holding], permits: int) -> Judgement:
    """Never more than *permits* at once, and no token twice."""
    judgement = Judgement("permits", 9)
    tokens: dict[int, str] = {}
    moments: list[tuple[int, int]] = []
    for item in holdings:
        judgement.looked_at += 1
        if item.token in tokens:
            judgement.violated(f"{item.holder} and {tokens[item.token]} share token {item.token}")
        tokens[item.token] = item.holder
        if item.end_ns > item.begin_ns:
            moments += [(item.begin_ns, 1), (item.end_ns, -1)]
    inside = 0
    # At the same moment who leaves does so before who comes.
    for at, step in sorted(moments):
        inside += step
        if inside > permits:
            judgement.violated(f"{inside} held {permits} permits at {at}")
    return judgement
