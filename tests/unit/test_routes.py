"""Which handler handles which signal: wildcards, priorities, predicates, typed payloads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats import Agent, Payload, Signal, State, on
from foundation_nats.agent.handling import handlings
from foundation_nats.errors import ConfigError
from foundation_nats.testing import AgentHarness


class Placed(Payload, type="order.placed"):
    """An order came."""

    order: str
    amount: int = 1


class Desk(Agent):
    """Says which of its methods was asked."""

    class State(State):
        """What it was told last."""

        last: str = ""

    @on(Placed)
    def placed(self, signal: Signal[Placed]) -> str:
        """Typed."""
        self.emit(Placed(order=signal.data.order, amount=signal.data.amount + 1), to="agent:next")
        return f"placed {signal.data.order}"

    @on("order.*")
    def one_word(self, signal: Signal[Any]) -> str:
        """Any one word."""
        return "one word"

    @on("order.**")
    def many_words(self, signal: Signal[Any]) -> str:
        """Any number of words."""
        return "many words"

    @on("**.urgent", priority=10)
    def urgent(self, signal: Signal[Any]) -> str:
        """Before all others."""
        return "urgent"

    @on("bid", when=lambda signal: signal.data["amount"] > 100)
    def high(self, signal: Signal[dict[str, int]]) -> str:
        """Large ones."""
        return "high"

    @on("bid")
    def low(self, signal: Signal[dict[str, int]]) -> str:
        """The rest."""
        return "low"


@pytest.mark.parametrize(
    ("type", "data", "answer"),
    [
        ("order.placed", {"order": "7"}, "placed 7"),
        ("order.paid", None, "one word"),
        ("order.paid.late", None, "many words"),
        ("order", None, "many words"),
        ("order.urgent", None, "urgent"),
        ("order.paid.urgent", None, "urgent"),
        ("urgent", None, "urgent"),
        ("bid", {"amount": 200}, "high"),
        ("bid", {"amount": 2}, "low"),
    ],
)
async def test_the_most_exact_handler_of_the_highest_priority_is_asked(
    type: str, data: Any, answer: str
) -> None:
    """Exact before one word before many words; a predicate decides per signal."""
    async with AgentHarness(Desk) as desk:
        assert await desk.ask(type, data) == answer


async def test_a_payload_is_type_and_data_in_one() -> None:
    """For sending, asking and emitting."""
    async with AgentHarness(Desk) as desk:
        assert await desk.ask(Placed(order="8", amount=4)) == "placed 8"
        (sent,) = desk.take()
        assert (sent.type, sent.data) == ("order.placed", {"order": "8", "amount": 5})


def test_a_subclass_is_asked_before_its_base() -> None:
    """A predicate of the subclass leaves the rest to the base."""

    class Special(Desk):
        @on("bid", when=lambda signal: signal.data["amount"] == 1)
        def single(self, signal: Signal[Any]) -> str:
            return "single"

    routes = handlings(Special)
    envelope = {"id": "1", "source": "client:test"}
    one = routes.find("bid", {**envelope, "data": {"amount": 1}})
    two = routes.find("bid", {**envelope, "data": {"amount": 2}})
    assert one is not None
    assert two is not None
    assert (one.name, two.name) == ("single", "low")


def test_two_handlers_of_one_type_in_a_class_are_an_error() -> None:
    """Unless a predicate or a priority tells them apart."""
    with pytest.raises(ConfigError, match="both a and b handle 'x'"):

        class Twice(Agent):
            @on("x")
            def a(self, signal: Signal[Any]) -> None: ...

            @on("x")
            def b(self, signal: Signal[Any]) -> None: ...


def _slow_match(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "**":
        return any(_slow_match(pattern[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _slow_match(pattern[1:], words[1:])


@given(
    st.lists(st.sampled_from(["a", "b", "*", "**"]), min_size=1, max_size=4).filter(
        lambda words: not any(x == y == "**" for x, y in itertools.pairwise(words))
    ),
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=5),
)
def test_wildcards_match_as_a_plain_search_does(pattern: list[str], words: list[str]) -> None:
    """``*`` is one word, ``**`` any number, whatever stands around them."""

    class Probe(Agent):
        @on(".".join(pattern))
        def hit(self, signal: Signal[Any]) -> None: ...

    found = handlings(Probe).find(".".join(words), {})
    assert (found is not None) == _slow_match(pattern, words)
