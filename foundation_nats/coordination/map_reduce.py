"""`map_reduce`: a large input in numbered chunks, each mapped by one of many agents, each counted exactly once.

J. Dean and S. Ghemawat, *MapReduce: Simplified Data Processing on Large Clusters*, 2004: re-issued
stragglers, redone work of dead mappers. A chunk is a stored question with a fixed id (`desk`) to
an agent that provides a capability; to whichever agents it is put, the first answer in the box counts,
for everybody. Chunks are folded in their order, and one record holds how many are counted and what they
make together, changed by compare-and-set: so any process can go on with the same id and the same
input, and two at once do no harm.

Guaranteed: each chunk is counted exactly once, in the order of the input; so the result is that of a run
without faults, also where the fold does not commute, if mapping a chunk gives the same each time.
With an agent as reducer its state changes exactly once for each chunk, or for each group of chunks that were
combined before. At most *in_flight* chunks are held.

Not guaranteed: that a chunk is mapped once (stragglers, deaths, several drivers): mappers must bear that.
The order at a reducer that refuses a chunk: it gets that one again behind later ones. Nobody drives by
itself: a job goes on when it is called again.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.cluster.registry import Registry
from foundation_nats.coordination.cell import KEEP_S, Cell, as_json, checked
from foundation_nats.coordination.desk import Answer, Desk, agent_names
from foundation_nats.coordination.intake import Intake, Items, all_of, digest_of, end_of, opened
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    DecodeError,
    HandlerError,
    MailboxFullError,
    NotFoundError,
    NotSettledError,
    PayloadTooLargeError,
)
from foundation_schemas import AgentStatus
from foundation_schemas.base import is_name
from foundation_schemas.coordination import MapRecord, Span

Fold = Callable[[Any, Any], Any]

CHUNK = 1000
IN_FLIGHT = 32
MAP = "map"
"""The type of the question to a mapper: ``{"job", "chunk", "first", "items"}``. Its answer is what
the items make together."""
REDUCE = "reduce"
"""The type of the question to a reducer: ``{"job", "chunk", "chunks", "value"}``: the first chunk, and how many
are in the value. The answer is its partial result."""
COMBINED = 8
_PREFIX = "map_"
_PER_MAPPER = 2
_LOOK_S = 0.5
_PATIENCE_S = 60.0
_FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class MapProgress:
    """How far a job is."""

    chunks: int
    """Counted."""
    items: int
    """In those."""
    total: int | None
    """Items of the input, once its end was seen."""
    in_flight: int
    """Chunks that were taken in, and are not counted."""
    reissued: int
    """How often a chunk was put to another mapper, in this call."""
    mappers: int
    """Agents that run and provide the capability."""
    value: Any
    """The partial result: of the counted chunks."""


# ---- decisions ----------------------------------------------------------------------


def merged(a: Any, b: Any) -> Any:
    """Two mappings as one, equal keys added; two lists behind each other; else the sum."""
    if isinstance(a, dict) and isinstance(b, dict):
        both = dict(a)
        for key, value in b.items():
            both[key] = merged(both[key], value) if key in both else value
        return both
    return a + b


FOLDS: Mapping[str, Fold] = {
    "sum": lambda a, b: a + b,
    "min": lambda a, b: min(a, b),
    "max": lambda a, b: max(a, b),
    "merge": merged,
}
"""The folds that have a name, so that shells can use them."""


def chosen(
    mappers: Collection[str],
    load: Mapping[str, int],
    late: Collection[str],
    tried: Collection[str],
    most: int,
) -> str | None:
    """Which of *mappers* gets a chunk: not one that was *tried* or has *most* already, the least
    loaded; those that were *late* with another one last."""
    free = [m for m in mappers if m not in tried and load.get(m, 0) < most]
    return min(free, key=lambda m: (m in late, load.get(m, 0), m), default=None)


def outcome(
    id_of: Callable[[int], str], answers: Mapping[str, Answer], attempt: int, limit: int
) -> tuple[int, Answer | None]:
    """The present attempt, after those that failed, and its answer; the last one's if all failed."""
    while True:
        answer = answers.get(id_of(attempt))
        if answer is None or not answer.is_error or attempt + 1 >= limit:
            return attempt, answer
        attempt += 1


def counted(
    record: MapRecord, cursor: int, values: Sequence[Any], fold: Fold | None, at: str
) -> MapRecord | None:
    """*record* with *values* of the chunks from *cursor* on; None if others have counted them.

    Without *fold* the last value stands for all.
    """
    if record.cursor != cursor or not values:
        return None
    value, n = record.value, cursor
    if n == 0 and record.initial is not None:
        value = record.initial
    for new in values:
        first = n == 0 and record.initial is None
        value = new if fold is None or first else fold(value, new)
        n += 1
    after = record.model_copy(
        update={
            "cursor": n,
            "items": end_of(record.items, record.spans[: len(values)]),
            "spans": record.spans[len(values) :],
            "value": value,
            "error": "",
        }
    )
    return settled(after, at)


def settled(record: MapRecord, at: str) -> MapRecord:
    """*record*, over if nothing is left."""
    return record.model_copy(update={"ended": at}) if record.is_over else record


def failed(record: MapRecord, cursor: int, error: str) -> MapRecord | None:
    """*record* with a chunk that can't be done; None if that is known."""
    if record.error or record.is_over or record.cursor > cursor:
        return None
    return record.model_copy(update={"error": error})


def freed(record: MapRecord) -> MapRecord | None:
    """A failed *record* with its chunks to be tried anew, under other ids."""
    if not record.error:
        return None
    return record.model_copy(update={"error": "", "rounds": record.rounds + 1})


def grouped(numbers: Sequence[int], size: int, total: int | None) -> list[range]:
    """The groups that are complete among *numbers*, which follow each other and begin with a group.

    A group is *size* chunks, counted from the first chunk of all, so that whoever drives makes the same ones;
    the last one ends with the input, of *total* chunks (None: not known yet).
    """
    found: list[range] = []
    for first in numbers:
        if first % size == 0:
            end = first + size if total is None else min(first + size, total)
            if end <= numbers[-1] + 1:
                found.append(range(first, end))
    return found


def chunk_of(id: str) -> int:
    """The chunk that a question was about; -1: it is no question of a job."""
    parts = id.split(".")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdigit() else -1


# ---- driving --------------------------------------------------------------------------


@dataclass(slots=True)
class _Chunk:
    """A chunk that this process drives."""

    number: int
    span: Span
    items: list[Any]
    attempt: int = 0
    asked: list[str] = field(default_factory=list)
    """The mappers, in this attempt."""
    asked_at: float = 0.0
    is_mapped: bool = False
    value: Any = None
    reducing: int = -1
    """The attempt that the reducer was asked; -1: it was not."""
    reduce_attempt: int = 0
    is_reduced: bool = False
    partial: Any = None


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    mapper: str
    type: str
    fold: Fold | None
    reducer: str | None
    chunk: int
    in_flight: int
    retries: int
    straggler_s: float
    combine: Fold | None
    combined: int
    """So many chunks are put together before the reducer gets them."""
    on_progress: Callable[[MapProgress], Any] | None


class _Driver:
    """One call of `map_reduce`."""

    def __init__(
        self,
        job: _Job,
        cell: Cell[MapRecord],
        desk: Desk,
        wake: asyncio.Event,
        intake: Intake,
        registry: Registry,
        record: MapRecord,
    ) -> None:
        self._job = job
        self._cell = cell
        self._desk = desk
        self._wake = wake
        self._intake = intake
        self._registry = registry
        self.record = record
        self._chunks: deque[_Chunk] = deque()
        self._room = asyncio.Event()
        self._changing = asyncio.Lock()
        self._load: Counter[str] = Counter()
        self._late: dict[str, float] = {}
        self._reissued = 0
        self._looked = 0.0
        self._said: tuple[int, int] | None = None

    def _until(self) -> float:
        return monotonic() + _PATIENCE_S

    async def run(self, deadline: float) -> bool:
        """Drive until it is over, or *deadline*; returns whether it is."""
        reading = asyncio.create_task(self._read(), name=f"map_reduce.{self._job.name}.read")
        reading.add_done_callback(lambda _: self._wake.set())
        try:
            while not self.record.is_over:
                if reading.done():
                    reading.result()
                if monotonic() >= deadline:
                    return False
                self._wake.clear()
                await self._pump()
                self._tell()
                if self.record.is_over:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.001, min(_LOOK_S, deadline - monotonic()))):
                        await self._wake.wait()
            return True
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _tell(self) -> None:
        now = (self.record.cursor, len(self._chunks))
        if self._job.on_progress is not None and now != self._said:
            self._said = now
            self._job.on_progress(
                MapProgress(
                    self.record.cursor,
                    self.record.items,
                    self.record.total,
                    len(self._chunks),
                    self._reissued,
                    len(self._mappers()),
                    self.record.value,
                )
            )

    async def _change(self, make: Callable[[MapRecord], MapRecord | None]) -> None:
        def change(record: MapRecord | None) -> MapRecord | None:
            if record is None:
                raise NotFoundError(f"The record of the job {self._job.name} is gone.")
            return make(record)

        async with self._changing:
            try:
                found = await self._cell.change(
                    change, self._until(), ttl_s=lambda r: KEEP_S if r.is_over else None
                )
            except PayloadTooLargeError as error:
                raise PayloadTooLargeError(
                    f"What the chunks of {self._job.name} make together does not fit a record.",
                    hint="Let an agent reduce, or fold to something smaller.",
                ) from error
            assert found is not None
            self.record = found
            self._looked = monotonic()
            while self._chunks and self._chunks[0].number < found.cursor:
                self._free(self._chunks.popleft())
            self._room.set()

    # ---- taking in ------------------------------------------------------------------

    async def _read(self) -> None:
        """Take in what was taken in before, then more, as there is room."""
        intake, job = self._intake, self._job
        while True:
            record = self.record
            await intake.pass_over(record.items)
            known = next(
                ((n, s) for n, s in enumerate(record.spans) if s.first >= intake.position), None
            )
            if known is not None:
                index, span = known
                items = await intake.take_span(span, f"The job {job.name}")
                self._chunks.append(_Chunk(record.cursor + index, span, items))
                self._wake.set()
                continue
            if record.total is not None:
                return
            self._room.clear()
            if len(record.spans) >= job.in_flight:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._room.wait()
                continue
            most = (job.in_flight - len(record.spans)) * job.chunk
            await self._take_in(await intake.peek(min(most, 8 * job.chunk)))

    async def _take_in(self, items: Sequence[Any]) -> None:
        position = self._intake.position
        if not items:
            await self._change(
                lambda r: (
                    settled(r.model_copy(update={"total": position}), utc_text())
                    if r.total is None and end_of(r.items, r.spans) == position
                    else None
                )
            )
            self._wake.set()
            return
        now = await self._cell.now(self._until())
        parts = [items[at : at + self._job.chunk] for at in range(0, len(items), self._job.chunk)]
        spans: list[Span] = []
        for part in parts:
            first = end_of(position, spans)
            spans.append(Span(first=first, count=len(part), opened=now, digest=digest_of(part)))

        def open_(record: MapRecord) -> MapRecord | None:
            if record.total is not None:
                return None
            after = opened(record.items, record.spans, spans)
            return None if after is None else record.model_copy(update={"spans": after})

        await self._change(open_)

    # ---- asking ---------------------------------------------------------------------

    async def _pump(self) -> None:
        """Read what has been answered, count it, ask what comes next."""
        if monotonic() - self._looked > _LOOK_S:
            await self._change(lambda _: None)
        answers = await self._desk.answers(self._until())
        limit = (self.record.rounds + 1) * (self._job.retries + 1)
        for chunk in list(self._chunks):
            if not chunk.is_mapped:
                await self._mapped(chunk, answers, limit)
        if self._job.reducer is not None:
            await self._reduce(answers, limit)
        await self._count()
        now = await self._cell.now(self._until())
        await self._put(now)

    async def _mapped(self, chunk: _Chunk, answers: Mapping[str, Answer], limit: int) -> None:
        number, name = chunk.number, self._job.name
        attempt, answer = outcome(lambda n: _map_id(name, number, n), answers, chunk.attempt, limit)
        if attempt != chunk.attempt:
            self._free(chunk)
            chunk.attempt = attempt
        if answer is not None and answer.is_error:
            await self._fail(chunk, f"{answer.code}: {answer.message}")
        if answer is not None:
            self._free(chunk)
            chunk.is_mapped, chunk.value, chunk.items = True, answer.ok, []

    def _free(self, chunk: _Chunk) -> None:
        for mapper in chunk.asked:
            self._load[mapper] -= 1
        chunk.asked = []

    async def _fail(self, chunk: _Chunk, reason: str) -> None:
        why = f"chunk {chunk.number}: {reason}"
        await self._change(lambda record: failed(record, chunk.number, why))
        raise HandlerError(
            f"The job {self._job.name} can't go on: {why}",
            hint="Repair it and call again: it is tried anew.",
            chunk=chunk.number,
            first=chunk.span.first,
            reason=reason,
        )

    async def _count(self) -> None:
        """Fold what is there of the next chunks, and write it down with how far that is."""
        job = self._job
        values: list[Any] = []
        for chunk in self._chunks:
            if not (chunk.is_mapped if job.reducer is None else chunk.is_reduced):
                break
            values.append(chunk.value if job.reducer is None else chunk.partial)
        if not values:
            return
        cursor = self._chunks[0].number
        failpoint("map.before_counted")
        await self._change(lambda r: counted(r, cursor, values, job.fold, utc_text()))
        over = self.record.cursor
        await self._desk.trim(lambda id: chunk_of(id) < over)

    async def _reduce(self, answers: Mapping[str, Answer], limit: int) -> None:
        """Ask the reducer for the next groups of chunks, in their order."""
        job, record = self._job, self.record
        assert job.reducer is not None
        chunks = {chunk.number: chunk for chunk in self._chunks}
        total = None if record.total is None else record.cursor + len(record.spans)
        for group in grouped(list(chunks), job.combined, total):
            parts = [chunks[number] for number in group]
            if not all(part.is_mapped for part in parts):
                return
            first = parts[0]
            number = first.number
            first.reduce_attempt, answer = outcome(
                lambda n, number=number: _reduce_id(job.name, number, n),  # type: ignore[misc]
                answers,
                first.reduce_attempt,
                limit,
            )
            if answer is not None and answer.is_error:
                await self._fail(first, f"{job.reducer}: {answer.code}: {answer.message}")
            if answer is not None:
                for part in parts:
                    part.is_reduced, part.partial = True, answer.ok
            elif first.reducing != first.reduce_attempt:
                value = first.value
                for part in parts[1:]:
                    assert job.combine is not None
                    value = job.combine(value, part.value)
                id = _reduce_id(job.name, number, first.reduce_attempt)
                data = {"job": job.name, "chunk": number, "chunks": len(parts), "value": value}
                now = await self._cell.now(self._until())
                if not await self._ask(first, job.reducer, id, REDUCE, data, now):
                    return
                first.reducing = first.reduce_attempt

    async def _put(self, now: float) -> None:
        """Ask mappers for chunks that nobody does, and others for those that take too long."""
        mappers = self._mappers()
        here = monotonic()
        late = {m for m, at in self._late.items() if here - at < 3 * self._job.straggler_s}
        asks = []
        for chunk in self._chunks:
            if chunk.is_mapped:
                continue
            is_again = bool(chunk.asked)
            slow = here - chunk.asked_at >= self._job.straggler_s
            if is_again and not slow and any(m in mappers for m in chunk.asked):
                continue
            # For the second time only to who has nothing else to do.
            most = _PER_MAPPER if not is_again or not slow else 1
            mapper = chosen(mappers, self._load, late, chunk.asked, most)
            if mapper is None:
                if slow and mappers and set(mappers) <= set(chunk.asked):
                    self._free(chunk)  # all have it; one may have lost it with its mailbox
                continue
            if is_again:
                self._reissued += 1
                self._late.update((m, here) for m in chunk.asked)
            chunk.asked.append(mapper)
            chunk.asked_at = here
            self._load[mapper] += 1
            asks.append(self._put_one(chunk, mapper, now))
        await all_of(asks)

    async def _put_one(self, chunk: _Chunk, mapper: str, now: float) -> None:
        data = {
            "job": self._job.name,
            "chunk": chunk.number,
            "first": chunk.span.first,
            "items": chunk.items,
        }
        id = _map_id(self._job.name, chunk.number, chunk.attempt)
        if not await self._ask(chunk, mapper, id, self._job.type, data, now):
            self._late[mapper] = monotonic()

    async def _ask(
        self, chunk: _Chunk, agent: str, id: str, type: str, data: Any, now: float
    ) -> bool:
        async def still() -> bool:
            record = await self._cell.read(self._until())
            return record is not None and record.cursor <= chunk.number

        try:
            await self._desk.ask(
                agent,
                id,
                type,
                data,
                until=self._until(),
                since=chunk.span.opened,
                now=now,
                still=still,
            )
        except MailboxFullError:
            return False
        except PayloadTooLargeError as error:
            raise PayloadTooLargeError(
                f"Chunk {chunk.number} of {self._job.name} does not fit a signal.",
                hint="Take smaller chunks, under another id.",
            ) from error
        return True

    def waits_for(self) -> str:
        """In words."""
        if self._job.reducer is not None and self._chunks and self._chunks[0].is_mapped:
            return f"{self._job.reducer} has not answered for chunk {self._chunks[0].number}"
        count = len(self._mappers())
        return f"{count} agents that run provide {self._job.mapper}"

    def _mappers(self) -> list[str]:
        held = self._registry.providing(self._job.mapper)
        return [h.record.id for h in held if h.record.status is AgentStatus.RUNNING]


def _map_id(name: str, chunk: int, attempt: int) -> str:
    return f"map.{name}.{chunk}.{attempt}"


def _reduce_id(name: str, chunk: int, attempt: int) -> str:
    return f"reduce.{name}.{chunk}.{attempt}"


def _folding(name: str, fold: str | Fold) -> tuple[Fold | None, str, str | None]:
    """The function, what the record says of it, and the reducer."""
    if not isinstance(fold, str):
        return fold, _FUNCTION, None
    if fold in FOLDS:
        return FOLDS[fold], fold, None
    if fold.startswith("agent:"):
        (agent,) = agent_names([fold], f"the reducer of the job {name}")
        return None, fold, agent
    raise ConfigError(f"{fold!r} does not reduce: use {', '.join(FOLDS)}, agent:ID, or a function.")


def _combining(
    name: str, combine: str | Fold | None, combined: int, reducer: str | None, in_flight: int
) -> tuple[Fold | None, str]:
    """The function, and what the record says of it."""
    if combine is None:
        return None, ""
    if reducer is None:
        raise ConfigError(
            f"The job {name} folds where it is driven: `combine` is for a reducer that is an agent.",
            hint="Say agent:ID as fold, or leave `combine` out.",
        )
    if not 2 <= combined <= in_flight:
        raise ConfigError(
            f"The job {name} can combine 2 to {in_flight} chunks (as many as are in flight), not {combined}."
        )
    if not isinstance(combine, str):
        return combine, f"{_FUNCTION} of {combined}"
    if combine not in FOLDS:
        raise ConfigError(f"{combine!r} does not combine: use {', '.join(FOLDS)}, or a function.")
    return FOLDS[combine], f"{combine} of {combined}"


async def map_reduce(
    connection: Connection,
    name: str,
    items: Items,
    mapper: str,
    fold: str | Fold,
    *,
    initial: Any = None,
    type: str = MAP,
    chunk: int = CHUNK,
    in_flight: int = IN_FLIGHT,
    retries: int = 2,
    straggler_s: float = 10.0,
    combine: str | Fold | None = None,
    combined: int = COMBINED,
    on_progress: Callable[[MapProgress], Any] | None = None,
    timeout: float = 3600.0,
) -> Any:
    """Let agents map *items* in chunks and fold what they answer; with a *name* that was used: go on.

    Agents that provide the capability *mapper* handle ``map`` (`MAP`) and return what the chunk's
    items make together. Returns what all chunks make together; also for a job that is over.

    Args:
        items: an iterable or an async one, of JSON values; the same again where a job is gone on with.
        fold: of the result so far and a chunk's answer the new result: a pure function of JSON values, a name
            of `FOLDS`, or ``agent:ID``: an agent that handles ``reduce`` (`REDUCE`), with state.
        initial: the result of no chunks; without it the first chunk's answer is the first result.
        chunk: at most so many items at once.
        in_flight: at most so many chunks are held.
        retries: how often a chunk is asked anew after a mapper's (or the reducer's) handler has raised.
        straggler_s: after so long another mapper that has nothing to do gets the chunk too.
        combine: with ``agent:ID`` as fold: a pure function, or a name of `FOLDS`, that puts the values of
            neighbouring chunks together before the reducer gets them, so that it is asked less often.
        combined: so many chunks at once.
        on_progress: called with each partial result.
        timeout: how long to wait; the job goes on at the next call.

    Cancellation: the job stands where it is; call again to go on.

    Raises:
        ConfigError: an argument is wrong, *name* belongs to another job, or the input is another.
        HandlerError: a chunk has failed; `details` has ``chunk`` and ``reason``.
        NotSettledError: not over within *timeout*.
        PayloadTooLargeError: a chunk, or the result, does not fit.
        BusTimeoutError, BusUnavailableError: call again.

    Example:
        >>> await map_reduce(cluster, "words-7", lines, "count-words", "merge")
    """
    checked("job", name)
    if not is_name(mapper):
        raise ConfigError(f"{mapper!r} is no capability.")
    if chunk < 1 or not 1 <= in_flight <= 1000 or retries < 0 or straggler_s <= 0:
        raise ConfigError(
            f"The job {name} needs chunk from 1, in_flight from 1 to 1000, retries from 0, and a "
            "positive straggler_s."
        )
    function, said, reducer = _folding(name, fold)
    joining, how = _combining(name, combine, combined, reducer, in_flight)
    start = as_json(initial, f"job {name}: initial")
    job = _Job(
        name,
        mapper,
        type,
        function,
        reducer,
        chunk,
        in_flight,
        retries,
        straggler_s,
        joining,
        1 if joining is None else combined,
        on_progress,
    )
    wanted = MapRecord(mapper=mapper, type=type, fold=said, combine=how, initial=start, value=start)

    def open_(record: MapRecord | None) -> MapRecord | None:
        if record is None:
            return wanted.model_copy(update={"started": utc_text()})
        for what in ("mapper", "type", "fold", "combine", "initial"):
            if getattr(record, what) != getattr(wanted, what):
                raise ConfigError(
                    f"There is another job {name}: its {what} is {getattr(record, what)!r}.",
                    hint="Each job has an id of its own.",
                )
        return freed(record)

    deadline = monotonic() + timeout
    wake = asyncio.Event()
    async with (
        Cell(connection, _PREFIX + name, MapRecord) as cell,
        Desk(connection, f"map-{name}", wake) as desk,
        Intake(items, chunk) as intake,
    ):
        record = await cell.change(open_, monotonic() + _PATIENCE_S)
        assert record is not None
        if not record.is_over:
            scope = TaskScope(f"map_reduce.{name}")
            registry = Registry(connection.bus, connection.subjects)
            try:
                await _open_registry(registry, scope)
                registry.subscribe(lambda *_: wake.set())
                driver = _Driver(job, cell, desk, wake, intake, registry, record)
                is_over = await driver.run(deadline)
                record = driver.record
            finally:
                await scope.close()
            if not is_over:
                raise NotSettledError(
                    f"The job {name} is not over after {timeout:g} s: {record.items} items are "
                    f"counted, and {driver.waits_for()}.",
                    hint="It goes on when it is called again.",
                )
        await desk.clear()
        return record.value


async def _open_registry(registry: Registry, scope: TaskScope) -> None:
    until = monotonic() + _PATIENCE_S
    try:
        await registry.open(scope, timeout=until - monotonic())
    except BusTimeoutError as error:
        raise BusUnavailableError("Who can map could not be read.") from error


async def map_jobs(connection: Connection) -> dict[str, MapRecord]:
    """Every job that is known, by its id, with its partial result: those under way, and those of the last week.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    entries = await Bucket(connection.bus, connection.subjects, "coordination").read_all()
    found: builtins.dict[str, MapRecord] = {}
    for key, entry in sorted(entries.items()):
        if key.startswith(_PREFIX) and entry.value is not None:
            with contextlib.suppress(DecodeError):  # a newer version's
                found[key.removeprefix(_PREFIX)] = decode(MapRecord, entry.value)
    return found


__all__ = ["CHUNK", "FOLDS", "MAP", "REDUCE", "MapProgress", "map_jobs", "map_reduce"]
