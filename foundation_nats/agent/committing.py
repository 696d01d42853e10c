"""Stores what an activation has kept: one compare-and-set of the record at a time.

Effects become visible in one step, the commit of the record that holds state, cursor and
outbox. While one is in flight further signals are handled, and the next commit covers them
all. Replies and emitted signals leave only after the commit that holds their cause.

After a commit whose outcome is unknown nothing is guessed: the record is read from the
leader and its writer compared (`Commits.resolve`), which ends in `stored_as`, in `store`
once more, or in the end of the activation.
"""

from __future__ import annotations

from functools import partial

import orjson

from foundation_nats.agent.activation import Abandoned, Activation, InFlight
from foundation_nats.agent.emissions import buried
from foundation_nats.agent.past import base_key, encode_base
from foundation_nats.agent.publishing import publish, publish_head
from foundation_nats.agent.record import encode_record
from foundation_nats.agent.steps import StepLedger
from foundation_nats.base.clock import utc_text
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.bus.streams import PubAck
from foundation_nats.errors import (
    BusError,
    FoundationError,
    PayloadTooLargeError,
    StateTooLargeError,
)
from foundation_nats.signaling.envelope import emitted_id
from foundation_schemas import BaseRecord, DeadLetter


def commit(activation: Activation) -> None:
    """Store what is dirty, unless a commit is in flight: then the next one covers it."""
    if not activation.dirty or activation.in_flight is not None or activation.failure is not None:
        return
    if not activation.agent.durable:
        _commit_nothing(activation)
        return
    if not activation.runtime.commits.may_commit(activation):
        return
    failpoint("commit.before_cas")
    mailbox, outbox = activation.mailbox, activation.outbox
    if mailbox.skip:
        mailbox.skip = [sequence for sequence in mailbox.skip if sequence > mailbox.cursor]
    items = list(outbox.items.values())
    past = activation.past
    payload = encode_record(
        epoch=activation.epoch,
        commit=activation.commit_no + 1,
        writer=activation.runtime.writer_json,
        cursor=mailbox.cursor,
        mark=mailbox.mark,
        run=activation.run_name,
        state=activation.state_json,
        salt=activation.salt,
        emitted=activation.emitted,
        outbox=[] if planted("drop_outbox") else items,
        attempt=activation.runtime.attempts.get(activation.id) if activation.cautious else None,
        outbox_since=outbox.recovered_at if outbox.recovering else "",
        skip=mailbox.skip,
        ahead=mailbox.ahead,
        steps=activation.step_ledger,
        sensors=activation.positions,
        family=activation.agent.ctx._family_kept,
        schema_version=activation.kind.version,
        past=None if past is None else past.encoded(),
    )
    activation.commit_no += 1
    activation.in_flight = InFlight(
        payload,
        mailbox.cursor,
        items,
        activation.awaiting,
        past=None if past is None else past.mark(),
        base=_base(activation),
    )
    activation.awaiting = []
    activation.dirty = False
    activation.uncommitted = 0
    store(activation)


def _commit_nothing(activation: Activation) -> None:
    activation.dirty = False
    activation.uncommitted = 0
    activation.committed_cursor = activation.mailbox.cursor
    activation.runtime.moved(activation)
    awaiting, activation.awaiting = activation.awaiting, []
    for reply, body in awaiting:
        activation.send_reply(reply, body)
    publish(activation, list(activation.outbox.items.values()))


def store(activation: Activation) -> None:
    """Send the commit in flight (again)."""
    assert activation.in_flight is not None
    try:
        activation.runtime.state.replace_nowait(
            activation.id,
            activation.in_flight.payload,
            expected=activation.revision,
            on_ack=partial(_on_stored, activation),
        )
    except PayloadTooLargeError as error:
        activation.fail(StateTooLargeError(f"The record of {activation.id} does not fit: {error}"))
    except BusError:
        activation.runtime.commits.resolve(activation)


def _on_stored(activation: Activation, ack: PubAck | FoundationError) -> None:
    if activation.in_flight is None:
        return
    if isinstance(ack, PubAck):
        stored_as(activation, ack.sequence)
    else:
        activation.runtime.commits.resolve(activation)


def stored_as(activation: Activation, revision: int) -> None:
    """The commit in flight is stored: let its replies and emitted signals go."""
    assert activation.in_flight is not None
    stored, activation.in_flight = activation.in_flight, None
    activation.runtime.commits.in_flight -= 1
    activation.revision = revision
    activation.committed_cursor = stored.cursor
    activation.outbox.committed = len(stored.items)
    failpoint("commit.after_cas_before_outbox")
    if activation.past is not None and stored.past is not None:
        activation.past.committed(stored.past)
        _store_base(activation, stored.base)
    activation.runtime.counts.commits += 1
    activation.runtime.moved(activation)
    for reply, body in stored.awaiting:
        activation.send_reply(reply, body)
    if stored.items:
        publish(activation, stored.items)
    if activation.dirty:
        commit(activation)
    if activation.in_flight is None and not activation.outbox and activation.outbox.committed:
        activation.runtime.commits.clear_later(activation)
    activation.runtime.commits.committed(activation)
    activation.runtime.commits.commit_next()
    activation.resume()


def _base(activation: Activation) -> tuple[BaseRecord, bytes] | None:
    """What is being committed, as a base, if it is time for one."""
    if activation.past is None or (place := activation.past.next_place()) is None:
        return None
    base = activation.past.begin(place, activation.mailbox.cursor)
    return base, encode_base(
        base,
        epoch=activation.epoch,
        run=activation.run_name,
        state=activation.state_json,
        schema_version=activation.kind.version,
    )


def store_first_base(activation: Activation) -> None:
    """The claim is stored: what it found is what a replay can begin with."""
    if activation.past is not None:
        _store_base(activation, _base(activation))


def _store_base(activation: Activation, base: tuple[BaseRecord, bytes] | None) -> None:
    """Store a base of a commit that is stored; the next commit names it."""
    past = activation.past
    if past is None or base is None:
        return
    made, value = base
    # Its place was named by a record until now; what is there from now on may be either.
    past.bases = [known for known in past.bases if known.place != made.place]

    def on_ack(ack: PubAck | FoundationError) -> None:
        past.end(made, is_stored=isinstance(ack, PubAck))
        if (
            activation.runtime.holds(activation)
            and activation.failure is None
            and activation.stopping is None
        ):
            activation.dirty = True
            commit(activation)

    try:
        activation.runtime.state.overwrite_nowait(
            base_key(activation.id, made.place), value, on_ack=on_ack
        )
    except BusError:
        past.end(made, is_stored=False)


async def wait_committed(activation: Activation) -> None:
    """Return when all that was kept so far is stored.

    Raises:
        Abandoned: it has failed; nothing more will be stored.
    """
    while activation.dirty or activation.in_flight is not None:
        if activation.failure is not None:
            raise Abandoned
        commit(activation)
        await activation.runtime.commits.next_commit(activation)


def give_up_publishing(activation: Activation, subject: str, error: FoundationError) -> None:
    """Its receiver is full for too long: the signal becomes a dead letter of the receiver.

    Signal and dead letter change places in one commit, so it is never both.
    """
    outbox = activation.outbox
    if outbox.head(subject) is None:
        return
    item, following = outbox.give_up(subject)
    if following is not None:
        publish_head(activation, subject)
    signal = orjson.loads(item.body)
    receiver = subject.rpartition(".")[2] if ".signal.agent." in subject else "route"
    letter = DeadLetter(
        agent=receiver,
        signal=signal,
        code=error.code,
        reason=f"{activation.id} could not deliver it: {error}",
        at=utc_text(),
    )
    subjects = activation.runtime.subjects
    for word in buried(
        subjects,
        letter,
        signal,
        teller=activation.id,
        msg_id=emitted_id(activation.salt, item.msg_id, -2, subjects.dead(receiver)),
        payload=letter.model_dump_json(exclude_none=True).encode(),
    ):
        outbox.add(word)
    activation.dirty = True
    activation.runtime.log.warning(
        "emitted signal given up", agent=activation.id, receiver=receiver
    )
    commit(activation)
    activation.resume()


class LedgerKeeper:
    """The `StepHome` of an agent that runs on a worker."""

    __slots__ = ("_activation",)

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    @property
    def steps(self) -> StepLedger:
        """What was begun and done outside, until its signal has taken effect."""
        activation = self._activation
        if activation.step_ledger is None:
            activation.step_ledger = StepLedger(bytes_max=activation.runtime.steps_max_bytes)
        return activation.step_ledger

    async def store_steps(self) -> None:
        """Store the ledger, in the middle of a handler: with the state as it was before that."""
        activation = self._activation
        activation.dirty = True
        await wait_committed(activation)
        if not activation.runtime.is_valid():
            activation.runtime.park(activation)
            raise Abandoned
