"""What pipelines and map-reduce jobs decide, without a server."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats.coordination.desk import Answer
from foundation_nats.coordination.intake import Intake, digest_of, end_of, opened
from foundation_nats.coordination.map_reduce import (
    FOLDS,
    chosen,
    chunk_of,
    counted,
    failed,
    freed,
    grouped,
    outcome,
)
from foundation_nats.coordination.pipeline import (
    Place,
    Result,
    finished,
    given_up,
    handed_out,
    is_selector,
    item_of,
    moved,
    patience_s,
    pause_s,
    question_id,
)
from foundation_nats.errors import ConfigError
from foundation_schemas.coordination import MapRecord, PipelineRecord, PipelineStage, Span

STAGES = [
    PipelineStage(name="a", agents=["x"], type="t"),
    PipelineStage(name="b", agents=["y"], type="t", retries=1),
]
NO = Answer(code="agent.handler", message="no", stored=9.0)


def _span(first: int, count: int = 4, **more: Any) -> Span:
    return Span(first=first, count=count, opened=1.0, digest="", **more)


# ---- pipelines ------------------------------------------------------------------------


def test_an_answer_takes_an_item_to_its_next_place() -> None:
    """Not before that answer was stored; the last stage's is its result."""
    place = Place({"n": 1}, since=1.0)
    second = moved(3, place, Answer(ok=5, stored=7.0), STAGES)
    assert second == Place(5, 7.0, stage=1)
    assert moved(3, second, Answer(ok=6), STAGES) == Result(3, 6)
    assert moved(3, place, NO, STAGES) == Result(3, stage="a", error="agent.handler: no")
    again = moved(3, second, NO, STAGES)
    assert again == Place(5, 9.0, stage=1, attempt=1)
    assert moved(3, again, NO, STAGES) == Result(3, stage="b", error="agent.handler: no")


def test_the_next_attempt_waits_twice_as_long_each_time() -> None:
    """By the server's clock, from the refusal on, so that whoever drives waits the same; and a minute at most."""
    stage = PipelineStage(name="a", agents=["x"], type="t", retries=9, backoff_s=2)
    first = moved(3, Place(5, 1.0), NO, [stage])
    assert first == Place(5, 9.0, attempt=1, not_before=11.0)
    assert isinstance(first, Place)
    second = moved(3, first, NO, [stage])
    assert second == Place(5, 9.0, attempt=2, not_before=13.0)
    assert [pause_s(stage, n) for n in range(7)] == [2, 4, 8, 16, 32, 60, 60]


def test_a_question_is_valid_for_all_attempts_that_are_left() -> None:
    """Where a late answer is an attempt; else for one."""
    stage = PipelineStage(name="a", agents=["x"], type="t", retries=2, backoff_s=1, timeout_s=10)
    assert patience_s(stage, 0) == 10
    stage = stage.model_copy(update={"on_timeout": "retry"})
    assert patience_s(stage, 0) == 10 + (10 + 1) + (10 + 2)
    assert patience_s(stage, 1) == 10 + (10 + 2)
    assert patience_s(stage, 2) == 10


def test_agents_are_named_by_what_they_are() -> None:
    """Anything else is an id."""
    assert all(map(is_selector, ["capability:a", "any:a", "deployment:a-1"]))
    assert not any(map(is_selector, ["a", "agent:a", "capability:", "label:a=b", "any:a b"]))


async def test_a_large_input_is_read_in_little_memory() -> None:
    """What lies between the input and the questions holds no more than was asked for; all of it would be 12 MB."""
    tracemalloc.start()
    try:
        async with Intake((str(n) for n in range(200_000)), 1000) as intake:
            total = 0
            while items := await intake.peek(8000):
                await intake.pass_over(intake.position + len(items))
                total += len(items)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 200_000
    assert peak < 4e6, f"{peak / 1e6:.1f} MB"


def test_ids_say_what_they_are_about() -> None:
    """Others are about nothing."""
    assert item_of(question_id("run", 17, STAGES[1], 0)) == 17
    assert item_of("saga.x.y") == item_of("pipeline.a.b.c.d") == -1
    assert chunk_of("map.job.4.0") == 4
    assert chunk_of("something") == -1


def test_what_is_finished_is_not_given_up() -> None:
    """So that there is one verdict on an item, whoever drives."""
    record = PipelineRecord(stages=STAGES, spans=[_span(0, finished=True), _span(4)])
    assert given_up(record, {1: ("a", "late")}) is None
    lost = given_up(record, {1: ("a", "late"), 5: ("b", "late")})
    assert lost is not None
    assert [span.lost for span in lost.spans] == [{}, {5: ["b", "late"]}]
    assert given_up(lost, {5: ("b", "other")}) is None
    done = finished(lost, [4])
    assert done is not None
    assert [span.finished for span in done.spans] == [True, True]
    assert finished(done, [0, 4]) is None


def test_spans_are_handed_out_once_in_order() -> None:
    """The last one ends the run, if the end of the input is known."""
    record = PipelineRecord(stages=STAGES, spans=[_span(0), _span(4)], total=8)
    assert handed_out(record, 8, 0, "now") is None
    after = handed_out(record, 4, 1, "now")
    assert after is not None
    assert (after.cursor, after.failed, after.ended) == (4, 1, "")
    assert handed_out(after, 4, 1, "now") is None
    end = handed_out(after, 8, 1, "now")
    assert end is not None
    assert (end.cursor, end.failed, end.ended, end.spans) == (8, 2, "now", [])


# ---- map-reduce -----------------------------------------------------------------------


def test_the_least_loaded_mapper_gets_a_chunk() -> None:
    """Not one that has it; those that were late only where there is no other."""
    mappers = ["a", "b", "c"]
    assert chosen(mappers, {"a": 1, "b": 0, "c": 0}, [], [], 2) == "b"
    assert chosen(mappers, {}, ["a"], ["b"], 2) == "c"
    assert chosen(mappers, {"b": 2, "c": 2}, ["a"], [], 2) == "a"
    assert chosen(mappers, {"a": 2, "b": 2, "c": 2}, [], [], 2) is None
    assert chosen([], {}, [], [], 2) is None


def test_the_first_attempt_that_was_not_refused_counts() -> None:
    """Of those that all failed the last one is the reason."""
    answers = {"0": NO, "1": Answer(ok=5), "2": Answer(ok=6)}
    assert outcome(str, answers, 0, 3) == (1, Answer(ok=5))
    assert outcome(str, answers, 0, 1) == (0, NO)
    assert outcome(str, {"0": NO}, 0, 3) == (1, None)
    assert outcome(str, {"0": NO, "1": NO}, 0, 2) == (1, NO)


def test_chunks_are_combined_in_the_same_groups_whoever_drives() -> None:
    """Counted from the first of all; the last one ends with the input."""
    assert grouped([], 4, None) == []
    assert grouped([8, 9, 10], 4, None) == []
    assert grouped([8, 9, 10, 11, 12], 4, None) == [range(8, 12)]
    assert grouped([8, 9, 10, 11, 12], 4, 13) == [range(8, 12), range(12, 13)]
    assert grouped([8, 9], 4, 11) == [], "one has not been read yet"
    assert grouped([0, 1], 1, None) == [range(1), range(1, 2)]


def test_a_chunk_is_counted_once() -> None:
    """Whoever comes second finds that it is."""
    fold = FOLDS["sum"]
    record = MapRecord(
        mapper="m", type="map", fold="sum", spans=[_span(0), _span(4), _span(8, 2)], total=10
    )
    one = counted(record, 0, [5], fold, "now")
    assert one is not None
    assert (one.cursor, one.items, one.value, one.ended) == (1, 4, 5, "")
    assert counted(one, 0, [5], fold, "now") is None
    assert counted(one, 1, [], fold, "now") is None
    end = counted(one, 1, [6, 7], fold, "now")
    assert end is not None
    assert (end.cursor, end.items, end.value, end.ended) == (3, 10, 18, "now")
    start = record.model_copy(update={"initial": 100})
    first = counted(start, 0, [5], fold, "now")
    assert first is not None
    assert first.value == 105
    by_agent = counted(record, 0, [5, 9], None, "now")
    assert by_agent is not None
    assert by_agent.value == 9


def test_a_failed_job_is_tried_anew_when_it_is_called_again() -> None:
    """Under other ids; what is counted stays so."""
    record = MapRecord(mapper="m", type="map", fold="sum", cursor=2)
    assert failed(record, 1, "why") is None
    stuck = failed(record, 2, "why")
    assert stuck is not None
    assert failed(stuck, 2, "other") is None
    again = freed(stuck)
    assert again is not None
    assert (again.error, again.rounds, again.cursor) == ("", 1, 2)
    assert freed(again) is None


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 9)), min_size=1))
def test_merging_adds_by_key(chunks: list[dict[str, int]]) -> None:
    """However the chunks are cut."""
    merge = FOLDS["merge"]
    value: Any = {}
    for chunk in chunks:
        value = merge(value, chunk)
    assert value == {
        key: sum(chunk.get(key, 0) for chunk in chunks) for chunk in chunks for key in chunk
    }


# ---- input ----------------------------------------------------------------------------


def test_a_span_is_opened_behind_the_last_one_only() -> None:
    """So the spans of two who drive do not overlap."""
    spans = [_span(4)]
    assert opened(4, spans, [_span(8)]) == [_span(4), _span(8)]
    assert opened(4, spans, [_span(4)]) is None
    assert opened(8, [], [_span(8)]) == [_span(8)]
    assert opened(8, [], []) is None
    assert end_of(3, []) == 3


async def _numbers(count: int, taken: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


async def test_of_a_stream_no_more_is_held_than_is_needed() -> None:
    """What is taken is numbered; an input that is too short or another one is named."""
    taken: list[int] = []
    async with Intake(_numbers(1000, taken), 10) as intake:
        assert await intake.peek(5) == [0, 1, 2, 3, 4]
        await asyncio.sleep(0)
        assert len(taken) <= 10
        span = Span(first=0, count=4, opened=0, digest=digest_of([0, 1, 2, 3]))
        assert await intake.take_span(span, "it") == [0, 1, 2, 3]
        assert intake.position == 4
        await intake.pass_over(998)
        assert await intake.peek(5) == [998, 999]
        with pytest.raises(ConfigError, match="ends after 1000 items, but 1001 were"):
            await intake.take(3)
    async with Intake([1, 2], 10) as intake:
        with pytest.raises(ConfigError, match="the items 0 to 1 are others"):
            await intake.take_span(span.model_copy(update={"count": 2}), "it")
        assert await intake.peek(5) == []
    with pytest.raises(ConfigError, match="can't be sent"):
        digest_of([object()])


async def test_an_error_of_the_stream_is_raised_where_it_is_read() -> None:
    """Not swallowed."""

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise OSError("gone")

    async with Intake(broken(), 10) as intake:
        with pytest.raises(OSError, match="gone"):
            await intake.peek(5)
