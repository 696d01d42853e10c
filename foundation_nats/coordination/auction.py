"""`auction`: announce a task, take bids, award it to the best that accepts: exactly one award per id.

The contract net (R. G. Smith, *The Contract Net Protocol*, 1980) over one record and
stored questions with fixed ids (`desk`). The announcement is a question whose answer is the bid;
the ranking is recorded once; then the best is offered the award, and where it declines or does
not answer in time, the next. The award is recorded first, and then sent to the winner, durably.

Guaranteed: at most one award is ever recorded per id, and only to an agent that has bid and
accepted; ``auction.award`` is sent to it alone, under a fixed id, so it takes effect once.
Who calls again with the id, also after the auctioneer died half-way, goes on with that
auction or gets its result (kept for a week).

Not guaranteed: that the winner lives when the award reaches it: the award waits for it, and for its
successor. An agent that accepted too late may believe that it will win: what counts is ``auction.award``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.coordination.cell import KEEP_S, Cell, as_json, checked
from foundation_nats.coordination.desk import Answer, Desk, agent_names
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    ConfigError,
    FoundationError,
    MailboxFullError,
)
from foundation_schemas.coordination import AuctionRecord, AuctionResult, Bid

ANNOUNCE = "auction.announce"
"""The type of the announcement, ``{"auction", "task"}``. The answer is a bid: a number, or an object
in which the key is one; None: no bid."""
OFFER = "auction.offer"
"""The type of the offer to the best, ``{"auction", "task", "bid"}``. The answer False declines."""
AWARD = "auction.award"
"""The type of the award, ``{"auction", "task", "bid"}``: do it."""

_BIDDERS_MAX = 1000
_GRACE_S = 10.0

Key = str | Callable[[str, Any], Any]


# ---- decisions ----------------------------------------------------------------------


def read_bid(answer: Answer, key: Key) -> Bid:
    """What an answer to the announcement means."""
    if answer.is_error:
        return Bid(refused=f"{answer.code}: {answer.message}"[:300])
    if answer.ok is None:
        return Bid(refused="does not bid")
    if isinstance(key, str) and _number(answer.ok, key) is None:
        return Bid(refused=f"its bid has no number {key!r}: {str(answer.ok)[:100]!r}")
    return Bid(value=answer.ok)


def _number(bid: Any, key: str) -> float | None:
    value: Any = bid.get(key) if isinstance(bid, Mapping) else bid
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return float(value) if is_number else None


def ranked(bids: Mapping[str, Bid], key: Key) -> list[str]:
    """Those that have bid, the lowest key first; equals by their names."""
    able = sorted(bidder for bidder, bid in bids.items() if bid.value is not None)
    if isinstance(key, str):
        return sorted(able, key=lambda bidder: _number(bids[bidder].value, key) or 0.0)
    return sorted(able, key=lambda bidder: key(bidder, bids[bidder].value))


def accepted(answer: Answer) -> str:
    """Why an answer to the offer is no; empty: it is yes."""
    if answer.is_error:
        return f"{answer.code}: {answer.message}"[:300]
    return "declined" if answer.ok is False else ""


def _refusals(record: AuctionRecord) -> dict[str, str]:
    refused = {name: bid.refused for name, bid in record.bids.items() if bid.refused}
    late = {n: "did not answer in time" for n in record.bidders if n not in record.bids}
    return dict(sorted({**late, **refused, **record.declined}.items()))


def moved_on(record: AuctionRecord, turn: int, why: str, now: float) -> AuctionRecord | None:
    """*record* after the offer of *turn* was answered: the award, the next turn, or the end."""
    if record.result is not None or record.ranking is None or record.turn != turn:
        return None
    if turn < len(record.ranking) and not why:
        winner = record.ranking[turn]
        result = AuctionResult(
            winner=winner,
            bid=record.bids[winner].value,
            ranking=record.ranking,
            refused=_refusals(record),
            at=utc_text(),
        )
        return record.model_copy(update={"result": result})
    if turn < len(record.ranking):
        declined = {**record.declined, record.ranking[turn]: why}
        record = record.model_copy(update={"declined": declined, "turn": turn + 1, "offered": now})
    if record.turn < len(record.ranking or []):
        return record
    result = AuctionResult(ranking=record.ranking or [], refused=_refusals(record), at=utc_text())
    return record.model_copy(update={"result": result, "delivered": True})


# ---- the auctioneer -------------------------------------------------------------------


def _ttl(record: AuctionRecord) -> float | None:
    return KEEP_S if record.result is not None and record.delivered else None


async def auction(
    connection: Connection,
    name: str,
    task: Any,
    bidders: Collection[str],
    *,
    key: Key = "cost",
    timeout: float = 5.0,
    accept_timeout: float = 5.0,
) -> AuctionResult:
    """Let agents bid for *task* and award it; with a *name* that was used: its result.

    Agents handle ``auction.announce`` (return a bid or None), ``auction.offer`` (return False to
    decline) and ``auction.award`` (do it).

    Args:
        key: the lowest wins: the name of a number in each bid (``cost``, ``load`` …; a bid may be just
            the number), or a function of bidder and bid. It is used once, when the bids are closed.
        timeout: how long bids are taken; it ends earlier once all have answered.
        accept_timeout: how long each that is offered the award has to accept.

    Cancellation: what was recorded stands; call again to go on.

    Raises:
        ConfigError: an argument is wrong, or *name* belongs to another auction.
        BusTimeoutError, BusUnavailableError: call again.
    """
    names = sorted(set(agent_names(bidders, f"auction {checked('auction', name)}")))
    if isinstance(bidders, str) or not 1 <= len(names) <= _BIDDERS_MAX:
        raise ConfigError(f"The auction {name} needs 1 to {_BIDDERS_MAX} bidders.")
    if timeout <= 0 or accept_timeout <= 0:
        raise ConfigError(f"The times of the auction {name} are positive.")
    until = monotonic() + timeout + accept_timeout * len(names) + _GRACE_S
    task = as_json(task, f"auction {name}: the task")
    async with (
        Cell(connection, f"auction_{name}", AuctionRecord) as cell,
        Desk(connection, f"auction-{name}", cell.changed) as desk,
    ):
        now = await cell.now(until)

        def open_(record: AuctionRecord | None) -> AuctionRecord | None:
            if record is None:
                return AuctionRecord(task=task, bidders=names, opened=now, deadline=now + timeout)
            if (record.task, record.bidders) != (task, names):
                raise ConfigError(
                    f"There is another auction {name}: of {record.task!r} "
                    f"among {', '.join(record.bidders)}.",
                    hint="Each auction has an id of its own.",
                )
            return None

        await cell.change(open_, until)
        run = _Run(name, cell, desk, key, accept_timeout, until)
        return await run.finish()


class _Run:
    """One process's part in an auction: any number of them may be at it."""

    def __init__(
        self,
        name: str,
        cell: Cell[AuctionRecord],
        desk: Desk,
        key: Key,
        accept_s: float,
        until: float,
    ) -> None:
        self._name = name
        self._cell = cell
        self._desk = desk
        self._key = key
        self._accept_s = accept_s
        self._until = until
        self._is_announced = False
        self._offered = -1

    async def finish(self) -> AuctionResult:
        """Go on from what is recorded to the end."""
        while True:
            record = await self._cell.read(self._until)
            if record is None:
                raise BusTimeoutError(f"The record of the auction {self._name} is gone.")
            now = await self._cell.now(self._until)
            if record.result is not None:
                if not record.delivered:
                    await self._deliver(record, now)
                await self._desk.clear()
                return record.result
            if record.ranking is None:
                pause = await self._take_bids(record, now)
            else:
                pause = await self._offer(record, now)
            if monotonic() >= self._until:
                raise BusTimeoutError(
                    f"The auction {self._name} is not over yet.", hint="Call it again."
                )
            if pause > 0:
                await self._cell.wait(min(pause, self._until - monotonic()))

    def _id(self, what: str, bidder: str) -> str:
        return f"auction.{self._name}.{what}.{bidder}"

    async def _take_bids(self, record: AuctionRecord, now: float) -> float:
        bids: dict[str, Bid] = {}
        if not self._is_announced and now < record.deadline:
            await asyncio.gather(
                *(self._announce(name, record, now, bids) for name in record.bidders)
            )
            self._is_announced = True
        answers = await self._desk.answers(self._until)
        for name in record.bidders:
            answer = answers.get(self._id("announce", name))
            if answer is not None:
                bids[name] = read_bid(answer, self._key)
        bids = {**bids, **record.bids}
        if len(bids) < len(record.bidders) and now < record.deadline:
            if bids != record.bids:
                await self._cell.change(lambda r: _with_bids(r, bids), self._until)
                return 0.0
            return record.deadline - now
        ranking = ranked(bids, self._key)

        def close(found: AuctionRecord | None) -> AuctionRecord | None:
            # Ranked were these bids: where another process has recorded more, rank anew.
            if found is None or found.ranking is not None or set(found.bids) - set(bids):
                return None
            after = found.model_copy(update={"bids": bids, "ranking": ranking, "offered": now})
            return after if ranking else moved_on(after, 0, "", now)

        await self._cell.change(close, self._until, ttl_s=_ttl)
        return 0.0

    async def _announce(
        self, bidder: str, record: AuctionRecord, now: float, bids: dict[str, Bid]
    ) -> None:
        if bidder in record.bids:
            return
        if not await self._desk.exists(bidder, self._until):
            bids[bidder] = Bid(refused="there is no such agent")
            return
        try:
            await self._desk.ask(
                bidder,
                self._id("announce", bidder),
                ANNOUNCE,
                {"auction": self._name, "task": record.task},
                until=min(self._until, monotonic() + record.deadline - now),
                since=record.opened,
                now=now,
                deadline=record.deadline,
            )
        except FoundationError as error:
            bids[bidder] = Bid(refused=f"it could not be asked: {error}"[:300])

    async def _offer(self, record: AuctionRecord, now: float) -> float:
        assert record.ranking is not None
        turn = record.turn
        bidder = record.ranking[turn]
        ends = record.offered + self._accept_s
        data = {
            "auction": self._name,
            "task": record.task,
            "bid": record.bids[bidder].value,
        }
        if self._offered < turn and now < ends:
            try:
                await self._desk.ask(
                    bidder,
                    self._id("offer", bidder),
                    OFFER,
                    data,
                    until=self._until,
                    since=record.offered,
                    now=now,
                    deadline=ends,
                )
            except MailboxFullError as error:
                await self._move_on(turn, str(error), now)
                return 0.0
            self._offered = turn
        answer = (await self._desk.answers(self._until)).get(self._id("offer", bidder))
        now = await self._cell.now(self._until)
        if answer is None and now < ends:
            return ends - now
        why = "did not accept in time" if answer is None else accepted(answer)
        await self._move_on(turn, why, now)
        return 0.0

    async def _move_on(self, turn: int, why: str, now: float) -> None:
        await self._cell.change(
            lambda r: None if r is None else moved_on(r, turn, why, now), self._until, ttl_s=_ttl
        )

    async def _deliver(self, record: AuctionRecord, now: float) -> None:
        assert record.result is not None
        assert record.result.winner is not None
        await self._desk.ask(
            record.result.winner,
            self._id("award", record.result.winner),
            AWARD,
            {"auction": self._name, "task": record.task, "bid": record.result.bid},
            until=self._until,
            since=record.opened,
            now=now,
            answer=False,
        )
        await self._cell.change(
            lambda r: (
                None if r is None or r.delivered else r.model_copy(update={"delivered": True})
            ),
            self._until,
            ttl_s=_ttl,
        )


def _with_bids(record: AuctionRecord | None, bids: Mapping[str, Bid]) -> AuctionRecord | None:
    if record is None or record.ranking is not None:
        return None
    both = {**bids, **record.bids}
    return None if both == record.bids else record.model_copy(update={"bids": both})


__all__ = ["ANNOUNCE", "AWARD", "OFFER", "auction", "ranked"]
