"""What a handler emitted, as items of the outbox; and whether a signal's deadline has passed.

Pure, but for the reading of the wall clock in `expired`. Deadlines compare the clock of the
sender with that of the receiver's machine: keep them in step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orjson import Fragment

from foundation_nats.agent.context import Emission
from foundation_nats.agent.record import OutboxItem
from foundation_nats.agent.signal import Signal
from foundation_nats.base.clock import utc_now, utc_text
from foundation_nats.bus.rpc import encode, to_json
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import ExpiredError
from foundation_nats.signaling.burial import words
from foundation_nats.signaling.envelope import ANSWER, BOX, emitted_id, encode_envelope
from foundation_nats.signaling.schedules import read_time, timer_headers
from foundation_schemas import ClusterEvent, DeadLetter, Target, TargetKind
from foundation_schemas.base import is_name


def expired(agent: str, body: Mapping[str, Any]) -> ExpiredError | None:
    """Why the signal may not be handled any more; None if it may."""
    text = body.get("deadline")
    if text is None:
        return None
    try:
        deadline = read_time(text)
    except (ValueError, TypeError):
        return None  # no time at all: not a reason to lose it
    if utc_now() <= deadline:
        return None
    return ExpiredError(
        f"{agent} did not get to it before its deadline, {text}.", agent=agent, deadline=text
    )


def answer(box: Any, said: Mapping[str, Any]) -> list[Emission]:
    """What a signal that asks for a stored answer gets: a signal for the box that it names.

    A box is a mailbox of no agent, so its name is none (`foundation_nats.coordination.desk`).
    The answer names the signal it belongs to as its cause.

    Raises:
        TypeError: what was said is not JSON.
    """
    if not (isinstance(box, str) and box.startswith(BOX) and is_name(box.removeprefix(BOX))):
        return []
    target = Target(kind=TargetKind.AGENT, name=box)
    return [Emission(target, ANSWER, Fragment(to_json(said)))]


def outbox_items(
    subjects: Subjects,
    agent: str,
    emissions: Sequence[Emission],
    *,
    salt: str,
    seed: str,
    emitted: int,
    signal: Signal[Any] | None,
) -> list[OutboxItem]:
    """One item for each emission, under ids that are the same at each repeat of its cause.

    *emitted* counts what this agent has emitted before: timers of one name are told apart by it.
    """
    items = []
    for index, emission in enumerate(emissions):
        target = str(emission.target)
        headers = None
        if emission.event:
            items.append(
                _event_item(subjects, agent, emission, emitted_id(salt, seed, index, "event"))
            )
            continue
        if emission.timer is not None:
            subject = subjects.timer(agent, emission.name)
            timer = replace(emission.timer, generation=emitted + index + 1)
            headers = timer_headers(timer, subjects.due())
        elif emission.target.kind is TargetKind.AGENT:
            subject = subjects.mailbox(emission.target.name)
        else:
            subject = subjects.route(emission.target)
        msg_id = emitted_id(
            salt, seed, index, target if emission.timer is None else f"{target} {emission.name}"
        )
        body = encode_envelope(
            id=msg_id,
            source=f"agent:{agent}",
            type=emission.type,
            target=target,
            data=emission.data,
            traceparent=None if signal is None else signal.traceparent,
            cause=None if signal is None else signal.id,
            deadline=emission.deadline,
            attempts=emission.attempts,
            onerror=emission.on_error,
            urgent=emission.urgent,
        )
        items.append(OutboxItem(subject, msg_id, body, headers))
    return items


def _event_item(subjects: Subjects, agent: str, emission: Emission, msg_id: str) -> OutboxItem:
    event = ClusterEvent(
        topic="agent",
        what=emission.event,
        at=utc_text(),
        source=f"agent:{agent}",
        message=emission.type,
        data={"agent": agent, **emission.value},
    )
    return OutboxItem(subjects.event(event.topic, event.what), msg_id, encode(event))


def buried(
    subjects: Subjects,
    letter: DeadLetter,
    body: dict[str, Any] | None,
    *,
    teller: str,
    msg_id: str,
    payload: bytes,
) -> list[OutboxItem]:
    """A dead letter, and with it the word to whoever waits for an answer or asked to be told.

    Args:
        body: the signal that is given up; None: it can't be read.
        teller: the agent that gives it up.
        payload: the letter as it fits.
    """
    return [
        OutboxItem(subjects.dead(letter.agent), msg_id, payload),
        *(
            OutboxItem(word.subject, word.msg_id, word.payload)
            for word in words(subjects, body, letter, source=f"agent:{teller}", seed=msg_id)
        ),
    ]
