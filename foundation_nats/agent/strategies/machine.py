"""`StateMachine`: an agent that is in one phase at a time, with a table that says which signals lead where.

The type of a signal is the event. What the table does not allow in the present phase is refused
(`TransitionError`, not tried again) before anything is done: nothing changes. What it allows is one
commit: guard, `leaving` hooks, the handler of the signal if there is one, the new phase, `entering` hooks.
If one of them raises, the phase is what it was.

The phase is a field of the state, and its type holds the phases, so a stored phase that the class does not
know any more is an error: migrate it. The decisions are pure (`choose`); the machine is a middleware.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import create_model

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.handling import Handling
from foundation_nats.agent.middleware import Middleware, Proceed
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Payload, Signal
from foundation_nats.agent.state import State as BaseState
from foundation_nats.errors import ConfigError, TransitionError
from foundation_schemas import RecoveredFrom

ANY = "*"
_BEHIND = 30
Guard = Callable[[Any, Signal[Any]], bool] | str
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Go:
    """A transition: ``Go("order.pay", "new", "paid", when="is_enough")``.

    Args:
        event: the type of a signal, or a `Payload` class.
        source: the phase from which it leads, or several; ``*``: any.
        target: the phase to which it leads; None: it stays, and no hook is called.
        when: a guard: a function of agent and signal, or the name of a method that takes the signal.
            Of several transitions the first whose guard agrees is taken. Must be quick.
        after: seconds in the phase after which the event comes by itself.
    """

    event: str | type[Payload]
    source: str | Sequence[str]
    target: str | None
    when: Guard | None = None
    after: float | None = None

    @property
    def type(self) -> str:
        """Of the signal."""
        return self.event if isinstance(self.event, str) else self.event.signal_type

    @property
    def sources(self) -> tuple[str, ...]:
        """The phases from which it leads."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


def entering(*phases: str) -> Callable[[F], F]:
    """Mark a method, which takes the signal, as called after the phase has become one of these."""
    return _hook("__foundation_entering__", phases)


def leaving(*phases: str) -> Callable[[F], F]:
    """Mark a method, which takes the signal, as called before the phase changes from one of these."""
    return _hook("__foundation_leaving__", phases)


def _hook(name: str, phases: tuple[str, ...]) -> Callable[[F], F]:
    if not phases:
        raise ConfigError("name the phases")

    def mark(function: F) -> F:
        setattr(function, name, phases)
        return function

    return mark


class StateMachine(Agent):
    """An agent that is a machine.

    A signal of an event that has no handler is answered with the new phase.

    Raises:
        ConfigError: the table is wrong; says why.

    Example:
        >>> class Order(StateMachine):
        ...     initial = "new"
        ...     transitions = (
        ...         Go("pay", "new", "paid"),
        ...         Go("ship", "paid", "shipped"),
        ...         Go("cancel", ("new", "paid"), "cancelled"),
        ...         Go("expire", "new", "cancelled", after=3600),
        ...     )
        ...
        ...     class State(StateMachine.State):
        ...         amount: int = 0
        ...
        ...     @on("pay")
        ...     def pay(self, signal: Signal[int]) -> None:
        ...         self.state.amount = signal.data
        ...
        ...     @entering("shipped")
        ...     def tell(self, signal: Signal[Any]) -> None:
        ...         self.emit("shipped", to="agent:customer")
    """

    initial: ClassVar[str] = ""
    transitions: ClassVar[Sequence[Go]] = ()
    _events: ClassVar[frozenset[str]] = frozenset()

    class State(BaseState):
        """With the phase that it is in."""

        phase: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.transitions:
            check_table(cls)
            cls.State = _with_phases(cls)  # type: ignore[misc, assignment]
            cls._events = frozenset(events(cls))
            cls._layers = (*cls._layers, _Machine())

    @classmethod
    def _foundation_more(cls) -> list[Handling]:
        more = super()._foundation_more()
        return [
            *more,
            *(Handling(type, _nothing, False, None, -_BEHIND, name=type) for type in events(cls)),
        ]

    @property
    def phase(self) -> str:
        """The one that it is in."""
        return str(self.state.phase)

    def possible(self) -> list[str]:
        """The events that the table allows now, guards aside."""
        return [
            event
            for event in events(type(self))
            if any(_leads(go, event, self.phase) for go in self.transitions)
        ]

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Starts the clocks of the first phase; call it from your own."""
        if recovered_from is None:
            _wind(self, None, self.phase)


def events(cls: type[StateMachine]) -> list[str]:
    """The types of signals in the table, in its order."""
    return list(dict.fromkeys(go.type for go in cls.transitions))


def phases(cls: type[StateMachine]) -> list[str]:
    """All phases, in the order of the table, the first one first."""
    named = [cls.initial]
    for go in cls.transitions:
        named += [*go.sources, *([go.target] if go.target is not None else [])]
    return [phase for phase in dict.fromkeys(named) if phase != ANY]


def choose(
    transitions: Iterable[Go], phase: str, type: str, agrees: Callable[[Guard], bool]
) -> Go | None:
    """The transition that an event takes in *phase*; None: there is none."""
    return next(
        (
            go
            for go in transitions
            if _leads(go, type, phase) and (go.when is None or agrees(go.when))
        ),
        None,
    )


def _leads(go: Go, type: str, phase: str) -> bool:
    return go.type == type and (phase in go.sources or ANY in go.sources)


def check_table(cls: type[StateMachine]) -> None:
    """Whether the table of a class can be used.

    Raises:
        ConfigError: it can't; says why.
    """
    name = cls.__qualname__
    if not cls.initial:
        raise ConfigError(f"{name}: say in which phase it begins: initial = '…'")
    reached = {cls.initial}
    for go in cls.transitions:
        if not isinstance(go, Go):
            raise ConfigError(f"{name}.transitions holds {go!r}: use Go(event, source, target)")
        if not go.type or "*" in go.type:
            raise ConfigError(
                f"{name}: {go.event!r} can't be an event: use a type without wildcards"
            )
        if go.after is not None and (go.after <= 0 or ANY in go.sources):
            raise ConfigError(f"{name}: {go.type}: `after` is positive, and of phases by name")
        if isinstance(go.when, str) and not callable(getattr(cls, go.when, None)):
            raise ConfigError(f"{name}: {go.type}: there is no method {go.when!r} to be its guard")
        reached.add(go.target or cls.initial)
    lost = [x for go in cls.transitions for x in go.sources if x != ANY and x not in reached]
    if lost:
        raise ConfigError(f"{name}: nothing leads to {', '.join(dict.fromkeys(lost))}")
    known = set(phases(cls))
    for kind in ("entering", "leaving"):
        for method, wanted in _hooks(cls, f"__foundation_{kind}__"):
            wrong = sorted(set(wanted) - known)
            if wrong:
                raise ConfigError(f"{name}.{method}: there is no phase {', '.join(wrong)}")


def _with_phases(cls: type[StateMachine]) -> type[BaseState]:
    kind = cls.State
    if "phase" not in kind.model_fields:
        raise ConfigError(f"{cls.__qualname__}.State must be a subclass of StateMachine.State")
    found: Any = Literal[tuple(phases(cls))]
    made = create_model(
        kind.__name__, __base__=kind, __module__=kind.__module__, phase=(found, cls.initial)
    )
    made.__qualname__ = kind.__qualname__
    return made


def _hooks(cls: type[Any], mark: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    seen = set()
    for base in cls.__mro__:
        for name, member in vars(base).items():
            if name not in seen and hasattr(member, mark):
                seen.add(name)
                yield name, getattr(member, mark)


_NO_HANDLER = object()


def _nothing(agent: AnyAgent, signal: Signal[Any]) -> object:
    """The handler of an event that has no other."""
    return _NO_HANDLER


class _Machine(Middleware):
    """Refuses what the table does not allow; changes the phase around the handler."""

    async def handle(self, agent: Any, signal: Signal[Any], proceed: Proceed) -> Any:
        kind = type(agent)
        if signal.type not in kind._events:
            return await proceed(signal)
        before = agent.phase
        go = choose(
            kind.transitions, before, signal.type, lambda guard: _agrees(agent, guard, signal)
        )
        if go is None:
            if _is_own_clock(agent, signal):
                return None  # It came too late, or twice.
            raise _refused(agent, signal.type)
        after = before if go.target is None else go.target
        if go.target is not None:
            await _call_hooks(agent, "__foundation_leaving__", before, signal)
        result = await proceed(signal)
        if go.target is not None:
            agent.state.phase = after
            _wind(agent, before, after)
            await _call_hooks(agent, "__foundation_entering__", after, signal)
        return after if result is _NO_HANDLER else result


def _agrees(agent: Any, guard: Guard, signal: Signal[Any]) -> bool:
    return bool(getattr(agent, guard)(signal) if isinstance(guard, str) else guard(agent, signal))


def _refused(agent: Any, event: str) -> TransitionError:
    kind = type(agent)
    guarded = any(_leads(go, event, agent.phase) for go in kind.transitions)
    why = (
        "its guard refuses it" if guarded else f"possible: {', '.join(agent.possible()) or 'none'}"
    )
    return TransitionError(
        f"{kind.__qualname__} ({agent.id}) is {agent.phase}: no {event!r} now; {why}.",
        phase=agent.phase,
        event=event,
    )


async def _call_hooks(agent: Any, mark: str, phase: str, signal: Signal[Any]) -> None:
    for name, wanted in _hooks(type(agent), mark):
        if phase in wanted:
            found = getattr(agent, name)(signal)
            if inspect.isawaitable(found):
                await found


def _is_own_clock(agent: Any, signal: Signal[Any]) -> bool:
    is_timed = any(
        go.after is not None and go.type == signal.type for go in type(agent).transitions
    )
    return is_timed and signal.source == f"agent:{agent.id}"


def _wind(agent: Any, before: str | None, after: str) -> None:
    """Stop the clocks of the phase before, start those of the new one."""
    for go in type(agent).transitions:
        if go.after is None:
            continue
        name = f"phase-{go.type}"
        if after in go.sources:
            agent.ctx.schedule(go.type, name=name, after=go.after)
        elif before in go.sources:
            agent.ctx.cancel(name)


def fsm_mermaid(cls: type[StateMachine]) -> str:
    """The table as a state diagram in the language of Mermaid.

    Raises:
        ConfigError: *cls* is no state machine.
    """
    if not (isinstance(cls, type) and issubclass(cls, StateMachine) and cls.transitions):
        raise ConfigError(f"{cls!r} is no state machine with a table")
    ids = {phase: f"s{number}" for number, phase in enumerate(phases(cls))}
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{phase}" as {id}' for phase, id in ids.items()]
    lines.append(f"    [*] --> {ids[cls.initial]}")
    for go in cls.transitions:
        sources = [phase for phase in ids if phase in go.sources or ANY in go.sources]
        guard = go.when if isinstance(go.when, str) else getattr(go.when, "__name__", "guard")
        label = go.type
        label += f" [{'guard' if guard == '<lambda>' else guard}]" if go.when is not None else ""
        label += f" after {go.after:g} s" if go.after is not None else ""
        lines += [
            f"    {ids[source]} --> {ids[go.target or source]}: {label}" for source in sources
        ]
    left = {phase for go in cls.transitions for phase in go.sources}
    if ANY not in left:
        lines += [f"    {id} --> [*]" for phase, id in ids.items() if phase not in left]
    return "\n".join(lines) + "\n"


__all__ = ["Go", "StateMachine", "choose", "entering", "fsm_mermaid", "leaving"]
