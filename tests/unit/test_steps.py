"""Steps that must not repeat: retries, crashes at each point, doubts and a person's word."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from foundation_nats import Agent, Signal, State, on
from foundation_nats.agent.steps import STEPS_MAX, StepLedger
from foundation_nats.errors import (
    AskTimeoutError,
    ConfigError,
    HandlerError,
    StepInDoubtError,
    StepNotDoneError,
)
from foundation_nats.testing import AgentHarness, CrashPoint


class Paid(BaseModel):
    """What the bank says."""

    number: int


class Bank:
    """The world outside, which remembers all that was done to it."""

    done: ClassVar[list[str]] = []
    fail: ClassVar[list[Exception]] = []

    @classmethod
    async def pay(cls, amount: int, idempotency_key: str) -> Paid:
        """Pay, as often as it is called."""
        if cls.fail:
            raise cls.fail.pop(0)
        cls.done.append(idempotency_key)
        return Paid(number=amount)

    @classmethod
    async def look(cls, amount: int, idempotency_key: str) -> Paid:
        """Whether it was paid."""
        if idempotency_key in cls.done:
            return Paid(number=amount)
        raise StepNotDoneError("no such payment")

    @classmethod
    def mail(cls) -> str:
        """A plain function; it may block."""
        cls.done.append("mail")
        return "sent"


@pytest.fixture(autouse=True)
def bank() -> type[Bank]:
    """A new one."""
    Bank.done, Bank.fail = [], []
    return Bank


class Clerk(Agent):
    """Pays, by each of the policies."""

    class State(State):
        """What it has paid."""

        paid: int = 0

    @on("pay")
    async def pay(self, signal: Signal[int]) -> int:
        """Pay, then mail, then fail if told so."""
        paid = await self.ctx.once("pay", Bank.pay, signal.data)
        assert isinstance(paid, Paid)
        await self.ctx.once("mail", Bank.mail)
        if self.config.get("fails", 0) >= signal.attempt:
            raise ValueError("later")
        self.state.paid += paid.number
        return self.state.paid

    @on("pay.verified")
    async def verified(self, signal: Signal[int]) -> None:
        """Ask the bank in doubt."""
        paid = await self.ctx.once(
            "pay", Bank.pay, signal.data, on_doubt="verify", verify=Bank.look
        )
        self.state.paid += paid.number

    @on("pay.careful")
    async def careful(self, signal: Signal[int]) -> None:
        """Leave doubts to people."""
        paid = await self.ctx.once("pay", Bank.pay, signal.data, on_doubt="fail")
        self.state.paid += paid.number

    @on("welcome")
    async def welcome(self, signal: Signal[None]) -> str:
        """Once in its life."""
        return str(await self.ctx.once("welcome", Bank.mail, scope="agent"))

    @on("forget")
    async def forget(self, signal: Signal[None]) -> bool:
        """Make it possible again."""
        return await self.ctx.forget("welcome")

    @on("both")
    async def both(self, signal: Signal[None]) -> list[int]:
        """Side by side."""
        found = await asyncio.gather(
            self.ctx.once("a", Bank.pay, 1), self.ctx.once("b", Bank.pay, 2)
        )
        return [item.number for item in found]


async def test_a_handler_that_is_tried_again_does_not_pay_twice() -> None:
    """The stored results are returned, in the declared type."""
    async with AgentHarness(Clerk, config={"fails": 2}) as clerk:
        assert await clerk.send("pay", 5, id="s1")
        assert clerk.state.paid == 5
        assert Bank.done == ["agent.s1.pay", "mail"]
        assert clerk.steps == []


@pytest.mark.parametrize(
    ("point", "times"), [(CrashPoint.BEGUN, 1), (CrashPoint.HAPPENED, 2), (CrashPoint.DONE, 1)]
)
async def test_a_crash_repeats_only_what_is_in_doubt_and_under_the_same_key(
    point: CrashPoint, times: int
) -> None:
    """Between the effect and its record nobody can know; the key is for the other side."""
    async with AgentHarness(Clerk) as clerk:
        clerk.crash_in_step("pay", point)
        assert await clerk.send("pay", 5, id="s1")
        assert Bank.done == ["agent.s1.pay"] * times + ["mail"]
        assert clerk.state.paid == 5


@pytest.mark.parametrize("point", [CrashPoint.BEGUN, CrashPoint.HAPPENED])
async def test_verify_finds_out_whether_it_was_done(point: CrashPoint) -> None:
    """It is called only in doubt, and then nothing is paid twice."""
    async with AgentHarness(Clerk) as clerk:
        clerk.crash_in_step("pay", point)
        assert await clerk.send("pay.verified", 5, id="s1")
        assert Bank.done == ["agent.s1.pay"]
        assert clerk.state.paid == 5


async def test_a_person_decides_and_the_replayed_signal_goes_on() -> None:
    """In doubt it is a dead letter at once; with the person's word it isn't paid again."""
    async with AgentHarness(Clerk) as clerk:
        clerk.crash_in_step("pay", CrashPoint.HAPPENED)
        assert not await clerk.send("pay.careful", 5, id="s1")
        (dead,) = clerk.dead
        assert isinstance(dead.error, StepInDoubtError)
        assert dead.attempts == 1
        assert [(step.key, step.status) for step in clerk.steps] == [("pay", "pending")]
        verdict = {"key": "pay", "signal": "s1", "done": True, "result": {"number": 5}}
        assert await clerk.send("foundation.step.resolve", verdict)
        assert await clerk.send("pay.careful", 5, id="s1.replay1")
        assert Bank.done == ["agent.s1.pay"]
        assert clerk.state.paid == 5
        assert clerk.steps == []


async def test_who_is_sure_that_nothing_happened_is_called_again() -> None:
    """`StepNotDoneError` leaves no doubt behind, whatever the policy."""
    Bank.fail = [StepNotDoneError("connection refused")]
    async with AgentHarness(Clerk) as clerk:
        assert await clerk.send("pay.careful", 5)
        assert len(Bank.done) == 1


async def test_what_a_step_raised_is_told_to_the_person_who_decides() -> None:
    """An error is no proof that nothing happened."""
    Bank.fail = [ConnectionError("the line is dead")]
    async with AgentHarness(Clerk) as clerk:
        assert not await clerk.send("pay.careful", 5, id="s1")
        assert "raised ConnectionError: the line is dead" in str(clerk.dead[0].error)
        (step,) = clerk.steps
        assert step.note == "ConnectionError: the line is dead"


async def test_a_step_of_the_agent_is_done_once_in_its_life() -> None:
    """Until it is forgotten."""
    async with AgentHarness(Clerk) as clerk:
        assert await clerk.ask("welcome") == "sent"
        await clerk.crash()
        assert await clerk.ask("welcome") == "sent"
        assert Bank.done == ["mail"]
        assert await clerk.ask("forget") is True
        await clerk.ask("welcome")
        assert Bank.done == ["mail", "mail"]


async def test_steps_run_side_by_side() -> None:
    """Each has its own entry."""
    async with AgentHarness(Clerk) as clerk:
        assert await clerk.ask("both") == [1, 2]


async def test_a_question_is_not_asked_again() -> None:
    """It is at most once; its steps are forgotten with it."""
    async with AgentHarness(Clerk) as clerk:
        clerk.crash_in_step("pay", CrashPoint.DONE)
        with pytest.raises(AskTimeoutError):
            await clerk.ask("pay", 5)
        assert clerk.state.paid == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"on_doubt": "maybe"}, "use one of rerun"),
        ({"on_doubt": "verify"}, "needs `verify`"),
        ({"verify": Bank.look}, "needs `verify`"),
        ({"scope": "world"}, "use 'signal'"),
        ({"key": ""}, "1 to 200"),
    ],
)
async def test_bad_arguments_are_named(arguments: dict[str, Any], match: str) -> None:
    """Before anything is done."""

    class Odd(Agent):
        @on("go")
        async def go(self, signal: Signal[None]) -> None:
            await self.ctx.once(arguments.pop("key", "k"), Bank.mail, **arguments)

    async with AgentHarness(Odd) as odd:
        with pytest.raises((ConfigError, HandlerError), match=match):
            await odd.ask("go")
    assert Bank.done == []


def test_the_ledger_makes_room_and_keeps_what_is_in_hand() -> None:
    """Steps of signals that were given up go first; those of the agent stay."""
    ledger = StepLedger()
    ledger.begin("", "life", "t")
    for number in range(STEPS_MAX + 5):
        ledger.begin(f"c s{number}", "k", "t")
    assert len(ledger) == STEPS_MAX
    assert ledger.get("", "life") is not None
    assert ledger.get("c s0", "k") is None
    assert ledger.get(f"c s{STEPS_MAX + 4}", "k") is not None


def test_a_result_that_is_too_large_is_not_kept_but_known() -> None:
    """It is done: nobody does it again."""
    ledger = StepLedger(bytes_max=10)
    ledger.begin("c s", "k", "t")
    assert not ledger.finish("c s", "k", "t", b'"12345678901"')
    step = ledger.get("c s", "k")
    assert step is not None
    assert (step.status, step.result) == ("done", None)
    assert ledger.encoded()[0]["lost"] is True
