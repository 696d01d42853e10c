"""Behaviour trees: what each part says, what is remembered between ticks, what a crash keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from pydantic import Field

from foundation_nats import Agent, Signal, on
from foundation_nats.agent.strategies import (
    Always,
    BehaviourTree,
    Do,
    Invert,
    Parallel,
    Repeat,
    Retry,
    Selector,
    Sequence,
    Status,
    Timeout,
    Wait,
)
from foundation_nats.agent.strategies.tree import Node
from foundation_nats.errors import ActionError, ConfigError, HandlerError
from foundation_nats.testing import AgentHarness

GOOD, BAD, RUN = Status.SUCCESS, Status.FAILURE, Status.RUNNING


def _said(*answers: Any, name: str = "x") -> tuple[Do, list[Any]]:
    """A leaf that says these, one after the other, and the list of what it has said."""
    left = list(answers)
    said: list[Any] = []

    def say(agent: Any) -> Any:
        said.append(left[0])
        return left.pop(0) if len(left) > 1 else left[0]

    return Do(say, name), said


async def _ticked(root: Node, times: int, *, seconds: float = 0.0) -> list[str]:
    cls = type("Tree", (BehaviourTree,), {"tree": root, "tick_every": None})
    async with AgentHarness(cls) as agent:
        found = []
        for _ in range(times):
            found.append(await agent.ask("tree.tick"))
            await agent.crash()
            await agent.advance(seconds)
        return found


@pytest.mark.parametrize(
    ("make", "answers", "expected"),
    [
        (Sequence, [(GOOD,), (True,), (None,)], ["success"]),
        (Sequence, [(GOOD,), (False,), (GOOD,)], ["failure"]),
        (Sequence, [(GOOD,), (RUN, RUN, GOOD), (GOOD,)], ["running", "running", "success"]),
        (Selector, [(BAD,), (GOOD,), (BAD,)], ["success"]),
        (Selector, [(BAD,), (BAD,)], ["failure"]),
        (Selector, [(BAD,), (RUN, BAD), (GOOD,)], ["running", "success"]),
        (Parallel, [(RUN, GOOD), (GOOD,), (RUN, RUN, GOOD)], ["running", "running", "success"]),
        (Parallel, [(RUN,), (BAD,)], ["failure"]),
    ],
)
async def test_parts_of_several(
    make: Callable[..., Node], answers: list[tuple[Any, ...]], expected: list[str]
) -> None:
    """A crash after each tick changes nothing."""
    leaves = [_said(*item)[0] for item in answers]
    assert await _ticked(make(*leaves), len(expected)) == expected


async def test_a_sequence_goes_on_where_it_was_unless_it_looks_again() -> None:
    """What has succeeded is not done again, or is, and then may end what is running."""
    first, said = _said(True, True, False)
    long, ran = _said(RUN)
    assert await _ticked(Sequence(first, long), 3) == ["running"] * 3
    assert (len(said), len(ran)) == (1, 3)
    first, said = _said(True, True, False)
    long, ran = _said(RUN)
    assert await _ticked(Sequence(first, long, again=True), 3) == ["running", "running", "failure"]
    assert (len(said), len(ran)) == (3, 2)


async def test_some_of_several_are_enough() -> None:
    """And who has ended is not ticked again."""
    one, said = _said(GOOD)
    two, _ = _said(RUN, RUN, GOOD)
    three, _ = _said(RUN)
    assert await _ticked(Parallel(one, two, three, need=2), 3) == ["running", "running", "success"]
    assert len(said) == 1
    assert await _ticked(Parallel(_said(BAD)[0], _said(RUN)[0], need=1), 1) == ["running"]


async def test_parts_around_one() -> None:
    """Inverted, forced, tried again, repeated."""
    assert await _ticked(Invert(_said(RUN, GOOD)[0]), 2) == ["running", "failure"]
    assert await _ticked(Invert(_said(BAD)[0]), 1) == ["success"]
    assert await _ticked(Always(_said(RUN, BAD)[0]), 2) == ["running", "success"]
    assert await _ticked(Retry(_said(BAD, BAD, GOOD)[0], 3), 3) == ["running", "running", "success"]
    assert await _ticked(Retry(_said(BAD)[0], 2), 2) == ["running", "failure"]
    assert await _ticked(Repeat(_said(GOOD)[0], 2), 2) == ["running", "success"]
    assert await _ticked(Repeat(_said(GOOD, BAD)[0], 3), 2) == ["running", "failure"]


async def test_parts_that_look_at_the_clock() -> None:
    """Of the agent."""
    assert await _ticked(Wait(10), 3, seconds=5) == ["running", "running", "success"]
    assert await _ticked(Timeout(_said(RUN)[0], 10), 3, seconds=5) == [
        "running",
        "running",
        "failure",
    ]
    assert await _ticked(Timeout(_said(RUN, GOOD)[0], 10), 2, seconds=5) == ["running", "success"]


async def test_an_action_that_fails_is_a_failure_and_another_error_undoes_the_tick() -> None:
    """Which is tried again."""

    def fail(agent: Any) -> None:
        raise ActionError("no")

    def bug(agent: Any) -> None:
        raise RuntimeError("bug")

    assert await _ticked(Selector(Do(fail), _said(GOOD)[0]), 1) == ["success"]
    with pytest.raises(HandlerError, match="bug"):
        await _ticked(Do(bug), 1)
    with pytest.raises(ConfigError, match="returned 7"):
        await _ticked(_said(7)[0], 1)


class Robot(BehaviourTree):
    """Delivers, and charges when it must."""

    tick_every = 5.0
    tree = Selector(
        Sequence(Do("is_empty"), Do("charge")),
        Sequence(Do("drive"), Do("drop")),
    )
    outside: ClassVar[list[str]] = []

    class State(BehaviourTree.State):
        """What it knows."""

        battery: int = 2
        log: list[str] = Field(default_factory=list)

    def is_empty(self) -> bool:
        """A question."""
        return bool(self.state.battery == 0)

    async def charge(self) -> Status:
        """Takes two ticks."""
        self.state.battery += 1
        return GOOD if self.state.battery == 2 else RUN

    async def drive(self) -> Status:
        """Takes a tick for each bit of the battery."""
        self.state.battery -= 1
        self.state.log.append("drive")
        return RUN if self.state.battery else GOOD

    async def drop(self) -> None:
        """Something outside."""
        await self.ctx.once("drop", self.outside.append, "dropped")

    @on("bump")
    async def bump(self, signal: Signal[Any]) -> str:
        """React at once."""
        return str(await self.tick())


async def test_a_tree_is_ticked_by_its_clock_until_it_has_ended() -> None:
    """And begins anew when it is told to."""
    Robot.outside.clear()
    async with AgentHarness(Robot) as robot:
        await robot.advance(5)
        assert robot.state.tree.ticks == 1
        assert robot.state.tree.memory
        await robot.crash()
        assert await robot.ask("bump") == "success"
        assert Robot.outside == ["dropped"]
        assert (robot.state.tree.result, robot.state.tree.memory) == ("success", {})
        await robot.advance(60)
        assert robot.state.tree.ticks == 2
        assert await robot.ask("bump") == "success"
        assert robot.state.tree.ticks == 2
        assert await robot.ask("tree.start") == "running"
        await robot.advance(5)
        assert robot.state.tree.result == "success"


async def test_a_crash_in_a_tick_repeats_the_tick_and_not_its_steps() -> None:
    """All else is as it was before it."""
    Robot.outside.clear()
    async with AgentHarness(Robot) as robot:
        await robot.ask("bump")
        robot.crash_in_step("drop", "done")
        assert await robot.send("tree.tick")
        assert Robot.outside == ["dropped"]
        assert robot.state.log == ["drive", "drive"]
        assert robot.state.tree.ticks == 2


async def test_a_tree_of_another_shape_begins_anew() -> None:
    """What is remembered is of no use to it."""

    class Other(Robot):
        tree = Sequence(Do("drive"), Do("drive"), Do("drop"))

    async with AgentHarness(Robot) as robot:
        await robot.ask("bump")
        kept = robot.state.model_dump()
    async with AgentHarness(Other, state=kept) as other:
        assert await other.ask("bump") == "running"
        assert other.state.tree.shape != kept["tree"]["shape"]
        assert other.state.tree.memory == {"r.0": {"at": 1}}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Sequence(), "not nothing"),
        (lambda: Selector("x"), "not x"),  # type: ignore[arg-type]
        (lambda: Invert(3), "needs a part"),  # type: ignore[arg-type]
        (lambda: Parallel(Wait(1), need=2), "need=2 of 1"),
        (lambda: Retry(Wait(1), 0), "at least 1"),
        (lambda: Timeout(Wait(1), 0), "positive"),
        (lambda: Wait(0), "positive"),
        (lambda: type("T", (BehaviourTree,), {"tree": 3}), "part of a tree"),
        (lambda: type("T", (BehaviourTree,), {"tree": Do("nothing")}), "no method 'nothing'"),
        (
            lambda: type("T", (BehaviourTree,), {"tree": Wait(1), "State": Agent.State}),
            "BehaviourTree.State",
        ),
        (lambda: type("T", (BehaviourTree,), {"tree": Wait(1), "tick_every": 0}), "tick_every"),
    ],
)
def test_a_tree_that_is_wrong_is_refused(make: Callable[[], Any], match: str) -> None:
    """When it is made."""
    with pytest.raises(ConfigError, match=match):
        make()
