"""Buckets and their watches, on a real server that dies and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets, streams
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.streams import StoredMessage, StreamReader, api, append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import Config
from foundation_nats.errors import (
    AlreadyExistsError,
    MailboxFullError,
    ServerError,
    StaleRevisionError,
)
from foundation_nats.testing import TestServer, eventually

NAMES = Subjects("kv")


def settings(server: TestServer, **mailbox: object) -> Config:
    """The test's settings."""
    return Config.load(cluster="kv", bus={"servers": (server.url,)}, mailbox=mailbox)


@pytest.fixture
async def bus(server: TestServer) -> AsyncIterator[Bus]:
    """A connection to a server that has the streams."""
    config = settings(server, mailbox_max=5)
    connected = await Bus.connect(config.bus, "test")
    await assets.ensure(connected, config)
    yield connected
    await connected.close()


async def test_writes_say_what_they_expect(bus: Bus) -> None:
    """create, replace, delete, and create again over the tombstone."""
    bucket = Bucket(bus, NAMES, "agents")
    first = await bucket.create("k", b"1")
    with pytest.raises(AlreadyExistsError):
        await bucket.create("k", b"2")
    second = await bucket.replace("k", b"2", expected=first)
    with pytest.raises(StaleRevisionError):
        await bucket.replace("k", b"3", expected=first)
    with pytest.raises(StaleRevisionError):
        await bucket.delete("k", expected=first)
    await bucket.delete("k", expected=second)
    gone = await bucket.read("k")
    assert gone is not None
    assert gone.value is None
    assert await bucket.read("never") is None
    assert await bucket.create("k", b"4") > second


async def test_what_is_left_of_a_key_may_say_something(bus: Bus) -> None:
    """Readers and watchers see the mark of the deletion, and none once the key is written again."""
    bucket = Bucket(bus, NAMES, "agents")
    scope = TaskScope("test")
    seen: list[Entry] = []
    try:
        watch = bucket.watch(scope, seen.append)
        await asyncio.wait_for(watch.ready.wait(), 10)
        revision = await bucket.create("k", b"1")
        await bucket.delete("k", expected=revision, mark="because")
        left = await bucket.read("k")
        assert left is not None
        assert (left.value, left.mark) == (None, "because")
        await bucket.replace("k", b"2", expected=left.revision)
        again = await bucket.read("k")
        assert again is not None
        assert (again.value, again.mark) == (b"2", "")
        await eventually(lambda: len(seen) == 3, message="the watch sees all")
        assert [entry.mark for entry in seen] == ["", "because", ""]
    finally:
        await scope.close()


async def test_many_keys_are_read_in_pages(bus: Bus) -> None:
    """More than a page and more than one multi_last holds; deleted ones are absent."""
    bucket = Bucket(bus, NAMES, "agents")
    names = [f"k{number}" for number in range(1300)]
    await asyncio.gather(*(bucket.overwrite(name, name.encode()) for name in names))
    await bucket.delete("k7")
    everything = await bucket.read_all()
    assert set(everything) == set(names) - {"k7"}
    some = await bucket.read_many(names)
    assert len(some) == 1300
    assert some["k7"].value is None
    assert some["k8"].value == b"k8"


async def test_a_watch_sees_everything_through_a_restart_and_a_lost_consumer(
    bus: Bus, server: TestServer
) -> None:
    """What was there, every change, expiry, and what happened while it was deaf."""
    bucket = Bucket(bus, NAMES, "nodes")
    await bucket.create("old", b"1")
    seen: list[Entry] = []
    scope = TaskScope("test")
    watch = bucket.watch(scope, seen.append)
    await watch.wait_ready(5)
    assert [entry.key for entry in seen] == ["old"]
    await bucket.create("brief", b"1", ttl_s=1)
    await eventually(
        lambda: any(e.key == "brief" and e.value is None for e in seen), message="it expires"
    )
    server.kill()
    await server.restart()
    await bus.wait_connected(10)
    await bucket.create("after", b"1")
    await eventually(lambda: any(e.key == "after" for e in seen), message="it watches again")
    consumers = await api(bus, "CONSUMER.NAMES", bucket.stream)
    for consumer in consumers["consumers"]:
        await api(bus, "CONSUMER.DELETE", f"{bucket.stream}.{consumer}")
    await bucket.create("later", b"1")
    await eventually(
        lambda: any(e.key == "later" for e in seen), timeout=15, message="it is not deaf"
    )
    assert len([e for e in seen if e.key == "old"]) == 1
    await scope.close()


async def test_a_full_mailbox_refuses_and_state_commits_go_on(bus: Bus, server: TestServer) -> None:
    """One subject at its limit, then the whole stream at its bytes: the state bucket still takes (F8)."""
    for _ in range(5):
        await append(bus, NAMES.mailbox("a"), b"x")
    with pytest.raises(MailboxFullError, match="full"):
        await append(bus, NAMES.mailbox("a"), b"x")
    await append(bus, NAMES.mailbox("b"), b"x")
    small = Config.load(
        cluster="small",
        bus={"servers": (server.url,)},
        mailbox={"signals_max_bytes": 64 * 1024},
    )
    await assets.ensure(bus, small)
    names = Subjects("small")
    with pytest.raises(MailboxFullError, match="store"):
        for number in range(200):
            await append(bus, names.mailbox(f"a{number}"), b"x" * 1024)
    await Bucket(bus, names, "state").create("a", b"the state still fits")


async def test_pages_last_messages_and_trimming(bus: Bus) -> None:
    """Reading from a sequence on, the last of each subject, and removing what is consumed."""
    reader = StreamReader(bus, NAMES.signals_stream)
    acks = [await append(bus, NAMES.mailbox(f"m{i % 2}"), b"%d" % i) for i in range(8)]
    messages, more = await reader.page(NAMES.mailbox("m0"), acks[2].sequence, batch=2)
    assert [message.data for message in messages] == [b"2", b"4"]
    assert more == 1
    last = await reader.last_of([NAMES.mailbox("m0"), NAMES.mailbox("m1"), NAMES.mailbox("none")])
    assert {message.data for message in last.values()} == {b"6", b"7"}
    assert await reader.purge(NAMES.mailbox("m0"), below=acks[4].sequence) == 2
    messages, more = await reader.page(NAMES.mailbox("m0"), 1)
    assert [message.data for message in messages] == [b"4", b"6"]
    again = await append(bus, NAMES.mailbox("m0"), b"once", headers={"Nats-Msg-Id": "same"})
    repeat = await append(bus, NAMES.mailbox("m0"), b"once", headers={"Nats-Msg-Id": "same"})
    assert repeat.duplicate
    assert repeat.sequence == again.sequence


async def test_streams_are_ensured_idempotently_and_drift_is_named(
    bus: Bus, server: TestServer
) -> None:
    """Twice is once; a changed setting and a missing stream are found."""
    config = settings(server, mailbox_max=5)
    await assets.ensure(bus, config)
    assert await assets.drift(bus, config) == []
    other = settings(server, mailbox_max=6)
    await assets.ensure(bus, other)
    found = await assets.drift(bus, other)
    assert [(d.setting, d.declared, d.actual) for d in found] == [("max_msgs_per_subject", 6, 5)]
    await api(bus, "STREAM.DELETE", NAMES.dead_stream)
    assert NAMES.dead_stream in {d.stream for d in await assets.drift(bus, config)}


def test_old_servers_and_servers_without_jetstream_are_refused() -> None:
    """Each with what to do."""
    with pytest.raises(ServerError, match=r"2\.9\.0"):
        assets.check_server({"version": "2.9.0", "jetstream": True})
    with pytest.raises(ServerError, match="without JetStream"):
        assets.check_server({"version": "2.15.1"})


async def test_what_a_silent_replica_does_not_answer_the_leader_is_asked(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same messages as by Direct Get: pages, from a time on, last ones; and in little time."""
    for number in range(7):
        await append(bus, NAMES.mailbox(f"m{number % 2}"), b"%d" % number, headers={"A": "b"})
    reader = StreamReader(bus, NAMES.signals_stream)
    whole, _ = await reader.page(None, 1)
    named = [NAMES.mailbox(name) for name in ("m0", "m1", "none")]
    since = whole[3].time
    straight = [
        whole,
        (await reader.page(NAMES.mailbox("m1"), 1))[0],
        (await reader.page(None, 1, start_time=since))[0],
        list((await reader.last_of(named)).values()),
        list((await reader.last_of_by_now(named)).values()),
    ]
    asked: list[bytes] = []
    bus.subscribe("silent", lambda message: asked.append(message.data))
    await bus.flush()
    monkeypatch.setattr(streams, "direct_get", lambda _stream: "silent")
    monkeypatch.setattr(streams, "_SILENCE_S", 0.05)
    instead = [
        (await reader.page(None, 1))[0],
        (await reader.page(NAMES.mailbox("m1"), 1))[0],
        (await reader.page(None, 1, start_time=since))[0],
        list((await reader.last_of(named)).values()),
        list((await reader.last_of_by_now(named)).values()),
    ]
    assert len(asked) == 10, "each is tried twice"

    def shown(pages: list[list[StoredMessage]]) -> list[list[tuple[str, int, bytes, str, str]]]:
        return [
            [(m.subject, m.sequence, m.data, m.headers["A"], m.time) for m in page]
            for page in pages
        ]

    assert [len(page) for page in straight] == [7, 3, 4, 2, 2]
    assert shown(instead) == shown(straight)
    part, more = await reader.page(None, 1, batch=3)
    assert [message.sequence for message in part] == [message.sequence for message in whole[:3]]
    assert more
