"""Plans and chains: order, references, failures that are taken back, and crashes anywhere in between."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from foundation_nats import Action, ActionContext, Agent, Plan, Signal, State, action, on, ref
from foundation_nats.agent.actions import Instruction, chain, run_action
from foundation_nats.agent.actions.plan import in_order
from foundation_nats.errors import (
    ActionError,
    ActionInvalidError,
    ActionNotFoundError,
    ConfigError,
    PlanFailedError,
)
from foundation_nats.testing import AgentHarness

DONE: list[str] = []
BROKEN: dict[str, int] = {}
"""Name to how often it still fails."""


class Booked(BaseModel):
    """What a desk gives."""

    what: str
    price: int


def _happens(text: str) -> None:
    left = BROKEN.get(text, 0)
    if left:
        BROKEN[text] = left - 1
        raise ValueError(f"no {text}")
    DONE.append(text)


@action(name="unbook")
async def unbook_action(what: str) -> None:
    """Named by a plan as what undoes."""
    _happens(f"unbook {what}")


async def _unbook(params: Any, result: Booked, ctx: ActionContext) -> None:
    _happens(f"un{result.what}")


@action(undo=_unbook)
async def book(what: str, price: int = 10) -> Booked:
    """Book something."""
    _happens(what)
    return Booked(what=what, price=price)


@action
async def total(prices: list[int]) -> int:
    """Add up."""
    return sum(prices)


trip = (
    Plan("trip")
    .step("flight", book, {"what": "flight", "price": ref("input").most})
    .step("car", book, {"what": "car"}, after="flight")
    .step("sum", total, {"prices": [ref("flight").price, ref("car").price]})
    .step("hotel", book, {"what": "hotel", "price": ref("sum")})
    .returning({"sum": ref("sum"), "hotel": ref("hotel").price})
)


class Traveller(Agent):
    """Carries out plans in its handler."""

    actions = (book, total, unbook_action, trip)

    class State(State):
        """What it has."""

        last: Any = None

    @on("go")
    async def go(self, signal: Signal[int]) -> None:
        """The plan."""
        self.state.last = await self.ctx.run(trip, {"most": signal.data})

    @on("careful")
    async def careful(self, signal: Signal[int]) -> str:
        """The plan, and what becomes of it if it fails."""
        try:
            await self.ctx.run("trip", {"most": signal.data})
        except PlanFailedError as error:
            self.state.last = str(error)
            return "stays at home"
        return "travels"

    @on("data")
    async def data(self, signal: Signal[dict[str, Any]]) -> Any:
        """A plan that came as data."""
        return await self.ctx.run(Plan.parse(signal.data))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    DONE.clear()
    BROKEN.clear()


async def test_steps_run_after_what_they_need_with_its_results() -> None:
    """Without an agent, and in one."""
    assert await run_action(trip, {"most": 70}) == {"sum": 80, "hotel": 80}
    assert DONE == ["flight", "car", "hotel"]
    async with AgentHarness(Traveller) as traveller:
        assert await traveller.send("go", 5)
        assert traveller.state.last == {"sum": 15, "hotel": 15}
        assert await traveller.ask("action.trip", {"most": 1}) == {"sum": 11, "hotel": 11}
        assert traveller.steps == []


def test_a_plan_is_data() -> None:
    """There and back."""
    assert Plan.parse(trip.model_dump_json()) == trip
    assert trip.model_dump()["steps"][3]["params"] == {
        "what": "hotel",
        "price": {"$ref": ["sum"]},
    }


async def test_a_plan_as_data_names_actions_of_the_agent_alone() -> None:
    """What it has not, it can't be made to do; nor is a part that is not there guessed."""
    step = {"name": "a", "action": "book", "params": {"what": "seat"}}
    price = {"name": "b", "action": "total", "params": {"prices": [{"$ref": "a.price"}]}}
    async with AgentHarness(Traveller) as traveller:
        found = await traveller.ask("data", {"steps": [price, step]})
        assert found == {"a": {"what": "seat", "price": 10}, "b": 10}
        cost = {**price, "params": {"prices": {"$ref": "a.cost"}}}
        with pytest.raises(PlanFailedError, match="has no action 'launch'"):
            await traveller.ask("data", {"steps": [{**step, "action": "launch"}]})
        with pytest.raises(PlanFailedError, match="no 'cost' in"):
            await traveller.ask("data", {"steps": [step, cost]})


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([("a", {"$ref": "b"}), ("b", {"$ref": "a"})], "wait for each other: a, b"),
        ([("a", {"$ref": "a"})], "wait for each other: a"),
        ([("a", {"$ref": "x"})], "step a needs x, which is no step"),
        ([("a", 1), ("a", 1)], "'a' is there twice"),
        ([("input", 1)], "'input' is there twice"),
        ([("a b", 1)], "'a b' is no name"),
        ([("a", {"$ref": []})], "is no reference"),
        ([(5, 1)], "steps.0.name"),
    ],
)
def test_a_plan_that_cannot_end_is_refused(steps: list[Any], match: str) -> None:
    """When it is made."""
    made = [{"name": name, "action": "x", "params": {"p": value}} for name, value in steps]
    with pytest.raises(ConfigError, match=match):
        Plan.parse({"steps": made})


def test_order_is_as_written_unless_something_is_needed() -> None:
    """The same each time."""
    plan = Plan("p").step("b", "x").step("a", "x").step("c", "x", {"p": ref("a")})
    assert [step.name for step in in_order(plan)] == ["b", "a", "c"]
    back = Plan.parse({**plan.model_dump(), "steps": list(reversed(plan.model_dump()["steps"]))})
    assert [step.name for step in in_order(back)] == ["a", "c", "b"]


async def test_branches_run_side_by_side() -> None:
    """As many as the plan allows."""
    inside: list[int] = []
    most: list[int] = []
    barrier = asyncio.Event()

    @action
    async def wait(n: int) -> int:
        inside.append(n)
        most.append(len(inside))
        if len(inside) == 3:
            barrier.set()
        await barrier.wait()
        inside.remove(n)
        return n

    plan = Plan("wide", parallel=3)
    for n in range(6):
        plan = plan.step(f"s{n}", wait, {"n": n})
    assert list((await run_action(plan)).values()) == list(range(6))
    assert max(most) == 3


async def test_a_step_may_be_left_out() -> None:
    """By a result; what refers to it gets null."""
    plan = (
        Plan("maybe")
        .step("a", book, {"what": "a"}, when=ref("input").wanted)
        .returning([ref("a").price, ref("input").wanted, {"$value": {"$ref": 1}}])
    )
    assert await run_action(plan, {"wanted": False}) == [None, False, {"$ref": 1}]
    assert DONE == []
    assert (await run_action(plan, {"wanted": True}))[0] == 10


async def test_a_chain_hands_on_results() -> None:
    """By name, or as the only param that is missing."""

    @action
    async def double(number: int, plus: int = 0) -> dict[str, int]:
        return {"number": number * 2 + plus, "more": 1}

    @action
    async def text(number: int) -> str:
        return f"n{number}"

    @action
    async def shout(word: str, end: str = ".") -> str:
        return word.upper() + end

    found = chain("c", double, (double, {"plus": 1}), text, (shout, {"end": "!"}))
    assert await run_action(found, {"number": 3}) == "N13!"
    with pytest.raises(ConfigError, match="has no actions"):
        chain("empty")


# ---- failures -------------------------------------------------------------------------


async def test_a_failure_takes_back_what_is_done_in_reverse() -> None:
    """And the signal is given up at once: to try it again would end the same way."""
    BROKEN["hotel"] = 1
    async with AgentHarness(Traveller) as traveller:
        assert not await traveller.send("go", 5)
        assert DONE == ["flight", "car", "uncar", "unflight"]
        (dead,) = traveller.dead
        assert isinstance(dead.error, PlanFailedError)
        assert dead.attempts == 1
        assert "trip failed at hotel: Action book failed: ValueError: no hotel" in str(dead.error)
        assert dead.error.details["undone"] == ["car", "flight"]
        assert traveller.state.last is None


async def test_a_handler_may_go_on_after_a_plan_has_failed() -> None:
    """What it then does is committed."""
    BROKEN["hotel"] = 1
    async with AgentHarness(Traveller) as traveller:
        assert await traveller.ask("careful", 5) == "stays at home"
        assert "undone: car, flight" in traveller.state.last
        assert traveller.steps == []


async def test_a_step_is_tried_again_before_the_plan_has_failed() -> None:
    """As the plan says, or the action."""
    BROKEN["car"] = 2
    plan = Plan("p").step("car", book, {"what": "car"}, retries=2)
    quick = book.retry_first_s
    book.retry_first_s = 0.001
    try:
        assert (await run_action(plan))["car"]["price"] == 10
    finally:
        book.retry_first_s = quick


async def test_what_cannot_be_undone_is_told_and_tried_again() -> None:
    """The rest is undone all the same, and once."""
    BROKEN.update({"hotel": 1, "uncar": 1})
    async with AgentHarness(Traveller) as traveller:
        assert not await traveller.send("go", 5)
        # The second attempt of the signal could undo it.
        assert DONE == ["flight", "car", "unflight", "uncar"]
        assert isinstance(traveller.dead[0].error, PlanFailedError)
        assert traveller.dead[0].attempts == 2
    DONE.clear()
    BROKEN.update({"hotel": 1, "uncar": 99})
    async with AgentHarness(Traveller) as traveller:
        assert not await traveller.send("go", 5)
        assert DONE == ["flight", "car", "unflight"]
        assert "could not be undone: car" in str(traveller.dead[0].error)


async def test_a_plan_says_itself_how_a_step_is_undone() -> None:
    """By an action and references, also to the step itself."""
    BROKEN["b"] = 1
    plan = (
        Plan("p")
        .step("a", book, {"what": "a"}, undo=("unbook", {"what": ref("a").what}))
        .step("b", book, {"what": "b"}, after="a")
    )
    assert plan.steps[0].undo == Instruction(
        action="unbook", params={"what": {"$ref": ["a", "what"]}}
    )
    with pytest.raises(PlanFailedError):
        await run_action(plan, known={"unbook": unbook_action})
    assert DONE == ["a", "unbook a"]


async def test_a_plan_within_a_plan_is_undone_with_it() -> None:
    """Its steps, in reverse."""
    BROKEN["last"] = 1
    inner = Plan("inner").step("x", book, {"what": "x"}).step("y", book, {"what": "y"}, after="x")
    outer = Plan("outer").step("in", inner).step("last", book, {"what": "last"}, after="in")
    with pytest.raises(PlanFailedError, match=r"outer failed at last.*undone: in"):
        await run_action(outer)
    assert DONE == ["x", "y", "uny", "unx"]


async def test_running_branches_are_waited_for_before_all_is_undone() -> None:
    """Nothing is cut off in the middle."""
    gate = asyncio.Event()

    @action(undo=_unbook)
    async def slow(what: str) -> Booked:
        await gate.wait()
        return await book(what)  # type: ignore[no-any-return]

    @action
    async def breaks() -> None:
        asyncio.get_running_loop().call_soon(gate.set)
        raise ValueError("broken")

    plan = Plan("p").step("slow", slow, {"what": "slow"}).step("bad", breaks)
    with pytest.raises(PlanFailedError, match="undone: slow"):
        await run_action(plan)
    assert DONE == ["slow", "unslow"]


async def test_cancelling_a_plan_ends_its_steps() -> None:
    """And leaves no task behind."""
    ended: list[str] = []

    @action
    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    task = asyncio.ensure_future(run_action(Plan("p").step("a", forever).step("b", forever)))
    while len(asyncio.all_tasks()) < 4:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["ended", "ended"]


# ---- crashes --------------------------------------------------------------------------

STEPS = ("flight", "car", "sum", "hotel")


@pytest.mark.parametrize(
    ("step", "point"), list(itertools.product(STEPS, ("begun", "happened", "done")))
)
async def test_a_crash_in_a_step_resumes_after_the_last_one_that_is_done(
    step: str, point: str
) -> None:
    """Only the step in doubt is done again."""
    async with AgentHarness(Traveller) as traveller:
        traveller.crash_in_step(f"trip/{step}", point)
        assert await traveller.send("go", 5)
        assert traveller.state.last == {"sum": 15, "hotel": 15}
        again = [step] if point == "happened" and step != "sum" else []
        assert sorted(DONE) == sorted(["flight", "car", "hotel", *again])


@pytest.mark.parametrize(
    ("key", "point"),
    list(
        itertools.product(
            ("trip!failed", "trip/car:undo", "trip/flight:undo"), ("begun", "happened", "done")
        )
    ),
)
async def test_a_crash_while_a_plan_is_undone_goes_on_undoing(key: str, point: str) -> None:
    """It is never carried forward again, although what had failed would succeed now."""
    BROKEN["hotel"] = 1 if key != "trip!failed" or point == "done" else 2
    async with AgentHarness(Traveller) as traveller:
        traveller.crash_in_step(key, point)
        assert not await traveller.send("go", 5)
        assert isinstance(traveller.dead[0].error, PlanFailedError)
        assert "hotel" not in DONE
        undone = [item for item in DONE if item.startswith("un")]
        again = key.partition("/")[2].partition(":")[0]
        twice = [f"un{again}"] if again and point == "happened" else []
        assert sorted(undone) == sorted(["uncar", "unflight", *twice])


class Doubtful(Action):
    """Must not be done twice, and nobody can tell whether it was."""

    on_doubt = "fail"
    calls: ClassVar[list[int]] = []

    async def run(self, params: Any, ctx: ActionContext) -> int:
        self.calls.append(1)
        return 1


async def test_a_step_in_doubt_waits_for_a_person_and_undoes_nothing() -> None:
    """The plan is not over."""

    class Careful(Agent):
        actions = (Plan("p").step("a", book, {"what": "a"}).step("b", Doubtful, after="a"),)

    async with AgentHarness(Careful) as careful:
        careful.crash_in_step("p/b", "happened")
        assert not await careful.send("action.p", {}, id="s1")
        assert careful.dead[0].error.code == "agent.step_in_doubt"
        assert DONE == ["a"]
        assert {step.key: step.status for step in careful.steps} == {
            "p/a": "done",
            "p/b": "pending",
        }


async def test_errors_of_a_plan_are_errors_of_actions() -> None:
    """To catch both."""
    with pytest.raises(ActionError):
        await run_action(Plan("p").step("a", total, {"prices": "x"}))
    with pytest.raises(PlanFailedError, match="nothing to undo"):
        await run_action(Plan("p").step("a", "nowhere"))
    with pytest.raises(ActionNotFoundError):
        await run_action("nowhere")
    typed = Plan("p").step("a", total, {"prices": ref("input").numbers}).taking(Numbers)
    with pytest.raises(ActionInvalidError, match="numbers: Field required"):
        await run_action(typed, {})
    assert await run_action(typed, {"numbers": [1, 2]}) == {"a": 3}


class Numbers(BaseModel):
    """What a plan takes."""

    numbers: list[int]
