"""Runs actions: `ActionContext` is what they get, `execute` tries them, `run_in` is ``ctx.run``.

An action runs within the handler in hand: what it changes and emits is committed with it, or not at all,
and the mailbox waits meanwhile. Its steps (``ctx.once``) are steps of the signal in hand, under the
action's own path, so that two runs in one handler don't share them. So a handler must run its actions in
the same order when it is tried again; what it decides by, it decides by its state, its signal, and results.

Without an agent (`run_action`) all works the same but for durability: nothing outlives the process.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from foundation_nats.agent.actions.action import Action, as_action
from foundation_nats.agent.failing import handler_error
from foundation_nats.agent.steps import Doubt, Idempotent, StepLedger, check_once, once
from foundation_nats.base.clock import utc_now
from foundation_nats.base.logs import get_logger
from foundation_nats.base.resilience import backoff_s
from foundation_nats.errors import (
    ActionError,
    ActionInvalidError,
    ActionNotFoundError,
    BudgetError,
    ConfigError,
    FencedError,
    FoundationError,
    PlanFailedError,
    StepInDoubtError,
    StepTooLargeError,
)

if TYPE_CHECKING:
    from foundation_nats.agent.context import Context
    from foundation_nats.agent.owner import AnyAgent
    from foundation_schemas import Target

FINAL = (
    ActionInvalidError,
    ActionNotFoundError,
    BudgetError,
    ConfigError,
    FencedError,
    PlanFailedError,
    StepInDoubtError,
    StepTooLargeError,
)
"""What would be raised again at another try."""


class Instruction(BaseModel):
    """An action and its params, as data: for plans, models, and `RunInstruction`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: str
    params: dict[str, Any] = Field(default_factory=dict)
    retries: int | None = Field(default=None, ge=0)
    """Instead of the action's own."""
    timeout: float | None = Field(default=None, gt=0)


class _Memory:
    """A step ledger that lives as long as the run: for actions without an agent."""

    def __init__(self) -> None:
        self.steps = StepLedger()

    async def store_steps(self) -> None:
        """Nowhere."""


class ActionContext:
    """What an action may know and call besides its params."""

    __slots__ = ("_agent", "_counts", "_known", "_memory", "_mount", "attempt", "path")

    def __init__(
        self,
        agent: AnyAgent | None,
        path: str,
        *,
        known: Mapping[str, Action] | None = None,
        mount: str | None = None,
        memory: _Memory | None = None,
    ) -> None:
        self._agent = agent
        self._known = known or {}
        self._mount = mount
        self._memory = memory or _Memory()
        self._counts: dict[str, int] = {}
        self.path = path
        """Where in the handler this run stands, as in ``refunds/charge``; begins the keys of its steps."""
        self.attempt = 1
        """Which try this is."""

    @property
    def agent(self) -> AnyAgent:
        """In whose handler it runs.

        Raises:
            ConfigError: in none.
        """
        if self._agent is None:
            raise ConfigError(f"action {self.path} needs an agent, and runs without one")
        return self._agent

    @property
    def context(self) -> Context:
        """The handler's own `Context`: timers, guards, children. Raises as `agent`."""
        return self.agent.ctx

    @property
    def skill(self) -> Any:
        """The skill that has brought this action. Raises `ConfigError` if none has."""
        if self._mount is None:
            raise ConfigError(f"action {self.path} is not of a skill")
        return self.agent.skill[self._mount]

    @property
    def idempotency_key(self) -> str:
        """The same at every try of this run: ``<agent>.<signal>.<path>``."""
        if self._agent is None:
            return self.path
        context = self._agent.ctx
        return str(Idempotent(context.agent_id, context._step_cause, self.path))

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        return utc_now() if self._agent is None else self._agent.ctx.now()

    @property
    def random(self) -> random.Random:
        """Randomness that repeats at every try."""
        return random.Random(self.idempotency_key)

    def emit(
        self, type: str, data: Any = None, *, to: str | Target, ttl: float | None = None
    ) -> None:
        """As `Agent.emit`."""
        self.agent.emit(type, data, to=to, ttl=ttl)

    async def once(
        self,
        key: str,
        function: Callable[..., Any],
        *args: Any,
        on_doubt: str = Doubt.RERUN,
        verify: Callable[..., Any] | None = None,
        returns: Any = None,
    ) -> Any:
        """A step outside that must not be repeated; as `Context.once`, its key within this run."""
        return await self._step(
            f"{self.path}/{key}", function, *args, on_doubt=on_doubt, verify=verify, returns=returns
        )

    async def _step(
        self,
        key: str,
        function: Callable[..., Any],
        *args: Any,
        on_doubt: str = Doubt.RERUN,
        verify: Callable[..., Any] | None = None,
        returns: Any = None,
    ) -> Any:
        if self._agent is not None:
            return await self._agent.ctx.once(
                key, function, *args, on_doubt=on_doubt, verify=verify, returns=returns
            )
        policy = check_once(key, on_doubt, verify, "signal")
        name = Idempotent("", "", key)
        return await once(
            self._memory, name, function, args, on_doubt=policy, verify=verify, returns=returns
        )

    @property
    def _ledger(self) -> tuple[StepLedger, str]:
        """Where its steps are noted, and whose they are."""
        if self._agent is None:
            return self._memory.steps, ""
        return self._agent.ctx._steps_home.steps, self._agent.ctx._step_cause

    async def run(self, what: Any, params: Any = None) -> Any:
        """Run another action within this one; as `Context.run`."""
        found, params, more = self._resolved(what, params)
        return await execute(found, params, self._within(found), **more)

    async def run_blocking(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a blocking function in a thread; as `Context.run_blocking`."""
        if self._agent is not None:
            return await self._agent.ctx.run_blocking(function, *args, **kwargs)
        return await asyncio.to_thread(partial(function, *args, **kwargs))

    def _resolved(self, what: Any, params: Any) -> tuple[Action, Any, dict[str, Any]]:
        more: dict[str, Any] = {}
        if isinstance(what, Instruction):
            if params is not None:
                raise ConfigError(f"instruction {what.action} has its params already")
            more = {"retries": what.retries, "timeout": what.timeout}
            what, params = what.action, what.params
        if isinstance(what, str):
            return self._find(what), params, more
        return as_action(what), params, more

    def _find(self, name: str) -> Action:
        known = self._known.get(name)
        if known is None and self._agent is not None:
            from foundation_nats.agent.actions.catalogue import find_action

            return find_action(self._agent, name)
        if known is None:
            raise ActionNotFoundError(f"There is no action {name!r} here.", action=name)
        return known

    def _within(self, action: Action, name: str | None = None) -> ActionContext:
        """The context of a run within this one; the second of one name is ``name#2``."""
        if name is None:
            name = _numbered(self._counts, action.name)
        return self._child(f"{self.path}/{name}", action)

    def _child(self, path: str, action: Action) -> ActionContext:
        mount = getattr(action, "mount", None)
        return ActionContext(
            self._agent,
            path,
            known=self._known,
            mount=mount or self._mount,
            memory=self._memory,
        )


def _numbered(counts: dict[str, int], name: str) -> str:
    counts[name] = number = counts.get(name, 0) + 1
    return name if number == 1 else f"{name}#{number}"


async def execute(
    action: Action,
    params: Any,
    ctx: ActionContext,
    *,
    retries: int | None = None,
    timeout: float | None = None,
) -> Any:
    """Run *action* until it succeeds, or has failed for the last time.

    Raises:
        ActionInvalidError: params or result don't fit; it is not tried again.
        ActionError: what it raised last, or that it took too long.
        FoundationError: one that it raised.
    """
    given = action.read_params(params)
    tries = 1 + (action.retries if retries is None else retries)
    seconds = action.timeout if timeout is None else timeout
    ctx.attempt = 1
    while True:
        ctx._counts.clear()
        try:
            return action.read_result(await _try(action, given, ctx, seconds))
        except FINAL as error:
            await _tidy(action, given, error, ctx)
            raise
        except Exception as error:
            if ctx.attempt >= tries or not isinstance(_cause(error), action.retry_on):
                await _tidy(action, given, error, ctx)
                raise _named(action, error) from error
        pause = backoff_s(
            ctx.attempt,
            random.random(),
            first_s=action.retry_first_s,
            most_s=action.retry_most_s,
        )
        await asyncio.sleep(pause)
        ctx.attempt += 1


async def _try(action: Action, params: Any, ctx: ActionContext, seconds: float | None) -> Any:
    try:
        async with asyncio.timeout(seconds) as scope:
            found = action.run(params, ctx)
            return await found if inspect.isawaitable(found) else found
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise ActionError(
            f"Action {action.name} took longer than {seconds:g} s.", action=action.name
        ) from error


def _cause(error: Exception) -> BaseException:
    """A time-out counts as `TimeoutError` for `retry_on`."""
    cause = error.__cause__
    return cause if isinstance(error, ActionError) and isinstance(cause, TimeoutError) else error


async def _tidy(action: Action, params: Any, error: Exception, ctx: ActionContext) -> None:
    if isinstance(error, StepInDoubtError):
        return  # Not over: a person decides, and it goes on.
    try:
        await action.on_error(params, error, ctx)
    except Exception as second:
        get_logger("actions").warning("on_error failed", action=action.name, exc_info=second)
        error.add_note(f"And its on_error raised {type(second).__name__}: {second}")


def _named(action: Action, error: Exception) -> FoundationError:
    """The error as who ran the action gets it."""
    if isinstance(error, FoundationError):
        return error
    told = handler_error(error, f"Action {action.name} failed: ")
    return ActionError(str(told), action=action.name, **told.details)


async def run_in(context: Context, agent: AnyAgent, what: Any, params: Any) -> Any:
    """Run an action in the handler in hand; see `Context.run`."""
    outside = ActionContext(agent, "")
    found, params, more = outside._resolved(what, params)
    inner = outside._child(_next_path(context, found.name), found)
    return await execute(found, params, inner, **more)


def context_in(agent: AnyAgent, name: str) -> ActionContext:
    """The context of something that is called *name* and runs in the handler in hand, like an action."""
    return ActionContext(agent, _next_path(agent.ctx, name))


def _next_path(context: Context, name: str) -> str:
    if context._runs is None:
        context._runs = {}
    return _numbered(context._runs, name)


async def run_action(
    what: Any, params: Any = None, *, known: Mapping[str, Any] | None = None
) -> Any:
    """Run an action, a plan or an instruction without an agent, as in a test or a script.

    Args:
        known: actions by name, for what names them.

    Raises:
        ActionInvalidError: params or result don't fit.
        ActionError: it has failed.
        ConfigError: it needs an agent.
    """
    by_name = {name: as_action(item) for name, item in (known or {}).items()}
    outside = ActionContext(None, "", known=by_name)
    found, params, more = outside._resolved(what, params)
    return await execute(found, params, outside._child(found.name, found), **more)


__all__ = ["ActionContext", "Instruction", "context_in", "execute", "run_action", "run_in"]
