"""The bus survives its client, and says what became of a request (F5)."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator

import pytest

from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig
from foundation_nats.errors import (
    AgentNotFoundError,
    BusTimeoutError,
    BusUnavailableError,
    NoRespondersError,
    PayloadTooLargeError,
    PermissionDeniedError,
)
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.links import Link
from foundation_schemas import Pong


@pytest.fixture
async def bus(server: TestServer) -> AsyncIterator[Bus]:
    """A connection to the test's server."""
    connected = await Bus.connect(BusConfig(servers=(server.url,)), "test")
    yield connected
    await connected.close()


async def test_nothing_listening_is_a_clear_error_without_the_password() -> None:
    """The error names the server and what to do, never the credentials."""
    config = BusConfig(servers=("nats://user:secret@127.0.0.1:1",), connect_timeout_s=0.5)
    with pytest.raises(BusUnavailableError, match="foundation up") as caught:
        await Bus.connect(config, "test")
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ('user: "u", password: "p"', {"user": "u", "password": "p"}),
        ('token: "t"', {"token": "t"}),
    ],
)
async def test_the_credentials_of_the_settings_are_used(
    settings: str, given: dict[str, str]
) -> None:
    """With them the server lets us in, without them it doesn't."""
    async with TestServer(EmbeddedConfig(extra=f"authorization {{ {settings} }}")) as server:
        bus = await Bus.connect(BusConfig(servers=(server.url,), **given), "test")  # type: ignore[arg-type]
        await bus.flush()
        await bus.close()
        with pytest.raises(PermissionDeniedError):
            # At once: far sooner than the connection may take.
            async with asyncio.timeout(20):
                await Bus.connect(BusConfig(servers=(server.url,), connect_timeout_s=60), "test")


async def test_one_server_that_refuses_does_not_keep_us_from_another() -> None:
    """They may be about to be given the same credentials, one after the other."""
    locked = EmbeddedConfig(extra='authorization { token: "t" }')
    async with TestServer(locked) as refuses, TestServer() as takes:
        for servers in ((refuses.url, takes.url), (takes.url, refuses.url)):
            bus = await Bus.connect(BusConfig(servers=servers), "test")
            await bus.flush()
            await bus.close()


async def test_a_request_to_nobody_fails_at_once(bus: Bus) -> None:
    """No responders is an answer, not a time-out."""
    with pytest.raises(NoRespondersError):
        await bus.request("nobody.home", b"", timeout=30)


async def test_a_request_in_flight_fails_when_the_connection_drops(
    bus: Bus, server: TestServer
) -> None:
    """Its outcome is unknown, and that is known at once."""
    bus.subscribe("silent", lambda _message: None)
    await bus.flush()
    asking = asyncio.create_task(bus.request("silent", b"", timeout=60))
    await asyncio.sleep(0)
    server.kill()
    with pytest.raises(BusTimeoutError) as caught:
        await asyncio.wait_for(asking, 10)
    assert caught.value.outcome == "unknown"
    with pytest.raises(BusUnavailableError):
        bus.publish("anything", b"")
    await server.restart()
    await bus.wait_connected(10)


async def test_a_request_times_out_however_many_others_follow_it(bus: Bus) -> None:
    """Later deadlines don't put off the look at the first one."""
    bus.subscribe("silent", lambda _message: None)
    await bus.flush()
    asking = asyncio.create_task(bus.request("silent", b"", timeout=0.3))
    began = monotonic()
    while not asking.done() and monotonic() - began < 2:
        bus.forget(bus.request_nowait("silent", b"", lambda _reply: None, timeout=0.3))
        bus.request_nowait("silent", b"", lambda _reply: None, timeout=0.3)
        await asyncio.sleep(0.01)
    assert asking.done(), "it waits for the others"
    with pytest.raises(BusTimeoutError):
        await asking


async def test_subscriptions_survive_a_restart_and_nothing_is_sent_late(
    bus: Bus, server: TestServer
) -> None:
    """Routes are replayed; what was refused while disconnected never appears."""
    heard: list[bytes] = []
    bus.subscribe("topic", lambda message: heard.append(message.data))
    server.kill()
    await eventually(lambda: not bus.is_connected)
    for number in range(3):
        with pytest.raises(BusUnavailableError):
            bus.publish("topic", b"late %d" % number)
    await server.restart()
    await bus.wait_connected(10)
    bus.publish("topic", b"now")
    await eventually(lambda: heard)
    assert heard == [b"now"]


async def test_connections_that_fail_after_they_are_made_are_closed(server: TestServer) -> None:
    """A server that ends accepts and hangs up; no attempt leaves a socket behind."""
    host, _, port = server.url.removeprefix("nats://").partition(":")
    refused = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refused
        refused += 1
        writer.close()

    link = await Link.open(host, int(port))
    bus = await Bus.connect(BusConfig(servers=(link.url,), connect_timeout_s=1.0), "test")
    try:
        before = len(os.listdir("/proc/self/fd"))
        port = link.port
        await link.close()
        async with await asyncio.start_server(hang_up, "127.0.0.1", port):
            await eventually(lambda: refused >= 3, message="it has tried again and again")
            assert len(os.listdir("/proc/self/fd")) <= before
        gc.collect()  # what was left open would warn now
    finally:
        await bus.close()


async def test_a_client_that_nats_py_closed_for_good_is_rebuilt(bus: Bus) -> None:
    """A protocol error ends nats-py's client; the bus makes a new one with the same routes."""
    heard: list[bytes] = []
    bus.subscribe("topic", lambda message: heard.append(message.data))
    bus._client.write(b"PUB " + b"x" * 5000 + b" 0\r\n\r\n")  # over the control line limit
    await eventually(lambda: bus.statistics().rebuilds == 1, message="rebuilt")
    await bus.wait_connected(10)
    bus.publish("topic", b"still here")
    await eventually(lambda: heard == [b"still here"])


async def test_headers_count_towards_the_payload_limit(bus: Bus) -> None:
    """At the limit it passes, one byte over it is refused here; the connection lives on."""
    heard: list[int] = []
    bus.subscribe("big", lambda message: heard.append(len(message.data)))
    head = len(b"NATS/1.0\r\nA: b\r\n\r\n")
    room = bus.max_payload - head
    with pytest.raises(PayloadTooLargeError, match="max_payload"):
        bus.publish("big", b"x" * (room + 1), headers={"A": "b"})
    with pytest.raises(PayloadTooLargeError):
        bus.publish("big", b"x" * (bus.max_payload + 1))
    bus.publish("big", b"x" * room, headers={"A": "b"})
    await eventually(lambda: heard == [room])
    assert bus.statistics().rebuilds == 0


async def test_a_denied_subject_is_an_error_of_the_call() -> None:
    """The server reports it out of band; the caller does not wait for its time-out."""
    extra = (
        'authorization { users: [ { user: "u", password: "p", '
        'permissions: { publish: ["_INBOX.>", "ok"], subscribe: ">" } } ] }'
    )
    async with TestServer(EmbeddedConfig(extra=extra)) as server:
        url = server.url.replace("nats://", "nats://u:p@")
        bus = await Bus.connect(BusConfig(servers=(url,)), "test")
        try:
            with pytest.raises(PermissionDeniedError, match="forbidden"):
                await asyncio.wait_for(bus.request("forbidden.here", b"", timeout=30), 5)
        finally:
            await bus.close()
        with pytest.raises(PermissionDeniedError, match="credentials"):
            await Bus.connect(BusConfig(servers=(server.url,), connect_timeout_s=2), "test")


async def test_errors_cross_the_wire_and_foreign_reply_subjects_are_dropped(bus: Bus) -> None:
    """An error is the same class on the other side; a reply goes to an inbox only (F10)."""
    scope = TaskScope("test")
    served: list[bytes] = []

    async def handler(data: bytes) -> Pong:
        served.append(data)
        if data == b"fail":
            raise AgentNotFoundError("no such agent", id="x")
        return Pong(name="me", incarnation=7)

    rpc.serve(bus, scope, "serve.me", handler)
    assert (await rpc.call(bus, "serve.me", None, Pong, timeout=5)).incarnation == 7
    with pytest.raises(AgentNotFoundError) as caught:
        rpc.read_reply((await bus.request("serve.me", b"fail")).data)
    assert caught.value.details["id"] == "x"
    stolen: list[bytes] = []
    bus.subscribe("victim.key", lambda message: stolen.append(message.data))
    before = len(served)
    bus.publish("serve.me", b"", reply="victim.key")
    await bus.flush()
    await bus.request("serve.me", b"")  # one more, so that the first would have been served
    assert len(served) == before + 1
    assert not stolen
    await scope.close()
