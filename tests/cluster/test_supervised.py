"""Supervised signals: their senders are told what became of them, through crashes too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from foundation_nats.api.supervised import Outcome, OutcomeState
from foundation_nats.bus.streams import StreamReader
from foundation_nats.errors import AskTimeoutError, ConfigError, ExpiredError, HandlerError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """One node with a worker and a boss; retries come soon."""
    settings = {"mailbox": {"retry_first_s": 0.01}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as cluster:
        await cluster.client.agents.start("supervised:Worker", id="w")
        await cluster.client.agents.start("supervised:Boss", id="boss")
        yield cluster


async def _state(cluster: TestCluster, agent: str) -> dict[str, Any]:
    stored = await cluster.client.agents.state(agent)
    return {} if stored is None else stored["state"] or {}


async def test_the_sender_is_told_what_became_of_it(nodes: TestCluster) -> None:
    """Handled after so many tries, given up after so many, refused, too late, not known."""
    cluster = nodes.client
    send = cluster.signals.send_supervised
    done = await send("w", "job", {"key": "a", "failures": 5}, retries=5)
    assert (done.state, done.result, done.error) == (OutcomeState.HANDLED, 6, None)
    given_up = await send("any:labouring", "job", {"key": "b", "failures": 2}, retries=1)
    assert given_up.state is OutcomeState.GIVEN_UP
    assert isinstance(given_up.error, HandlerError)
    assert "try 2 of b" in str(given_up.error)
    (letter,) = await cluster.dead.list()
    assert (letter.letter.attempts, letter.letter.code) == (2, "agent.handler")
    with pytest.raises(HandlerError, match="try 1 of c"):
        await send("w", "job", {"key": "c", "failures": 1}, retries=0, on_error="raise")
    heard: list[Outcome] = []
    nobody = await send("any:nobody", "job", {"key": "d"}, on_error=heard.append)
    assert heard == [nobody]
    assert nobody.error is not None
    assert nobody.error.details["code"] == "no_recipient"
    # In hand until after the other's deadline.
    await cluster.send("w", "job", {"key": "slow", "sleep": 0.8})
    late = await send("w", "job", {"key": "late"}, timeout=0.4, on_error="ignore")
    assert late.state is OutcomeState.TOO_LATE
    assert isinstance(late.error, ExpiredError)
    unknown = await send("yet-to-come", "job", {"key": "e"}, timeout=0.1)
    assert unknown.state is OutcomeState.UNKNOWN
    assert isinstance(unknown.error, AskTimeoutError)
    assert (await _state(nodes, "w"))["done"] == ["a", "slow"]
    for wrong in ({"retries": -1}, {"timeout": 0}, {"on_error": "shout"}):
        with pytest.raises(ConfigError):
            await send("w", "job", {"key": "x"}, **wrong)
    with pytest.raises(ConfigError, match="One receiver"):
        await send("everyone", "job")
    signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)

    async def boxes_are_empty() -> bool:
        found = await signals.subjects(cluster.subjects.mailboxes())
        return not [name for name in found if ".~sent-" in name]

    await eventually(boxes_are_empty, timeout=5, message="what was read is removed")


async def test_an_agent_is_told_what_was_given_up(nodes: TestCluster) -> None:
    """Its handler fails, nobody is there, it is too late: each comes back once, with the data."""
    cluster = nodes.client

    async def give(key: str, to: str, **more: Any) -> None:
        await cluster.send("boss", "give", {"key": key, "to": to, **more})

    await give("bad", "w", attempts=2)
    await give("nobody", "any:nobody")
    await give("good", "w", failures=0)
    await cluster.send("w", "job", {"key": "slow", "sleep": 0.3})
    await give("late", "w", ttl=0.1, failures=0)

    async def told() -> bool:
        failed = {item["data"]["key"]: item for item in (await _state(nodes, "boss"))["failed"]}
        return set(failed) == {"bad", "nobody", "late"}

    await eventually(told, timeout=10)
    failed = {item["data"]["key"]: item for item in (await _state(nodes, "boss"))["failed"]}
    assert (failed["bad"]["code"], failed["bad"]["attempts"]) == ("agent.handler", 2)
    assert (failed["bad"]["agent"], failed["bad"]["target"]) == ("w", "agent:w")
    assert (failed["nobody"]["code"], failed["nobody"]["agent"]) == ("no_recipient", "route")
    assert failed["late"]["code"] == "expired"
    assert len((await _state(nodes, "boss"))["failed"]) == 3


async def _crash(point: str, passes: int, *, in_turn: bool) -> None:
    environment = {"FOUNDATION_FAILPOINTS": f"{point}=after({passes},kill)"}
    settings = {"mailbox": {"retry_first_s": 0.01}}
    async with TestCluster(nodes=0, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        nodes.start_node("n1", environment=environment)
        await nodes.wait_up(["n1"])
        for name, run in (("w", "Worker"), ("boss", "Boss")):
            await cluster.agents.start(f"supervised:{run}", id=name)
        await cluster.send("boss", "give", {"key": "bad", "to": "w", "attempts": 1})

        async def told() -> bool:
            return len((await _state(nodes, "boss"))["failed"]) == 1

        if in_turn:
            await eventually(told, timeout=10)
        outcomes = await asyncio.gather(
            *(
                cluster.signals.send_supervised(
                    "w", "job", {"key": f"k{n}", "failures": n % 2 * 9}, retries=0, timeout=30
                )
                for n in range(3)
            )
        )
        assert [item.state for item in outcomes] == ["handled", "given_up", "handled"]
        await eventually(told, timeout=10)
        assert sorted((await _state(nodes, "w"))["done"]) == ["k0", "k2"]
        assert len(await cluster.dead.list()) == 2
        events = [(event.topic, event.what) for event in await cluster.events.list(limit=1000)]
        assert ("worker", "died") in events, "or nothing was tested"


async def test_a_crash_delays_the_word_and_loses_none() -> None:
    """The worker ends as it gives up: both senders are told once."""
    await _crash("deadletter.before_ack", 2, in_turn=True)


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("passes", [3, 4])
async def test_a_crash_between_commit_and_word(passes: int) -> None:
    """What is committed and has not left is told by the next activation."""
    await _crash("commit.after_cas_before_outbox", passes, in_turn=False)
