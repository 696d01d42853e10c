"""The actions of an agent's class: those it declares and those its skills bring, by name; and who answers for them.

Pure. An action ``refund`` answers signals and questions of the type ``action.refund``; one of a skill
mounted as ``desk`` is called ``desk_refund`` (unless the skill is not `prefixed`). A handler that the
class itself has for such a type goes before it. Its name is a capability, too, so that
``capability:refund`` finds an agent that can do it.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from foundation_nats.agent.actions.action import Action, as_action
from foundation_nats.agent.handling import Handling
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Signal
from foundation_nats.errors import ActionNotFoundError, ConfigError

PREFIX = "action."
INSTRUCTION = "foundation.instruction"
"""The type of the signal that carries a `RunInstruction`."""
CATALOGUE = "foundation.actions"
"""The type of the question that every agent answers with its tools."""
_BEHIND = 20


def actions_of(cls: type[Any]) -> Mapping[str, Action]:
    """The actions of an agent's class by name, its own first.

    Raises:
        ConfigError: one is none, or two share a name.
    """
    found: dict[str, Action] | None = cls.__dict__.get("_foundation_actions")
    if found is None:
        found = {}
        for item in cls.actions:
            _add(found, cls, as_action(item))
        for skill in cls.skills:
            for item in type(skill).actions:
                _add(found, cls, _mounted(as_action(item), skill))
        cls._foundation_actions = found
    return found


def found_actions(agent: AnyAgent) -> Mapping[str, Action]:
    """What an agent's skills have found out that it can do, since it was started."""
    skills = agent.skill.values()
    return {name: item for skill in skills for name, item in skill.found_actions().items()}


def _add(found: dict[str, Action], cls: type[Any], action: Action) -> None:
    if action.name in found:
        raise ConfigError(f"{cls.__qualname__}: two actions are called {action.name!r}")
    found[action.name] = action


def _mounted(action: Action, skill: Any) -> Action:
    mine = copy.copy(action)
    mine.mount = skill.mount  # type: ignore[attr-defined]
    if type(skill).prefixed:
        mine.name = f"{skill.mount}_{action.name}"
    return mine


def find_action(agent: AnyAgent, name: str) -> Action:
    """The action of this name.

    Raises:
        ActionNotFoundError: the agent has none; lists what it has.
    """
    known = {**found_actions(agent), **actions_of(type(agent))}
    if name not in known:
        raise ActionNotFoundError(
            f"{type(agent).__qualname__} ({agent.id}) has no action {name!r}; "
            f"it has: {', '.join(known) or 'none'}.",
            action=name,
        )
    return known[name]


def action_handlings(cls: type[Any]) -> list[Handling]:
    """The handlers by which the class's actions answer."""
    return [
        Handling(
            PREFIX + name,
            _handler(action),
            True,
            action.params_adapter,
            priority=-_BEHIND,
            name=PREFIX + name,
        )
        for name, action in actions_of(cls).items()
    ]


def _handler(action: Action) -> Callable[[Any, Signal[Any]], Awaitable[Any]]:
    async def handle(agent: AnyAgent, signal: Signal[Any]) -> Any:
        return await agent.ctx.run(action, signal.data)

    return handle


async def run_instruction(agent: AnyAgent, stored: Mapping[str, Any]) -> None:
    """Carry out a `RunInstruction` that came as a signal, and send its result to the agent itself."""
    result = await agent.ctx.run(str(stored["action"]), stored.get("params") or {})
    kind = stored.get("result_type")
    if kind is not None:
        agent.emit(str(kind), result, to=f"agent:{agent.id}")


__all__ = [
    "CATALOGUE",
    "INSTRUCTION",
    "action_handlings",
    "actions_of",
    "find_action",
    "found_actions",
]
