"""What a stranger may put on the wire: malformed signals, forged copies, odd names, ids used twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import orjson
import pytest

from foundation_nats import Cluster
from foundation_nats.bus.streams import append
from foundation_nats.errors import ConfigError, FoundationError, PermissionDeniedError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]

GOOD = {
    "specversion": "1.0",
    "id": "one",
    "source": "client:stranger",
    "type": "counter.add",
    "data": {"amount": 1},
}


def envelope(**changed: object) -> bytes:
    """A sound envelope but for what is changed; None leaves it out."""
    return orjson.dumps({k: v for k, v in {**GOOD, **changed}.items() if v is not None})


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"not json",
    "half of it": envelope()[:-5],
    "binary": bytes(range(256)),
    "invalid UTF-8": envelope().replace(b"stranger", b"\xff\xfe\xfd"),
    "half a surrogate": envelope().replace(b"stranger", b"\\ud800"),
    "null": b"null",
    "a number": b"17",
    "a list": b"[]",
    "an empty object": b"{}",
    "an object in a list": b"[" + envelope() + b"]",
    "no id": envelope(id=None),
    "no type": envelope(type=None),
    "no source": envelope(source=None),
    "no version": envelope(specversion=None),
    "a version to come": envelope(specversion="2.0"),
    "a version that is a number": envelope(specversion=1.0),
    "an id that is a number": envelope(id=1),
    "a type that is a list": envelope(type=["counter.add"]),
    "a source that is an object": envelope(source={"a": 1}),
    "a million brackets": b"[" * 1_000_000,
    "a payload two thousand deep": envelope(data="@").replace(
        b'"@"', b"[" * 2000 + b"1" + b"]" * 2000
    ),
    "not a number": envelope().replace(b"1}", b"NaN}"),
    "infinity": envelope().replace(b"1}", b"Infinity}"),
    "a payload of another type": envelope(data="text"),
    "no payload": envelope(data=None),
    "a field of another type": envelope(data={"amount": [1]}),
    "a number too large for a float": envelope().replace(b"1}", b"1e999}"),
    "an unknown type": envelope(type="counter.explode"),
    "an empty type": envelope(type=""),
    "a type of 100,000 letters": envelope(type="x" * 100_000),
    "a type with control characters": envelope(type="a\r\nPUB x 0\r\n\x1b[31m"),
    "a million bytes of nonsense": b"\x00" * 1_000_000,
}
"""What it is to the bytes: one dead letter each."""

SOUND: dict[str, bytes] = {
    "more than is asked for": envelope(extra=[1, {"a": None}], subject="agent:somebody else"),
    "a key twice: the last counts": envelope().replace(
        b'"type":', b'"type":"counter.explode","type":'
    ),
    "letters of all alphabets": envelope(id="日本語 🦀 \u202e", source="client:Ω"),
}
"""What is let through, as the readers of JSON everywhere do."""


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """One node."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as running:
        yield running


async def counts(cluster: Cluster, agent: str, total: int, *, timeout: float = 10) -> None:
    """Wait until *agent* has counted to *total*."""

    async def counted() -> bool:
        return bool(await cluster.ask(agent, "counter.get", timeout=2) == total)

    await eventually(counted, timeout=timeout, message=f"{agent} counts {total}")


async def test_whatever_is_put_into_a_mailbox_the_next_signal_is_handled(
    nodes: TestCluster,
) -> None:
    """A dead letter with the reason for each, in order, in milliseconds; nobody restarts (R-39)."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    mailbox = cluster.subjects.mailbox("c")
    (worker,) = nodes.nodes["n1"].workers()
    began = time.monotonic()
    for payload in MALFORMED.values():
        await append(cluster.bus, mailbox, payload)
    for payload in SOUND.values():
        await append(cluster.bus, mailbox, payload)
    headers = {f"X-{number}": "y" * 20 for number in range(2_000)}
    await append(cluster.bus, mailbox, envelope(), headers=headers)
    await cluster.send("c", "counter.add", {"amount": 100})
    await counts(cluster, "c", 101 + len(SOUND))
    took = time.monotonic() - began
    assert took < 0.2 * len(MALFORMED), f"{took:.1f} s"

    async def told() -> bool:
        return len(await cluster.dead.list("c", limit=1000)) == len(MALFORMED)

    await eventually(told, message="a dead letter each")
    for name, dead in zip(MALFORMED, await cluster.dead.list("c", limit=1000), strict=True):
        assert dead.letter.code in ("agent.payload_invalid", "agent.unhandled_signal"), name
        assert dead.letter.reason, name
        assert dead.letter.attempts == 1, name
    assert worker.is_running()
    (agent,) = await cluster.agents.list()
    assert (agent.status, agent.epoch) == ("running", 1)


async def test_whatever_is_put_into_routes_the_next_signal_for_many_arrives(
    nodes: TestCluster,
) -> None:
    """Nonsense for many, for nobody, and ids that would be no key: the expander goes on (R-39)."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c", capabilities=["counting"])
    route = f"fnd.{nodes.config.cluster}.route"
    wrong = [b"", b"not json", b"[]", b"[" * 100_000, b"\xff", b"\x00" * 900_000, envelope(id=3)]
    odd_ids = ["a b", "*", ">", "x" * 5000, "a.b\tc", "日本"]
    for payload in wrong:
        for kind in ("capability.counting", "capability.nobody", "any.nobody", "bogus.x", "a.b.c"):
            await append(cluster.bus, f"{route}.{kind}", payload)
    # It fits, and its copy with an id does not.
    await append(cluster.bus, f"{route}.capability.counting", b"x" * cluster.bus.max_payload)
    letters = 5 * len(wrong) + 1
    for id in odd_ids:
        await append(
            cluster.bus, f"{route}.any.counting", envelope(id=id), headers={"Nats-Msg-Id": id}
        )
    await cluster.send("capability:counting", "counter.add", {"amount": 100})
    await cluster.send("any:counting", "counter.add", {"amount": 1000})
    await counts(cluster, "c", 1100 + len(odd_ids))
    assert cluster.bus.is_connected

    async def told() -> bool:
        found = await cluster.dead.list(limit=1000)
        nobody = [item for item in found if item.letter.code == "no_recipient"]
        return len(nobody) == 4 * len(wrong) and len(found) == letters

    await eventually(told, message="a dead letter for each that nobody can take")


async def test_whatever_is_put_onto_the_control_subjects_the_cluster_goes_on(
    nodes: TestCluster,
) -> None:
    """Requests get an error; heartbeats and echoes that are none are ignored (R-39)."""
    cluster = nodes.client
    names = cluster.subjects
    await cluster.agents.start("fleet:Counter", id="c")
    wrong = [b"", b"not json", b"null", b"[]", b'{"node": 7}', b"[" * 100_000, b"\xff" * 10]
    for payload in wrong:
        for subject in (names.heartbeat("n1"), names.heartbeat("ghost"), names.echo("n1")):
            cluster.bus.publish(subject, payload)
        for subject in (
            *(names.control_node("n1", verb) for verb in ("validate", "report")),
            *(names.control_worker("n1-w0", verb) for verb in ("start", "stop", "validate")),
            names.ask("c"),
        ):
            try:
                reply = await cluster.bus.request(subject, payload, timeout=2)
            except FoundationError:
                continue
            assert b'"error"' in reply.data or not payload, (subject, payload[:20], reply.data)
    await cluster.send("c", "counter.add", {"amount": 1})
    await counts(cluster, "c", 1)
    assert [(node.name, node.status) for node in await cluster.nodes.list()] == [("n1", "up")]
    (agent,) = await cluster.agents.list()
    assert (agent.status, agent.epoch) == ("running", 1)


async def test_a_name_that_could_be_more_than_a_name_is_refused(nodes: TestCluster) -> None:
    """Wildcards, dots, spaces, line ends, 300 letters, other alphabets: before the wire (R-43)."""
    cluster = nodes.client
    names = (
        "", ".", "a.b", "*", ">", "a*", "a>", "$SYS", "$JS.API", " ", "a b", "a\tb", "a\r\nPUB x 0",
        "a\x00", "é", "日本", "\u202eabc", "x" * 129, "x" * 300, "a/b", "a:b", "a\\b", "{{a}}",
    )  # fmt: skip
    for name in names:
        with pytest.raises(ConfigError) as caught:
            await cluster.agents.start("fleet:Counter", id=name)
        assert "name" in str(caught.value), name
        for target in (f"agent:{name}", f"capability:{name}", f"any:{name}", f"deployment:{name}"):
            with pytest.raises(ConfigError):
                await cluster.send(target, "counter.add", {"amount": 1})
        with pytest.raises(ConfigError):
            await cluster.ask(f"agent:{name}", "counter.get")
        text = orjson.dumps({"version": 1, "agents": [{"name": name, "run": "fleet:Counter"}]})
        with pytest.raises(ConfigError):
            await cluster.deployments.apply(text.decode())
    assert await cluster.deployments.wishes() == {}
    assert cluster.bus.statistics().rebuilds == 0
    node = nodes.start_node("n.2")
    assert await node.wait(timeout=15) == 2
    assert "n.2" in node.log_tail()
    await cluster.agents.start("fleet:Counter", id="x" * 128)
    await cluster.send("x" * 128, "counter.add", {"amount": 1})
    await counts(cluster, "x" * 128, 1)


async def test_an_id_counts_per_source_and_receiver() -> None:
    """The same id again is no second signal; from another sender or later than the window it is (R-42)."""
    settings = {"mailbox": {"duplicate_window_s": 1, "full_patience_s": 0.4}}
    async with (
        TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes,
        Cluster.connect(config=nodes.config, name="other") as other,
    ):
        cluster = nodes.client
        for agent in ("a", "b"):
            await cluster.agents.start("fleet:Counter", id=agent)
        sent = [
            await client.send(agent, "counter.add", {"amount": 1}, id="one")
            for client in (cluster, other)
            for agent in ("a", "b")
            for _ in range(2)
        ]
        assert [receipt.duplicate for receipt in sent] == [False, True] * 4
        await counts(cluster, "a", 2)
        await counts(cluster, "b", 2)

        async def forgotten() -> bool:
            # Each try renews nothing: the server counts from the first.
            again = await cluster.send("a", "counter.add", {"amount": 10}, id="one")
            return not again.duplicate

        # As documented: later than the window it is another signal.
        await eventually(forgotten, every=0.2, message="the window passes")
        await counts(cluster, "a", 12)


def live_copy(sequence: int, last: int) -> dict[str, str]:
    """What the server writes on a live copy."""
    return {
        "Nats-Stream": "fnd_test_SIGNALS",
        "Nats-Sequence": str(sequence),
        "Nats-Last-Sequence": str(last),
        "Nats-Time-Stamp": "2026-01-01T00:00:00Z",
    }


async def test_forged_live_copies_that_do_not_connect_change_nothing(nodes: TestCluster) -> None:
    """Replays, gaps, nonsense: the stream is what counts (R-44)."""
    cluster = nodes.client
    await cluster.agents.start("fleet:Counter", id="c")
    first = await cluster.send("c", "counter.add", {"amount": 1})
    await counts(cluster, "c", 1)
    live = cluster.subjects.live("c")
    forged = envelope(data={"amount": 1000})
    cluster.bus.publish(live, forged)
    for headers in (
        live_copy(first.sequence, 0),  # a replay
        live_copy(0, 0),
        live_copy(first.sequence + 7, first.sequence + 6),  # behind a gap
        live_copy(10**12, 10**12 - 1),
        {"Nats-Sequence": "many"},
        {"Nats-Sequence": "-1", "Nats-Last-Sequence": "-2"},
    ):
        cluster.bus.publish(live, forged, headers=headers)
        cluster.bus.publish(live, b"not json", headers=headers)
    await cluster.send("c", "counter.add", {"amount": 1})
    await counts(cluster, "c", 2)
    assert await cluster.dead.list() == []
    stored = await cluster.agents.state("c")
    assert stored is not None
    assert stored["state"]["total"] == 2


async def test_with_permissions_nobody_but_the_server_makes_live_copies() -> None:
    """A copy that would connect can be told from none; so publishing them is denied (R-44, F11)."""
    users = (
        '{ user: "member", password: "m", permissions: '
        '{ publish: { allow: ">", deny: "fnd.*.agent.*.live" } } }'
    )
    async with TestServer(
        EmbeddedConfig(extra=f"authorization {{ users: [ {users} ] }}")
    ) as server:
        url = server.url.replace("nats://", "nats://member:m@")
        settings = {"mailbox": {"signals_max_bytes": server.signals_max_bytes}}
        async with TestCluster(nodes=1, path=[str(AGENTS)], urls=[url], settings=settings) as nodes:
            cluster = nodes.client
            await cluster.agents.start("fleet:Counter", id="c")
            first = await cluster.send("c", "counter.add", {"amount": 1})
            await counts(cluster, "c", 1)
            forged = envelope(data={"amount": 1000})
            connects = live_copy(first.sequence + 1, first.sequence)
            with pytest.raises(PermissionDeniedError, match="live"):
                await asyncio.wait_for(
                    cluster.bus.request(cluster.subjects.live("c"), forged, headers=connects), 5
                )
            await cluster.send("c", "counter.add", {"amount": 1})
            await counts(cluster, "c", 2)
