"""Delivers a signal of the mailbox to the agent: each takes effect once, or becomes a dead letter.

A handler that fails is tried again after a while, and then the signal is given up: the dead
letter is part of the commit that moves the cursor past it. What was handled (or given up)
moves the cursor, or is named as ahead of it if it has overtaken others; so it is the same
compare-and-set that makes both lanes exactly once.

A signal that has ended its worker is handled with caution: each further attempt is written
down before it begins.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from foundation_nats.agent.activation import Abandoned, Activation
from foundation_nats.agent.calling import call
from foundation_nats.agent.committing import commit, wait_committed
from foundation_nats.agent.effects import checked_state, keep_effects, roll_back
from foundation_nats.agent.emissions import answer, buried, expired
from foundation_nats.agent.failing import handler_error, malformed
from foundation_nats.agent.handling import Handling, is_notice, unhandled, validated
from foundation_nats.agent.kin import hear, is_of_kin
from foundation_nats.agent.mailbox import Stored
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.steps import cause_of
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.errors import (
    BudgetError,
    FoundationError,
    HandlerError,
    PayloadInvalidError,
    PayloadTooLargeError,
    PlanFailedError,
    StateTooLargeError,
    StepInDoubtError,
    StepTooLargeError,
    TransitionError,
)
from foundation_nats.signaling.burial import attempts_of, content
from foundation_nats.signaling.envelope import emitted_id
from foundation_schemas import DeadLetter

_RAW_MAX = 8000
_HOPELESS = (BudgetError, PlanFailedError, StepInDoubtError, StepTooLargeError, TransitionError)
"""To try again would end the same way."""


async def deliver(activation: Activation, item: Stored) -> None:
    """Handle one signal of the mailbox until it has taken effect or is given up.

    Raises:
        StateTooLargeError: the agent must end.
        Abandoned: it may not go on now; the signal is left as it is.
    """
    mailbox = activation.mailbox
    if item.sequence <= mailbox.cursor:
        return
    if mailbox.skip and item.sequence in mailbox.skip:
        if activation.past is not None:
            activation.past.took_no_effect(item.sequence)
        _advance(activation, item)
        return
    if mailbox.ahead and not activation.overtaking and item.sequence in mailbox.ahead:
        if mailbox.ahead.pop(item.sequence) == item.stamp:
            _advance(activation, item)
            return
        # The stream went back, and its number was given out again: it is another one.
        activation.dirty = True
    if activation.cautious and not await _may_try(activation, item):
        return
    try:
        body = orjson.loads(item.data)
        signal_type, signal_id, source = body["type"], body["id"], body["source"]
        data = body.get("data")
        if not (
            isinstance(signal_type, str)
            and isinstance(signal_id, str)
            and isinstance(source, str)
            and body.get("specversion") == "1.0"
        ):
            raise ValueError("not a CloudEvents 1.0 envelope")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _bury(activation, item, None, malformed(item.data, error), attempts=1)
        return
    handling = activation.handlings.find(signal_type, body)
    if handling is None and not is_notice(signal_type):
        _bury(
            activation,
            item,
            body,
            unhandled(type(activation.agent), activation.id, signal_type),
            attempts=1,
        )
        return
    try:
        data = validated(handling, signal_type, data)
    except PayloadInvalidError as error:
        _bury(activation, item, body, error, attempts=1)
        return
    attempt = 1
    while True:
        if (late := expired(activation.id, body)) is not None:
            _bury(activation, item, body, late, attempts=attempt - 1)
            return
        signal = Signal(
            id=signal_id,
            source=source,
            type=signal_type,
            data=data,
            time=body.get("time"),
            cause=body.get("cause"),
            traceparent=body.get("traceparent"),
            sequence=item.sequence,
            attempt=attempt,
            deadline=body.get("deadline"),
        )
        began, before = monotonic(), activation.emitted
        failure = await _try(activation, handling, signal, body.get("replyto"))
        if failure is None:
            activation.runtime.trace.add(
                activation.id,
                item.sequence,
                activation.epoch,
                monotonic() - began,
                attempt,
                activation.emitted - before,
            )
            if activation.step_ledger is not None:
                activation.step_ledger.settle(cause_of(source, signal_id))
            activation.runtime.counts.handled += 1
            if activation.overtaking and activation.past is not None:
                # A replay goes by the order of the mailbox, in which this one has no place.
                activation.past.took_no_effect(item.sequence)
                activation.past.aside()
            _advance(activation, item)
            return
        if isinstance(failure, StateTooLargeError):
            raise failure
        most = attempts_of(body, activation.runtime.attempts_max)
        if attempt >= most or isinstance(failure, _HOPELESS):
            _bury(activation, item, body, failure, attempts=attempt)
            return
        commit(activation)
        await asyncio.sleep(activation.runtime.retry_delay(attempt))
        if activation.stopping is not None:
            raise asyncio.CancelledError
        if not activation.runtime.is_valid():
            activation.runtime.park(activation)
            raise Abandoned
        attempt += 1
        if handling is not None and handling.adapter is not None:
            data = validated(handling, signal_type, body.get("data"))


def _advance(activation: Activation, item: Stored) -> None:
    """The signal is done with: the next commit moves the cursor past it, or names it as ahead."""
    if activation.overtaking:
        activation.mailbox.ahead[item.sequence] = item.stamp
    else:
        activation.mailbox.pass_by(item)
        activation.consumed += 1
        if activation.past is not None:
            activation.past.done()
    if activation.cautious:
        suspect = activation.runtime.attempts.get(activation.id, (0, 0))[0]
        if item.sequence == suspect or (item.sequence > suspect and not activation.overtaking):
            activation.cautious = False
            activation.runtime.attempts.pop(activation.id, None)
    activation.dirty = True
    activation.uncommitted += 1


async def _try(
    activation: Activation, handling: Handling | None, signal: Signal[Any], reply_to: Any
) -> FoundationError | None:
    """Handle one signal; effects are kept only if this returns None."""
    try:
        result = await call(activation, handling, signal)
        if reply_to is not None:
            activation.agent.ctx._emissions += answer(reply_to, {"ok": result})
        keep_effects(
            activation, checked_state(activation), seed=str(signal.sequence), signal=signal
        )
        return None
    except (asyncio.CancelledError, Abandoned):
        roll_back(activation)
        raise
    except FoundationError as error:
        roll_back(activation)
        return error
    except Exception as error:
        roll_back(activation)
        return handler_error(error)


def _bury(
    activation: Activation,
    item: Stored,
    body: dict[str, Any] | None,
    error: FoundationError,
    *,
    attempts: int,
) -> None:
    """Give the signal up: the dead letter is part of the commit that moves the cursor past it."""
    failpoint("deadletter.before_ack")
    activation.runtime.counts.given_up += 1
    trace = error.details.get("traceback")
    raw = None if body is not None else item.data[:_RAW_MAX].decode("utf-8", "replace")
    letter = DeadLetter(
        agent=activation.id,
        signal=body,
        raw=raw,
        sequence=item.sequence,
        code=error.code,
        reason=str(error),
        attempts=attempts,
        traceback=trace,
        at=utc_text(),
    )
    subject = activation.runtime.subjects.dead(activation.id)
    payload = letter.model_dump_json(exclude_none=True).encode()
    try:
        activation.runtime.check_size(subject, payload)
    except PayloadTooLargeError:
        brief = letter.model_copy(update={"signal": None, "raw": None})
        payload = brief.model_dump_json(exclude_none=True).encode()
    msg_id = emitted_id(activation.salt, str(item.sequence), -1, subject)
    for word in buried(
        activation.runtime.subjects,
        letter,
        body,
        teller=activation.id,
        msg_id=msg_id,
        payload=payload,
    ):
        activation.outbox.add(word)
    if body is not None and is_of_kin(body["type"]):
        _hear_buried(activation, body, item.sequence)
    if activation.past is not None:
        activation.past.took_no_effect(item.sequence)
    _advance(activation, item)
    activation.runtime.log.warning(
        "signal given up", agent=activation.id, sequence=item.sequence, reason=error.code
    )


def _hear_buried(activation: Activation, body: dict[str, Any], sequence: int) -> None:
    """A child has ended all the same, although the handler of that has failed."""
    signal: Signal[Any] = Signal(
        id=body["id"], source=body["source"], type=body["type"], data=body.get("data")
    )
    activation.agent.ctx._begin(signal)
    hear(activation.agent, signal)
    keep_effects(activation, activation.state_json, seed=f"buried-{sequence}")


async def _may_try(activation: Activation, item: Stored) -> bool:
    """Write down that a signal which ended a worker is tried again; False: it was tried enough."""
    sequence, tries = activation.runtime.attempts.get(activation.id, (0, 0))
    if sequence != item.sequence:
        return True
    body, _ = content(item.data)
    if tries >= attempts_of(body, activation.runtime.attempts_max):
        known = activation.recovered is not None and activation.recovered.sequence == item.sequence
        cause = activation.recovered.cause if known and activation.recovered is not None else None
        error = HandlerError(
            f"Handling it ended the worker process {tries} times "
            f"({cause or 'a crash in native code, an exit, or too much memory'})."
        )
        _bury(activation, item, body, error, attempts=tries)
        # Stored before the next signal, which may end the worker too.
        commit(activation)
        await wait_committed(activation)
        return False
    activation.runtime.attempts[activation.id] = (item.sequence, tries + 1)
    activation.dirty = True
    commit(activation)
    await wait_committed(activation)
    return True
