"""State machines: the table decides, what it refuses changes nothing, its picture is the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from pydantic import Field

from foundation_nats import Agent, Payload, Signal, on
from foundation_nats.agent.strategies import Go, StateMachine, entering, fsm_mermaid, leaving
from foundation_nats.errors import ConfigError, HandlerError, StateInvalidError, TransitionError
from foundation_nats.testing import AgentHarness


class Ship(Payload, type="ship"):
    """By whom."""

    carrier: str


class Order(StateMachine):
    """From new to shipped, or cancelled."""

    initial = "new"
    transitions = (
        Go("pay", "new", "paid", when="is_enough"),
        Go("pay", "new", "partly", when=lambda agent, signal: signal.data > 0),
        Go("pay", "partly", "paid"),
        Go(Ship, "paid", "shipped"),
        Go("cancel", ("new", "partly", "paid"), "cancelled"),
        Go("expire", ("new", "partly"), "cancelled", after=60),
        Go("note", "*", None),
    )
    breaks: ClassVar[set[str]] = set()

    class State(StateMachine.State):
        """What else it knows."""

        amount: int = 0
        seen: list[str] = Field(default_factory=list)

    def is_enough(self, signal: Signal[Any]) -> bool:
        """A guard."""
        return bool(signal.data >= 10)

    def _see(self, what: str) -> None:
        if what in self.breaks:
            raise RuntimeError(what)
        self.state.seen.append(what)

    @on("pay")
    def pay(self, signal: Signal[int]) -> int:
        """Between leaving and entering."""
        self._see(f"pay in {self.phase}")
        self.state.amount += signal.data
        return self.state.amount

    @leaving("new", "partly")
    def left(self, signal: Signal[Any]) -> None:
        """Plain."""
        self._see(f"leaving {self.phase}")

    @entering("paid", "cancelled")
    async def entered(self, signal: Signal[Any]) -> None:
        """Async."""
        self._see(f"entering {self.phase}")
        self.emit("became", self.phase, to="agent:log")

    @on("ask")
    def ask(self, signal: Signal[Any]) -> list[str]:
        """No event: always allowed."""
        return self.possible()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Order.breaks.clear()


async def test_signals_lead_through_the_table() -> None:
    """Guards choose; hooks and handler stand around the change; it survives a crash."""
    async with AgentHarness(Order) as order:
        assert order.state.phase == "new"
        assert await order.ask("ask") == ["pay", "cancel", "expire", "note"]
        assert await order.ask("pay", 3) == 3
        assert order.state.phase == "partly"
        await order.crash()
        assert await order.ask("pay", 4) == 7
        assert order.state.phase == "paid"
        assert order.state.seen == [
            "leaving new",
            "pay in new",
            "leaving partly",
            "pay in partly",
            "entering paid",
        ]
        assert [item.data for item in order.take("became")] == ["paid"]
        assert await order.ask(Ship(carrier="x")) == "shipped"
        assert await order.ask("ask") == ["note"]
        assert await order.ask("note") == "shipped"


async def test_what_the_table_does_not_allow_changes_nothing() -> None:
    """And is not tried again."""
    async with AgentHarness(Order) as order:
        with pytest.raises(
            TransitionError, match=r"Order \(agent\) is new: no 'ship' now; possible"
        ):
            await order.ask(Ship(carrier="x"))
        with pytest.raises(TransitionError, match="its guard refuses it"):
            await order.ask("pay", 0)
        assert not await order.send("ship", {"carrier": "x"})
        assert order.dead[0].attempts == 1
        assert order.dead[0].error.details == {"phase": "new", "event": "ship"}
        assert order.state.seen == []
        assert order.take("became") == []


@pytest.mark.parametrize("where", ["leaving new", "pay in new", "entering paid"])
async def test_a_transition_that_raises_anywhere_did_not_happen(where: str) -> None:
    """The phase is what it was, and it may be tried again."""
    async with AgentHarness(Order) as order:
        Order.breaks.add(where)
        with pytest.raises(HandlerError, match=where):
            await order.ask("pay", 10)
        assert (order.state.phase, order.state.seen, order.state.amount) == ("new", [], 0)
        assert order.take("became") == []
        Order.breaks.clear()
        await order.ask("pay", 10)
        assert order.state.phase == "paid"


async def test_a_phase_may_be_bounded_in_time() -> None:
    """The event comes by itself, and not after the phase is over."""
    async with AgentHarness(Order) as order:
        await order.advance(59)
        await order.ask("pay", 1)
        await order.advance(59)
        assert order.state.phase == "partly"
        await order.advance(1)
        assert order.state.phase == "cancelled"
    async with AgentHarness(Order) as order:
        await order.ask("pay", 10)
        await order.advance(1000)
        assert order.state.phase == "paid"
        # One that was on its way when the phase changed.
        assert await order.send("expire", source="agent:agent")
        assert order.dead == []


async def test_a_phase_that_the_class_does_not_know_is_an_error() -> None:
    """Stored or set."""
    with pytest.raises(StateInvalidError, match="phase"):
        AgentHarness(Order, state={"phase": "lost"})

    class Wild(Order):
        @on("wild")
        def wild(self, signal: Signal[Any]) -> None:
            self.state.phase = "nowhere"

    async with AgentHarness(Wild) as wild:
        with pytest.raises(StateInvalidError, match="phase"):
            await wild.ask("wild")


def _machine(*transitions: Any, **members: Any) -> Callable[[], Any]:
    members = {"initial": "a", "transitions": transitions, **members}
    return lambda: type("M", (StateMachine,), members)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_machine(Go("x", "a", "b"), initial=""), "in which phase it begins"),
        (_machine(("x", "a", "b")), "use Go"),
        (_machine(Go("x.*", "a", "b")), "without wildcards"),
        (_machine(Go("x", "a", "b"), Go("y", "c", "a")), "nothing leads to c"),
        (_machine(Go("x", "a", "b", when="missing")), "no method 'missing'"),
        (_machine(Go("x", "*", "b", after=1)), "of phases by name"),
        (_machine(Go("x", "a", "b", after=0)), "is positive"),
        (_machine(Go("x", "a", "b"), hook=entering("z")(lambda s, x: None)), "no phase z"),
        (_machine(Go("x", "a", "b"), State=Agent.State), "StateMachine.State"),
        (lambda: entering(), "name the phases"),
        (lambda: fsm_mermaid(Agent), "no state machine"),  # type: ignore[arg-type]
    ],
)
def test_a_table_that_is_wrong_is_refused(make: Callable[[], Any], match: str) -> None:
    """When the class is made."""
    with pytest.raises(ConfigError, match=match):
        make()


def test_the_picture_is_the_table() -> None:
    """In Mermaid."""
    picture = fsm_mermaid(Order).splitlines()
    assert picture[0] == "stateDiagram-v2"
    assert '    state "new" as s0' in picture
    assert "    [*] --> s0" in picture
    assert "    s0 --> s1: pay [is_enough]" in picture
    assert "    s0 --> s2: pay [guard]" in picture
    assert "    s2 --> s4: expire after 60 s" in picture
    assert sum(": note" in line for line in picture) == 5
