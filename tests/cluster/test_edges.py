"""Bad input and full mailboxes: a clear error, and nothing lost or half-done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AlreadyExistsError,
    AskTimeoutError,
    ConfigError,
    HandlerError,
    MailboxFullError,
    NotSettledError,
    PayloadInvalidError,
    PayloadTooLargeError,
    StateTooLargeError,
    UnhandledSignalError,
)
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

SETTINGS = {
    "mailbox": {
        "mailbox_max": 50,
        "retry_first_s": 0.02,
        "state_max_bytes": 64 * 1024,
        "trim_every_s": 0.2,
    },
    "control": {"failed_backoff_s": 0.2},
}


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """One node, small limits."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], settings=SETTINGS) as running:
        yield running


async def test_a_full_mailbox_is_an_error_at_the_sender_and_loses_nothing(
    nodes: TestCluster,
) -> None:
    """Signals for an agent that is not there yet wait, up to the limit; then it handles them all."""
    cluster = nodes.client
    receipts = 0
    with pytest.raises(MailboxFullError, match="full"):
        for number in range(60):
            await cluster.send("late", "counter.add", {"amount": 1}, id=f"s{number}")
            receipts += 1
    assert receipts == 50
    await cluster.agents.start("fleet:Counter", id="late")
    await eventually(
        lambda: _is(cluster.ask("late", "counter.get"), receipts), message="all are applied"
    )
    # What was consumed is trimmed, so that there is room again.
    await eventually(lambda: cluster.send("late", "counter.add", {"amount": 1}, id="more"))
    await eventually(lambda: _is(cluster.ask("late", "counter.get"), receipts + 1))


async def _is(answer, expected) -> bool:
    return await answer == expected


async def test_a_poison_signal_is_dead_lettered_and_the_next_proceed(nodes: TestCluster) -> None:
    """A handler that always raises: tried, given up with its error; its effects are undone."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Difficult", id="d")
    await cluster.send("d", "good")
    await cluster.send("d", "poison", id="bad")
    await cluster.send("d", "good")
    await eventually(lambda: _is_state(cluster, "d", good=2), message="the next is handled")
    (dead,) = await eventually(cluster.dead.list, message="the dead letter")
    assert dead.letter.code == "agent.handler"
    assert "poisoned" in dead.letter.reason
    assert dead.letter.attempts == 4
    assert dead.letter.signal is not None
    assert dead.letter.signal["id"] == "bad"
    assert "fleet.py" in (dead.letter.traceback or "")
    receipt = await cluster.dead.replay(dead.number)
    assert receipt.target == "agent:d"

    async def again() -> bool:
        letters = await cluster.dead.list()
        return len(letters) == 1 and letters[0].number != dead.number

    await eventually(again, message="it is given up again, under a new number")
    (second,) = await cluster.dead.list()
    await cluster.dead.discard(second.number)
    assert await cluster.dead.list() == []


async def _is_state(cluster, agent: str, **expected) -> bool:
    stored = await cluster.agents.state(agent)
    return stored is not None and all(stored["state"][k] == v for k, v in expected.items())


async def test_bad_payloads_and_unknown_types_are_told_to_both_sides(nodes: TestCluster) -> None:
    """An ask gets the typed error; a signal becomes a dead letter with the same code."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    with pytest.raises(PayloadInvalidError, match="amount"):
        await cluster.ask("c", "counter.add", {"amount": "many"})
    with pytest.raises(UnhandledSignalError, match=r"counter\.add"):
        await cluster.ask("c", "counter.subtract", {"amount": 1})
    await cluster.send("c", "counter.add", {"amount": "many"})
    await cluster.send("c", "counter.subtract", {"amount": 1})
    cluster.bus.publish(cluster.subjects.mailbox("c"), b"not json")
    await cluster.send("c", "counter.add", {"amount": 1})
    await eventually(lambda: _is(cluster.ask("c", "counter.get"), 1))

    async def three() -> bool:
        return len(await cluster.dead.list("c")) == 3

    await eventually(three, message="three dead letters")
    codes = [entry.letter.code for entry in await cluster.dead.list("c")]
    assert codes == ["agent.payload_invalid", "agent.unhandled_signal", "agent.payload_invalid"]


async def test_unknown_and_stopped_agents_are_told_apart(nodes: TestCluster) -> None:
    """No such agent, and an agent that is not running: two immediate, clear errors."""
    cluster = nodes.client
    with pytest.raises(AgentNotFoundError, match="nobody"):
        await cluster.ask("nobody", "hello")
    with pytest.raises(AgentNotFoundError):
        await cluster.agents.get("nobody")
    with pytest.raises(AgentNotFoundError):
        await cluster.agents.stop("nobody")
    await cluster.agents.start("fleet:Counter", id="needy", resources={"gpu": 1}, wait=False)

    async def pending() -> bool:
        return (await cluster.agents.get("needy")).status == "pending"

    await eventually(pending)
    with pytest.raises(AgentUnavailableError, match="pending"):
        await cluster.ask("needy", "counter.get")


async def test_a_handler_that_raises_in_an_ask_changes_nothing(nodes: TestCluster) -> None:
    """The asker gets the error; state and emitted signals are as if it had not been asked."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Difficult", id="d")
    with pytest.raises(HandlerError, match="poisoned"):
        await cluster.ask("d", "poison")
    with pytest.raises(HandlerError, match="not JSON"):
        await cluster.ask("d", "not_json")
    assert await cluster.ask("d", "good") == 1
    assert await cluster.dead.list() == []
    with pytest.raises(AskTimeoutError):
        await cluster.ask("d", "wait", 0.6, timeout=0.2)
    assert await cluster.ask("d", "good") == 2


async def test_what_is_too_large_is_refused_before_the_wire(nodes: TestCluster) -> None:
    """A payload of 2 MB: an explicit error, and the connection survives."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    with pytest.raises(PayloadTooLargeError, match="limit"):
        await cluster.send("c", "counter.add", {"amount": 1, "note": "x" * 2_000_000})
    with pytest.raises(PayloadTooLargeError):
        await cluster.ask("c", "counter.add", {"amount": 1, "note": "x" * 2_000_000})
    for size in range(1_047_000, 1_049_000, 97):  # around max_payload, headers included
        try:
            await cluster.send("c", "counter.add", {"amount": 0, "note": "x" * size}, timeout=3)
        except (PayloadTooLargeError, MailboxFullError):
            continue
    assert cluster.bus.is_connected
    assert cluster.bus.statistics().rebuilds == 0
    assert await cluster.ask("c", "counter.add", {"amount": 1}) == 1


async def test_state_over_the_limit_fails_the_agent_and_overwrites_nothing(
    nodes: TestCluster,
) -> None:
    """An ask is refused; a signal stops the agent as failed, with the last good state kept."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Difficult", id="d")
    await cluster.ask("d", "good")
    with pytest.raises(StateTooLargeError, match="limit"):
        await cluster.ask("d", "grow", 100_000)
    await cluster.send("d", "grow", 100_000)

    async def failed() -> bool:
        info = await cluster.agents.get("d")
        return info.status == "failed" and "limit" in (info.reason or "")

    await eventually(failed)
    stored = await cluster.agents.state("d")
    assert stored is not None
    assert stored["state"]["good"] == 1
    assert stored["state"]["blob"] == ""


async def test_a_damaged_record_fails_the_agent_and_is_not_overwritten(nodes: TestCluster) -> None:
    """Bytes that are no record stay as they are."""
    from foundation_nats.bus.kv import Bucket

    cluster = nodes.client
    bucket = Bucket(cluster.bus, cluster.subjects, "state")
    await bucket.overwrite("broken", b'{"v": 99}')
    with pytest.raises(NotSettledError, match="damaged"):
        await cluster.agents.start("fleet:Counter", id="broken")
    entry = await bucket.read("broken")
    assert entry is not None
    assert entry.value == b'{"v": 99}'


async def test_classes_that_cannot_run_are_refused_with_the_reason(nodes: TestCluster) -> None:
    """No module, no class, no Agent: nothing is stored."""
    cluster = nodes.client
    for run, reason in {
        "nowhere:Counter": "no module",
        "fleet:Nobody": "no class",
        "fleet:NoAgent": "not a subclass",
        "fleet": "module:Class",
        "1fleet:Counter": "module:Class",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            await cluster.agents.start(run, id="x")
    assert await cluster.agents.list() == []
    assert await cluster.deployments.wishes() == {}
    with pytest.raises(ConfigError, match="valid name"):
        await cluster.agents.start("fleet:Counter", id="a.b")
    for target in ("a.b", "", "a>", "room:x", "a b", "capability:a.b"):
        with pytest.raises(ConfigError):
            await cluster.send(target, "hello")
    with pytest.raises(ConfigError, match="signal type"):
        await cluster.send("x", "two words")
    with pytest.raises(ConfigError, match="JSON"):
        await cluster.send("x", "hello", object())


async def test_an_agent_that_cannot_start_says_why_and_others_go_on(nodes: TestCluster) -> None:
    """on_start raises: failed with the reason, retried with back-off, nobody else is affected."""
    cluster = nodes.client
    with pytest.raises(NotSettledError, match="no start today"):
        await cluster.agents.start("fleet:Difficult", id="d", config={"fail_start": True})
    await cluster.agents.start("fleet:Counter", id="c")
    assert await cluster.ask("c", "counter.add", {"amount": 1}) == 1
    # The wish can be mended in place.
    await cluster.agents.start("fleet:Difficult", id="d", config={"fail_start": False})
    assert await cluster.ask("d", "good") == 1


async def test_a_signal_that_kills_its_worker_is_given_up_at_last(nodes: TestCluster) -> None:
    """os._exit in a handler: the worker is restarted, the signal counted, and then buried."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Difficult", id="d")
    await cluster.agents.start("fleet:Counter", id="c")
    await cluster.send("d", "exit", id="killer")
    await cluster.send("d", "good")
    await eventually(lambda: _is_state(cluster, "d", good=1), timeout=40)
    (dead,) = await eventually(cluster.dead.list)
    assert "worker process" in dead.letter.reason
    assert await cluster.ask("c", "counter.add", {"amount": 1}) == 1


async def test_the_same_id_takes_effect_once_and_of_two_agents_at_each(nodes: TestCluster) -> None:
    """A repeat adds nothing; the same id for another agent is another signal (F6)."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="a")
    await cluster.agents.start("fleet:Counter", id="b")
    first = await cluster.send("a", "counter.add", {"amount": 1}, id="one")
    again = await cluster.send("a", "counter.add", {"amount": 1}, id="one")
    other = await cluster.send("b", "counter.add", {"amount": 1}, id="one")
    assert not first.duplicate
    assert again.duplicate
    assert again.sequence == first.sequence
    assert not other.duplicate
    await eventually(lambda: _is(cluster.ask("b", "counter.get"), 1))
    assert await cluster.ask("a", "counter.get") == 1


async def test_routes_reach_everybody_once(nodes: TestCluster) -> None:
    """capability:, deployment:, everyone and any: expand to mailboxes; nobody is a dead letter."""
    cluster = nodes.client
    text = """
version: 1
agents:
  - {name: counter, run: "fleet:Counter", replicas: 3, capabilities: [counting]}
  - {name: single, run: "fleet:Counter", capabilities: [counting]}
"""
    await cluster.deployments.apply(text)
    await cluster.deployments.wait_settled(["counter", "single"], timeout=15)
    ids = ["counter-0", "counter-1", "counter-2", "single"]

    async def totals() -> list[int]:
        return [await cluster.ask(id, "counter.get") for id in ids]

    await cluster.send("deployment:counter", "counter.add", {"amount": 1})
    await eventually(lambda: _is(totals(), [1, 1, 1, 0]))
    await cluster.send("capability:counting", "counter.add", {"amount": 10})
    await eventually(lambda: _is(totals(), [11, 11, 11, 10]))
    await cluster.send("everyone", "counter.add", {"amount": 100})
    await eventually(lambda: _is(totals(), [111, 111, 111, 110]))
    await cluster.send("any:counting", "counter.add", {"amount": 1000})

    async def one_more() -> bool:
        return sum(await totals()) == 1443

    await eventually(one_more)
    assert await cluster.ask("any:counting", "counter.get") in (111, 110, 1111, 1110)
    await cluster.send("capability:flying", "counter.add", {"amount": 1})
    (dead,) = await eventually(cluster.dead.list)
    assert dead.letter.code == "no_recipient"


async def test_agents_without_durability_keep_nothing_and_still_work(nodes: TestCluster) -> None:
    """durable = False: no record, and the class's capabilities are known."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Forgetful", id="f")
    await cluster.send("f", "hello")
    assert await cluster.ask("f", "hello") == 2
    assert await cluster.agents.state("f") is None
    assert [info.id for info in await cluster.agents.find("forgetting")] == ["f"]


async def test_stopping_keeps_the_state_for_the_next_start(nodes: TestCluster) -> None:
    """stop, then start again: on_stop ran, the state and the unread signals are there."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Difficult", id="d")
    await cluster.ask("d", "good")
    await cluster.agents.stop("d")
    with pytest.raises(AgentNotFoundError):
        await cluster.ask("d", "good")
    await cluster.send("d", "good")
    await cluster.agents.start("fleet:Difficult", id="d", config={"a": 1})
    await eventually(lambda: _is_state(cluster, "d", good=2))
    stored = await cluster.agents.state("d")
    assert stored is not None
    assert stored["state"]["stopped"]
    assert await cluster.ask("d", "config") == {"a": 1}
    keys = await cluster.ask("d", "key")
    assert len(set(keys)) == 2
    with pytest.raises(AlreadyExistsError):
        await cluster.deployments.apply('version: 1\nagents: [{name: e, run: "fleet:Counter"}]')
        await cluster.agents.start("fleet:Counter", id="e")


async def test_a_node_name_is_taken_while_its_node_lives(nodes: TestCluster) -> None:
    """The second node of a name ends with a clear error; the first is not disturbed."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    first = nodes.nodes["n1"]
    second = nodes.start_node("n1")
    nodes.nodes["n1"] = first
    try:
        assert await second.wait(timeout=20) == 1
        assert "n1" in second.log_tail()
        assert "is running" in second.log_tail()
        assert "--name" in second.log_tail()
    finally:
        if second.is_running:
            second.kill_all()
    assert await cluster.ask("c", "counter.add", {"amount": 1}) == 1
    assert first.is_running


async def test_every_ask_is_answered_while_commits_are_in_flight(nodes: TestCluster) -> None:
    """Questions that change nothing, put right behind signals that do: none waits for ever."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    for round_number in range(1, 40):
        await cluster.send("c", "counter.add", {"amount": 1})
        answers = await asyncio.gather(
            *(cluster.ask("c", "counter.get", timeout=3) for _ in range(8))
        )
        assert set(answers) == {round_number}


async def test_declared_capacity_is_never_exceeded(nodes: TestCluster) -> None:
    """Three slots: three agents run, the others say per node why not, and start when there is room."""
    cluster = nodes.client
    nodes.start_node("n2", "--label", "cap=yes", "--capacity", "slots=3")
    await nodes.wait_up(["n1", "n2"])
    text = """
version: 1
agents:
  - {name: c, run: "fleet:Counter", replicas: 5, placement: {labels: {cap: "yes"}}}
"""
    await cluster.deployments.apply(text)
    with pytest.raises(NotSettledError, match="slots") as caught:
        await cluster.deployments.wait_settled(["c"], timeout=3)
    assert caught.value.details["reasons"]
    infos = await cluster.agents.list()
    assert sorted(info.status for info in infos) == ["pending"] * 2 + ["running"] * 3
    nodes.start_node("n3", "--label", "cap=yes", "--capacity", "slots=2")
    await cluster.deployments.wait_settled(["c"], timeout=20)
    homes = [info.node for info in await cluster.agents.list()]
    assert homes.count("n2") == 3
    assert homes.count("n3") == 2


async def test_nodes_are_seen_as_a_nats_micro_service(nodes: TestCluster) -> None:
    """What `nats micro ls`, `info` and `stats` ask is answered in their types."""
    import orjson

    bus = nodes.client.bus
    for verb in ("PING", "INFO", "STATS"):
        for subject in (f"$SRV.{verb}", f"$SRV.{verb}.foundation-node.n1"):
            body = orjson.loads((await bus.request(subject, b"")).data)
            assert body["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert (body["name"], body["id"]) == ("foundation-node", "n1")
    info = orjson.loads((await bus.request("$SRV.INFO.foundation-node", b"")).data)
    assert "fnd.test.control.node.n1.ping" in {point["subject"] for point in info["endpoints"]}


async def test_lost_live_copies_are_caught_up(nodes: TestCluster) -> None:
    """Every third live copy is dropped on purpose: the stream is read instead."""
    cluster = nodes.client
    nodes.start_node(
        "n2",
        "--label",
        "leaky=yes",
        environment={
            "FOUNDATION_FAILPOINTS": "live.received=1in3(raise)",
            "FOUNDATION_MAILBOX__MAILBOX_MAX": "5000",
        },
    )
    await nodes.wait_up(["n1", "n2"])
    await cluster.agents.start("fleet:Counter", id="c", placement={"labels": {"leaky": "yes"}})
    sent = 40
    for _ in range(sent):
        await cluster.send("c", "counter.add", {"amount": 1})
        await asyncio.sleep(0)
    await eventually(lambda: _is(cluster.ask("c", "counter.get"), sent), timeout=20)
