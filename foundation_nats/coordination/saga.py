"""`saga`: steps at several agents, one after the other; where one fails, those before it are undone in reverse.

H. Garcia-Molina and K. Salem, *Sagas*, 1987. Each step is a stored question with a fixed id
(`desk`), and how far the saga is stands in one record. That a step is about to be asked is
written down before, and its answer before the next: so any process can go on with it, and two at once do
no harm.

Guaranteed: every step and every compensation takes effect in its agent's state at most once,
however often its runner dies. A saga that is over is either *done* (each step has answered) or
*undone* (each step that was done, or may have been, and has an `undo`, has answered that it is
undone). Its outcome is recorded and kept for a week. A compensation comes behind its step in the
same mailbox, so it never overtakes it.

Not guaranteed: isolation (others see the state between the steps); that it ends while an agent
it needs is not there: `NotSettledError` says that it goes on when it is called again. A step without an
answer in its time is undone although it may never have happened: compensations must bear that.
A handler that raised has no effect on its agent's state; it is not undone.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.coordination.cell import KEEP_S, Cell, as_json, checked
from foundation_nats.coordination.desk import Answer, Desk, agent_names
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import ConfigError, DecodeError, NotFoundError, NotSettledError
from foundation_schemas.coordination import (
    SagaRecord,
    SagaState,
    SagaStep,
    StepProgress,
    StepState,
)

_STEPS_MAX = 200
_PREFIX = "saga_"
_TO_UNDO = (StepState.DONE, StepState.UNKNOWN, StepState.UNDOING)


# ---- decisions ----------------------------------------------------------------------


def present(record: SagaRecord) -> int | None:
    """Which step is to be asked or undone; None: there is none left."""
    match record.state:
        case SagaState.RUNNING:
            left = [n for n, part in enumerate(record.progress) if part.state is not StepState.DONE]
            return left[0] if left else None
        case SagaState.UNDOING:
            undo = [n for n, part in enumerate(record.progress) if part.state in _TO_UNDO]
            return undo[-1] if undo else None
    return None


def begun(record: SagaRecord, index: int, now: float) -> SagaRecord | None:
    """*record* with the present step about to be asked or undone; None if it is."""
    part = record.progress[index]
    if present(record) != index or part.state in (StepState.ASKED, StepState.UNDOING):
        return None
    if record.state is SagaState.RUNNING:
        return _with(record, index, state=StepState.ASKED, asked=now)
    if record.steps[index].undo is None:
        return settled(_with(record, index, state=StepState.KEPT))
    return _with(record, index, state=StepState.UNDOING, asked=now)


def answered(record: SagaRecord, index: int, answer: Answer | None) -> SagaRecord | None:
    """*record* with the answer to the present step or to its undoing; None: there was none in time."""
    part = record.progress[index]
    step = record.steps[index].name
    said = "" if answer is None or not answer.is_error else f"{answer.code}: {answer.message}"
    match part.state:
        case StepState.ASKED if answer is None:
            why = f"{step}: no answer within {record.steps[index].timeout_s:g} s"
            after = _with(record, index, state=StepState.UNKNOWN, error=why)
            return settled(after.model_copy(update={"state": SagaState.UNDOING, "error": why}))
        case StepState.ASKED if said:
            after = _with(record, index, state=StepState.FAILED, error=said)
            why = f"{step}: {said}"
            return settled(after.model_copy(update={"state": SagaState.UNDOING, "error": why}))
        case StepState.ASKED:
            assert answer is not None
            return settled(_with(record, index, state=StepState.DONE, result=answer.ok))
        case StepState.UNDOING if said:
            after = _with(record, index, error=said)
            why = f"{record.error}; undoing {step}: {said}"
            return after.model_copy(update={"state": SagaState.STUCK, "error": why})
        case StepState.UNDOING if answer is not None:
            return settled(_with(record, index, state=StepState.UNDONE))
    return None


def settled(record: SagaRecord) -> SagaRecord:
    """*record*, over if nothing is left to do."""
    if present(record) is not None or record.is_over or record.state is SagaState.STUCK:
        return record
    state = SagaState.DONE if record.state is SagaState.RUNNING else SagaState.UNDONE
    return record.model_copy(update={"state": state, "ended": utc_text()})


def freed(record: SagaRecord) -> SagaRecord | None:
    """A stuck *record* with its compensation to be tried again, under another id."""
    if record.state is not SagaState.STUCK:
        return None
    index = max(n for n, part in enumerate(record.progress) if part.state is StepState.UNDOING)
    tries = record.progress[index].undo_tries + 1
    # As before it was asked: its state tells `begun` to write down when it is.
    after = _with(record, index, state=StepState.UNKNOWN, undo_tries=tries)
    return after.model_copy(
        update={"state": SagaState.UNDOING, "error": record.error.partition("; undoing ")[0]}
    )


def _with(record: SagaRecord, index: int, **changes: Any) -> SagaRecord:
    progress = list(record.progress)
    progress[index] = progress[index].model_copy(update=changes)
    return record.model_copy(update={"progress": progress})


def _checked_steps(name: str, steps: Sequence[SagaStep | Mapping[str, Any]]) -> list[SagaStep]:
    found: list[SagaStep] = []
    for number, given in enumerate(steps, 1):
        try:
            unknown = [] if isinstance(given, SagaStep) else set(given) - set(SagaStep.model_fields)
            step = given if isinstance(given, SagaStep) else SagaStep.model_validate(dict(given))
        except (ValidationError, TypeError, ValueError) as error:
            said = error.errors()[0] if isinstance(error, ValidationError) else None
            what = f"{said['loc'][0]}: {said['msg']}" if said and said["loc"] else str(error)
            raise ConfigError(f"Step {number} of the saga {name}: {what}.") from error
        if unknown:
            raise ConfigError(
                f"Step {number} of the saga {name} has {', '.join(sorted(unknown))}; "
                f"a step has {', '.join(SagaStep.model_fields)}."
            )
        (agent,) = agent_names([step.agent], f"step {step.name} of the saga {name}")
        data = as_json(step.data, f"step {step.name} of the saga {name}")
        found.append(step.model_copy(update={"agent": agent, "data": data}))
    names = [step.name for step in found]
    if not found or len(found) > _STEPS_MAX or len(set(names)) < len(names):
        raise ConfigError(f"The saga {name} needs 1 to {_STEPS_MAX} steps with names that differ.")
    return found


# ---- the runner -------------------------------------------------------------------------


def _ttl(record: SagaRecord) -> float | None:
    return KEEP_S if record.is_over else None


async def saga(
    connection: Connection,
    name: str,
    steps: Sequence[SagaStep | Mapping[str, Any]] | None = None,
    *,
    timeout: float = 300.0,
) -> SagaRecord:
    """Run the saga *name* to its end, or go on with it; returns its record, for ever the same.

    Each step is ``{"name", "agent", "type", "data", "undo", "timeout_s"}``: the agent handles a signal of
    *type*; what the handler returns is the step's result. `SagaRecord.state` says whether all was
    done, undone, or is stuck in a compensation that failed (which is tried again at each call).

    Args:
        steps: None: of a saga that was begun before.
        timeout: how long to wait; the saga itself goes on at the next call.

    Cancellation: the saga stands where it is; call again to go on.

    Raises:
        ConfigError: a step is wrong, or *name* belongs to another saga.
        NotFoundError: there is no such saga, and no *steps*.
        NotSettledError: not over within *timeout*.
        BusTimeoutError, BusUnavailableError, MailboxFullError: call again.
    """
    checked("saga", name)
    wanted = None if steps is None else _checked_steps(name, steps)
    until = monotonic() + timeout
    async with (
        Cell(connection, _PREFIX + name, SagaRecord) as cell,
        Desk(connection, f"saga-{name}", cell.changed) as desk,
    ):

        def open_(record: SagaRecord | None) -> SagaRecord | None:
            if record is None:
                if wanted is None:
                    raise NotFoundError(f"There is no saga {name}, or not any more.")
                progress = [StepProgress() for _ in wanted]
                return SagaRecord(steps=wanted, progress=progress, started=utc_text())
            if wanted is not None and record.steps != wanted:
                raise ConfigError(
                    f"There is another saga {name}, of the steps "
                    f"{', '.join(step.name for step in record.steps)}.",
                    hint="Each saga has an id of its own.",
                )
            return freed(record)

        await cell.change(open_, until)
        return await _run(name, cell, desk, until, timeout)


async def _run(
    name: str, cell: Cell[SagaRecord], desk: Desk, until: float, timeout: float
) -> SagaRecord:
    asked = ""
    while True:
        record = await cell.read(until)
        if record is None:
            raise NotFoundError(f"The record of the saga {name} is gone.")
        index = present(record)
        if index is None:
            if record.is_over:
                await desk.clear()
            return record
        now = await cell.now(until)
        step, part = record.steps[index], record.progress[index]
        if part.state not in (StepState.ASKED, StepState.UNDOING):
            await cell.change(_beginning(index, part.state, now), until, ttl_s=_ttl)
            continue
        is_undo = part.state is StepState.UNDOING
        id = f"saga.{name}.{step.name}" + (f".undo.{part.undo_tries}" if is_undo else "")
        ends = None if is_undo else part.asked + step.timeout_s
        if asked != id and (ends is None or now < ends):
            await _ask(desk, name, id, step, part, until, now, ends)
            asked = id
        answer = (await desk.answers(until)).get(id)
        now = await cell.now(until)
        if answer is not None or (ends is not None and now >= ends):
            await cell.change(_answering(index, part.state, answer), until, ttl_s=_ttl)
            continue
        left = until - monotonic()
        if left <= 0:
            what = f"{step.agent} has not answered yet: {'undo of ' if is_undo else ''}{step.name}"
            raise NotSettledError(
                f"The saga {name} is not over after {timeout:g} s: {what}.",
                hint="It goes on when it is called again.",
                step=step.name,
            )
        await cell.wait(left if ends is None else min(left, ends - now))


def _beginning(index: int, was: StepState, now: float) -> Any:
    return lambda r: (
        begun(r, index, now) if r is not None and r.progress[index].state is was else None
    )


def _answering(index: int, was: StepState, answer: Answer | None) -> Any:
    return lambda r: (
        answered(r, index, answer)
        if r is not None and present(r) == index and r.progress[index].state is was
        else None
    )


async def _ask(
    desk: Desk,
    name: str,
    id: str,
    step: SagaStep,
    part: StepProgress,
    until: float,
    now: float,
    ends: float | None,
) -> None:
    undo = {"saga": name, "step": step.name, "data": step.data, "result": part.result}
    await desk.ask(
        step.agent,
        id,
        step.type if ends is not None else str(step.undo),
        step.data if ends is not None else undo,
        until=until,
        since=part.asked,
        now=now,
        deadline=ends,
    )


async def sagas(connection: Connection) -> dict[str, SagaRecord]:
    """Every saga that is known, by its name: those under way, and those of the last week.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    entries = await Bucket(connection.bus, connection.subjects, "coordination").read_all()
    found: builtins.dict[str, SagaRecord] = {}
    for key, entry in sorted(entries.items()):
        if key.startswith(_PREFIX) and entry.value is not None:
            try:
                found[key.removeprefix(_PREFIX)] = decode(SagaRecord, entry.value)
            except DecodeError:
                continue  # a newer version's
    return found


__all__ = ["saga", "sagas"]
