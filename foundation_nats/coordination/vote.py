"""`vote`: one question, many ballots, one recorded result, decided as soon as it can't change.

All of a vote is one record. Agents are asked by stored questions with fixed ids (`desk`),
others `cast` by themselves; the ballot that decides brings the result in the same write.

Guaranteed: one result per id, for ever the same for all that ask (it is kept for a week), also
where the asker died half-way and another one asks again. The first ballot of a voter counts, and each
agent is asked once. The result is sent to every voter that is an agent, asked or not, and to the topic
``vote.NAME``, under fixed ids: each gets it once, whoever decides, also by a `cast`. One whose mailbox is
full stops nobody else: it is named in the record, and tried again whenever somebody asks for the result. The time
is the record's own, by the server's clock: whoever looks after it closes the vote.

Not guaranteed: that somebody looks. After the death of its asker a vote by agents goes on when
`vote` or `vote_result` is called again. A ballot that comes after the decision is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.coordination.cell import KEEP_S, Cell, as_json, checked
from foundation_nats.coordination.desk import Answer, Desk, agent_names
from foundation_nats.coordination.intake import all_of
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    ConflictError,
    FoundationError,
    NotFoundError,
    VoteClosedError,
)
from foundation_schemas.base import is_name
from foundation_schemas.coordination import Ballot, VoteRecord, VoteResult

Quorum = Literal["majority", "all"] | float

QUESTION = "vote.question"
"""The type of the question to an agent: ``{"vote", "question", "choices"}``. Its answer is a choice,
None to abstain, or ``{"choice": …, "reason": …}``."""
RESULT = "vote.result"
"""The type of the signal that tells an agent how it ended: ``{"vote", "question", "result"}``."""
TOPIC = "vote"
"""The first word of the topic that is told, too: ``vote.NAME``."""
_NOBODY = "there is no such agent"
_VOTERS_MAX = 1000
_GRACE_S = 10.0
"""After the vote's time: to close it and to tell."""


# ---- decisions ----------------------------------------------------------------------


def _reaches(record: VoteRecord, weight: float) -> bool:
    total = sum(record.voters.values())
    match record.quorum:
        case "majority":
            return weight * 2 > total + 1e-9
        case "all":
            return weight >= total - 1e-9
    return weight >= float(record.quorum) - 1e-9


def decided(record: VoteRecord, now: float) -> VoteRecord:
    """*record*, with its result if there can be no other, or its time is over."""
    if record.result is not None:
        return record
    counts = dict.fromkeys(record.choices, 0.0)
    for voter, ballot in record.ballots.items():
        if ballot.choice is not None:
            counts[ballot.choice] += record.voters[voter]
    open_ = [voter for voter in record.voters if voter not in record.ballots]
    left = sum(record.voters[voter] for voter in open_)
    ahead = max(counts, key=lambda choice: counts[choice])
    if _reaches(record, counts[ahead]):
        others = [
            choice
            for choice in record.choices
            if choice != ahead
            and counts[choice] + left >= counts[ahead]
            and _reaches(record, counts[choice] + left)
        ]
        if others and now < record.deadline and open_:
            return record  # a small quorum that two can reach: the one with more weight
        rivals = [c for c in record.choices if c != ahead and counts[c] == counts[ahead]]
        chosen, reason = (None, "a tie") if rivals else (ahead, "the quorum is reached")
    elif not any(_reaches(record, count + left) for count in counts.values()):
        chosen, reason = None, "no choice can reach the quorum any more"
    elif now >= record.deadline:
        chosen, reason = None, "time is over"
    else:
        return record
    ballots = record.ballots.items()
    result = VoteResult(
        choice=chosen,
        reason=reason,
        counts=counts,
        abstained=sorted(v for v, b in ballots if b.choice is None and not b.unavailable),
        unavailable={v: b.unavailable for v, b in sorted(ballots) if b.unavailable},
        missing=sorted(open_),
        at=utc_text(),
    )
    return record.model_copy(update={"result": result})


def read_ballot(answer: Answer, choices: Sequence[str]) -> Ballot:
    """What an agent's answer means."""
    if answer.is_error:
        return Ballot(unavailable=f"{answer.code}: {answer.message}"[:300])
    said: Any = answer.ok
    reason = ""
    if isinstance(said, Mapping):
        said, reason = said.get("choice"), str(said.get("reason", ""))[:1000]
    if said is None or said in choices:
        return Ballot(choice=said, reason=reason)
    return Ballot(unavailable=f"its answer is none of the choices: {str(said)[:100]!r}")


def counted(record: VoteRecord, ballots: Mapping[str, Ballot], now: float) -> VoteRecord | None:
    """*record* with those ballots that come first; None if none does.

    Also at its very end: what agents have answered was in time for them.
    """
    if record.result is not None:
        return None
    new = {
        voter: ballot
        for voter, ballot in ballots.items()
        if voter not in record.ballots
        or (record.ballots[voter].unavailable and not ballot.unavailable)
    }
    after = decided(record.model_copy(update={"ballots": {**record.ballots, **new}}), now)
    return None if after == record else after


# ---- asking ---------------------------------------------------------------------------


def _ttl(record: VoteRecord) -> float | None:
    return KEEP_S if record.result is not None and record.delivered else None


def _opening(
    name: str,
    question: Any,
    choices: Sequence[str],
    voters: Collection[str] | Mapping[str, float],
    quorum: Quorum,
    ask: bool | Collection[str],
) -> VoteRecord:
    weights = dict(voters) if isinstance(voters, Mapping) else dict.fromkeys(voters, 1.0)
    names = agent_names(list(weights), f"vote {name}")
    weights = dict(zip(names, (float(weight) for weight in weights.values()), strict=True))
    if isinstance(voters, str) or not 1 <= len(weights) <= _VOTERS_MAX:
        raise ConfigError(f"The vote {name} needs 1 to {_VOTERS_MAX} voters.")
    if any(not 0 <= weight < float("inf") for weight in weights.values()) or not any(
        weights.values()
    ):
        raise ConfigError(f"The vote {name}: weights are numbers from 0, not all of them 0.")
    options = list(choices)
    if isinstance(choices, str) or len(options) < 1 or len(set(options)) != len(options):
        raise ConfigError(f"The vote {name} needs choices that differ, got {choices!r}.")
    if isinstance(quorum, str):
        if quorum not in ("majority", "all"):
            raise ConfigError(f"A quorum is majority, all, or a weight, not {quorum!r}.")
    elif not 0 < quorum <= sum(weights.values()):
        raise ConfigError(
            f"The quorum of the vote {name} is {quorum:g}, but all its voters weigh "
            f"{sum(weights.values()):g}."
        )
    asked = list(weights) if ask is True else [] if ask is False else agent_names(ask, "ask")
    for voter in asked:
        if voter not in weights:
            raise ConfigError(f"{voter} is asked, but is none of the voters.")
    return VoteRecord(
        question=as_json(question, f"vote {name}: the question"),
        choices=options,
        voters=weights,
        asked=sorted(asked),
        quorum=quorum if isinstance(quorum, str) else f"{quorum:g}",
        opened=0.0,
        deadline=0.0,
    )


async def vote(
    connection: Connection,
    name: str,
    question: Any,
    choices: Sequence[str],
    voters: Collection[str] | Mapping[str, float],
    *,
    quorum: Quorum = "majority",
    ask: bool | Collection[str] = True,
    timeout: float = 10.0,
) -> VoteResult:
    """Put *question* to *voters* and return the result; with a *name* that was used: its result.

    Agents handle ``vote.question``: they return a choice, or None to abstain. Each has its turn
    among its signals. The result is sent to them as ``vote.result``.

    Args:
        voters: ids of agents (and names of others), or a mapping to their weights.
        quorum: what a choice needs of the weight of *all* voters: more than half, all, or a weight.
        ask: False: nobody is asked, all `cast`; or which voters are asked.
        timeout: how long the vote is open, from the first call on.

    Cancellation: the vote stays open until its time is over; call again to go on.

    Raises:
        ConfigError: an argument is wrong, or *name* belongs to another vote.
        BusTimeoutError, BusUnavailableError: call again.
    """
    wanted = _opening(checked("vote", name), question, choices, voters, quorum, ask)
    if timeout <= 0:
        raise ConfigError(f"A vote's timeout is positive, got {timeout:g}.")
    until = monotonic() + timeout + _GRACE_S
    async with Cell(connection, f"vote_{name}", VoteRecord) as cell:
        now = await cell.now(until)

        def open_(record: VoteRecord | None) -> VoteRecord | None:
            if record is None:
                return wanted.model_copy(update={"opened": now, "deadline": now + timeout})
            _same(name, record, wanted)
            return None

        await cell.change(open_, until)
        return await _finish(connection, cell, name, until)


async def vote_result(connection: Connection, name: str, *, timeout: float = 10.0) -> VoteResult:
    """Wait for the result of a vote, and go on with it if its asker died.

    Raises:
        NotFoundError: there is no such vote, or not any more.
        BusTimeoutError, BusUnavailableError: not known in time.
    """
    until = monotonic() + timeout
    async with Cell(connection, f"vote_{checked('vote', name)}", VoteRecord) as cell:
        if await cell.read(until) is None:
            raise _unknown(name)
        return await _finish(connection, cell, name, until)


async def cast(
    connection: Connection,
    name: str,
    voter: str,
    choice: str | None,
    *,
    reason: str = "",
    timeout: float = 5.0,
) -> VoteRecord:
    """Give *voter*'s ballot (None: abstain); returns the vote as it is then. A repeat counts once.

    Raises:
        NotFoundError: there is no such vote.
        ConfigError: *voter* or *choice* is not of this vote.
        VoteClosedError: it is decided, or its time is over; nothing was counted.
        ConflictError: *voter* has voted otherwise before.
        BusTimeoutError, BusUnavailableError: cast it again.
    """
    until = monotonic() + timeout
    voter = voter.removeprefix("agent:")
    # Not entered: a crowd that casts need not hear of each other's ballots.
    cell = Cell(connection, f"vote_{checked('vote', name)}", VoteRecord)
    now = await cell.now(until)
    late = False

    def put(record: VoteRecord | None) -> VoteRecord | None:
        nonlocal late
        if record is None:
            raise _unknown(name)
        if voter not in record.voters:
            raise ConfigError(f"{voter!r} is none of the voters of {name}.")
        if choice is not None and choice not in record.choices:
            raise ConfigError(f"{choice!r} is none of: {', '.join(record.choices)}.")
        before = record.ballots.get(voter)
        if before is not None and not before.unavailable:
            if before.choice != choice:
                raise ConflictError(
                    f"{voter} has voted {before.choice or 'to abstain'} in {name} before."
                )
            return None
        late = record.result is not None or now >= record.deadline
        if late:
            return None
        return counted(record, {voter: Ballot(choice=choice, reason=reason)}, now)

    found = await cell.change(put, until, ttl_s=_ttl)
    if late:
        raise VoteClosedError(f"The vote {name} is over; the ballot of {voter} is not counted.")
    assert found is not None
    if found.result is not None and not found.delivered:
        # Who decides tells: perhaps nobody else looks. The ballot stands, whatever becomes of it.
        with contextlib.suppress(BusTimeoutError, BusUnavailableError):
            async with Desk(connection, f"vote-{name}", cell.changed) as desk:
                await _tell(desk, cell, name, found, until)
    return found


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"There is no vote {name}, or not any more.")


def _same(name: str, record: VoteRecord, wanted: VoteRecord) -> None:
    for what in ("question", "choices", "voters", "quorum", "asked"):
        if getattr(record, what) != getattr(wanted, what):
            raise ConfigError(
                f"There is another vote {name}: its {what} is {getattr(record, what)!r}.",
                hint="Each vote has an id of its own.",
            )


async def _finish(
    connection: Connection, cell: Cell[VoteRecord], name: str, until: float
) -> VoteResult:
    """Ask who was not asked, count, close, tell."""
    async with Desk(connection, f"vote-{name}", cell.changed) as desk:
        is_asked = False
        while True:
            record = await cell.read(until)
            if record is None:
                raise _unknown(name)
            now = await cell.now(until)
            if record.result is not None:
                if not record.delivered or record.untold:
                    await _tell(desk, cell, name, record, until)
                await desk.clear()
                return record.result
            ballots: dict[str, Ballot] = {}
            if record.asked and not is_asked and now < record.deadline:
                ballots = await _ask(desk, name, record, now, until)
                is_asked = True
            if record.asked:
                said = await desk.answers(until)
                for voter in record.asked:
                    answer = said.get(_question_id(name, voter))
                    if answer is not None:
                        ballots[voter] = read_ballot(answer, record.choices)

            def count(
                record: VoteRecord | None, ballots: dict[str, Ballot] = ballots, now: float = now
            ) -> VoteRecord | None:
                return None if record is None else counted(record, ballots, now)

            if ballots or now >= record.deadline:
                after = await cell.change(count, until, ttl_s=_ttl)
                if after is not None and after.result is not None:
                    continue
            if monotonic() >= until:
                raise BusTimeoutError(
                    f"The vote {name} is not decided yet.", hint="Ask for its result again."
                )
            await cell.wait(min(record.deadline - now, until - monotonic()))


def _question_id(name: str, voter: str) -> str:
    return f"vote.{name}.{voter}"


async def _ask(
    desk: Desk, name: str, record: VoteRecord, now: float, until: float
) -> dict[str, Ballot]:
    """Ask everybody that has no ballot, at once; returns who could not be asked."""
    failed: dict[str, Ballot] = {}

    async def one(voter: str) -> None:
        if not await desk.exists(voter, until):
            failed[voter] = Ballot(unavailable=_NOBODY)
            return
        try:
            await desk.ask(
                voter,
                _question_id(name, voter),
                QUESTION,
                {"vote": name, "question": record.question, "choices": record.choices},
                until=min(until, monotonic() + record.deadline - now),
                since=record.opened,
                now=now,
                deadline=record.deadline,
            )
        except FoundationError as error:
            failed[voter] = Ballot(unavailable=f"it could not be asked: {error}"[:300])

    await asyncio.gather(*(one(voter) for voter in record.asked if not _has_voted(record, voter)))
    return failed


def _has_voted(record: VoteRecord, voter: str) -> bool:
    return voter in record.ballots and not record.ballots[voter].unavailable


async def _tell(
    desk: Desk, cell: Cell[VoteRecord], name: str, record: VoteRecord, until: float
) -> None:
    """Tell the topic and all voters that are agents, each once; who can't be told now is written down."""
    assert record.result is not None
    data = {
        "vote": name,
        "question": record.question,
        "result": record.result.model_dump(mode="json"),
    }
    now = await cell.now(until)
    missing = {v for v, why in record.result.unavailable.items() if why == _NOBODY}
    untold: dict[str, str] = {}

    async def one(voter: str) -> None:
        if voter in missing or not is_name(voter):
            return
        if voter not in record.asked and not await desk.exists(voter, until):
            return  # no agent: it hears by the topic, or asks
        try:
            await desk.ask(
                voter,
                f"vote.{name}.result",
                RESULT,
                data,
                until=until,
                since=record.opened,
                now=now,
                answer=False,
            )
        except (BusTimeoutError, BusUnavailableError):
            raise
        except FoundationError as error:
            untold[voter] = str(error)[:300]

    if not record.delivered:
        topic = f"{TOPIC}.{name}"
        await desk.announce(topic, f"vote.{name}.topic", RESULT, data, until=until)
    await all_of(one(voter) for voter in (record.untold or record.voters))

    def told(record: VoteRecord | None) -> VoteRecord | None:
        if record is None or (record.delivered and record.untold == untold):
            return None
        return record.model_copy(update={"delivered": True, "untold": untold})

    await cell.change(told, until, ttl_s=_ttl)


__all__ = ["QUESTION", "RESULT", "TOPIC", "Quorum", "cast", "decided", "vote", "vote_result"]
