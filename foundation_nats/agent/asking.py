"""Answers questions: at most once, and never from effects that may still be lost.

A question is handled between two signals, by the same handlers. Its answer may rest on
effects that are not stored yet: it leaves with the commit that covers them. Whoever may not
answer refuses, and says whether it is sure that nothing was handled.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from foundation_nats.agent.activation import Abandoned, Activation
from foundation_nats.agent.calling import call
from foundation_nats.agent.committing import wait_committed
from foundation_nats.agent.effects import checked_state, keep_effects, roll_back
from foundation_nats.agent.emissions import expired
from foundation_nats.agent.failing import handler_error, malformed
from foundation_nats.agent.handling import Handling, is_notice, unhandled, validated
from foundation_nats.agent.mailbox import Ask
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.steps import cause_of
from foundation_nats.agent.streaming import asked_for
from foundation_nats.bus.rpc import error_body, to_json
from foundation_nats.errors import FoundationError
from foundation_schemas import Envelope


async def answer_question(activation: Activation, item: Ask) -> None:
    """Handle one question; the answer leaves once all that it may rest on is stored."""
    if not activation.runtime.is_valid() or activation.starting:
        activation.refuse(item.reply)
        return
    activation.asked += 1
    try:
        body = orjson.loads(item.data)
        Envelope.model_validate(body)
    except (ValueError, RecursionError) as error:
        activation.send_reply(item.reply, orjson.dumps(error_body(malformed(item.data, error))))
        return
    signal_type = body["type"]
    handling: Handling | None = None
    result: Any = None
    failure: FoundationError | None = None
    before = activation.state_json, len(activation.outbox)
    try:
        handling = activation.handlings.find(signal_type, body)
        if handling is None and not is_notice(signal_type):
            raise unhandled(type(activation.agent), activation.id, signal_type)
        if (late := expired(activation.id, body)) is not None:
            raise late
        signal = Signal(
            id=body["id"],
            source=body["source"],
            type=signal_type,
            data=validated(handling, signal_type, body.get("data")),
            time=body.get("time"),
            traceparent=body.get("traceparent"),
            deadline=body.get("deadline"),
        )
        activation.replies = asked_for(
            body, activation.epoch, lambda item_: activation.runtime.bus.publish(item.reply, item_)
        )
        if activation.replies is not None:
            # What an item rests on is stored, but for what its own handler does.
            await wait_committed(activation)
        answered = await call(activation, handling, signal)
        result = (
            to_json(answered) if activation.replies is None else activation.replies.last(answered)
        )
        keep_effects(
            activation,
            checked_state(activation),
            seed=f"ask-{activation.epoch}-{activation.emitted}",
            signal=signal,
        )
    except (asyncio.CancelledError, Abandoned):
        activation.replies = None
        roll_back(activation)
        activation.refuse(item.reply, sure=not activation.step_ledger)
        raise
    except FoundationError as error:
        failure = error
    except Exception as error:
        failure = handler_error(error)
    if activation.step_ledger is not None and activation.step_ledger.settle(
        cause_of(body["source"], body["id"])
    ):
        activation.dirty = True
    if failure is not None:
        roll_back(activation)
        reply = orjson.dumps(error_body(failure))
    else:
        reply = b'{"ok":%b}' % result if activation.replies is None else result
    activation.replies = None
    activation.runtime.counts.answered += 1
    if (activation.state_json, len(activation.outbox)) != before:
        activation.uncommitted += 1
    # The answer may rest on effects that are not stored yet: it leaves with the
    # commit that covers them, which is the one in flight if nothing came since.
    if activation.dirty:
        activation.awaiting.append((item.reply, reply))
    elif activation.in_flight is not None:
        activation.in_flight.awaiting.append((item.reply, reply))
    elif activation.runtime.is_valid():
        activation.send_reply(item.reply, reply)
    else:
        activation.refuse(item.reply)
