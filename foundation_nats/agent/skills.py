"""`Skill`: a part of an agent that can be reused: state, handlers, actions, sensors, config in one class.

Pure. A skill is mounted by putting an instance of it into ``Agent.skills``; several of one kind have
different names. Its state is a field of that name in the agent's state, so it is committed with it. Its
signal types begin with the name (unless ``prefixed = False``), and the agent's own handlers of a type come
before it. What it emits and does is the agent's.

Not isolated: a skill can reach its agent, and shares its mailbox, its limits and its failures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar
from weakref import ReferenceType, ref

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from foundation_nats.agent.context import Context
from foundation_nats.agent.handling import Handling, handling_of, marked
from foundation_nats.agent.middleware import Middleware
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Payload
from foundation_nats.agent.state import State
from foundation_nats.errors import ConfigError
from foundation_schemas import RecoveredFrom, Target

_BEHIND = 10
"""So much less priority than the agent's own handlers."""


class SkillConfig(BaseModel):
    """The base of a skill's `Config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Skill:
    """Subclass it; mount it by ``skills = [Chat(), Notes("work", limit=3)]``.

    Args:
        name: under which it is mounted; None: `Skill.name`.
        config: of its `Config`; the agent's own ``config[name]`` goes before it.

    Raises:
        ConfigError: the name or a value is wrong; says which.

    Example:
        >>> class Counting(Skill):
        ...     class State(State):
        ...         total: int = 0
        ...
        ...     @on("add")  # of an agent: counting.add
        ...     def add(self, signal: Signal[int]) -> int:
        ...         self.state.total += signal.data
        ...         return self.state.total
    """

    name: ClassVar[str] = ""
    """Under which it is mounted unless said otherwise; empty: the class's name in lower case."""
    State: ClassVar[type[State]] = State
    Config: ClassVar[type[SkillConfig]] = SkillConfig
    prefixed: ClassVar[bool] = True
    """Whether its signal types are within its name."""
    capabilities: ClassVar[Collection[str]] = ()
    subscriptions: ClassVar[Sequence[Any]] = ()
    middleware: ClassVar[Sequence[Middleware]] = ()
    actions: ClassVar[Sequence[Any]] = ()
    sensors: ClassVar[Sequence[Any]] = ()
    requires: ClassVar[Collection[str]] = ()
    """Names of skills that must be mounted beside it."""

    _owner: ReferenceType[AnyAgent]
    """Weakly: an agent that sleeps or ends shall not keep its memory till a full collection."""

    def __init__(self, name: str | None = None, **config: Any) -> None:
        kind = type(self)
        self.mount = name or kind.name or kind.__name__.lower()
        if not self.mount.isidentifier() or self.mount.startswith("_"):
            raise ConfigError(f"{kind.__qualname__}: {self.mount!r} can't be a skill's name")
        self._values = config
        self.config = self._configured(config)

    def _configured(self, values: dict[str, Any]) -> Any:
        try:
            return type(self).Config.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"skill {self.mount} ({type(self).__qualname__}): {where}: {first['msg']}"
            ) from error

    # ---- what its methods use ----------------------------------------------------

    @property
    def agent(self) -> AnyAgent:
        """Whose part it is; it lives no longer than that.

        Raises:
            ReferenceError: it has gone.
        """
        agent = self._owner()
        if agent is None:
            raise ReferenceError(f"the agent of skill {self.mount} has gone")
        return agent

    @property
    def id(self) -> str:
        """The agent's name."""
        return self.agent.id

    @property
    def ctx(self) -> Context:
        """As `Agent.ctx`."""
        return self.agent.ctx

    @property
    def state(self) -> Any:
        """Its slice of the agent's state."""
        return getattr(self.agent.state, self.mount)

    def emit(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        to: str | Target,
        ttl: float | None = None,
        deadline: datetime | None = None,
    ) -> None:
        """As `Agent.emit`."""
        self.agent.emit(type, data, to=to, ttl=ttl, deadline=deadline)

    # ---- what depends on how it is mounted -------------------------------------------

    def more_handlings(self) -> list[Handling]:
        """Further handlers, as functions of agent and signal."""
        return []

    def found_actions(self) -> Mapping[str, Any]:
        """Actions that only the running agent knows of, by name; see `MCPTools`."""
        return {}

    # ---- hooks ---------------------------------------------------------------------

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Called before the agent's own `on_start`, in the order of mounting."""

    async def on_stop(self, reason: str) -> None:
        """Called after the agent's own `on_stop`, in the opposite order."""


def check_skills(owner: str, skills: Iterable[Skill]) -> None:
    """Whether these can be mounted together.

    Raises:
        ConfigError: two have one name, or one is missing that another requires.
    """
    seen: set[str] = set()
    for skill in skills:
        if not isinstance(skill, Skill):
            raise ConfigError(
                f"{owner}.skills holds {skill!r}: mount an instance, as in skills = [Chat()]"
            )
        if skill.mount in seen:
            raise ConfigError(f"{owner}: two skills are called {skill.mount!r}: give one a name")
        seen.add(skill.mount)
    for skill in skills:
        missing = sorted(set(skill.requires) - seen)
        if missing:
            raise ConfigError(f"{owner}: skill {skill.mount} requires {', '.join(missing)}")


def state_with(kind: type[State], skills: Sequence[Skill]) -> type[State]:
    """*kind* with a field for each skill's state.

    Raises:
        ConfigError: it has another field of that name.
    """
    fields: dict[str, Any] = {}
    for skill in skills:
        slice_ = type(skill).State
        known = kind.model_fields.get(skill.mount)
        if known is None:
            fields[skill.mount] = (slice_, Field(default_factory=slice_))
        elif known.annotation is not slice_:
            raise ConfigError(
                f"{kind.__qualname__}.{skill.mount} and the skill {skill.mount} share a name"
            )
    if not fields:
        return kind
    made = create_model(kind.__name__, __base__=kind, __module__=kind.__module__, **fields)
    made.__qualname__ = kind.__qualname__
    return made


def skill_handlings(skills: Iterable[Skill]) -> list[Handling]:
    """The handlers of mounted skills, as functions of agent and signal.

    Raises:
        ConfigError: as `handling_of`.
    """
    found = []
    for skill in skills:
        kind = type(skill)
        for name, member, mark in marked(kind):
            plain = handling_of(kind, name, member, mark)
            found.append(
                Handling(
                    f"{skill.mount}.{mark.type}" if kind.prefixed else mark.type,
                    _bound(skill.mount, plain.function),
                    plain.is_async,
                    plain.adapter,
                    plain.priority - _BEHIND,
                    plain.when,
                    plain.timeout,
                    f"{skill.mount}.{name}",
                )
            )
        found += skill.more_handlings()
    return found


def _bound(mount: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(agent: AnyAgent, signal: Any) -> Any:
        return method(agent.skill[mount], signal)

    return call


def bind_skills(agent: AnyAgent, skills: Iterable[Skill]) -> dict[str, Any]:
    """The agent's own instances of its skills, by name.

    Raises:
        ConfigError: the agent's configuration of one is wrong.
    """
    bound = {}
    for skill in skills:
        mine = copy.copy(skill)
        mine._owner = ref(agent)
        over = agent.ctx.config.get(skill.mount)
        if over is not None:
            if not isinstance(over, dict):
                raise ConfigError(f"config.{skill.mount} must be an object: it is a skill's")
            mine.config = mine._configured({**skill._values, **over})
        bound[skill.mount] = mine
    return bound
