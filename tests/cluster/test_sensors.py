"""Sensors on a real cluster: one of each, whatever is killed, and nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import hmac
import signal
import socket
from collections.abc import AsyncIterator
from datetime import datetime
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from foundation_nats.bus.streams import api, append
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

QUICK = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0}}


@pytest.fixture
async def one() -> AsyncIterator[TestCluster]:
    """A node with one worker."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        yield nodes


async def state(nodes: TestCluster, agent: str) -> dict[str, Any]:
    """What is stored of it."""
    record = await nodes.client.agents.state(agent)
    assert record is not None
    found: dict[str, Any] = record["state"] or {}
    return found


async def seen(nodes: TestCluster, agent: str) -> list[Any]:
    """What it has noted."""
    return list((await state(nodes, agent)).get("seen", []))


def free_port() -> int:
    """One that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_workers(nodes: TestCluster, name: str) -> None:
    """SIGKILL."""
    for worker in nodes.nodes[name].workers():
        worker.send_signal(signal.SIGKILL)


async def all_seen(nodes: TestCluster) -> list[list[int]]:
    """What the counter has noted once it senses no more and has handled what was in its mailbox."""
    agents = nodes.client.agents
    await agents.stop("counter")
    await agents.start("sensing:Still", id="counter")
    await nodes.client.ask("counter", "look", timeout=10)
    return await seen(nodes, "counter")


def judge(found: list[list[int]], sink: Path) -> None:
    """Whether the sensors of one agent came one after the other, and lost nothing that was stored."""
    epochs = [epoch for epoch, _ in found]
    assert epochs == sorted(epochs), "an older sensor's signal came after a newer one's"
    for epoch, group in groupby(found, key=lambda item: item[0]):
        numbers = [number for _, number in group]
        assert numbers == list(range(1, len(numbers) + 1)), f"epoch {epoch}: {numbers}"
    told = [
        [int(word) for word in line.split()]
        for line in sink.with_suffix(".stored").read_text().splitlines()
    ]
    missing = [item for item in told if item not in found]
    assert not missing, f"acknowledged, and lost: {missing}"


async def test_killed_workers_and_nodes_leave_one_sensor(tmp_path: Path) -> None:
    """SIGKILL of the worker twice, then of the node: the counts follow each other, none twice."""
    sink = tmp_path / "sink"
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)], settings=QUICK) as nodes:
        agents = nodes.client.agents
        await agents.start("sensing:Counter", id="counter", config={"sink": str(sink)})

        async def counts(epoch: int) -> bool:
            return sum(item[0] == epoch for item in await seen(nodes, "counter")) >= 10

        async def counted(epoch: int) -> None:
            await eventually(
                lambda: counts(epoch), timeout=30, message=f"epoch {epoch} counts to ten"
            )

        await counted(1)
        for epoch in (2, 3):
            node = (await agents.get("counter")).node
            assert node is not None
            kill_workers(nodes, node)
            await counted(epoch)
        node = (await agents.get("counter")).node
        assert node is not None
        nodes.nodes[node].kill_all()
        await counted(4)
        judge(await all_seen(nodes), sink)


@pytest.mark.parametrize(
    "point",
    [
        "commit.after_cas_before_outbox",
        "commit.before_cas",
        "outbox.mid",
    ],
)
async def test_a_worker_that_dies_anywhere_between_sensing_and_handling_loses_nothing(
    tmp_path: Path, point: str, request: pytest.FixtureRequest
) -> None:
    """Around the commit that holds the event, and before its signal is known to be in the mailbox."""
    if point != "commit.after_cas_before_outbox" and not request.config.getoption("--chaos"):
        pytest.skip("long: run it with --chaos")
    sink = tmp_path / "sink"
    crashes = {"FOUNDATION_FAILPOINTS": f"{point}=after(25,kill)"}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], environment=crashes) as nodes:
        agents = nodes.client.agents
        await agents.start("sensing:Counter", id="counter", config={"sink": str(sink)})

        async def died_twice() -> bool:
            found = await seen(nodes, "counter")
            return bool(found) and found[-1][0] >= 3

        await eventually(died_twice, timeout=40, message="two have died, a third counts")
        judge(await all_seen(nodes), sink)


@pytest.mark.parametrize("bug", ["", "answer_after_deadline"])
async def test_a_replaced_worker_that_senses_on_gets_nothing_stored(
    tmp_path: Path, bug: str
) -> None:
    """Its manager stands still, so nobody ends it; even if it does not see that its right has lapsed."""
    sink = tmp_path / "sink"
    environment = {"FOUNDATION_TEST_BUG": bug} if bug else {}
    async with TestCluster(
        nodes=2, workers=1, path=[str(AGENTS)], settings=QUICK, environment=environment
    ) as nodes:
        agents = nodes.client.agents
        await agents.start("sensing:Counter", id="counter", config={"sink": str(sink)})
        victim = nodes.nodes[str((await agents.get("counter")).node)]

        async def counts() -> bool:
            return len(await seen(nodes, "counter")) > 10

        await eventually(counts, message="it counts")
        (old,) = victim.workers()
        if not bug:
            # It sleeps through its replacement, too, and wakes up in the middle of what it did.
            old.send_signal(signal.SIGSTOP)
        victim.process.send_signal(signal.SIGSTOP)
        try:

            async def replaced() -> bool:
                found = await seen(nodes, "counter")
                return sum(epoch == 2 for epoch, _ in found) > 10

            await eventually(replaced, timeout=30, message="its successor counts")
            old.send_signal(signal.SIGCONT)
            count = len(await seen(nodes, "counter"))

            async def went_on() -> bool:
                return len(await seen(nodes, "counter")) > count + 20

            await eventually(went_on, message="the successor counts on")
        finally:
            victim.resume()
        found = await all_seen(nodes)
        judge(found, sink)
        if bug:
            # It went on until a commit was refused: to sense is harmless, to store is not allowed.
            # It begins with a number when the one before is stored. So exactly the last can be
            # missing: if its own commit was the one refused. If that of the handling of a signal
            # was, the sensor ended with its agent, and may have been at rest between two numbers.
            tried = [line.split() for line in sink.read_text().splitlines()]
            by_old = [int(number) for _, epoch, number in tried if epoch == "1"]
            assert by_old == list(range(1, len(by_old) + 1))
            stored = [number for epoch, number in found if epoch == 1]
            assert stored in (by_old, by_old[:-1])


async def test_a_timer_keeps_its_row_of_moments_over_a_crash(one: TestCluster) -> None:
    """No moment twice, none that is not of the row."""
    await one.client.agents.start("sensing:Ticking", id="clock")

    async def ticks(count: int) -> bool:
        return len(await seen(one, "clock")) >= count

    await eventually(lambda: ticks(5), message="it ticks")
    kill_workers(one, "n1")
    count = len(await seen(one, "clock"))
    await eventually(lambda: ticks(count + 5), timeout=20, message="it ticks again")
    await one.client.agents.stop("clock")
    due = [datetime.fromisoformat(text) for text in await seen(one, "clock")]
    steps = [round((moment - due[0]).total_seconds() * 10, 6) for moment in due]
    assert all(step == int(step) for step in steps)
    assert steps == sorted(set(steps))


async def test_orders_over_http_are_stored_before_they_are_accepted(one: TestCluster) -> None:
    """A worker is killed in the middle, senders try again: each order once; then what is refused, and how."""
    port = free_port()
    await one.client.agents.start("sensing:Hooked", id="shop", config={"port": port})
    url = f"http://127.0.0.1:{port}/orders/shop"
    refused = 0

    async def order(client: httpx.AsyncClient, number: int) -> None:
        nonlocal refused
        while True:
            try:
                answer = await client.post(
                    url, json=number, headers={"Idempotency-Key": f"order-{number}"}
                )
            except httpx.HTTPError:
                refused += 1
                await asyncio.sleep(0.05)
                continue
            if answer.status_code == 202:
                return
            assert answer.status_code == 503, answer.text
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(timeout=5) as client:
        await order(client, 0)
        going = [asyncio.ensure_future(order(client, number)) for number in range(1, 60)]
        await eventually(lambda: sum(task.done() for task in going) > 5, message="some are in")
        kill_workers(one, "n1")
        await asyncio.wait_for(asyncio.gather(*going), 30)
        await asyncio.gather(*(order(client, number) for number in range(10)))

        async def all_there() -> bool:
            return sorted(await seen(one, "shop")) == list(range(60))

        await eventually(all_there, message="each order is there once")
        assert (await client.get(url)).status_code == 405
        assert (await client.post(url + "x")).status_code == 404
        assert (await client.post(url, content=b"x" * 1001)).status_code == 413
        wrong = await client.post(url, content=b"{", headers={"content-type": "application/json"})
        assert wrong.status_code == 400
        # A second agent shares the server, by its path, and wants to see a signature.
        await one.client.agents.start(
            "sensing:Hooked", id="safe", config={"port": port, "secret": "s3"}
        )
        body = orjson.dumps({"cake": "plum"})
        signature = {"X-Hub-Signature-256": f"sha256={hmac.new(b's3', body, sha256).hexdigest()}"}
        headers = {"content-type": "application/json"}
        safe = f"http://127.0.0.1:{port}/orders/safe"

        async def is_there() -> bool:
            return (await client.post(safe, content=body, headers=headers)).status_code == 401

        await eventually(is_there, message="it listens, and refuses what is not signed")
        answer = await client.post(safe, content=body, headers={**headers, **signature})
        assert answer.status_code == 202
        # While nothing can be stored nothing is accepted.
        one.server.freeze()
        try:
            began = asyncio.get_running_loop().time()
            assert (await client.post(url, json=99, timeout=20)).status_code == 503
            assert asyncio.get_running_loop().time() - began < 10
        finally:
            one.server.thaw()
        await one.client.agents.stop("safe")

        async def is_gone() -> bool:
            try:
                said = await client.post(safe, content=body)
            except httpx.HTTPError:
                return False
            # Perhaps it is only moving: who sends shall try again.
            return said.json() == {"error": "its agent does not run now"}

        await eventually(is_gone, message="what has stopped does not answer")
        assert await seen(one, "safe") == [{"cake": "plum"}]
    await one.client.agents.stop("shop")


async def test_one_port_serves_the_agents_of_all_workers() -> None:
    """On two nodes with two workers each; the worker that listens is killed under load."""
    port = free_port()
    async with TestCluster(nodes=2, workers=2, path=[str(AGENTS)], settings=QUICK) as nodes:
        shops = [f"shop-{number}" for number in range(4)]
        for shop in shops:
            await nodes.client.agents.start("sensing:Hooked", id=shop, config={"port": port})
        places = {(await nodes.client.agents.get(shop)).node for shop in shops}
        assert len(places) == 2, "void: they are all on one node"

        async def order(client: httpx.AsyncClient, shop: str, number: int) -> None:
            headers = {"Idempotency-Key": f"order-{number}"}
            url = f"http://127.0.0.1:{port}/orders/{shop}"
            while True:
                try:
                    answer = await client.post(url, json=number, headers=headers)
                except httpx.HTTPError:
                    answer = None
                if answer is not None and answer.status_code == 202:
                    return
                await asyncio.sleep(0.1)

        async with httpx.AsyncClient(timeout=5) as client:
            await asyncio.gather(*(order(client, shop, 0) for shop in shops))
            going = [
                asyncio.ensure_future(order(client, shop, number))
                for shop in shops
                for number in range(1, 30)
            ]
            await eventually(lambda: sum(task.done() for task in going) > 5, message="some are in")
            workers = [worker for node in nodes.nodes.values() for worker in node.workers()]
            listening = [
                worker
                for worker in workers
                if any(
                    place.status == "LISTEN" and place.laddr.port == port
                    for place in worker.net_connections()
                )
            ]
            assert len(listening) == 1
            listening[0].send_signal(signal.SIGKILL)
            await asyncio.wait_for(asyncio.gather(*going), 40)

            async def all_there(shop: str) -> bool:
                return sorted(await seen(nodes, shop)) == list(range(30))

            for shop in shops:
                await eventually(partial(all_there, shop), message="each order is there once")
            answer = await client.get(f"http://127.0.0.1:{port}/~")
            assert answer.json() == {"cluster": nodes.client.name}
            unknown = await client.post(f"http://127.0.0.1:{port}/orders/nobody")
            assert unknown.status_code == 404


async def test_a_port_of_another_program_is_told(one: TestCluster) -> None:
    """And taken as soon as it is free."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        await one.client.agents.start("sensing:Hooked", id="shop", config={"port": port})

        async def told() -> bool:
            return any(
                "Another program has the port." in event.message
                for event in await one.client.events.list(topic="agent")
            )

        await eventually(told, timeout=20, message="the event")
    async with httpx.AsyncClient() as client:

        async def is_taken() -> bool:
            try:
                said = await client.post(f"http://127.0.0.1:{port}/orders/shop", json=1)
            except httpx.HTTPError:
                return False
            return said.status_code == 202

        await eventually(is_taken, timeout=20, message="it listens")


async def test_a_stream_and_a_bucket_are_read_once_and_in_order(one: TestCluster) -> None:
    """From another's stream, over a SIGKILL of the worker; and core messages while it runs."""
    bus = one.client.bus
    lines = {"name": "LINES", "subjects": ["lines.>"], "storage": "memory"}
    await api(bus, "STREAM.CREATE", "LINES", lines)
    bucket = {
        "name": "KV_settings",
        "subjects": ["$KV.settings.>"],
        "allow_direct": True,
        "max_msgs_per_subject": 5,
        "storage": "memory",
    }
    await api(bus, "STREAM.CREATE", "KV_settings", bucket)
    await append(bus, "$KV.settings.ui.colour", b'"red"')
    await append(bus, "$KV.settings.db.url", b"not for us")
    for number in range(20):
        await append(bus, "lines.a", str(number).encode())
    await one.client.agents.start("sensing:Streaming", id="reader")

    async def has(count: int) -> bool:
        found = [item for item in await seen(one, "reader") if isinstance(item, int)]
        return len(found) >= count

    await eventually(lambda: has(20), message="what was there is read")
    kill_workers(one, "n1")
    for number in range(20, 200):
        await append(bus, "lines.a", str(number).encode())
    await append(bus, "$KV.settings.ui.colour", b'"blue"')
    await append(bus, "$KV.settings.ui.colour", b"", headers={"KV-Operation": "DEL"})
    await eventually(lambda: has(200), timeout=30, message="what came meanwhile is read")
    found = await seen(one, "reader")
    assert [item for item in found if isinstance(item, int)] == list(range(200))

    async def has_settings() -> bool:
        settings = [item for item in await seen(one, "reader") if not isinstance(item, int)]
        return settings == [
            ["put", "ui.colour", "red"],
            ["put", "ui.colour", "blue"],
            ["del", "ui.colour", None],
        ]

    await eventually(has_settings, message="each change of a setting, in order")
    bus.publish("plant.oven", b'{"temp":180}')

    async def heard() -> bool:
        return ["plant.oven", {"temp": 180}] in await seen(one, "reader")

    await eventually(heard, message="the core message")
    assert (await one.client.agents.state("reader"))["sensors"]["line"]["sequence"] == 200
    await one.client.agents.stop("reader")


async def test_files_that_came_while_the_agent_was_down_are_told(
    one: TestCluster, tmp_path: Path
) -> None:
    """With ``remember``: each change once."""
    (tmp_path / "before.csv").write_text("1")
    (tmp_path / "other.txt").write_text("1")
    await one.client.agents.start("sensing:Filing", id="files", config={"path": str(tmp_path)})

    async def is_seen(*wanted: list[str]) -> bool:
        return await seen(one, "files") == list(wanted)

    first = ["added", "before.csv"]
    await eventually(lambda: is_seen(first), message="what was there")
    await asyncio.sleep(1.4)  # who has a sensor never sleeps
    assert (await one.client.agents.get("files")).status == "running"
    (tmp_path / "new.csv").write_text("1")
    second = ["added", "new.csv"]
    await eventually(lambda: is_seen(first, second), message="what came")
    kill_workers(one, "n1")
    (tmp_path / "before.csv").unlink()
    (tmp_path / "new.csv").write_text("22")
    third, fourth = ["deleted", "before.csv"], ["modified", "new.csv"]
    await eventually(
        lambda: is_seen(first, second, third, fourth), timeout=20, message="what changed meanwhile"
    )
    await one.client.agents.stop("files")


async def test_a_page_is_told_of_when_it_has_changed(one: TestCluster) -> None:
    """By its ETag and by its body; a failing server is asked again; nothing is repeated after a crash."""
    page, status, asked = b'{"price":1}', 200, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                etag = f'"{len(page)}{page[-2:-1].decode()}"'
                asked.append(f"If-None-Match: {etag}".lower().encode() in head.lower())
                said, body = (304, b"") if asked[-1] else (status, page)
                writer.write(
                    f"HTTP/1.1 {said} X\r\nETag: {etag}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        await one.client.agents.start("sensing:Polling", id="prices", config={"url": url})

        async def is_seen(*prices: int) -> bool:
            return await seen(one, "prices") == [{"price": price} for price in prices]

        await eventually(lambda: is_seen(1), message="the first price")
        page = b'{"price":2}'
        await eventually(lambda: is_seen(1, 2), message="the second price")
        status, page = 500, b'{"price":3}'
        count = len(asked)
        await eventually(lambda: len(asked) > count + 2, message="it is asked again")
        kill_workers(one, "n1")
        count = len(asked)
        await eventually(lambda: len(asked) > count, timeout=20, message="it is asked again")
        status = 200
        await eventually(lambda: is_seen(1, 2, 3), timeout=20, message="the third price")
        await eventually(lambda: any(asked), message="it sends the ETag back")
        await one.client.agents.stop("prices")


async def test_sensors_overflow_fail_and_end_as_they_say(one: TestCluster) -> None:
    """None takes its agent down; who keeps failing is known to the agent and among the events."""
    client = one.client
    await client.agents.start("sensing:Zoo", id="zoo")

    async def settled() -> bool:
        found = await state(one, "zoo")
        return (
            len(found.get("slow", ())) == 100
            and len(found["exits"]) >= 2
            and found["metrics"] > 2
            and found["method"] == 7
        )

    await eventually(settled, timeout=20, message="all have been heard")
    found = await state(one, "zoo")
    assert found["oldest"] == [0, 1, 2, 3, 4]
    assert found["newest"] == [95, 96, 97, 98, 99]
    assert found["slow"] == list(range(100))
    assert ["broken", "failed"] in found["exits"]
    assert ["own", "ended"] in found["exits"]
    events = await client.events.list(topic="agent")
    told = [event for event in events if event.what == "sensor_failed"]
    assert told
    assert "the probe is broken" in told[0].message
    assert told[0].data["sensor"] == "broken"
    assert (await client.agents.get("zoo")).status == "running"
    # Started and stopped by handlers, with their commit.
    await client.send("zoo", "more", "fail")
    await client.send("zoo", "more", "start")

    async def more(count: int) -> bool:
        return int((await state(one, "zoo"))["extra"]) >= count

    await eventually(lambda: more(3), message="one more runs")
    await client.send("zoo", "more", "stop")

    async def still() -> bool:
        count = (await state(one, "zoo"))["extra"]
        await asyncio.sleep(0.3)
        return bool((await state(one, "zoo"))["extra"] == count)

    await eventually(still, message="it has stopped")
    await client.agents.stop("zoo")
    await client.agents.start("sensing:Broken", id="broken")

    async def said() -> bool:
        return any(
            "NO_SUCH_SECRET_AT_ALL is not set" in event.message
            for event in await client.events.list(topic="agent")
        )

    await eventually(said, message="what is configured wrongly is told at once")
    await client.agents.stop("broken")
