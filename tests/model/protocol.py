"""A model of the durable mailbox: claim, commit, outbox, failover, trimming, as moves between small states.

Pure. It is searched by `checker.explore`; `Safeguards` switches single rules
of the protocol off, to see what each of them is for. It shows that the rules
fit together in every order of events within `Bounds`. It doesn't show that the
code follows the rules: tests/cluster does that, by failpoints and kills.

World. A client sends signals 1, 2, … to agent A and waits for each receipt,
repeating under the same id. A's handler of signal n notes n in its state and
emits signal n to agent B. A has at most `Bounds.epochs` activations, one per
epoch, in any order of steps: an activation that makes no step for long is a
frozen one, and a zombie if it goes on after it was replaced.

Which move stands for what (functions of `foundation_nats`):

=======================================  ==========================================================
client sends n [, the receipt is lost]   signaling/publisher.py `Publisher.store`
An takes the live copy; sees a gap       agent/mailbox.py `Mailbox.hear`, `take_page`,
                                         agent/mailboxes.py `Mailboxes._catch_up`
the live copy is lost                    a republish is at most once
An sweeps                                `Mailboxes._sweep_loop`, `look_for_unread`
An handles n                             agent/delivering.py `deliver`, `_advance`,
                                         agent/effects.py `keep_effects`
An sends a commit                        agent/committing.py `commit`, `store` (several signals in one
                                         commit, others handled meanwhile); also agent/commits.py
                                         `Commits._clear_loop`
the commit of An is stored, refused …    agent/committing.py `_on_stored`, `stored_as`; the server's
                                         compare-and-set (bus/kv.py `Bucket.replace_nowait`)
An reads the record: …                   `Commits._resolve`, `_judge`
An publishes n                           agent/publishing.py `publish_head`, agent/post.py `Post.append`
An compares its recovered outbox         `Post._recover`, agent/outbox.py `drop_published`,
                                         agent/publishing.py `publish_recovered`
epoch n is assigned                      control/planner.py (failover), node/host.py `_reclaim_lost`
An reads the record to claim it          agent/claiming.py `Claims._claim`, `prepare`, `_is_my_claim`
An claims                                `Claims._write_claim`, agent/runtime.py `Runtime._take_over`
An answers an ask                        agent/activation.py `Activation._on_ask`, agent/asking.py
                                         `answer_question`, cluster/validity.py
the mailbox is trimmed                   node/trimmer.py `Trimmer._trim`, `Runtime.consumed`
the duplicate window passes              ``duplicate_window`` of SIGNALS; consumed signals are kept
                                         as evidence (`trim_min_age_s`)
=======================================  ==========================================================

Abstracted away:

- B is its mailbox. B consumes by the same protocol as A, so what is stored
  there once and in order takes effect once and in order.
- Sequences count within A's mailbox. Revisions are not counted: it is kept
  whether an activation's revision is the record's, is followed by nothing but
  its own write, or is older; compare-and-set and `_judge` ask for no more.
- An acknowledgement and its processing are one move, as are finding a gap and
  reading the stream, and subscribing and the first catch-up: between the two
  halves the activation itself does nothing that others could see.
- Time is order, with two assumptions. A right to answer (validity) has ended
  before a successor is assigned, unless the activation was seen dead (`fence_s` <
  `down_after_s`). The duplicate window does not pass while a client repeats an
  id, nor, unless `Bounds.late` says so, amid the work of an activation that
  emits: then a signal can be published twice (see `Late`).
- What a replaced activation takes in is left out where it can't handle it anyway;
  its commits, publishes, resolutions and late claims are not.
- Evidence for late recovery is not trimmed away (docs/guarantees.md, P2).
- Reads of the stream are fresh. Handlers don't fail; no dead letters, full
  mailboxes, expansion, `durable = False`, or loss of stored data.
- Crashes and lost answers of commits and claims are bounded; lost live copies,
  receipts and acknowledgements of publishes are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final, NamedTuple

from tests.model.checker import Move

LOST: Final = "lost signal"
TWICE: Final = "applied twice"
ORDER: Final = "wrong order"
STALE_COMMIT: Final = "stale commit accepted"
TWO_COMMITTERS: Final = "two committers in one epoch"
NO_CAUSE: Final = "effect without its cause"
STALE_ANSWER: Final = "stale answer"
UNBACKED_ANSWER: Final = "answer that is not stored"

# The stages of an activation.
ASSIGNED: Final = 0
READ: Final = 1
RUNNING: Final = 2
GONE: Final = 3

# How an activation's revision stands to the record's.
CURRENT: Final = 0
OWN_WRITE: Final = 1
OLDER: Final = 2

# The commit in flight.
NONE: Final = 0
SENT: Final = 1
UNKNOWN: Final = 2


@dataclass(frozen=True, slots=True)
class Safeguards:
    """The rules of the protocol; each can be left out."""

    cas: bool = True
    """The server refuses a write of the record that is not based on its present revision."""
    raise_epoch: bool = True
    """Every assignment has an epoch of its own."""
    epoch_check: bool = True
    """A record of a newer epoch is neither claimed nor overwritten."""
    claim_rewrites: bool = True
    """A claim writes the record, so that what older activations have in flight is refused."""
    one_record: bool = True
    """State and cursor are stored by one write."""
    outbox: bool = True
    """What is emitted is stored with the state that it follows from."""
    publish_after_commit: bool = True
    """What is emitted leaves only when it is stored."""
    recover_stored_only: bool = True
    """At the end of recovery, too, only what is stored leaves."""
    outbox_in_order: bool = True
    """One emitted signal per receiver is on its way at a time."""
    dedupe_ids: bool = True
    """A repeat has the id of the original, and the stream drops it."""
    search_late: bool = True
    """A late recovery looks in the receivers' mailboxes for what was published before."""
    outbox_since: bool = True
    """A claim leaves the age of the outbox that it found as it was."""
    resolve_unknown: bool = True
    """After a commit of unknown outcome the record is read; otherwise success is assumed."""
    gap_rule: bool = True
    """A live copy that follows an unseen one makes the activation read the stream."""
    sweep: bool = True
    """The stream is compared with what was taken in, now and then."""
    trim_behind_cursor: bool = True
    """Only what lies behind the stored cursor is removed; otherwise all that was taken in."""
    validity: bool = True
    """An activation that may be replaced neither handles nor answers."""
    reply_after_commit: bool = True
    """An answer waits until the state it speaks of is stored."""


class Late(StrEnum):
    """What may still be pending when the duplicate window passes; nothing guards against these.

    `drop_published` is asked once, at recovery, and takes the age of the record
    for the age of what its outbox holds.
    """

    NOTHING = "nothing"
    RETRY = "retry"
    """The activation in charge repeats a publish whose answer was lost, after the window."""
    ZOMBIE = "zombie"
    """A replaced activation publishes what it had stored, after the window."""
    COMMIT = "commit"
    """A commit that holds what was published meanwhile is stored after the window."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may happen."""

    signals: int = 2
    epochs: int = 2
    crashes: int = 1
    """Deaths of activations; each must have a successor."""
    losses: int = 1
    """Commits and claims whose request or answer is lost or late."""
    windows: int = 0
    """1: the duplicate window passes once."""
    late: Late = Late.NOTHING
    """What may be pending while it passes."""


class Record(NamedTuple):
    """A's record in the state bucket."""

    epoch: int = 0
    writer: int = -1
    cursor: int = 0
    applied: tuple[int, ...] = ()
    """The state: the signals that were handled, in order."""
    outbox: tuple[int, ...] = ()
    is_old: bool = False
    """The outbox may have been published before the duplicate window passed."""


class Activation(NamedTuple):
    """One activation of A; activation n (from 0) has epoch n + 1."""

    stage: int = ASSIGNED
    is_replaced: bool = False
    """A successor is assigned, and before that the right to answer has ended."""
    heard: int = 0
    """Live copies up to here were delivered or lost."""
    fetched: int = 0
    queue: tuple[int, ...] = ()
    cursor: int = 0
    applied: tuple[int, ...] = ()
    outbox: tuple[int, ...] = ()
    """Emitted and not acknowledged."""
    stored: int = 0
    """So many of them, from the first on, may be published."""
    held: bool = False
    """The recovered outbox was not yet compared: nothing is published."""
    is_old: bool = False
    """Some of the outbox may have been published before the duplicate window passed."""
    revision: int = OLDER
    saved_cursor: int = 0
    saved_outbox: int = 0
    """What the stored record holds, as far as the activation knows."""
    wire: int = NONE
    late: bool = False
    """A copy of the commit is under way though nobody waits for its answer."""
    flight: tuple[int, tuple[int, ...], tuple[int, ...]] = (0, (), ())
    """Cursor, state and outbox of the commit in flight."""


class World(NamedTuple):
    """One state of the model."""

    crashes: int
    losses: int
    windows: int
    receipts: int = 0
    """The client holds receipts for signals 1 to this."""
    unsure: bool = False
    """The next one was sent, and its receipt lost."""
    mailbox: tuple[tuple[int, int], ...] = ()
    """Of each signal ever stored: which one, and the sequence before it (``Nats-Last-Sequence``)."""
    trimmed: int = 0
    known: tuple[int, ...] = ()
    """Ids that the stream remembers: n for the client's, −n for the emitted ones, sorted."""
    record: Record = Record()
    activations: tuple[Activation, ...] = (Activation(),)
    receiver: tuple[int, ...] = ()
    """B's mailbox."""
    broken: str = ""
    """The promise that the last move broke."""


_DEAD: Final = Activation(stage=GONE, is_replaced=True)


class Protocol:
    """The moves of the protocol under some safeguards, and its promises."""

    def __init__(self, safeguards: Safeguards | None = None, bounds: Bounds | None = None) -> None:
        self.safeguards = safeguards or Safeguards()
        self.bounds = bounds or Bounds()
        # What a replaced activation takes in it never handles, so nobody can see it: left out.
        self._ignores_intake = self.safeguards.validity and self.safeguards.trim_behind_cursor
        self.initial = World(self.bounds.crashes, self.bounds.losses, self.bounds.windows)

    # ---- promises ---------------------------------------------------------------

    def invariants(self) -> Mapping[str, Callable[[World], bool]]:
        """What must hold in every state."""
        moved = (STALE_COMMIT, TWO_COMMITTERS, NO_CAUSE, STALE_ANSWER, UNBACKED_ANSWER)
        found: dict[str, Callable[[World], bool]] = {
            name: lambda world, name=name: world.broken != name  # type: ignore[misc]
            for name in moved
        }
        found[TWICE] = lambda world: (
            _is_without_repeats(world.record.applied) and _is_without_repeats(world.receiver)
        )
        found[ORDER] = lambda world: _is_sorted(world.record.applied) and _is_sorted(world.receiver)
        found[LOST] = _passes_nothing
        return found

    def final(self) -> Mapping[str, Callable[[World], bool]]:
        """What must hold when there is nothing left to do."""
        everything = tuple(range(1, self.bounds.signals + 1))
        return {
            LOST: lambda world: world.record.applied == everything and world.receiver == everything
        }

    # ---- moves ------------------------------------------------------------------

    def successors(self, world: World) -> Iterator[Move[World]]:
        """Every move out of *world*."""
        if world.receipts < self.bounds.signals:
            yield from self._send(world)
        for index, activation in enumerate(world.activations):
            stage = activation.stage
            if stage == RUNNING:
                if not (activation.is_replaced and self._ignores_intake):
                    yield from self._take_in(world, index, activation)
                yield from self._handle(world, index, activation)
                yield from self._commit(world, index, activation)
                yield from self._publish(world, index, activation)
                yield from self._answer(world, index, activation)
                yield from self._trim(world, index, activation)
            elif stage == ASSIGNED:
                yield self._read_to_claim(world, index, activation)
            elif stage == READ:
                yield from self._claim(world, index, activation)
            if activation.late:
                yield self._late_write(world, index, activation)
            if stage != GONE and world.crashes and len(world.activations) < self.bounds.epochs:
                after = world._replace(
                    activations=_with(world.activations, index, _crashed(activation)),
                    crashes=world.crashes - 1,
                )
                yield Move(f"A{index + 1} dies", after, True)
        yield from self._assign(world)
        if world.windows:
            yield from self._pass_window(world)

    def _send(self, world: World) -> Iterator[Move[World]]:
        signal = world.receipts + 1
        mailbox, known = world.mailbox, world.known
        if signal not in known:
            last = len(mailbox) if len(mailbox) > world.trimmed else 0
            mailbox = (*mailbox, (signal, last))
            if self.safeguards.dedupe_ids:
                known = _added(known, signal)
        stored = world._replace(mailbox=mailbox, known=known)
        yield Move(f"client sends {signal}", stored._replace(receipts=signal, unsure=False))
        if not self.safeguards.dedupe_ids or not world.unsure:
            yield Move(
                f"client sends {signal}, the receipt is lost", stored._replace(unsure=True), True
            )

    # -- intake

    def _take_in(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        length = len(world.mailbox)
        name = f"A{index + 1}"
        if it.heard < length:
            sequence = it.heard + 1
            if world.mailbox[it.heard][1] > it.fetched and self.safeguards.gap_rule:
                yield self._moved(
                    f"{name} sees a gap before {sequence} and reads the stream",
                    world,
                    index,
                    _caught_up(it, world),
                )
            else:
                taken = it._replace(heard=sequence, fetched=sequence, queue=(*it.queue, sequence))
                yield self._moved(f"{name} takes live copy {sequence}", world, index, taken)
            yield self._moved(
                f"live copy {sequence} to {name} is lost",
                world,
                index,
                it._replace(heard=sequence),
                is_fault=True,
            )
        if self.safeguards.sweep and it.fetched < length and length > world.trimmed:
            yield self._moved(f"{name} sweeps", world, index, _caught_up(it, world))

    # -- handling

    def _handle(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        if not it.queue or (it.is_replaced and self.safeguards.validity):
            return
        sequence = it.queue[0]
        signal = world.mailbox[sequence - 1][0]
        handled = it._replace(
            queue=it.queue[1:],
            cursor=sequence,
            applied=(*it.applied, signal),
            outbox=(*it.outbox, signal),
        )
        yield self._moved(f"A{index + 1} handles {signal}", world, index, handled)

    def _answer(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        """An ask that is sent now; only the answers that break a promise are moves."""
        if it.is_replaced and self.safeguards.validity:
            return
        known, stored = len(it.applied), len(world.record.applied)
        is_clean = it.cursor == it.saved_cursor and it.wire == NONE
        if self.safeguards.reply_after_commit and not is_clean:
            return
        broken = STALE_ANSWER if known < stored else UNBACKED_ANSWER if known > stored else ""
        if broken:
            yield Move(
                f"A{index + 1} answers an ask: {known} handled, while {stored} are stored",
                world._replace(broken=broken),
                True,
            )

    # -- commit

    def _commit(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        name = f"A{index + 1}"
        if it.wire == NONE:
            if it.cursor != it.saved_cursor or (it.saved_outbox and not it.outbox):
                flight = it.cursor, it.applied, it.outbox
                sent = it._replace(wire=SENT, flight=flight)
                yield self._moved(f"{name} sends a commit", world, index, sent)
        elif it.wire == UNKNOWN:
            yield self._resolve(world, index, it)
        else:
            unknown = it._replace(wire=UNKNOWN)
            if it.revision == CURRENT or not self.safeguards.cas:
                written = self._written(world, index, it, it.flight)
                yield self._moved(f"the commit of {name} is stored", written, index, _stored(it))
                if world.losses:
                    yield self._moved(
                        f"the commit of {name} is stored, the answer lost",
                        written._replace(losses=world.losses - 1),
                        index,
                        unknown._replace(revision=OWN_WRITE),
                        is_fault=True,
                    )
                if not self.safeguards.one_record and self._may_crash(world):
                    yield self._half_written(world, index, it)
            else:
                yield self._moved(f"the commit of {name} is refused", world, index, unknown)
            if world.losses:
                fewer = world._replace(losses=world.losses - 1)
                yield self._moved(
                    f"the commit of {name} is lost", fewer, index, unknown, is_fault=True
                )
                if it.revision == CURRENT or not self.safeguards.cas:
                    yield self._moved(
                        f"the commit of {name} is late",
                        fewer,
                        index,
                        unknown._replace(late=True),
                        is_fault=True,
                    )

    def _may_crash(self, world: World) -> bool:
        return world.crashes > 0 and len(world.activations) < self.bounds.epochs

    def _half_written(self, world: World, index: int, it: Activation) -> Move[World]:
        _, applied, outbox = it.flight
        written = self._written(world, index, it, (world.record.cursor, applied, outbox))
        return self._moved(
            f"A{index + 1} stores the state and dies before the cursor",
            written._replace(crashes=world.crashes - 1),
            index,
            _DEAD,
            is_fault=True,
        )

    def _late_write(self, world: World, index: int, it: Activation) -> Move[World]:
        name = f"the late commit of A{index + 1}"
        rest = _DEAD if it.stage == GONE else it._replace(late=False)
        if it.revision == CURRENT or not self.safeguards.cas:
            written = self._written(world, index, it, it.flight)
            if it.stage != GONE and it.revision == CURRENT:
                rest = rest._replace(revision=OWN_WRITE)
            return self._moved(f"{name} is stored", written, index, rest)
        return self._moved(f"{name} is refused", world, index, rest)

    def _written(
        self,
        world: World,
        index: int,
        it: Activation,
        content: tuple[int, tuple[int, ...], tuple[int, ...]],
    ) -> World:
        """The record is replaced; what others know of it is older then."""
        cursor, applied, outbox = content
        if not self.safeguards.outbox:
            outbox = ()
        before = world.record
        epoch = self._epoch(index)
        broken = world.broken
        if epoch < before.epoch or any(
            later.stage == RUNNING for later in world.activations[index + 1 :]
        ):
            broken = STALE_COMMIT
        if epoch == before.epoch and index != before.writer:
            broken = TWO_COMMITTERS
        record = Record(epoch, index, cursor, applied, outbox, bool(outbox) and it.is_old)
        others = tuple(
            other
            if place == index or other.revision == OLDER
            else _outdated(other, self.safeguards.cas)
            for place, other in enumerate(world.activations)
        )
        return world._replace(record=record, activations=others, broken=broken)

    def _epoch(self, index: int) -> int:
        return index + 1 if self.safeguards.raise_epoch else 1

    def _resolve(self, world: World, index: int, it: Activation) -> Move[World]:
        name = f"A{index + 1}"
        record = world.record
        if not self.safeguards.resolve_unknown:
            return self._moved(f"{name} assumes that it is stored", world, index, _stored(it))
        if it.revision == CURRENT:
            return self._moved(
                f"{name} reads the record: unchanged, sends again",
                world,
                index,
                it._replace(wire=SENT),
            )
        if not self.safeguards.epoch_check and record.writer != index:
            return self._moved(
                f"{name} reads the record of A{record.writer + 1} and sends again",
                world,
                index,
                it._replace(wire=SENT, revision=CURRENT),
            )
        if record.writer == index and it.revision == OWN_WRITE:
            return self._moved(f"{name} reads the record: stored", world, index, _stored(it))
        return self._moved(f"{name} reads the record: fenced", world, index, _crashed(it))

    # -- outbox

    def _publish(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        name = f"A{index + 1}"
        if it.held:
            yield self._moved(
                f"{name} compares its recovered outbox", world, index, self._recovered(world, it)
            )
            return
        ready = it.stored if self.safeguards.publish_after_commit else len(it.outbox)
        for place in range(min(1, ready) if self.safeguards.outbox_in_order else ready):
            signal = it.outbox[place]
            receiver, known, broken = world.receiver, world.known, world.broken
            if -signal not in known:
                receiver = (*receiver, signal)
                if self.safeguards.dedupe_ids:
                    known = _added(known, -signal)
                if signal not in world.record.applied:
                    broken = NO_CAUSE
            after = world._replace(receiver=receiver, known=known, broken=broken)
            outbox = it.outbox[:place] + it.outbox[place + 1 :]
            acknowledged = it._replace(
                outbox=outbox, stored=max(0, it.stored - 1), is_old=it.is_old and bool(outbox)
            )
            yield self._moved(f"{name} publishes {signal}", after, index, acknowledged)
            if receiver is not world.receiver:
                yield Move(f"{name} publishes {signal}, the answer is lost", after, True)

    def _recovered(self, world: World, it: Activation) -> Activation:
        outbox, stored = it.outbox, it.stored
        if it.is_old and self.safeguards.search_late:
            outbox = tuple(signal for signal in it.outbox if signal not in world.receiver)
            stored = sum(signal in outbox for signal in it.outbox[: it.stored])
        if not self.safeguards.recover_stored_only:
            stored = len(outbox)
        return it._replace(
            held=False, outbox=outbox, stored=stored, is_old=it.is_old and bool(outbox)
        )

    # -- failover

    def _assign(self, world: World) -> Iterator[Move[World]]:
        epoch = len(world.activations) + 1
        if epoch > self.bounds.epochs:
            return
        last = world.activations[-1]
        replaced = last if last.stage == GONE else last._replace(is_replaced=True)
        if self._ignores_intake:
            replaced = replaced._replace(heard=0, fetched=0, queue=())
        how = "" if last.stage == GONE else f" while A{epoch - 1} lives, its right at an end"
        yield Move(
            f"epoch {epoch} is assigned{how}",
            world._replace(activations=(*world.activations[:-1], replaced, Activation())),
            last.stage != GONE,
        )

    def _read_to_claim(self, world: World, index: int, it: Activation) -> Move[World]:
        record = world.record
        name = f"A{index + 1}"
        if record.epoch > self._epoch(index) and self.safeguards.epoch_check:
            return self._moved(f"{name} reads the record: fenced", world, index, _DEAD)
        read = it._replace(
            stage=READ,
            revision=CURRENT,
            cursor=record.cursor,
            applied=record.applied,
            outbox=record.outbox,
            is_old=record.is_old and bool(record.outbox),
        )
        if record.writer == index:
            return self._moved(
                f"{name} reads the record: its claim is stored",
                world,
                index,
                self._taken_over(read, world),
            )
        return self._moved(f"{name} reads the record to claim it", world, index, read)

    def _claim(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        name = f"A{index + 1}"
        if it.revision != CURRENT and self.safeguards.cas:
            yield self._moved(
                f"the claim of {name} is refused",
                world,
                index,
                Activation(is_replaced=it.is_replaced),
            )
            return
        if not self.safeguards.claim_rewrites:
            yield self._moved(f"{name} runs", world, index, self._taken_over(it, world))
            return
        content = it.cursor, it.applied, it.outbox
        aged = it if self.safeguards.outbox_since else it._replace(is_old=False)
        written = self._written(world, index, aged, content)
        claimed = it._replace(revision=CURRENT)
        yield self._moved(f"{name} claims", written, index, self._taken_over(claimed, world))
        if world.losses:
            yield self._moved(
                f"{name} claims, the answer is lost",
                written._replace(losses=world.losses - 1),
                index,
                Activation(is_replaced=it.is_replaced),
                is_fault=True,
            )

    def _taken_over(self, it: Activation, world: World) -> Activation:
        """Claimed: it runs from what the record held."""
        running = it._replace(
            stage=RUNNING,
            stored=len(it.outbox),
            held=bool(it.outbox),
            saved_cursor=it.cursor,
            saved_outbox=len(it.outbox),
        )
        if it.is_replaced and self._ignores_intake:
            return running
        return _caught_up(running._replace(fetched=it.cursor), world)

    # -- maintenance

    def _trim(self, world: World, index: int, it: Activation) -> Iterator[Move[World]]:
        to = it.saved_cursor if self.safeguards.trim_behind_cursor else it.fetched
        if to > world.trimmed:
            yield Move(
                f"the mailbox is trimmed up to {to} for A{index + 1}", world._replace(trimmed=to)
            )

    def _pass_window(self, world: World) -> Iterator[Move[World]]:
        if world.unsure or not world.known:
            return
        if any(self._is_amid(it) for it in world.activations):
            return
        record = world.record
        aged = tuple(
            # A living activation's commits carry the age of what it recovered only.
            it._replace(is_old=True) if it.outbox and (it.stage == READ or it.held) else it
            for it in world.activations
        )
        yield Move(
            "the duplicate window passes",
            world._replace(
                windows=world.windows - 1,
                known=(),
                record=record._replace(is_old=bool(record.outbox)),
                activations=aged,
            ),
            True,
        )

    def _is_amid(self, it: Activation) -> bool:
        """It is amid something during which the window is assumed not to pass."""
        late = self.bounds.late
        if (it.wire != NONE or it.late) and it.flight[2] and late is not Late.COMMIT:
            return True
        if it.stage != RUNNING or not it.stored:
            return False
        return late is not (Late.ZOMBIE if it.is_replaced else Late.RETRY)

    def _moved(
        self, name: str, world: World, index: int, it: Activation, *, is_fault: bool = False
    ) -> Move[World]:
        return Move(name, world._replace(activations=_with(world.activations, index, it)), is_fault)


# ---- parts of moves -------------------------------------------------------------


def _with(
    activations: tuple[Activation, ...], index: int, it: Activation
) -> tuple[Activation, ...]:
    return (*activations[:index], it, *activations[index + 1 :])


def _added(known: tuple[int, ...], id: int) -> tuple[int, ...]:
    return tuple(sorted((*known, id)))


def _caught_up(it: Activation, world: World) -> Activation:
    """All that the stream holds beyond `fetched` is taken in."""
    length = len(world.mailbox)
    unread = tuple(range(max(it.fetched, world.trimmed) + 1, length + 1))
    return it._replace(heard=length, fetched=length, queue=it.queue + unread)


def _stored(it: Activation) -> Activation:
    """The commit in flight is known to be stored."""
    cursor, _, items = it.flight
    return it._replace(
        wire=NONE,
        late=False,
        flight=(0, (), ()),
        revision=CURRENT,
        saved_cursor=cursor,
        saved_outbox=len(items),
        stored=sum(item in it.outbox for item in items),
    )


def _crashed(it: Activation) -> Activation:
    """Gone, but for the commit that it sent."""
    if it.stage == RUNNING and (it.wire == SENT or it.late) and it.revision == CURRENT:
        return _DEAD._replace(revision=CURRENT, late=True, flight=it.flight, is_old=it.is_old)
    return _DEAD


def _outdated(it: Activation, cas: bool) -> Activation:
    if not cas:
        return it._replace(revision=OLDER)
    if it.stage == GONE:
        return _DEAD
    return it._replace(revision=OLDER, late=False)


# ---- conditions -----------------------------------------------------------------


def _is_without_repeats(signals: tuple[int, ...]) -> bool:
    return len(set(signals)) == len(signals)


def _is_sorted(signals: tuple[int, ...]) -> bool:
    return all(before <= after for before, after in pairwise(signals))


def _passes_nothing(world: World) -> bool:
    """The stored cursor lies behind no signal that the stored state doesn't know."""
    record = world.record
    return all(signal in record.applied for signal, _ in world.mailbox[: record.cursor])
