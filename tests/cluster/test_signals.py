"""Deadlines, what became of a signal, many at once, and the answers of many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest

from foundation_nats import Cluster, Receipt
from foundation_nats.api.signals import Outgoing
from foundation_nats.errors import (
    AskTimeoutError,
    ConfigError,
    ExpiredError,
    QuorumError,
    SignalNotFoundError,
)
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]


async def applied(cluster: Cluster, agent: str) -> list[str]:
    """What an agent has stored."""
    stored = await cluster.agents.state(agent)
    return [] if stored is None or stored["state"] is None else stored["state"]["applied"]


async def test_what_is_past_its_deadline_is_not_handled() -> None:
    """It is a dead letter with the code `expired`, also where the deadline was handed on."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Recorder", id="b")
        await cluster.agents.start("fleet:Recorder", id="a", config={"to": "b"})
        await cluster.send("a", "sleep", 0.6)
        await cluster.send("a", "record", id="late", ttl=0.3)
        await cluster.send("a", "record", id="in time", ttl=30)
        # Begun in time; what it emits 0.3 s later is not.
        soon = datetime.now(UTC) + timedelta(seconds=0.8)
        await cluster.send("a", "hand_on", {"key": "too late"}, deadline=soon, id="hand-on")
        await cluster.send("a", "hand_on", {"key": "well"}, ttl=30)

        async def done() -> bool:
            return await applied(cluster, "b") == ["well"]

        await eventually(done, timeout=10)
        assert await applied(cluster, "a") == ["in time"]
        letters = {item.letter.agent: item.letter for item in await cluster.dead.list()}
        assert {letter.code for letter in letters.values()} == {"expired"}
        assert set(letters) == {"a", "b"}
        status = await cluster.signals.get("late")
        assert (status.state, status.deliveries[0].code) == ("dead", "expired")
        with pytest.raises(ExpiredError):
            await cluster.ask("a", "record", deadline=datetime.now(UTC) - timedelta(seconds=1))
        with pytest.raises(ConfigError, match="positive"):
            await cluster.send("a", "record", ttl=-1)


async def test_a_signal_tells_what_became_of_it() -> None:
    """Accepted, waiting, handled where and how long, with what effects; for many per receiver."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        get = cluster.signals.get
        await cluster.agents.start("fleet:Mirror", id="mirror")
        await cluster.agents.start(
            "fleet:Ledger", id="ledger", config={"mirror": "mirror"}, capabilities=["c"]
        )
        await cluster.agents.start("fleet:Difficult", id="bad", capabilities=["c"])
        await cluster.send("ledger", "ledger.append", {"key": "k"}, id="one")

        async def handled() -> bool:
            return (await get("one")).state == "handled"

        await eventually(handled, timeout=10)
        status = await get("one", agent="ledger")
        (copy,) = status.deliveries
        epoch = (await cluster.agents.get("ledger")).epoch
        assert (copy.agent, copy.handled_by, copy.epoch) == ("ledger", "n1", epoch)
        assert copy.took_ms is not None
        assert (copy.attempts, copy.emitted) == (1, 1)
        assert copy.accepted_at
        assert copy.sequence
        (effect,) = (await get("one")).effects
        assert (effect.type, effect.target) == ("ledger.append", "agent:mirror")
        # Of many, each by itself: one can't handle it.
        await cluster.send("capability:c", "ledger.append", {"key": "m"}, id="many")

        async def settled() -> bool:
            return (await get("many")).counts == {"handled": 1, "dead": 1}

        await eventually(settled, timeout=10)
        by_agent = {copy.agent: copy for copy in (await get("many")).deliveries}
        assert by_agent["bad"].code == "agent.unhandled_signal"
        assert by_agent["bad"].dead_number
        # One that waits for an agent that is yet to come, and one for later.
        await cluster.send("nobody", "ledger.append", {"key": "x"}, id="waits")
        assert (await get("waits")).state == "waiting"
        await cluster.signals.schedule(
            "ledger", "ledger.append", {"key": "y"}, after=60, id="later"
        )
        assert (await get("later")).state == "scheduled"
        with pytest.raises(SignalNotFoundError):
            await get("unheard of")
        # What a worker remembers ends with it; the rest stays known.
        for worker in nodes.nodes["n1"].workers():
            worker.kill()

        async def back() -> bool:
            info = await cluster.agents.get("ledger")
            return info.status == "running" and info.epoch > epoch

        await eventually(back, timeout=15)
        (copy,) = (await get("one")).deliveries
        assert (copy.state, copy.took_ms) == ("handled", None)


async def test_many_are_sent_in_a_pipeline_in_order() -> None:
    """Each has its receipt or its error, in the order given; the order is kept."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Mirror", id="m")
        keys = [str(number) for number in range(2000)]
        signals = [("m", "ledger.append", {"key": key}) for key in keys]
        results = await cluster.signals.send_many(
            [*signals, Outgoing("no:target", "x"), Outgoing("m", "ledger.append", {"key": "z"})]
        )
        assert [isinstance(item, Receipt) for item in results] == [True] * 2000 + [False, True]
        assert isinstance(results[2000], ConfigError)

        async def all_there() -> bool:
            return await applied(cluster, "m") == [*keys, "z"]

        await eventually(all_there, timeout=20)
        assert await cluster.signals.send_many([]) == []


async def test_input_without_end_is_sent_in_bounded_memory() -> None:
    """No more is taken than may be in flight; leaving early ends it; what the input raises is raised."""
    async with TestCluster(nodes=0) as nodes:
        signals = nodes.client.signals
        taken = 0

        async def endless() -> AsyncIterator[tuple[str, str, dict[str, str]]]:
            nonlocal taken
            while True:
                taken += 1
                yield "m", "ledger.append", {"key": str(taken)}

        sequences = []
        async with aclosing(signals.send_each(endless(), in_flight=16)) as results:
            async for result in results:
                assert isinstance(result, Receipt)
                sequences.append(result.sequence)
                assert taken <= len(sequences) + 17
                if len(sequences) == 200:
                    break
        assert sequences == list(range(1, 201))

        def broken() -> Iterator[tuple[str, str]]:
            yield "m", "x"
            raise ValueError("no more")

        seen = []
        with pytest.raises(ValueError, match="no more"):
            async for result in signals.send_each(broken()):
                seen.append(result)
        assert len(seen) == 1


async def test_everybody_is_asked_and_a_quorum_is_enough() -> None:
    """Results and errors by agent; a slow one is not waited for once there are enough."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        ask_all = cluster.signals.ask_all
        for name in ("a", "b", "slow"):
            await cluster.agents.start(
                "fleet:Recorder", id=name, capabilities=["r"], labels={"group": "q"}
            )
        await cluster.agents.start("fleet:Counter", id="other", capabilities=["r"])
        answers = await ask_all("capability:r", "sleep", 0.0, timeout=5)
        assert answers.results == {"a": 0.0, "b": 0.0, "slow": 0.0}
        assert answers.errors["other"].code == "agent.unhandled_signal"
        assert answers.missing == ["other"]
        await cluster.send("slow", "sleep", 6.0)
        loop = asyncio.get_running_loop()
        began = loop.time()
        answers = await ask_all("capability:r", "sleep", 0.0, quorum=2, timeout=5)
        assert loop.time() - began < 2
        assert set(answers.results) == {"a", "b"}
        answers = await ask_all("capability:r", "sleep", 0.0, timeout=0.3)
        assert isinstance(answers.errors["slow"], AskTimeoutError)
        # Out of reach when the time is up: whoever could answer has, the other one is told to be late.
        with pytest.raises(
            QuorumError, match=r"2 of 3 behind .* within 1 s; 3 are needed"
        ) as caught:
            await ask_all("label:group=q", "sleep", 0.0, quorum=0.9, timeout=1.0)
        assert caught.value.details["results"] == {"a": 0.0, "b": 0.0}
        assert list(caught.value.details["errors"]) == ["slow"]
        # Out of reach as soon as the one that can't answer has said so. Who has answered by then is
        # nobody's promise, but that everyone is told of, and nobody is waited for.
        with pytest.raises(QuorumError, match=r"of 4 behind [^ ]+ have answered; 4 are") as caught:
            await ask_all("capability:r", "sleep", 0.0, quorum=0.9, timeout=20)
        told = caught.value.details
        assert sorted([*told["results"], *told["errors"]]) == ["a", "b", "other", "slow"]
        assert "no handler" in told["errors"]["other"]
        assert "when that was decided" in told["errors"]["slow"]
        began = loop.time()
        with pytest.raises(QuorumError, match=r"3 are needed") as caught:
            await ask_all("agent:a", "sleep", 5.0, quorum=3, timeout=20)
        with pytest.raises(QuorumError, match=r"of 4 behind"):
            await ask_all("capability:r", "counter.get", quorum=3, timeout=20)
        assert loop.time() - began < 5, "what can't be reached is not waited for"
        soon = datetime.now(UTC) + timedelta(seconds=0.3)
        await ask_all("agent:a", "sleep", 0.6, deadline=soon)
        await cluster.send("a", "sleep", 0.0)
        answers = await ask_all("agent:a", "note", {"key": "late"}, deadline=soon, timeout=20)
        assert answers.missing == ["a"]
        await cluster.ask("a", "note", {"key": "in time"})
        stored = await cluster.agents.state("a")
        assert stored is not None
        assert stored["state"]["applied"] == ["in time"], "no receiver begins after the deadline"
        assert (await ask_all("capability:nobody", "sleep", 0.0)).asked == []
        with pytest.raises(ConfigError):
            await ask_all("topic:x", "sleep")
        with pytest.raises(ConfigError):
            await ask_all("everyone", "sleep", quorum=1.5)
