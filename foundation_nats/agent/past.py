"""`Past`: what an agent keeps of its handled signals, so that they can be looked at and replayed.

Where `mailbox.history`, or the class, asks for it, the last N handled signals stay in the mailbox. To
replay them one has to know the state before the first: so now and then, each N signals, a *base* is
stored beside the record: state and cursor of one commit, in one of two places by turns. The
record names the bases that are stored, and only signals up to a base that has N handled ones behind it
are reported as consumed; so behind that base nothing is missing.

A signal that took no effect (given up, or given to another agent) is written down, since to handle it
again would be wrong. What changed the state without being a signal in the mailbox (a question, a hook)
is only counted: a replay can't repeat it, but it can say that it is incomplete.

Pure. `Activation` drives it; a base is stored only when the commit that it is of was acknowledged.
"""

from __future__ import annotations

from typing import Any

import orjson

from foundation_schemas import BaseRecord, PastRecord

VOID_MAX = 1000
PLACES = 2


def base_key(agent: str, place: int) -> str:
    """The key in the bucket ``state`` of one of an agent's bases."""
    return f"{agent}.{place}"


class Past:
    """The past of one activation."""

    __slots__ = (
        "_claimed",
        "_committed",
        "_storing",
        "asides",
        "bases",
        "handled",
        "keep",
        "most",
        "void",
    )

    def __init__(self, keep: int, stored: PastRecord | None, *, most: int = 1 << 62) -> None:
        """
        Args:
            keep: how many handled signals stay.
            stored: what the record says, if it does.
            most: so many are too many: all but what is behind the newest base may go then.
        """
        known = stored or PastRecord()
        self.keep = keep
        self.most = most
        self.handled = known.handled
        self.asides = known.asides
        self.void = list(known.void)
        self.bases = list(known.bases)
        self._claimed = known.handled
        self._committed = self.mark()
        self._storing: BaseRecord | None = None

    def done(self) -> None:
        """One more signal is done with."""
        self.handled += 1

    def took_no_effect(self, sequence: int) -> None:
        """This one was given up, or belongs to another."""
        self.void.append(sequence)
        if len(self.void) > VOID_MAX:
            del self.void[0]
            self.asides += 1  # what is not known any more makes a replay incomplete

    def aside(self) -> None:
        """The state was changed by something that no mailbox holds."""
        self.asides += 1

    def restart(self) -> None:
        """The stream went back: its numbers will come again, so what they named counts no more."""
        self.bases, self.void, self._storing = [], [], None

    def encoded(self) -> dict[str, Any]:
        """As it is stored in the record."""
        return {
            "handled": self.handled,
            "asides": self.asides,
            "void": list(self.void),
            "bases": [base.model_dump() for base in self.bases],
        }

    def mark(self) -> tuple[tuple[BaseRecord, ...], int]:
        """What a record that is written now says, as `committed` wants to hear it."""
        return tuple(self.bases), self.handled

    def committed(self, mark: tuple[tuple[BaseRecord, ...], int]) -> None:
        """The record that was written at *mark* was acknowledged."""
        self._committed = mark

    def next_place(self) -> int | None:
        """Where the commit that is being made is to be stored as a base; None: it need not be."""
        if self._storing is not None:
            return None
        if not self.bases:
            return 0
        newest = self.bases[-1]
        if self.handled - newest.handled < self.keep:
            return None
        return (newest.place + 1) % PLACES

    def begin(self, place: int, cursor: int) -> BaseRecord:
        """A base is about to be stored; there is one at a time."""
        self._storing = BaseRecord(
            place=place, cursor=cursor, handled=self.handled, asides=self.asides
        )
        return self._storing

    def end(self, base: BaseRecord, *, is_stored: bool) -> None:
        """It was stored, or it may not have been: then its place is not counted on."""
        if self._storing is not base:
            return  # the stream went back meanwhile
        self._storing = None
        self.bases = [known for known in self.bases if known.place != base.place]
        if is_stored:
            self.bases.append(base)
            # Commits of very many signals: the mailbox must not fill up with what is kept.
            while base.handled - self.bases[0].handled >= self.most:
                del self.bases[0]
        if self.bases:
            self.void = [number for number in self.void if number > self.bases[0].cursor]

    def boundary(self) -> tuple[int, int] | None:
        """Up to which cursor the mailbox may be trimmed, and how many that are since the claim."""
        bases, handled = self._committed
        for base in reversed(bases):
            if handled - base.handled >= self.keep:
                break
        else:
            if len(bases) != 1:
                return None
            base = bases[0]  # nothing before it is of use
        return base.cursor, max(0, base.handled - self._claimed)


def encode_base(
    base: BaseRecord, *, epoch: int, run: str, state: bytes, schema_version: int
) -> bytes:
    """A base as JSON; *state* is JSON already."""
    return orjson.dumps(
        {
            "v": 1,
            **base.model_dump(),
            "epoch": epoch,
            "run": run,
            "schema_version": schema_version,
            "state": orjson.Fragment(state),
        }
    )
