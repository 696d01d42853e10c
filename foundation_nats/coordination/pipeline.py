"""`pipeline`: a stream of items through durable stages at agents; each item takes effect once at each stage.

Every (item, stage) is a stored question with a fixed id (`desk`); the answer of a stage is the
question of the next, put by whoever drives. One record says which items were taken in, in
spans, and how many results were handed out. So any process can go on with a run, with the same id
and the same input, and two at once do no harm: what has been asked is found by its id, and what was
answered is in the box until its result was handed out.

Guaranteed: each item takes effect in each stage's agent at most once; exactly once unless it has
failed. A stage that dies goes on where it was: its questions wait in its mailbox. Results come in the
order of the input, each at least once: after a crash those are repeated that the record did not say
were handed out, the same as before. At most *in_flight* items are between input and result.

A stage may name agents by what they are: ``capability:NAME`` and ``deployment:NAME`` (all that shall run), and
``any:NAME`` (those of the capability that run just now). Who they are is written down with each span of
the input when it is taken in; so an item has one agent at a stage, whoever drives, and those that come later get later
items.

Not guaranteed: the order within a stage. An item that failed because a stage gave no answer in
time may have taken effect there all the same, and in later stages where two drove. Nobody drives by itself: a run
goes on when it is called again.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.cluster.registry import Registry
from foundation_nats.coordination.cell import KEEP_S, Cell, checked
from foundation_nats.coordination.desk import Answer, Desk, agent_names
from foundation_nats.coordination.intake import Intake, Items, all_of, digest_of, end_of, opened
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusRefusedError,
    ConfigError,
    DecodeError,
    HandlerError,
    MailboxFullError,
    NotFoundError,
)
from foundation_nats.signaling.receivers import receivers
from foundation_schemas import AgentStatus
from foundation_schemas.base import is_name
from foundation_schemas.coordination import PipelineRecord, PipelineStage, Span

IN_FLIGHT = 256
_PREFIX = "pipeline_"
_STAGES_MAX = 50
_SPANS = 4
"""Into so many spans what is in flight is cut, where the input is fast."""
_SPANS_MAX = 64
_AT_ONCE = 128
_LOOK_S = 0.5
_PAUSE_MAX_S = 60.0
_CREW_MAX = 100
"""So many agents of a capability or deployment are written down with a span."""
_BY_KIND = ("capability", "any", "deployment")
_PATIENCE_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one item."""

    item: int
    """Its number in the input, from 0."""
    value: Any = None
    """What the last stage has returned."""
    stage: str = ""
    """Where it failed; empty: it did not."""
    error: str = ""
    """Why it failed."""

    def get(self) -> Any:
        """The value.

        Raises:
            HandlerError: it has failed; `details` has ``item``, ``stage`` and ``reason``.
        """
        if self.stage:
            raise HandlerError(
                f"Item {self.item} failed at {self.stage}: {self.error}",
                item=self.item,
                stage=self.stage,
                reason=self.error,
            )
        return self.value


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    taken: int
    """Items of the input that were taken in."""
    done: int
    """Items whose results were handed out, those that failed included."""
    failed: int
    total: int | None
    """Of the input, once its end was seen."""
    stages: dict[str, int]
    """How many items are at each."""
    waits: str = ""
    """Why no more of the input is taken in: which stage has no agents; empty: there is no such reason."""


# ---- decisions ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item is: at a stage, for the n-th time."""

    data: Any
    since: float
    """Nothing of this was asked before, by the server's clock."""
    stage: int = 0
    attempt: int = 0
    not_before: float = 0.0
    """It is asked then, by the server's clock: after a pause."""


def pause_s(stage: PipelineStage, attempt: int) -> float:
    """How long is waited after this attempt before the next."""
    return min(_PAUSE_MAX_S, stage.backoff_s * 2.0 ** min(attempt, 30))


def patience_s(stage: PipelineStage, attempts: int) -> float:
    """How long an answer may take in all, after so many attempts; with the pauses between those that are left."""
    left = range(attempts, stage.retries) if stage.on_timeout == "retry" else ()
    return stage.timeout_s + sum(stage.timeout_s + pause_s(stage, number) for number in left)


def moved(
    item: int, place: Place, answer: Answer, stages: Sequence[PipelineStage]
) -> Place | Result:
    """Where the item is after *answer*, or what became of it."""
    stage = stages[place.stage]
    since = max(place.since, answer.stored)
    if answer.is_error:
        if place.attempt < stage.retries:
            pause = pause_s(stage, place.attempt)
            return Place(
                place.data,
                since,
                place.stage,
                place.attempt + 1,
                answer.stored + pause if pause else 0.0,
            )
        return Result(item, stage=stage.name, error=f"{answer.code}: {answer.message}")
    if place.stage + 1 == len(stages):
        return Result(item, answer.ok)
    return Place(answer.ok, since, place.stage + 1)


def question_id(name: str, item: int, stage: PipelineStage, attempt: int) -> str:
    """The same for whoever asks."""
    return f"pipeline.{name}.{item}.{stage.name}.{attempt}"


def item_of(id: str) -> int:
    """The item that a question was about; -1: it is no question of a pipeline."""
    parts = id.split(".")
    return int(parts[2]) if len(parts) == 5 and parts[2].isdigit() else -1


def given_up(record: PipelineRecord, lost: Mapping[int, tuple[str, str]]) -> PipelineRecord | None:
    """*record* with items without an answer; what is finished stays as it is."""
    spans = []
    for span in record.spans:
        new = {
            item: list(why)
            for item, why in lost.items()
            if not span.finished
            and item not in span.lost
            and span.first <= item < span.first + span.count
        }
        spans.append(span.model_copy(update={"lost": {**span.lost, **new}}) if new else span)
    return None if spans == record.spans else record.model_copy(update={"spans": spans})


def finished(record: PipelineRecord, firsts: Collection[int]) -> PipelineRecord | None:
    """*record* with those spans over: what has become of their items stands."""
    spans = [
        span.model_copy(update={"finished": True})
        if span.first in firsts and not span.finished
        else span
        for span in record.spans
    ]
    return None if spans == record.spans else record.model_copy(update={"spans": spans})


def handed_out(record: PipelineRecord, end: int, failed: int, at: str) -> PipelineRecord | None:
    """*record* after the results of its first span, which ends at *end*, were handed out."""
    if not record.spans or end_of(0, record.spans[:1]) != end:
        return None
    after = record.model_copy(
        update={
            "spans": record.spans[1:],
            "cursor": end,
            "failed": record.failed + failed,
        }
    )
    return settled(after, at)


def settled(record: PipelineRecord, at: str) -> PipelineRecord:
    """*record*, over if nothing is left."""
    return record.model_copy(update={"ended": at}) if record.is_over else record


def is_selector(text: str) -> bool:
    """Whether *text* names agents by what they are."""
    kind, _, name = text.partition(":")
    return kind in _BY_KIND and is_name(name)


def crew(registry: Registry, stage: PipelineStage, turn: int) -> list[str]:
    """Who does *stage* at present, by id; of very many some, others at each *turn*."""
    found: set[str] = set()
    for text in stage.agents:
        if not is_selector(text):
            found.add(text)
            continue
        kind, _, name = text.partition(":")
        found.update(
            held.record.id
            for held in receivers(registry, kind, name)
            if kind != "any" or held.record.status is AgentStatus.RUNNING
        )
    names = sorted(found)
    if len(names) > _CREW_MAX:
        at = turn % len(names)
        names = (names[at:] + names[:at])[:_CREW_MAX]
    return names


def _checked_stages(
    name: str, stages: Sequence[PipelineStage | Mapping[str, Any]]
) -> list[PipelineStage]:
    known = {*PipelineStage.model_fields, "agent"}
    found: list[PipelineStage] = []
    for number, given in enumerate(stages, 1):
        what = f"Stage {number} of the pipeline {name}"
        try:
            if isinstance(given, PipelineStage):
                stage = given
            else:
                values = dict(given)
                if unknown := set(values) - known:
                    raise ConfigError(
                        f"{what} has {', '.join(sorted(unknown))}; a stage has "
                        f"{', '.join(sorted(known))}."
                    )
                if "agent" in values:
                    values["agents"] = [values.pop("agent"), *values.get("agents", [])]
                stage = PipelineStage.model_validate(values)
        except (ValidationError, TypeError, ValueError) as error:
            said = error.errors()[0] if isinstance(error, ValidationError) else None
            why = f"{said['loc'][0]}: {said['msg']}" if said and said["loc"] else str(error)
            raise ConfigError(f"{what}: {why}.") from error
        agents = [
            given if is_selector(given) else agent_names([given], what)[0] for given in stage.agents
        ]
        if not agents:
            raise ConfigError(f"{what} needs an agent.")
        found.append(stage.model_copy(update={"agents": agents}))
    names = [stage.name for stage in found]
    if not found or len(found) > _STAGES_MAX or len(set(names)) < len(names):
        raise ConfigError(
            f"The pipeline {name} needs 1 to {_STAGES_MAX} stages with names that differ."
        )
    return found


def _in_words(stages: Sequence[PipelineStage]) -> str:
    return ", ".join(
        f"{s.name} ({s.type} at {', '.join(s.agents)}, {s.timeout_s:g} s, then {s.on_timeout}, "
        f"{s.retries} retries, {s.backoff_s:g} s back-off)"
        for s in stages
    )


# ---- driving --------------------------------------------------------------------------


@dataclass(slots=True)
class _Block:
    """A span that this process drives."""

    span: Span
    places: dict[int, Place]
    asked: dict[int, tuple[Place, float]] = field(default_factory=dict)
    """By item: what was asked, and until when it is waited for."""
    late: dict[int, tuple[Place, int]] = field(default_factory=dict)
    """By item: where it was without an answer in time, and how often."""
    results: dict[int, Result] = field(default_factory=dict)
    ready: bool = False

    @property
    def end(self) -> int:
        return self.span.first + self.span.count

    def lose(self, lost: Mapping[int, Sequence[str]]) -> None:
        for item, (stage, reason) in lost.items():
            self.places.pop(item, None)
            self.late.pop(item, None)
            self.results[item] = Result(item, stage=stage, error=reason)


@dataclass(slots=True)
class _Ask:
    block: _Block
    item: int
    place: Place
    ends: float
    deadline: float
    """After it there are no attempts left."""


class Pipeline:
    """One run in this process: enter it and iterate over it for the results; see `pipeline`."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        stages: Sequence[PipelineStage | Mapping[str, Any]],
        items: Items,
        *,
        in_flight: int,
        patience: float,
    ) -> None:
        self.name = checked("pipeline", name)
        self._stages = _checked_stages(name, stages)
        if not 1 <= in_flight <= 100_000 or not 0 < patience <= _PATIENCE_MAX_S:
            raise ConfigError(
                f"The pipeline {name} needs in_flight from 1, and a patience up to "
                f"{_PATIENCE_MAX_S:g} s."
            )
        self._in_flight = in_flight
        self._cut = max(1, in_flight // _SPANS)
        self._patience = patience
        self._cell = Cell(connection, _PREFIX + name, PipelineRecord)
        self._wake = asyncio.Event()
        self._desk = Desk(connection, f"pipeline-{name}", self._wake)
        self._intake = Intake(items, self._cut)
        self._record = PipelineRecord(stages=self._stages)
        self._blocks: deque[_Block] = deque()
        self._stack = contextlib.AsyncExitStack()
        self._driving: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._room = asyncio.Event()
        self._rest: deque[Result] = deque()
        self._given: _Block | None = None
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._changing = asyncio.Lock()
        self._looked = 0.0
        self._due_s = _LOOK_S
        self._waits = ""
        self._registry: Registry | None = None
        if any(is_selector(text) for stage in self._stages for text in stage.agents):
            self._registry = Registry(connection.bus, connection.subjects)

    def _until(self) -> float:
        return monotonic() + self._patience

    async def __aenter__(self) -> Self:
        """Begin the run, or go on with it.

        Raises:
            ConfigError: another run has this id.
            BusTimeoutError, BusUnavailableError: enter it again.
        """
        async with contextlib.AsyncExitStack() as stack:
            for part in (self._cell, self._desk, self._intake):
                await stack.enter_async_context(part)
            if self._registry is not None:
                scope = TaskScope(f"pipeline.{self.name}")
                stack.push_async_callback(scope.close)
                await self._registry.open(scope, timeout=self._patience)
                self._registry.subscribe(lambda *_: self._room.set())
            found = await self._cell.change(self._open, self._until())
            assert found is not None
            self._record = found
            self._stack = stack.pop_all()
        self._driving = asyncio.create_task(self._drive(), name=f"pipeline.{self.name}")
        self._driving.add_done_callback(lambda _: self._ready.set())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._driving is not None:
            self._driving.cancel()
            await asyncio.gather(self._driving, return_exceptions=True)
        await self._stack.aclose()

    def _open(self, record: PipelineRecord | None) -> PipelineRecord | None:
        if record is None:
            return PipelineRecord(stages=self._stages, started=utc_text())
        if record.stages != self._stages:
            raise ConfigError(
                f"There is another run {self.name}, of the stages {_in_words(record.stages)}; "
                f"these are {_in_words(self._stages)}.",
                hint="Each run has an id of its own, and who goes on gives the same stages.",
            )
        return None

    @property
    def progress(self) -> Progress:
        """How far the run is, as far as this process knows."""
        at = dict.fromkeys((stage.name for stage in self._stages), 0)
        for block in self._blocks:
            for place in block.places.values():
                at[self._stages[place.stage].name] += 1
        record = self._record
        taken = end_of(record.cursor, record.spans)
        return Progress(taken, record.cursor, record.failed, record.total, at, self._waits)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        """The next result; asking for it says that the one before was taken care of.

        Raises:
            ConfigError: the input is another one than before.
            BusTimeoutError, BusUnavailableError: go on with the run by entering it anew.
        """
        while not self._rest:
            if self._given is not None:
                await self._consumed(self._given)
                self._given = None
            self._ready.clear()
            if self._blocks and self._blocks[0].ready:
                self._given = self._blocks[0]
                results = self._given.results
                self._rest.extend(results[item] for item in sorted(results))
            elif self._record.is_over:
                await self._desk.clear()
                raise StopAsyncIteration
            elif self._driving is None or self._driving.done():
                if self._driving is not None:
                    self._driving.result()
                raise StopAsyncIteration
            else:
                await self._ready.wait()
        return self._rest.popleft()

    async def _consumed(self, block: _Block) -> None:
        failed = sum(1 for result in block.results.values() if result.stage)
        failpoint("pipeline.before_handed_out")
        await self._change(lambda record: handed_out(record, block.end, failed, utc_text()))
        cursor = self._record.cursor
        await self._desk.trim(lambda id: item_of(id) < cursor)

    async def _change(self, make: Any) -> None:
        def change(record: PipelineRecord | None) -> PipelineRecord | None:
            if record is None:
                raise NotFoundError(f"The record of the pipeline {self.name} is gone.")
            after: PipelineRecord | None = make(record)
            return after

        async with self._changing:
            found = await self._cell.change(
                change, self._until(), ttl_s=lambda record: KEEP_S if record.is_over else None
            )
            assert found is not None
            self._heed(found)

    def _heed(self, record: PipelineRecord) -> None:
        """What others have done meanwhile counts."""
        self._record = record
        self._looked = monotonic()
        while self._blocks and self._blocks[0].end <= record.cursor:
            self._blocks.popleft()
        self._room.set()
        self._ready.set()

    async def _drive(self) -> None:
        reading = asyncio.create_task(self._read(), name=f"pipeline.{self.name}.read")
        reading.add_done_callback(lambda _: self._wake.set())
        try:
            while not self._record.is_over:
                if reading.done():
                    reading.result()
                self._wake.clear()
                await self._pump()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.001, self._due_s)):
                        await self._wake.wait()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    # ---- taking in ------------------------------------------------------------------

    async def _read(self) -> None:
        """Take in what was taken in before, then more, as there is room."""
        intake = self._intake
        while True:
            record = self._record
            await intake.pass_over(record.cursor)
            known = next((s for s in record.spans if s.first >= intake.position), None)
            if known is not None:
                items = await intake.take_span(known, f"The pipeline {self.name}")
                places = {
                    known.first + n: Place(item, known.opened) for n, item in enumerate(items)
                }
                self._blocks.append(_Block(known, places))
                self._wake.set()
                continue
            if record.total is not None:
                return
            self._room.clear()
            room = self._in_flight - (intake.position - record.cursor)
            if room < min(self._cut, self._in_flight) or len(record.spans) >= _SPANS_MAX:
                await self._wait_room()
                continue
            items = await intake.peek(min(room, self._cut))
            agents = self._crews(intake.position) if items else {}
            if agents is None:
                await self._wait_room()
                continue
            await self._take_in(items, agents)

    async def _wait_room(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await self._room.wait()

    def _crews(self, position: int) -> dict[str, list[str]] | None:
        """Who does the stages that name agents by what they are; None: one of them has nobody now."""
        found: dict[str, list[str]] = {}
        self._waits = ""
        for stage in self._stages:
            if self._registry is None or not any(map(is_selector, stage.agents)):
                continue
            found[stage.name] = crew(self._registry, stage, position)
            if not found[stage.name]:
                self._waits = f"{stage.name}: there is no agent of {', '.join(stage.agents)}"
                return None
        return found

    async def _take_in(self, items: Sequence[Any], agents: dict[str, list[str]]) -> None:
        position = self._intake.position
        if not items:
            await self._change(
                lambda r: (
                    settled(r.model_copy(update={"total": position}), utc_text())
                    if r.total is None and end_of(r.cursor, r.spans) == position
                    else None
                )
            )
            return
        now = await self._cell.now(self._until())
        span = Span(
            first=position, count=len(items), opened=now, digest=digest_of(items), agents=agents
        )

        def open_(record: PipelineRecord) -> PipelineRecord | None:
            if record.total is not None:
                return None
            spans = opened(record.cursor, record.spans, [span])
            return None if spans is None else record.model_copy(update={"spans": spans})

        await self._change(open_)

    # ---- asking ---------------------------------------------------------------------

    async def _pump(self) -> None:
        """Read what has been answered, ask what comes next, end what is over."""
        if monotonic() - self._looked > _LOOK_S:
            await self._change(lambda _: None)
        answers = await self._desk.answers(self._until())
        now = await self._cell.now(self._until())
        self._due_s = _LOOK_S
        asks: list[_Ask] = []
        lost: dict[int, tuple[str, str]] = {}
        spans = {span.first: span for span in self._record.spans}
        for block in list(self._blocks):
            if not block.ready and block.span.first in spans:
                block.lose(spans[block.span.first].lost)
                self._advance(block, answers, now, asks, lost)
        failures = await all_of(self._ask(ask, now) for ask in asks)
        lost.update(failure for failure in failures if failure is not None)
        if lost:
            await self._change(lambda record: given_up(record, lost))
            self._wake.set()
        over = [b for b in self._blocks if not b.ready and len(b.results) == b.span.count]
        if over:
            firsts = {block.span.first for block in over}
            await self._change(lambda record: finished(record, firsts))
            spans = {span.first: span for span in self._record.spans}
            for block in over:
                if block.span.first in spans:
                    block.lose(spans[block.span.first].lost)
                    block.ready = True
            self._ready.set()

    def _advance(
        self,
        block: _Block,
        answers: Mapping[str, Answer],
        now: float,
        asks: list[_Ask],
        lost: dict[int, tuple[str, str]],
    ) -> None:
        for item, place in list(block.places.items()):
            at: Place | Result = place
            while isinstance(at, Place):
                stage = self._stages[at.stage]
                answer = answers.get(question_id(self.name, item, stage, at.attempt))
                if answer is None:
                    break
                at = moved(item, at, answer, self._stages)
            if isinstance(at, Result):
                del block.places[item]
                block.results[item] = at
                continue
            block.places[item] = at
            stage = self._stages[at.stage]
            if now < at.not_before:
                self._due_s = min(self._due_s, at.not_before - now)
                continue
            where, times = block.late.get(item, (at, 0))
            tries = at.attempt + (times if where is at else 0)
            asked = block.asked.get(item)
            is_asked = asked is not None and asked[0] is at
            if not is_asked:
                asked = block.asked.get(~item)  # tried in vain: its mailbox was full
            ends = asked[1] if asked is not None and asked[0] is at else now + stage.timeout_s
            if now >= ends and stage.on_timeout == "retry" and tries < stage.retries:
                # Under the same id: what is in the mailbox stays one, what was lost comes again.
                ends = now + pause_s(stage, tries) + stage.timeout_s
                tries += 1
                block.late[item] = (at, tries - at.attempt)
                block.asked.pop(item, None)
                block.asked.pop(~item, None)
                is_asked = False
            elif now >= ends:
                more = f", {tries - at.attempt + 1} times" if tries > at.attempt else ""
                lost[item] = (stage.name, f"no answer within {stage.timeout_s:g} s{more}")
            if not is_asked and item not in lost:
                deadline = ends - stage.timeout_s + patience_s(stage, tries)
                asks.append(_Ask(block, item, at, ends, deadline))

    async def _ask(self, ask: _Ask, now: float) -> tuple[int, tuple[str, str]] | None:
        """Put a question; returns why it can't be."""
        stage = self._stages[ask.place.stage]

        async def still() -> bool:
            record = await self._cell.read(self._until())
            return record is not None and any(
                s.first == ask.block.span.first and not s.finished for s in record.spans
            )

        try:
            async with self._gate:
                agents = ask.block.span.agents.get(stage.name, stage.agents)
                await self._desk.ask(
                    agents[ask.item % len(agents)],
                    question_id(self.name, ask.item, stage, ask.place.attempt),
                    stage.type,
                    ask.place.data,
                    until=self._until(),
                    since=ask.place.since,
                    now=now,
                    deadline=ask.deadline,
                    still=still,
                )
        except MailboxFullError:
            ask.block.asked[~ask.item] = (ask.place, ask.ends)
            return None
        except (BusRefusedError, ConfigError) as error:
            return ask.item, (stage.name, f"it can't be asked: {error}")
        ask.block.asked[ask.item] = (ask.place, ask.ends)
        return None


def pipeline(
    connection: Connection,
    name: str,
    stages: Sequence[PipelineStage | Mapping[str, Any]],
    items: Items,
    *,
    in_flight: int = IN_FLIGHT,
    patience: float = _PATIENCE_MAX_S,
) -> Pipeline:
    """Send *items* through *stages*; with a *name* that was used: go on where that run is.

    Each stage is ``{"name", "agent" or "agents", "type", "timeout_s", "retries", "backoff_s", "on_timeout"}``: its
    agents (ids, ``capability:NAME``, ``any:NAME``, ``deployment:NAME``) handle a signal of *type* with the item as data;
    what the handler returns goes to the next stage. Enter it and
    iterate over it: a `Result` per item, in order. `Pipeline.progress` tells how far it is.

    Args:
        items: an iterable or an async one, of JSON values; the same again where a run is gone on with.
        in_flight: at most so many items are between input and result.
        patience: how long the server may be out of reach before the run is given up here.

    Cancellation: the run stands where it is; call again to go on.

    Raises:
        ConfigError: a stage or an argument is wrong.

    Example:
        >>> stages = [{"name": "scan", "agent": "scanner", "type": "scan"}]
        >>> async with pipeline(cluster, "scan-7", stages, paths) as run:
        ...     async for result in run:
        ...         print(result.item, result.value, result.stage, result.error)
    """
    return Pipeline(connection, name, stages, items, in_flight=in_flight, patience=patience)


async def pipelines(connection: Connection) -> dict[str, PipelineRecord]:
    """Every run that is known, by its id: those under way, and those of the last week.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    entries = await Bucket(connection.bus, connection.subjects, "coordination").read_all()
    found: builtins.dict[str, PipelineRecord] = {}
    for key, entry in sorted(entries.items()):
        if key.startswith(_PREFIX) and entry.value is not None:
            with contextlib.suppress(DecodeError):  # a newer version's
                found[key.removeprefix(_PREFIX)] = decode(PipelineRecord, entry.value)
    return found


__all__ = [
    "IN_FLIGHT",
    "Pipeline",
    "Progress",
    "Result",
    "pipeline",
    "pipelines",
]
