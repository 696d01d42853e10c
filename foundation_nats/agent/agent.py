"""`Agent`: what users write.

An agent is a class with a nested `State`, handlers marked with `on`, and
optional hooks. It never meets NATS: a handler changes `self.state`, calls
`self.emit` and returns the reply; the runtime stores all of it together, then
publishes. A handler that raises leaves no trace.

This module is independent of the cluster, so that agents run in plain tests.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel

from foundation_nats.agent.actions.catalogue import (
    CATALOGUE,
    INSTRUCTION,
    action_handlings,
    actions_of,
    found_actions,
    run_instruction,
)
from foundation_nats.agent.context import Context, Emission, as_target, checked_type, freeze
from foundation_nats.agent.directives import DIRECTIVE, Directive, apply, execute
from foundation_nats.agent.family import Supervision
from foundation_nats.agent.handling import Handling, handlings, on
from foundation_nats.agent.kin import ORDER, carry_out
from foundation_nats.agent.middleware import Middleware
from foundation_nats.agent.prompts import PROMPT
from foundation_nats.agent.signal import Payload, Signal, typed
from foundation_nats.agent.skills import (
    Skill,
    bind_skills,
    check_skills,
    skill_handlings,
    state_with,
)
from foundation_nats.agent.state import State
from foundation_nats.errors import ConfigError
from foundation_nats.signaling.schedules import deadline_text
from foundation_schemas import (
    NodeLoss,
    OnNodeLoss,
    PlacementPolicy,
    RateLimit,
    RecoveredFrom,
    RestartLimit,
    Subscription,
    SubscriptionMode,
    Target,
)
from foundation_schemas.base import is_name
from foundation_schemas.signal import check_attempts

if typing.TYPE_CHECKING:
    from foundation_nats.agent.sensors.sensor import Sensor


class Verdict(BaseModel):
    """What a person says of a step in doubt."""

    key: str
    signal: str | None = None
    """The id of the signal that the step belongs to."""
    done: bool
    result: Any = None
    """What the step would have returned."""


class Agent:
    """A named object with typed state, a durable mailbox and handlers.

    Subclass it. While it runs, one activation at a time handles one signal at
    a time; between signals its state is stored. `self.state` is what the last
    handler left; `self.id` is its name.
    """

    State: ClassVar[type[State]] = State
    durable: ClassVar[bool] = True
    """False: state lives in memory only, signals are at least once."""
    capabilities: ClassVar[typing.Collection[str]] = ()
    """What it provides: targets of ``capability:NAME`` and ``any:NAME``."""
    labels: ClassVar[typing.Mapping[str, str]] = {}
    """Of its own: targets of ``label:EXPRESSION``."""
    subscriptions: ClassVar[typing.Sequence[str | Subscription]] = ()
    """Topics whose signals it is sent; see `subscribe`."""
    skills: ClassVar[typing.Sequence[Skill]] = ()
    """Parts that bring state, handlers, actions and sensors of their own; see `Skill`."""
    actions: ClassVar[typing.Sequence[Any]] = ()
    """What it can do by name, for ``action.NAME`` signals and as tools; see `Action`."""
    middleware: ClassVar[typing.Sequence[Middleware]] = ()
    """What stands around its handlers, the first outermost; see `Middleware`."""
    sensors: ClassVar[typing.Sequence[Sensor]] = ()
    """What it senses of the outside while it runs; see `foundation_nats.agent.sensors`."""
    critical: ClassVar[bool] = False
    """Whether it is restarted elsewhere at once when its node is lost."""
    resources: ClassVar[typing.Mapping[str, float]] = {}
    """What it takes of its node's capacity; the wish for it may say other numbers."""
    placement: ClassVar[typing.Mapping[str, Any] | PlacementPolicy | None] = None
    """Where it may and should run, as in a manifest; the wish for it may say otherwise, key by key."""
    restart: ClassVar[str | None] = None
    """``permanent``, ``transient`` or ``temporary``, unless the wish for it says one."""
    restart_limit: ClassVar[RestartLimit | None] = None
    """How many restarts are enough to give it up, unless the wish for it says it."""
    rate: ClassVar[typing.Mapping[str, float] | RateLimit | None] = None
    """How fast it takes in what it is sent: ``{"per_s": 100, "burst": 10, "per_sender": 5}``, unless
    the wish for it says it."""
    on_node_loss: ClassVar[OnNodeLoss | NodeLoss | typing.Mapping[str, Any] | str | None] = None
    """What becomes of it when its node is lost, unless the wish for it says it: ``restart``,
    ``unavailable``, ``stop``, or ``{"policy": "stop", "grace_s": 30}`` to wait for the node first."""
    supervision: ClassVar[Supervision] = Supervision()
    """How it looks after the children that it spawns; see `Context.spawn`."""

    inherit_deadline: ClassVar[bool] = False
    """Whether what it emits is not handled after the deadline of the signal that caused it."""
    hibernate_after: ClassVar[float | None] = None
    """Seconds without a signal after which it sleeps: its memory is freed, and the next signal wakes
    it. `on_stop("hibernated")` is called before, `on_start` after. None: `worker.hibernate_after_s`.
    Not for agents that are not durable or have sensors."""

    history: ClassVar[int | None] = None
    """How many of its handled signals stay in its mailbox, for `foundation history` and `replay`; None:
    `mailbox.history`. Not for agents that are not durable."""

    state: Any
    ctx: Context
    _layers: ClassVar[tuple[Middleware, ...]] = ()
    """All the middleware, outermost first."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        seen: dict[tuple[str, int], str] = {}
        for name, member in vars(cls).items():
            for mark in getattr(member, "__foundation_on__", ()):
                if mark.when is not None:
                    continue
                key = mark.type, mark.priority
                if key in seen:
                    raise ConfigError(
                        f"{cls.__qualname__}: both {seen[key]} and {name} handle {mark.type!r}"
                    )
                seen[key] = name
        check_skills(cls.__qualname__, cls.skills)
        if not (isinstance(cls.State, type) and issubclass(cls.State, State)):
            raise ConfigError(
                f"{cls.__qualname__}.State must be a subclass of foundation_nats.State"
            )
        cls.State = state_with(cls.State, cls.skills)
        cls._layers = (
            *cls.middleware,
            *(item for skill in cls.skills for item in skill.middleware),
        )

    @classmethod
    def _foundation_more(cls) -> list[Handling]:
        return [*skill_handlings(cls.skills), *action_handlings(cls)]

    def __init__(self) -> None:
        """Take no arguments: configuration is in `self.config`, state in `self.state`."""

    @property
    def id(self) -> str:
        """The agent's name."""
        return self.ctx.agent_id

    @property
    def config(self) -> dict[str, Any]:
        """The ``config`` of the manifest entry, or of `agents.start`."""
        return self.ctx.config

    def emit(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        to: str | Target,
        ttl: float | None = None,
        deadline: datetime | None = None,
        attempts: int | None = None,
        on_error: str = "",
        inherit_deadline: bool | None = None,
        urgent: bool = False,
    ) -> None:
        """Send a signal because of the one in hand, once its effects are stored.

        It reaches the receiver's state exactly once, and not at all if this
        handler raises. *data* is taken as it is now. After *ttl* seconds, or after
        *deadline*, it is not handled any more.

        *type* may be a `Payload`, which is type and data in one.

        Args:
            attempts: how often the receiver tries to handle it; else as its node is set.
            on_error: if it is given up (its handler fails, nobody is there, it is too late …), a signal
                of this type comes back to this agent, as durably as the dead letter; its data
                is a `GivenUp`. Of a signal for many, one for each receiver that gives it up.
            inherit_deadline: that of the signal in hand counts too, the earlier of both; None: as the
                class says by `inherit_deadline`.
            urgent: it overtakes what waits and is not urgent.

        Raises:
            ValueError: *to* is no target, *ttl* is not positive, or *attempts* not from 1 to 100.
            TypeError: *data* is not JSON.
        """
        type, data = typed(type, data)
        inherits = self.inherit_deadline if inherit_deadline is None else inherit_deadline
        now, cause = self.ctx.now(), self.ctx.signal
        until = deadline_text(now, ttl=ttl, deadline=deadline)
        inherited = None
        if inherits and cause is not None:
            inherited = deadline_text(now, deadline=cause.deadline)
        until = min(filter(None, (until, inherited)), default=None)
        self.ctx._emissions.append(
            Emission(
                as_target(to),
                checked_type(type),
                freeze(data),
                until,
                attempts=check_attempts(attempts),
                on_error=checked_type(on_error) if on_error else "",
                urgent=urgent,
            )
        )

    def direct(self, *directives: Directive) -> None:
        """Have these carried out once the effects of the signal in hand are stored.

        To return them from a handler does the same.

        Raises:
            ConfigError: one is no directive.
            ValueError, TypeError, StateInvalidError: what one says can't be done.
        """
        for directive in directives:
            apply(self, directive)

    @property
    def skill(self) -> dict[str, Any]:
        """Its own instances of its skills, by name."""
        found: dict[str, Any] | None = self.__dict__.get("_skill")
        if found is None:
            found = self.__dict__["_skill"] = bind_skills(self, self.skills)
        return found

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Called before the first signal of every activation.

        *recovered_from* names the earlier activation (node, epoch, reason) whose
        state this one continues; None at the very first. A parameter named
        ``recovered`` is given the same value.
        """

    async def ready(self) -> bool:
        """Whether it may be counted as running; asked after `on_start` until it says so.

        A health gate: a rollout goes on when those that were restarted are ready, and is
        rolled back when they don't get ready. To raise means that it never will. Until
        then nothing is handled; after `worker.ready_timeout_s` the start has failed.
        """
        return True

    async def on_stop(self, reason: str) -> None:
        """Called when the agent is stopped in good order; not when its process dies."""

    async def handle_cluster_signal(self, signal: Signal[Any]) -> Any:
        """Called for signals of type ``cluster.*`` that have no handler of their own.

        A class that has this method, or handlers for such types, subscribes to them by itself:
        ``cluster.node_up``, ``node_down``, ``leader_changed``, ``rebalanced``, and
        ``about_to_move``, which comes to the one that is moved, before `on_stop`.
        """

    @on(DIRECTIVE)
    async def _on_directive(self, signal: Signal[Any]) -> None:
        """One of its own directives."""
        await execute(self, signal.data)

    @on(ORDER, timeout=3600.0)
    async def _on_child_order(self, signal: Signal[Any]) -> None:
        """One of its own orders about a child."""
        await carry_out(self, signal.data)

    @on(INSTRUCTION)
    async def _on_instruction(self, signal: Signal[Any]) -> None:
        """One of its own `RunInstruction`."""
        await run_instruction(self, signal.data)

    @on(CATALOGUE)
    async def _on_catalogue(self, signal: Signal[Any]) -> list[dict[str, Any]]:
        """What it can do, as tools."""
        from foundation_nats.agent.tools import catalogue

        tools = [*catalogue(type(self)), *catalogue(found_actions(self).values())]
        return [tool.model_dump(mode="json") for tool in tools]

    @on("foundation.step.resolve")
    async def _on_step_resolve(self, signal: Signal[Verdict]) -> dict[str, Any]:
        """A person has found out about a step in doubt."""
        found = signal.data
        return await self.ctx._resolve_step(
            found.key, found.signal, done=found.done, result=found.result
        )


def start_arguments(cls: type[Agent], recovered: RecoveredFrom | None) -> dict[str, Any]:
    """The keyword arguments that this class's `on_start` takes."""
    names = inspect.signature(cls.on_start).parameters
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    offered = {"recovered_from": recovered, "recovered": recovered}
    return {
        name: value
        for name, value in offered.items()
        if name in names or (accepts_all and name == "recovered_from")
    }


async def begin(agent: Agent, recovered: RecoveredFrom | None) -> None:
    """The hooks before the first signal: of its skills, then its own."""
    for skill in agent.skill.values() if agent.skills else ():
        await skill.on_start(recovered)
    await agent.on_start(**start_arguments(type(agent), recovered))


async def end(agent: Agent, reason: str) -> None:
    """The hooks after the last signal: its own, then of its skills."""
    await agent.on_stop(reason)
    for skill in reversed(agent.skill.values()) if agent.skills else ():
        await skill.on_stop(reason)


def provided(cls: type[Agent]) -> list[str]:
    """The capabilities the class declares, and ``prompt`` if it answers prompts.

    Raises:
        ConfigError: one of them is no valid name.
    """
    declared = [
        cls.capabilities,
        *(skill.capabilities for skill in cls.skills),
        list(actions_of(cls)),
    ]
    names = sorted({n for item in declared for n in ([item] if isinstance(item, str) else item)})
    for name in names:
        if not is_name(name):
            raise ConfigError(f"{cls.__qualname__}: {name!r} is not a valid capability name")
    if PROMPT in handlings(cls).types() and PROMPT not in names:
        names = sorted([*names, PROMPT])
    return names


A = TypeVar("A", bound=type[Agent])


def subscribe(
    topic: str, *, mode: str = SubscriptionMode.ALL, group: str | None = None
) -> Callable[[A], A]:
    """Have every agent of a class sent what is published on *topic*, as durably as any signal.

    Args:
        topic: a pattern: ``orders.*`` is one more word, ``orders.>`` one or more.
        mode: ``all``: every agent that subscribes gets it; ``one-of-group``: one of each group.
        group: its name; without it those of one deployment are a group.

    Raises:
        ConfigError: an argument is wrong.

    Example:
        >>> @subscribe("orders.*", mode="one-of-group")
        ... class Billing(Agent): ...
    """
    try:
        wanted = Subscription(topic=topic, mode=SubscriptionMode(mode), group=group)
    except ValueError as error:
        raise ConfigError(f"subscribe({topic!r}, {mode!r}): {error}") from error

    def mark(cls: A) -> A:
        cls.subscriptions = (*cls.subscriptions, wanted)
        return cls

    return mark


def cluster_topics(cls: type[Agent]) -> list[str]:
    """The topics of cluster signals that the class wants, by what it handles."""
    if cls.handle_cluster_signal is not Agent.handle_cluster_signal:
        return ["cluster.>"]
    found = set()
    for type in handlings(cls).types():
        first, _, rest = type.partition(".")
        if first == "cluster":
            found.add("cluster.>" if "*" in rest else type)
    return ["cluster.>"] if "cluster.>" in found else sorted(found - {"cluster.about_to_move"})


def subscribed(cls: type[Agent]) -> list[Subscription]:
    """The topics the class subscribes to.

    Raises:
        ConfigError: one of them is no topic.
    """
    own = [cls.subscriptions, *(skill.subscriptions for skill in cls.skills)]
    declared = [*own, cluster_topics(cls)]
    found = [x for item in declared for x in ([item] if isinstance(item, str) else item)]
    try:
        return [
            item if isinstance(item, Subscription) else Subscription(topic=item) for item in found
        ]
    except ValueError as error:
        raise ConfigError(f"{cls.__qualname__}: {error}") from error
