"""Carries out a plan: `carry`. Each step is a step of the signal's ledger, so it goes on where it was.

Guaranteed, within a durable agent: a step whose result is stored is not run again for its signal, by no
retry, failover or replay; the plan goes on behind it. Once it was decided that the plan has failed that
stays so: what was done is taken back in reverse order, each undoing once as far as `ctx.once` can tell,
and however often a crash interrupts it. After that the signal is given up; a new one begins anew.

Not guaranteed: that a step which was interrupted has not happened. By ``on_doubt`` of the action it is
run again, with its done steps skipped, or waits for a person. The step that failed is not undone: its
action's `on_error` is asked to tidy up.

1. `begin` what is ready, at most `parallel` at once.
2. A step fails: begin no more, wait for those that run, and note the failure.
3. Undo what is done, the last first. What can't be undone is told, tried again with the signal, and is
   in the end a dead letter for a person, whose replay tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson

from foundation_nats.agent.actions.action import Action
from foundation_nats.agent.actions.plan import Plan, PlanStep, fed, in_order, ready
from foundation_nats.agent.actions.refs import INPUT, as_data, filled
from foundation_nats.agent.actions.running import ActionContext, execute
from foundation_nats.base import frames
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import (
    ActionError,
    FencedError,
    FoundationError,
    PlanFailedError,
    StepInDoubtError,
    StepTooLargeError,
)
from foundation_schemas import StepStatus

_NOT_OVER = (StepInDoubtError, StepTooLargeError, FencedError)
"""They end the handler, not the plan: a person decides, and it goes on; or another activation does."""
_FAILED = "failed"
UNDO = ":undo"


async def carry(plan: Plan, params: Any, ctx: ActionContext) -> Any:
    """Run the plan to its end, or take it back.

    Raises:
        PlanFailedError: a step has failed, and all before it is undone.
        ActionError: a step has failed, and something could not be undone.
    """
    ctx._known = {**ctx._known, **plan._known}
    return await _Carrier(plan, params, ctx).run()


async def take_back(plan: Plan, params: Any, ctx: ActionContext) -> None:
    """Undo a plan that has succeeded, because the plan that it is a step of has failed.

    Raises:
        ActionError: something could not be undone.
    """
    ctx = ActionContext(
        ctx._agent,
        ctx.path.removesuffix(UNDO),
        known={**ctx._known, **plan._known},
        mount=ctx._mount,
        memory=ctx._memory,
    )
    _, stuck = await _Carrier(plan, params, ctx).undo_all()
    if stuck:
        raise ActionError(f"Plan {plan.name} could not be undone: {', '.join(stuck)}.", stuck=stuck)


class _Carrier:
    """One run of a plan."""

    def __init__(self, plan: Plan, params: Any, ctx: ActionContext) -> None:
        self.plan = plan
        self.ctx = ctx
        self.results: dict[str, Any] = {INPUT: as_data(params)}
        """As JSON, by step; null of those left out."""
        self.begun: set[str] = set()
        self.running: dict[asyncio.Task[Any], PlanStep] = {}

    async def run(self) -> Any:
        failed = self._stored(_FAILED)
        if failed is None:
            failure = await self._forward()
            if failure is None:
                if self.plan.returns is not None:
                    return filled(self.plan.returns, self.results)
                return {step.name: self.results[step.name] for step in self.plan.steps}
            step, error = failure
            failed = {
                "step": step.name,
                "error": _told(error),
                "code": error.code if isinstance(error, FoundationError) else "agent.action",
            }
            failed = await self.ctx._step(self._key(_FAILED), _returned, failed)
        await self._back(failed)
        return None

    # ---- forward ----------------------------------------------------------------------

    async def _forward(self) -> tuple[PlanStep, Exception] | None:
        """Run the steps; returns the first that has failed, when no other is running."""
        failure: tuple[PlanStep, Exception] | None = None
        try:
            while True:
                if failure is None:
                    self._begin_more()
                if not self.running:
                    return failure
                done, _ = await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    step = self.running.pop(task)
                    error = task.exception()
                    if error is None:
                        self.results[step.name] = task.result()
                    elif isinstance(error, _NOT_OVER) or not isinstance(error, Exception):
                        raise error
                    elif failure is None:
                        failure = step, error
        finally:
            await self._end_all()

    def _begin_more(self) -> None:
        for step in ready(self.plan, self.begun, self.results):
            if len(self.running) >= self.plan.parallel:
                return
            self.begun.add(step.name)
            self.running[asyncio.ensure_future(self._do(step))] = step

    async def _end_all(self) -> None:
        tasks, self.running = list(self.running), {}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()

    async def _do(self, step: PlanStep) -> Any:
        if not filled(step.when, self.results):
            return None
        action = self.ctx._find(step.action)
        params = filled(step.params, self.results)
        if step.feed is not None:
            params = fed(action, params, self.results[step.feed])
        inner = self.ctx._child(self._key(step.name), action)

        async def act() -> Any:
            return await execute(action, params, inner, retries=step.retries, timeout=step.timeout)

        result = await self.ctx._step(self._key(step.name), act, on_doubt=action.on_doubt)
        return orjson.loads(to_json(result))

    # ---- back -------------------------------------------------------------------------

    async def _back(self, failed: Mapping[str, Any]) -> None:
        undone, stuck = await self.undo_all()
        said = f"Plan {self.plan.name} failed at {failed['step']}: {failed['error']}"
        details = {"plan": self.plan.name, "step": failed["step"], "error": failed["code"]}
        if stuck:
            raise ActionError(
                f"{said}; and this could not be undone: {', '.join(stuck)}.", stuck=stuck, **details
            )
        after = f"; undone: {', '.join(undone)}." if undone else "; there was nothing to undo."
        raise PlanFailedError(said + after, undone=undone, **details)

    async def undo_all(self) -> tuple[list[str], list[str]]:
        """Take back what is done, the last first; returns what was, and what could not be, with the reason."""
        for step in in_order(self.plan):
            known = self._stored(step.name)
            if step.name not in self.results and known is not None:
                self.results[step.name] = known
        undone: list[str] = []
        stuck: list[str] = []
        for step in reversed(in_order(self.plan)):
            if self._stored(step.name, missing=_MISSING) is _MISSING:
                continue
            try:
                if await self._undo(step):
                    undone.append(step.name)
            except _NOT_OVER:
                raise
            except Exception as error:
                stuck.append(f"{step.name} ({_told(error)})")
        return undone, stuck

    async def _undo(self, step: PlanStep) -> bool:
        """Take one step back; False: there is nothing to do for it."""
        action = self.ctx._find(step.action)
        key = f"{self._key(step.name)}{UNDO}"
        if step.undo is not None:
            undoing = self.ctx._find(step.undo.action)
            params = filled(step.undo.params, self.results)
            inner = self.ctx._child(key, undoing)

            async def undo() -> None:
                await execute(
                    undoing,
                    params,
                    inner,
                    retries=step.undo.retries if step.undo else None,
                    timeout=step.undo.timeout if step.undo else None,
                )

            await self.ctx._step(key, undo)
            return True
        if not action.can_undo:
            return False
        given = filled(step.params, self.results)
        if step.feed is not None:
            given = fed(action, given, self.results[step.feed])
        result = action.read_result(self.results[step.name])
        inner = self.ctx._child(key, action)

        async def take_back() -> None:
            await execute(_Undo(action, result), given, inner)

        await self.ctx._step(key, take_back)
        return True

    # ---- what is stored ---------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self.ctx.path}!{name}" if name == _FAILED else f"{self.ctx.path}/{name}"

    def _stored(self, name: str, missing: Any = None) -> Any:
        """The stored result of a step that is done."""
        ledger, cause = self.ctx._ledger
        known = ledger.get(cause, self._key(name))
        if known is None or known.status is not StepStatus.DONE:
            return missing
        return None if known.result is None else orjson.loads(known.result)


_MISSING = object()


class _Undo(Action):
    """Takes back what an action has done, tried again as that is."""

    def __init__(self, action: Action, result: Any) -> None:
        self.name = f"undo-{action.name}"[:64]
        self.retries, self.timeout = action.retries, action.timeout
        self.retry_first_s, self.retry_most_s = action.retry_first_s, action.retry_most_s
        self.params_type = action.params_type
        self._action, self._result = action, result
        super().__init__()

    async def run(self, params: Any, ctx: ActionContext) -> None:
        await self._action.undo(params, self._result, ctx)


def _returned(value: Any) -> Any:
    return value


def _told(error: Exception) -> str:
    text = str(error) if isinstance(error, FoundationError) else frames.summary(error)
    return text[:300].rstrip(".")


__all__ = ["carry", "take_back"]
