"""`BehaviourTree`: an agent that decides by a tree of small parts, which is ticked by signals.

A tick goes from the root to what is to be done now. Each part says success, failure, or that it is still
running; the next tick goes on there. Where the tree stands is part of the agent's state, so a tick is one
commit: after a crash it is done again from where the last one ended, and what it did outside by
``ctx.once`` is not repeated. Between two ticks nothing runs and nothing is kept in memory.

A part that raises an `ActionError` has failed; any other error undoes the tick, which is tried again. A
tree whose shape has changed since it was stored begins anew.

Memory is a table from the path of a part to what it must remember; a part that ends forgets all below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.handling import on
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.state import State as BaseState
from foundation_nats.errors import ActionError, ConfigError
from foundation_schemas import RecoveredFrom

TICK = "tree.tick"
START = "tree.start"
_TIMER = "tree-tick"


class Status(StrEnum):
    """What a part of the tree says of itself."""

    SUCCESS = "success"
    FAILURE = "failure"
    RUNNING = "running"


_OVER = (Status.SUCCESS, Status.FAILURE)


class Standing(BaseModel):
    """Where a tree stands; a part of the agent's state."""

    memory: dict[str, dict[str, Any]] = Field(default_factory=dict)
    shape: str = ""
    ticks: int = 0
    result: str = ""
    """Of the whole tree, once it has ended."""


class Tick:
    """One tick, as a part sees it."""

    __slots__ = ("agent", "path", "standing")

    def __init__(self, agent: Any, standing: Standing, path: str) -> None:
        self.agent = agent
        self.standing = standing
        self.path = path

    @property
    def now(self) -> datetime:
        """The agent's clock."""
        found: datetime = self.agent.ctx.now()
        return found

    @property
    def memory(self) -> dict[str, Any]:
        """What this part remembers until it ends; JSON."""
        return self.standing.memory.setdefault(self.path, {})

    async def of(self, child: Node, index: int = 0) -> Status:
        """Tick a child; when it ends it forgets."""
        path = f"{self.path}.{index}"
        found = await child.tick(Tick(self.agent, self.standing, path))
        if found is not Status.RUNNING:
            self._forget(path)
        return found

    def drop(self, index: int) -> None:
        """Let a child that is running be as if it had never begun."""
        self._forget(f"{self.path}.{index}")

    def _forget(self, path: str) -> None:
        memory = self.standing.memory
        for key in [x for x in memory if x == path or x.startswith(f"{path}.")]:
            del memory[key]


class Node:
    """A part of a tree; subclass it and write `tick` for one of your own."""

    children: tuple[Node, ...] = ()
    name: str = ""

    async def tick(self, tick: Tick) -> Status:
        """Do what is to be done now."""
        raise NotImplementedError

    def shape(self) -> str:
        """What it is made of; memory is of use only to the same shape."""
        inner = ",".join(child.shape() for child in self.children)
        return f"{type(self).__name__}:{self.name}({inner})"


class _Composite(Node):
    """A part of several."""

    def __init__(self, *children: Node) -> None:
        wrong = [child for child in children if not isinstance(child, Node)]
        if wrong or not children:
            raise ConfigError(
                f"{type(self).__name__} needs parts of a tree, not {wrong[0] if wrong else 'nothing'}"
            )
        self.children = children


class Do(Node):
    """A leaf: a function of the agent, or the name of one of its methods; async or plain.

    It returns a `Status`, or True for success and False for failure, or None for success.
    """

    def __init__(self, what: str | Callable[[Any], Any], name: str = "") -> None:
        self.what = what
        self.name = name or (what if isinstance(what, str) else getattr(what, "__name__", "do"))

    async def tick(self, tick: Tick) -> Status:
        what = self.what
        try:
            found = getattr(tick.agent, what)() if isinstance(what, str) else what(tick.agent)
            if inspect.isawaitable(found):
                found = await found
        except ActionError:
            return Status.FAILURE
        if isinstance(found, Status):
            return found
        if found is None or isinstance(found, bool):
            return Status.FAILURE if found is False else Status.SUCCESS
        raise ConfigError(
            f"part {self.name!r} of a tree returned {found!r}: use a Status, a bool or None"
        )


class Wait(Node):
    """Is running for so many seconds, then succeeds."""

    def __init__(self, seconds: float) -> None:
        if seconds <= 0:
            raise ConfigError("Wait: seconds must be positive")
        self.seconds = seconds

    async def tick(self, tick: Tick) -> Status:
        return Status.SUCCESS if _since(tick) >= self.seconds else Status.RUNNING


def _since(tick: Tick) -> float:
    began = tick.memory.setdefault("began", tick.now.isoformat())
    return (tick.now - datetime.fromisoformat(began)).total_seconds()


class Sequence(_Composite):
    """One after the other, until one fails."""

    _goes_on: ClassVar[Status] = Status.SUCCESS

    def __init__(self, *children: Node, again: bool = False) -> None:
        """*again*: each tick begins with the first, to look whether it still holds."""
        super().__init__(*children)
        self.again = again

    async def tick(self, tick: Tick) -> Status:
        first = 0 if self.again else tick.memory.get("at", 0)
        running = tick.memory.get("at")
        for index in range(first, len(self.children)):
            found = await tick.of(self.children[index], index)
            if found is self._goes_on:
                continue
            if running is not None and running != index:
                tick.drop(running)
            if found is Status.RUNNING:
                tick.memory["at"] = index
            return found
        return self._goes_on


class Selector(Sequence):
    """One after the other, until one succeeds."""

    _goes_on = Status.FAILURE


class Parallel(_Composite):
    """All of them at each tick, until *need* have succeeded (all, unless said), or too many failed."""

    def __init__(self, *children: Node, need: int | None = None) -> None:
        super().__init__(*children)
        self.need = len(children) if need is None else need
        if not 1 <= self.need <= len(children):
            raise ConfigError(f"Parallel: need={need} of {len(children)}")

    async def tick(self, tick: Tick) -> Status:
        ended: dict[str, str] = tick.memory.setdefault("ended", {})
        for index, child in enumerate(self.children):
            if str(index) not in ended:
                found = await tick.of(child, index)
                if found in _OVER:
                    ended[str(index)] = found
        good = sum(found == Status.SUCCESS for found in ended.values())
        if good >= self.need:
            return Status.SUCCESS
        if len(ended) - good > len(self.children) - self.need:
            return Status.FAILURE
        return Status.RUNNING


class _Decorator(Node):
    """A part around one."""

    def __init__(self, child: Node) -> None:
        if not isinstance(child, Node):
            raise ConfigError(f"{type(self).__name__} needs a part of a tree, not {child!r}")
        self.children = (child,)

    @property
    def child(self) -> Node:
        """What it stands around."""
        return self.children[0]


class Invert(_Decorator):
    """Success for failure, and the other way round."""

    async def tick(self, tick: Tick) -> Status:
        found = await tick.of(self.child)
        if found is Status.RUNNING:
            return found
        return Status.FAILURE if found is Status.SUCCESS else Status.SUCCESS


class Always(_Decorator):
    """Succeeds, whatever comes of its part."""

    async def tick(self, tick: Tick) -> Status:
        found = await tick.of(self.child)
        return found if found is Status.RUNNING else Status.SUCCESS


class Retry(_Decorator):
    """Its part is tried again at the next tick when it fails, *times* in all."""

    _again: ClassVar[Status] = Status.FAILURE

    def __init__(self, child: Node, times: int) -> None:
        super().__init__(child)
        if times < 1:
            raise ConfigError(f"{type(self).__name__}: times must be at least 1")
        self.times = times

    async def tick(self, tick: Tick) -> Status:
        found = await tick.of(self.child)
        if found is not self._again:
            return found
        tick.memory["done"] = done = tick.memory.get("done", 0) + 1
        return found if done >= self.times else Status.RUNNING


class Repeat(Retry):
    """Its part is done *times*, one tick each; ends when it fails."""

    _again = Status.SUCCESS


class Timeout(_Decorator):
    """Fails when its part has been running for so many seconds; looked at with each tick."""

    def __init__(self, child: Node, seconds: float) -> None:
        super().__init__(child)
        if seconds <= 0:
            raise ConfigError("Timeout: seconds must be positive")
        self.seconds = seconds

    async def tick(self, tick: Tick) -> Status:
        if _since(tick) >= self.seconds:
            return Status.FAILURE
        return await tick.of(self.child)


def shape_of(root: Node) -> str:
    """A short name for what the tree is made of."""
    return blake2b(root.shape().encode(), digest_size=8).hexdigest()


async def tick_once(root: Node, agent: Any, standing: Standing) -> Status:
    """One tick of the whole tree."""
    shape = shape_of(root)
    if standing.shape != shape:
        standing.shape, standing.memory = shape, {}
    standing.ticks += 1
    whole = Tick(agent, standing, "r")
    found = await whole.of(root)
    standing.result = "" if found is Status.RUNNING else str(found)
    if found is not Status.RUNNING:
        standing.memory = {}
    return found


class BehaviourTree(Agent):
    """An agent that is a tree.

    It is ticked every `tick_every` seconds until it has ended, by ``tree.tick`` signals, and by
    ``await self.tick()`` in a handler of your own, to react at once. ``tree.start`` begins anew.

    Example:
        >>> class Robot(BehaviourTree):
        ...     tick_every = 5.0
        ...     tree = Selector(
        ...         Sequence(Do("is_empty"), Timeout(Do("charge"), 600)),
        ...         Retry(Do("deliver"), 3),
        ...     )
        ...
        ...     class State(BehaviourTree.State):
        ...         battery: float = 1.0
        ...
        ...     def is_empty(self) -> bool:
        ...         return self.state.battery < 0.2
    """

    tree: ClassVar[Node]
    tick_every: ClassVar[float | None] = 1.0
    """None: by signals alone."""
    loops: ClassVar[bool] = False
    """Whether it begins anew when it has ended, with the next tick."""

    class State(BaseState):
        """With where the tree stands."""

        tree: Standing = Field(default_factory=Standing)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        root = getattr(cls, "tree", None)
        if root is None:
            return
        name = cls.__qualname__
        if not isinstance(root, Node):
            raise ConfigError(f"{name}.tree must be a part of a tree, not {root!r}")
        if "tree" not in cls.State.model_fields:
            raise ConfigError(f"{name}.State must be a subclass of BehaviourTree.State")
        if cls.tick_every is not None and cls.tick_every <= 0:
            raise ConfigError(f"{name}.tick_every must be positive")
        for leaf in _leaves(root):
            if isinstance(leaf.what, str) and not callable(getattr(cls, leaf.what, None)):
                raise ConfigError(f"{name}: there is no method {leaf.what!r} for its tree")

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Starts the clock; call it from your own."""
        if recovered_from is None:
            self._wind()

    def _wind(self) -> None:
        if self.tick_every is not None:
            self.ctx.schedule(TICK, name=_TIMER, every=self.tick_every)

    async def tick(self) -> Status:
        """Tick the tree once, within the handler in hand; one that has ended stays so, unless it `loops`."""
        standing: Standing = self.state.tree
        if standing.result and not self.loops:
            return Status(standing.result)
        found = await tick_once(self.tree, self, standing)
        if found is not Status.RUNNING and not self.loops and self.tick_every is not None:
            self.ctx.cancel(_TIMER)
        return found

    @on(TICK)
    async def _on_tick(self, signal: Signal[Any]) -> str:
        """Of its clock, or from whoever wants it to go on."""
        return str(await self.tick())

    @on(START)
    async def _on_start_anew(self, signal: Signal[Any]) -> str:
        """Begin anew."""
        self.state.tree = Standing()
        self._wind()
        return str(await self.tick())


def _leaves(root: Node) -> list[Do]:
    mine = [root] if isinstance(root, Do) else []
    return mine + [leaf for child in root.children for leaf in _leaves(child)]


__all__ = [
    "Always",
    "BehaviourTree",
    "Do",
    "Invert",
    "Node",
    "Parallel",
    "Repeat",
    "Retry",
    "Selector",
    "Sequence",
    "Standing",
    "Status",
    "Tick",
    "Timeout",
    "Wait",
    "tick_once",
]
