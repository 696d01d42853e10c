"""Agents by A2A 1.0, used by the official client: cards, messages, streams, and tasks that outlive the gateway."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from a2a.client import Client, ClientConfig, create_client
from a2a.types import (
    CancelTaskRequest,
    GetTaskRequest,
    ListTasksRequest,
    Message,
    Part,
    Role,
    SendMessageConfiguration,
    SendMessageRequest,
    SubscribeToTaskRequest,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
)
from a2a.utils.errors import (
    ContentTypeNotSupportedError,
    InvalidParamsError,
    TaskNotCancelableError,
    TaskNotFoundError,
    UnsupportedOperationError,
)

from foundation_nats import Cluster
from foundation_nats.agent.prompts import Attachment, Reply
from foundation_nats.errors import ConfigError
from foundation_nats.gateways.a2a import (
    CARD,
    A2AGateway,
    _Run,
    joined,
    parts_of,
    read_message,
)
from foundation_nats.gateways.a2a_tasks import Recorded
from foundation_nats.gateways.web import Web
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS
from tests.gateways.serving import served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

COMPLETED = TaskState.TASK_STATE_COMPLETED
FAILED = TaskState.TASK_STATE_FAILED
CANCELED = TaskState.TASK_STATE_CANCELED
WORKING = TaskState.TASK_STATE_WORKING


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node, and an agent that answers."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as running:
        await running.client.agents.start("talkative:Guide", id="guide", critical=True)
        yield running


@asynccontextmanager
async def gateway(cluster: Cluster, **options: Any) -> AsyncIterator[str]:
    """A gateway in this process: its URL."""
    served = A2AGateway(cluster, **options)
    web = Web(served.app(), ("127.0.0.1", 0), token=None)
    await web.open()
    served.url = web.url
    await served.open()
    try:
        yield web.url
    finally:
        await served.close()
        await web.close()


@asynccontextmanager
async def client_of(url: str, *, streaming: bool = False) -> AsyncIterator[Client]:
    """The official client, by the card at *url*."""
    http = httpx.AsyncClient(timeout=30)
    config = ClientConfig(streaming=streaming, httpx_client=http)
    async with http, await create_client(url, config) as client:
        yield client


def message(text: str, id: str = "", **more: Any) -> Message:
    """What a user says."""
    return Message(
        message_id=id or f"m-{text}", role=Role.ROLE_USER, parts=[Part(text=text)], **more
    )


async def send(client: Client, said: Message, *, wait: bool = True) -> Task:
    """The task that the message begins."""
    request = SendMessageRequest(
        message=said, configuration=SendMessageConfiguration(return_immediately=not wait)
    )
    (answer,) = [item async for item in client.send_message(request)]
    return answer.task


def text_of(task: Task) -> str:
    """What the agent has said."""
    return "".join(part.text for item in task.artifacts for part in item.parts)


def test_messages_and_replies_are_translated() -> None:
    """Text, files, data; links are not followed; text that follows on text is one part."""
    from google.protobuf.struct_pb2 import Value  # type: ignore[import-untyped]

    said = Message(
        context_id="c",
        parts=[
            Part(text="look"),
            Part(raw=b"\x00", filename="a.bin", media_type="x/y"),
            Part(data=Value(number_value=3)),
        ],
    )
    prompt = read_message(said)
    assert (prompt.text, prompt.context) == ("look\n3.0", "c")
    assert prompt.attachments[0].data() == b"\x00"
    assert read_message(Message(parts=[Part(raw=b"x", filename="f")])).text == "[f]"
    with pytest.raises(InvalidParamsError):
        read_message(Message())
    with pytest.raises(ContentTypeNotSupportedError):
        read_message(Message(parts=[Part(url="http://x")]))
    task = Task()
    artifact = task.artifacts.add()
    files = [Attachment.of("a", b"b")]
    for reply in (Reply(text="a"), Reply(text="b"), Reply(text="c", attachments=files)):
        joined(artifact, parts_of(reply))
    assert [part.WhichOneof("content") for part in artifact.parts] == ["text", "raw"]
    assert artifact.parts[0].text == "abc"


async def test_messages_become_tasks(nodes: TestCluster) -> None:
    """Cards, answers, files, errors, repeats, lists; of several agents the URL or the tenant says which."""
    async with gateway(nodes.client) as url, httpx.AsyncClient() as http:
        async with client_of(url) as client:
            task = await send(client, message("one two"))
            assert (task.status.state, text_of(task)) == (COMPLETED, "1:one1:two")
            assert task.history[0].parts[0].text == "one two"
            again = await send(client, message("one two"))
            assert (again.id, text_of(again)) == (task.id, "1:one1:two"), "it was handled again"
            assert await client.get_task(GetTaskRequest(id=task.id)) == again
            short = await client.get_task(GetTaskRequest(id=task.id, history_length=0))
            assert (len(short.history), text_of(short)) == (0, "1:one1:two")
            failed = await send(client, message("fail"))
            assert failed.status.state == FAILED
            assert "no such word" in failed.status.message.parts[0].text
            follow = message("three", context_id=task.context_id)
            assert text_of(await send(client, follow)) == "2:three"
            listed = await client.list_tasks(ListTasksRequest(context_id=task.context_id))
            assert [item.history[0].parts[0].text for item in listed.tasks] == ["three", "one two"]
            page = await client.list_tasks(ListTasksRequest(page_size=2))
            assert (len(page.tasks), page.total_size, page.next_page_token) == (2, 3, "2")
            with pytest.raises(TaskNotFoundError):
                await client.get_task(GetTaskRequest(id="0" * 32))
            with pytest.raises(TaskNotCancelableError):
                await client.cancel_task(CancelTaskRequest(id=task.id))
            with pytest.raises(UnsupportedOperationError, match="takes no further messages"):
                await send(client, message("more", task_id=task.id))

        await nodes.client.agents.start("talkative:Clerk", id="clerk")

        async def both() -> bool:
            return len((await http.get(url + CARD)).json()["skills"]) == 2

        await eventually(both)

        async def described() -> bool:
            """Soon: a node is asked what the class says of itself."""
            card = (await http.get(f"{url}/agents/clerk{CARD}")).json()
            return bool(card["description"] == "Returns attachments, and counts them.")

        await eventually(described, message="its card says what its class says")
        card = (await http.get(f"{url}/agents/clerk{CARD}")).json()
        assert card["supportedInterfaces"][0]["url"] == f"{url}/agents/clerk"
        assert (await http.get(f"{url}/agents/nobody{CARD}")).status_code == 404
        async with client_of(f"{url}/agents/clerk") as clerk:
            file = Message(
                message_id="f",
                role=Role.ROLE_USER,
                parts=[Part(raw=b"abc", filename="a.txt", media_type="text/plain")],
            )
            task = await send(clerk, file)
            text, back = task.artifacts[0].parts
            assert (text.text, back.raw, back.filename) == ("1 files", b"cba", "A.TXT")
            with pytest.raises(ContentTypeNotSupportedError):
                await send(clerk, Message(message_id="u", parts=[Part(url="http://x")]))
        async with client_of(url) as client:
            with pytest.raises(InvalidParamsError, match="Say which agent is meant"):
                await send(client, message("x"))
            request = SendMessageRequest(tenant="guide", message=message("by tenant"))
            (answer,) = [item async for item in client.send_message(request)]
            assert text_of(answer.task) == "3:by3:tenant"
        old = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "message/send",
            "params": {
                "message": {
                    "kind": "message",
                    "messageId": "v03",
                    "role": "user",
                    "parts": [{"kind": "text", "text": "old"}],
                }
            },
        }
        said = (await http.post(f"{url}/agents/guide", json=old)).json()
        assert said["result"]["artifacts"][0]["parts"][0]["text"] == "4:old"


async def test_streams_come_piece_by_piece_and_can_be_ended(nodes: TestCluster) -> None:
    """Who leaves may come back; a canceled handler leaves no trace."""
    async with gateway(nodes.client) as url, client_of(url, streaming=True) as client:
        events = [
            event
            async for event in client.send_message(SendMessageRequest(message=message("a b c")))
        ]
        kinds = [event.WhichOneof("payload") for event in events]
        assert kinds == ["task", *["artifact_update"] * 3, "status_update"]
        pieces = [e.artifact_update for e in events if e.HasField("artifact_update")]
        assert [item.artifact.parts[0].text for item in pieces] == ["1:a", "1:b", "1:c"]
        assert [item.append for item in pieces] == [False, True, True]
        assert events[-1].status_update.status.state == COMPLETED
        task = await client.get_task(GetTaskRequest(id=events[0].task.id))
        assert text_of(task) == "1:a1:b1:c"

        stream = client.send_message(SendMessageRequest(message=message("x wait")))
        first = await anext(stream)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        id = first.task.id
        seen = await client.get_task(GetTaskRequest(id=id))
        assert (seen.status.state, text_of(seen)) == (WORKING, "2:x")
        following = client.subscribe(SubscribeToTaskRequest(id=id))
        assert text_of((await anext(following)).task) == "2:x"
        ended = await client.cancel_task(CancelTaskRequest(id=id))
        assert ended.status.state == CANCELED
        (last,) = [event async for event in following]
        assert last.status_update.status.state == CANCELED
        events = [e async for e in client.send_message(SendMessageRequest(message=message("y")))]
        assert events[1].artifact_update.artifact.parts[0].text == "2:y", (
            "what was canceled is kept"
        )
        big = message("big big")
        events = [e async for e in client.send_message(SendMessageRequest(message=big))]
        status = events[-1].status_update.status
        assert status.state == FAILED
        assert "exceeds the server's limit" in status.message.parts[0].text
        with pytest.raises(UnsupportedOperationError):
            [e async for e in client.subscribe(SubscribeToTaskRequest(id=id))]


async def test_the_next_gateway_goes_on(nodes: TestCluster, tmp_path: Path) -> None:
    """With what was sent; what was streamed has failed. Canceled is canceled, whatever the agent does."""
    mark = tmp_path / "go"
    async with gateway(nodes.client) as url, client_of(url) as client:
        task = await send(client, message(f"hold {mark}"), wait=False)
        unwanted = await send(client, message("never"), wait=False)
        assert (task.status.state, unwanted.status.state) == (WORKING, WORKING)
        ended = await client.cancel_task(CancelTaskRequest(id=unwanted.id))
        assert ended.status.state == CANCELED
        assert "may have handled it" in ended.status.message.parts[0].text
    async with gateway(nodes.client) as url, client_of(url) as client:
        assert (await client.get_task(GetTaskRequest(id=task.id))).status.state == WORKING
        mark.touch()
        waited = await send(client, message(f"hold {mark}"))
        assert (waited.id, waited.status.state) == (task.id, COMPLETED)
        assert text_of(waited) == f"1:hold1:{mark}"
        seen = await client.get_task(GetTaskRequest(id=unwanted.id))
        assert (seen.status.state, text_of(seen)) == (CANCELED, "")
        async with client_of(url, streaming=True) as streaming:
            stream = streaming.send_message(SendMessageRequest(message=message("wait")))
            id = (await anext(stream)).task.id
            await stream.aclose()  # type: ignore[attr-defined]
    async with gateway(nodes.client, keep_s=1) as url, client_of(url) as client:
        brief = await send(client, message("bye"))
        assert brief.status.state == COMPLETED
        stopped = await client.get_task(GetTaskRequest(id=id))
        assert stopped.status.state == FAILED
        assert "stopped in the middle" in stopped.status.message.parts[0].text

        async def forgotten() -> bool:
            try:
                await client.get_task(GetTaskRequest(id=brief.id))
            except TaskNotFoundError:
                return True
            return False

        await eventually(forgotten)


async def test_who_reads_slowly_gets_it_all_at_once() -> None:
    """What waits for a listener is bounded."""
    run = _Run(Recorded("a", "streamed", "g", 0.0, Task(id="t")))
    queue: asyncio.Queue[Any] = asyncio.Queue(2)
    run.subscribers.add(queue)
    for _ in range(3):
        run.tell(TaskArtifactUpdateEvent(task_id="t"))
    assert queue.get_nowait() == Task(id="t")
    assert queue.empty()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to install it."""
    monkeypatch.setitem(sys.modules, "a2a.server.context", None)
    monkeypatch.delitem(sys.modules, "foundation_nats.gateways.a2a")
    with pytest.raises(ConfigError, match=r"needs a2a.*'foundation-nats\[a2a\]'"):
        importlib.import_module("foundation_nats.gateways.a2a")


@pytest.mark.usefixtures("chaos")
async def test_a_task_outlives_its_gateway_and_its_agent(
    nodes: TestCluster, tmp_path: Path
) -> None:
    """Both are killed in the middle: the next gateway goes on with what was sent; what was streamed has failed."""
    mark = tmp_path / "died"

    async with (
        served(nodes, "gateway", "a2a") as (url, process),
        client_of(url, streaming=True) as client,
    ):
        stream = client.send_message(SendMessageRequest(message=message("s wait")))
        streamed = (await anext(stream)).task.id
        assert (await anext(stream)).HasField("artifact_update")
        async with client_of(url) as other:
            task = await send(other, message(f"die-once {mark}"), wait=False)
            assert task.status.state == WORKING
        process.kill()
        await process.wait()
        with pytest.raises(Exception):  # noqa: B017 - however the client puts it
            await anext(stream)
    # The agent is at what was streamed until it finds that nobody listens; nobody has to wait for that.
    for worker in nodes.nodes["n1"].workers():
        worker.kill()
    async with served(nodes, "gateway", "a2a") as (url, process), client_of(url) as client:

        async def done(id: str, state: int) -> Task | None:
            found = await client.get_task(GetTaskRequest(id=id))
            return found if found.status.state == state else None

        over = await eventually(lambda: done(task.id, COMPLETED), timeout=30)
        assert over is not None
        assert text_of(over) == f"1:die-once1:{mark}"
        assert mark.exists()
        broken = await eventually(lambda: done(streamed, FAILED), timeout=30)
        assert broken is not None
        assert "may have handled it" in broken.status.message.parts[0].text
        again = await send(client, message(f"die-once {mark}"))
        assert (again.id, text_of(again)) == (task.id, text_of(over))
        assert text_of(await send(client, message("next"))) == "2:next"
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
