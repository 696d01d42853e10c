"""Agents by the Synadia Agent Protocol, seen by its official client."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from synadia_ai.agents import (
    Agent,
    Agents,
    Attachment,
    DiscoverFilter,
    ProtocolError,
    ResponseChunk,
    StatusChunk,
)

from foundation_nats.errors import BusError
from foundation_nats.gateways.nats_agents import NatsAgents, code_of, read_prompt
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """Two nodes, without agents."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as running:
        yield running


@pytest.fixture
async def connection(nodes: TestCluster) -> AsyncIterator[nats.NATS]:
    """Somebody else's."""
    connection = await nats.connect(nodes.server.url)
    yield connection
    await connection.close()


@pytest.fixture
async def client(connection: nats.NATS) -> AsyncIterator[Agents]:
    """The official client."""
    agents = Agents(nc=connection)
    yield agents
    await agents.close()


async def find(client: Agents, session: str, agent: str | None = None) -> Agent:
    """One agent, once it is seen."""
    wanted = DiscoverFilter(session_name=session, agent=agent)

    async def found() -> Agent | None:
        seen = await client.discover(filter=wanted, stall=0.1)
        return seen[0] if seen else None

    agent_ = await eventually(found)
    assert agent_ is not None
    return agent_


async def say(agent: Agent, text: str, **options: object) -> list[str]:
    """The text of each piece of the answer."""
    chunks = [item async for item in agent.prompt(text, **options)]  # type: ignore[arg-type]
    assert isinstance(chunks[0], StatusChunk)
    assert chunks[0].status == "ack"
    return [item.text for item in chunks if isinstance(item, ResponseChunk)]


async def test_agents_are_found_prompted_and_gone(
    nodes: TestCluster, client: Agents, connection: nats.NATS
) -> None:
    """Streams, attachments, errors, heartbeats, status; whole deployments, too; not the mute."""
    cluster = nodes.client
    await cluster.agents.start("talkative:Guide", id="guide")
    await cluster.agents.start("talkative:Mute", id="mute")
    gateway = NatsAgents(cluster, beat_s=1)
    await gateway.open()
    try:
        guide = await find(client, "guide")
        assert (guide.agent, guide.owner) == ("guide", "test")
        assert guide.description == "Repeats what it is told, word by word."
        assert guide.prompt_endpoint.max_payload_bytes == 1024 * 1024 - 64 * 1024
        assert await say(guide, "one two three") == ["1:one", "1:two", "1:three"]
        assert await say(guide, "four") == ["2:four"]
        with pytest.raises(ProtocolError, match=r"500.*no such word"):
            await say(guide, "fail")
        assert await say(guide, "five") == ["3:five"], "what failed was kept"
        inbox = connection.new_inbox()
        subscription = await connection.subscribe(inbox)
        await connection.publish(guide.prompt_subject, b"{", reply=inbox)
        failed = await subscription.next_msg(timeout=5)
        assert (failed.headers or {})["Nats-Service-Error-Code"] == "400"
        end = await subscription.next_msg(timeout=5)
        assert (end.data, end.headers) == (b"", None)
        pulse = await guide.status()
        assert (pulse.session, pulse.instance_id) == ("guide", guide.instance_id)
        assert await client.ping(guide.instance_id)
        await eventually(
            lambda: (seen := client.liveness(guide.instance_id)) is not None and seen.is_online
        )

        # Those that come later, and a deployment of which any may answer.
        await cluster.deployments.deploy(
            "version: 1\nagents: [{name: desk, run: 'talkative:Clerk', replicas: 2}]"
        )
        clerk = await find(client, "desk-1")
        chunks = [
            item
            async for item in clerk.prompt(
                "keep", attachments=[Attachment.from_bytes("a.txt", b"abc")]
            )
        ]
        (reply,) = [item for item in chunks if isinstance(item, ResponseChunk)]
        assert reply.text == "1 files"
        assert reply.attachments is not None
        assert reply.attachments[0].filename == "A.TXT"
        assert reply.attachments[0].to_bytes() == b"cba"
        whole = await find(client, "default", "desk")
        assert (await say(whole, "any"))[0].endswith("files")

        found = {(a.agent, a.session_name) for a in await client.discover(stall=0.2)}
        assert found == {
            ("guide", "guide"),
            ("desk", "desk-0"),
            ("desk", "desk-1"),
            ("desk", "default"),
        }
        await cluster.agents.stop("guide")
        await eventually(lambda: not any("guide" in subject for subject in gateway.served))
        assert not await client.ping(guide.instance_id, timeout=1.0)
    finally:
        await gateway.close()
    assert await client.discover(stall=0.2) == []


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (b" ", "empty"),
        (b"{", "neither text nor JSON"),
        (b"\xff", "neither text nor JSON"),
        (b'{"prompt": ""}', "prompt: String should have"),
        (b'{"attachments": []}', "prompt"),
        (b'{"prompt": "x", "attachments": [{"filename": "f", "content": "?"}]}', "base64"),
        (b"x" * 2049, "max_payload 2KB"),
    ],
)
def test_bad_requests_are_refused(payload: bytes, word: str) -> None:
    """By an error that says what is wrong, with the protocol's number for it."""
    with pytest.raises(BusError, match=word) as raised:
        read_prompt(payload, 2048)
    assert code_of(raised.value) == 400


def test_requests_are_text_or_json() -> None:
    """What the envelope has besides is kept."""
    assert read_prompt(b"hello", 99).text == "hello"
    found = read_prompt(b' {"prompt": "hi", "x": [1], "attachments": null}', 99)
    assert (found.text, found.attachments, found.metadata) == ("hi", [], {"x": [1]})


async def test_a_killed_node_is_waited_out(nodes: TestCluster, client: Agents) -> None:
    """kill -9 of the agent's node between two prompts: the next is answered, with the state.

    One whose answer had begun ends with an error that says so, in seconds; nothing of it is kept.
    """
    cluster = nodes.client
    await cluster.agents.start("talkative:Guide", id="guide", critical=True)
    gateway = NatsAgents(cluster)
    await gateway.open()
    try:
        guide = await find(client, "guide")
        assert await say(guide, "before") == ["1:before"]
        node = (await cluster.agents.get("guide")).node
        assert node is not None
        begun = guide.prompt("unfinished wait", timeout=60)
        assert isinstance(await anext(begun), StatusChunk)
        assert isinstance(await anext(begun), ResponseChunk)
        nodes.nodes[node].kill_all()
        async with asyncio.timeout(15):
            with pytest.raises(ProtocolError, match=r"50[34].*in the middle of its answer"):
                await anext(begun)
        assert await say(guide, "after", timeout=30) == ["2:after"]
        info = await cluster.agents.get("guide")
        assert info.recovered_from is not None
        assert (info.recovered_from.node, info.node != node) == (node, True)
    finally:
        await gateway.close()


async def test_a_stored_prompt_survives_the_death_of_its_agent(
    nodes: TestCluster, client: Agents, tmp_path: Path
) -> None:
    """The agent's worker dies in the middle; the prompt is handled once, and answered."""
    cluster = nodes.client
    await cluster.agents.start("talkative:Guide", id="guide", critical=True)
    gateway = NatsAgents(cluster, stored=True)
    await gateway.open()
    try:
        guide = await find(client, "guide")
        mark = tmp_path / "died"
        answer = await say(guide, f"die-once {mark}", timeout=30)
        assert answer == ["1:die-once", f"1:{mark}"]
        assert mark.exists()
        assert await say(guide, "next") == ["2:next"]
        with pytest.raises(ProtocolError, match=r"500.*no such word"):
            await say(guide, "fail", timeout=30)
    finally:
        await gateway.close()


async def test_the_command_serves_and_ends(nodes: TestCluster, client: Agents) -> None:
    """Two of them: one is killed, the other goes on; SIGTERM ends it with 0."""
    await nodes.client.agents.start("talkative:Guide", id="guide")
    command = [sys.executable, "-m", "foundation_cli.main", "gateway", "nats-agents"]
    command += ["-s", nodes.server.url, "-c", "test", "--owner", "Me", "capability:prompt"]
    both = [
        await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for process in both:
            assert process.stderr is not None
            first = await asyncio.wait_for(process.stderr.readline(), 20)
            assert b"Serving 1 agents" in first
            assert b"agents.prompt.guide.TWU.guide" in await process.stderr.readline()
        seen = await client.discover(stall=0.2)
        assert len({agent.instance_id for agent in seen}) == 2
        for number in range(4):
            assert await say(seen[0], "x") == [f"{number + 1}:x"]
        both[0].kill()
        await both[0].wait()
        assert await say(seen[0], "x") == ["5:x"]
        both[1].terminate()
        assert await asyncio.wait_for(both[1].wait(), 10) == 0
    finally:
        for process in both:
            if process.returncode is None:
                process.kill()
                await process.wait()
