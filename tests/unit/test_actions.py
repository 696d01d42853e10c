"""Actions: validated both ways, tried again, timed, undone; alone, in a handler, by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import BaseModel, Field

from foundation_nats import Action, ActionContext, Agent, Signal, State, action, on
from foundation_nats.agent.actions import Instruction, actions_of, as_action, run_action
from foundation_nats.agent.agent import provided
from foundation_nats.agent.directives import RunInstruction
from foundation_nats.agent.handling import handlings
from foundation_nats.agent.skills import Skill
from foundation_nats.errors import (
    ActionError,
    ActionInvalidError,
    ActionNotFoundError,
    ConfigError,
    HandlerError,
    PayloadInvalidError,
)
from foundation_nats.testing import AgentHarness


class Order(BaseModel):
    """What to give back."""

    payment: str
    amount: int = Field(ge=1)


class Receipt(BaseModel):
    """What the bank says."""

    number: int


BANK: list[str] = []


def pay_back(payment: str, amount: int, idempotency_key: str) -> int:
    """The outside."""
    BANK.append(f"{payment} {amount} {idempotency_key}")
    return len(BANK)


class Refund(Action):
    """Give money back."""

    async def run(self, params: Order, ctx: ActionContext) -> Receipt:
        number = await ctx.once("pay", pay_back, params.payment, params.amount)
        return Receipt(number=number)


class GiveBackHTTPBody(Action):
    """Has a name of many words."""

    async def run(self, params: Any, ctx: ActionContext) -> Any:
        return params


@action
async def add(a: int, b: Annotated[int, Field(ge=0)] = 1) -> int:
    """Add two numbers."""
    return a + b


@action(name="odd-names")
def odd(json: str, _hidden: int = 2, copy: str = "c") -> str:
    """A plain function, with arguments that models have for themselves."""
    return f"{json}{_hidden}{copy}"


@pytest.fixture(autouse=True)
def _bank() -> None:
    BANK.clear()


async def test_params_and_results_are_what_run_says() -> None:
    """Of a class, and of a function; models and plain values are taken alike."""
    assert as_action(Refund).name == "refund"
    assert as_action(Refund).description == "Give money back."
    assert as_action(GiveBackHTTPBody).name == "give_back_http_body"
    result = await run_action(Refund, {"payment": "p-1", "amount": 5})
    assert result == Receipt(number=1)
    assert await run_action(Refund, Order(payment="p-2", amount=1)) == Receipt(number=2)
    assert await run_action(add, {"a": "3"}) == 4
    assert await run_action(odd, {"json": "a", "_hidden": 3}) == "a3c"
    assert await add(1, 2) == 3
    assert await run_action(GiveBackHTTPBody, {"any": 1}) == {"any": 1}


@pytest.mark.parametrize(
    ("what", "params", "match"),
    [
        (Refund, {"payment": "p", "amount": 0}, "params of action refund .*amount: .*greater"),
        (Refund, None, "payment: Field required"),
        (add, {"a": 1, "c": 2}, "action add .*c: Extra inputs"),
        (add, {"a": 1, "b": -1}, "b: "),
        (GiveBackHTTPBody, [1], "must be an object, not list"),
    ],
)
async def test_params_that_do_not_fit_are_named(what: Any, params: Any, match: str) -> None:
    """Before anything is done."""
    with pytest.raises(ActionInvalidError, match=match):
        await run_action(what, params)
    assert BANK == []


async def test_a_result_that_does_not_fit_is_an_error() -> None:
    """And not tried again: it was done."""
    calls = []

    @action(retries=3)
    async def broken() -> int:
        calls.append(1)
        return "many"  # type: ignore[return-value]

    with pytest.raises(ActionInvalidError, match="What action broken returned is not valid"):
        await run_action(broken)
    assert calls == [1]


class Flaky(Action):
    """Succeeds at its third try, and does its outside step once."""

    retries = 2
    retry_first_s = 0.001

    def __init__(self) -> None:
        super().__init__()
        self.tries: list[int] = []

    async def run(self, params: Any, ctx: ActionContext) -> int:
        self.tries.append(ctx.attempt)
        await ctx.once("pay", pay_back, "p", 1)
        if ctx.attempt < 3:
            raise OSError("not yet")
        return len(BANK)


async def test_it_is_tried_again_and_its_done_steps_are_not() -> None:
    """As often as it says."""
    flaky = Flaky()
    assert await run_action(flaky) == 1
    assert flaky.tries == [1, 2, 3]


async def test_what_is_not_worth_trying_again_is_raised_at_once() -> None:
    """By the kinds of errors; the error says where, and `on_error` has tidied up."""
    told: list[str] = []

    async def tidy(params: Any, error: Exception, ctx: ActionContext) -> None:
        told.append(f"{params.a} {type(error).__name__}")

    @action(retries=5, retry_first_s=0.001, retry_on=(OSError,), on_error=tidy)
    async def divide(a: int) -> float:
        return a / 0

    with pytest.raises(ActionError, match=r"divide failed: ZeroDivisionError: .*test_actions") as e:
        await run_action(divide, {"a": 1})
    assert e.value.details["action"] == "divide"
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert told == ["1 ZeroDivisionError"]


async def test_a_time_out_ends_a_try() -> None:
    """Each of them."""
    tries = []

    @action(timeout=0.01, retries=1, retry_first_s=0.001)
    async def slow(ctx: ActionContext) -> None:
        tries.append(ctx.attempt)
        await asyncio.sleep(60)

    with pytest.raises(ActionError, match=r"slow took longer than 0\.01 s"):
        await run_action(slow)
    assert tries == [1, 2]

    @action
    async def raises_one() -> None:
        raise TimeoutError("its own")

    with pytest.raises(ActionError, match="its own"):
        await run_action(raises_one)


def _varied(*args: int) -> None: ...


def _unresolved(a: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: action(_varied), "have names"),
        (lambda: action(_unresolved), "can't be resolved"),
        (lambda: action(name="two words")(len), "can't be an action's name"),
        (lambda: action(timeout=0)(lambda: None), "name"),
        (lambda: action(name="x", timeout=0)(lambda: None), "leaves no time"),
        (lambda: action(name="x", retries=-1)(lambda: None), "negative"),
        (lambda: action(name="x", on_doubt="hope")(lambda: None), "use rerun or fail"),
        (lambda: as_action(3), "is no action"),
        (lambda: type("Empty", (Action,), {})(), "has no `run`"),
        (lambda: type("A", (Agent,), {"actions": (add, add)}) and None, ""),
    ],
)
def test_what_can_be_no_action_is_refused(make: Callable[[], object], match: str) -> None:
    """With the reason."""
    if not match:
        twice = type("A", (Agent,), {"actions": (add, add)})
        with pytest.raises(ConfigError, match="two actions are called 'add'"):
            actions_of(twice)
        return
    with pytest.raises(ConfigError, match=match):
        make()


# ---- in an agent ----------------------------------------------------------------------


@action
async def keep(word: str, ctx: ActionContext) -> str:
    """Change the agent's state, and tell another agent."""
    ctx.agent.state.words = [*ctx.agent.state.words, word]
    ctx.emit("kept", word, to="agent:log")
    return word.upper()


@action
async def note(text: str, ctx: ActionContext) -> str:
    """Of a skill."""
    ctx.skill.state.notes = [*ctx.skill.state.notes, text]
    return f"{ctx.skill.mount}: {text}"


class Notes(Skill):
    """Keeps notes."""

    actions = (note,)

    class State(State):
        """Its slice."""

        notes: list[str] = Field(default_factory=list)


class Desk(Agent):
    """Has actions of its own and of skills."""

    actions = (Refund, add, keep)
    skills = (Notes(), Notes("private"))
    fails: ClassVar[list[int]] = []

    class State(State):
        """What came back."""

        words: list[str] = Field(default_factory=list)
        last: Any = None

    @on("two")
    async def two(self, signal: Signal[Any]) -> list[int]:
        """The same action twice in one handler; fails as often as told."""
        first = await self.ctx.run(Refund, {"payment": "a", "amount": 1})
        second = await self.ctx.run("refund", {"payment": "b", "amount": 2})
        await self.ctx.run(keep, {"word": "two"})
        if self.fails:
            self.fails.pop()
            raise RuntimeError("again")
        return [first.number, second.number]

    @on("later")
    def later(self, signal: Signal[str]) -> RunInstruction:
        """By a directive."""
        return RunInstruction(signal.data, {"a": 1, "b": 2}, result_type="came.back")

    @on("came.back")
    def came_back(self, signal: Signal[Any]) -> None:
        """The result of it."""
        self.state.last = signal.data


async def test_an_agents_actions_answer_by_name() -> None:
    """Asked and sent, with what they change and emit in one commit."""
    async with AgentHarness(Desk) as desk:
        assert await desk.ask("action.add", {"a": 1, "b": 2}) == 3
        assert await desk.ask("action.refund", {"payment": "p", "amount": 1}) == {"number": 1}
        assert await desk.send("action.keep", {"word": "tea"})
        assert desk.state.words == ["tea"]
        assert [item.data for item in desk.take("kept")] == ["tea"]
        with pytest.raises(PayloadInvalidError, match="amount"):
            await desk.ask("action.refund", {"payment": "p", "amount": 0})
        assert await desk.ask("action.notes_note", {"text": "x"}) == "notes: x"
        assert await desk.ask("action.private_note", {"text": "y"}) == "private: y"
        assert (desk.state.notes.notes, desk.state.private.notes) == (["x"], ["y"])
    names = ["add", "keep", "notes_note", "private_note", "refund"]
    assert provided(Desk) == names
    assert set(handlings(Desk).types()) >= {f"action.{name}" for name in names}


async def test_a_handler_of_the_agents_own_goes_before_an_action() -> None:
    """Of the same type."""

    class Strict(Desk):
        @on("action.add")
        def mine(self, signal: Signal[Any]) -> str:
            return "mine"

    async with AgentHarness(Strict) as strict:
        assert await strict.ask("action.add", {"a": 1}) == "mine"


async def test_a_handler_that_is_tried_again_repeats_no_step_of_its_actions() -> None:
    """The same action twice has steps of its own each time."""
    async with AgentHarness(Desk) as desk:
        Desk.fails[:] = [1, 1]
        assert await desk.send("two", id="s1")
        assert BANK == ["a 1 agent.s1.refund/pay", "b 2 agent.s1.refund#2/pay"]
        assert desk.state.words == ["two"]
        assert len(desk.take("kept")) == 1
        assert desk.steps == []


@pytest.mark.parametrize("point", ["begun", "happened", "done"])
async def test_a_crash_in_a_step_of_an_action_repeats_what_is_in_doubt_alone(point: str) -> None:
    """With the same key."""
    async with AgentHarness(Desk) as desk:
        desk.crash_in_step("refund#2/pay", point)
        assert await desk.send("two", id="s1")
        assert BANK.count("a 1 agent.s1.refund/pay") == 1
        assert BANK.count("b 2 agent.s1.refund#2/pay") == (2 if point == "happened" else 1)


async def test_an_instruction_is_run_after_the_commit_and_its_result_comes_back() -> None:
    """By a directive; as data in a handler; what is unknown is a dead letter that lists what there is."""
    async with AgentHarness(Desk) as desk:
        await desk.ask("later", "add")
        own = desk.take("came.back")
        assert [(item.data, item.to) for item in own] == [(3, "agent:agent")]
        await desk.ask("later", "nothing")
        assert "has no action 'nothing'; it has: refund, add, keep" in str(desk.dead[0].error)
        ctx = desk.agent.ctx
        assert await ctx.run(Instruction(action="add", params={"a": 4})) == 5
        with pytest.raises(ActionNotFoundError):
            await ctx.run(Instruction(action="other"))


async def test_an_action_alone_says_that_it_needs_an_agent() -> None:
    """Where it uses one."""
    with pytest.raises(ConfigError, match="needs an agent"):
        await run_action(keep, {"word": "x"})


async def test_what_an_action_raises_is_what_the_handler_raised() -> None:
    """The asker learns the user's line."""

    class Sad(Agent):
        actions = (action(name="cry")(_cry),)

    async with AgentHarness(Sad) as sad:
        with pytest.raises((ActionError, HandlerError), match="cry failed: ValueError: tears"):
            await sad.ask("action.cry")


async def _cry() -> None:
    raise ValueError("tears")
