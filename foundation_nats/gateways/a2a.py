"""`A2AGateway`: agents that answer prompts, by A2A 1.0: JSON-RPC over HTTP, served by the official SDK.

Each message begins a task, which is written down before anything else and outlives this process: see
`a2a_tasks`. A task of ``SendMessage`` is a stored question to the agent under the task's id: handled exactly once,
through the death of the agent and of the gateway; whichever gateway comes next goes on with it. The same
message sent again is the same task. A task of ``SendStreamingMessage`` is told piece by piece while it is
made, and can't be gone on with: if its gateway dies it has failed, and says that it may have been handled.

A gateway that has taken a task answers on a subject of its own. Others look now and then whether those that hold
open tasks still do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.metadata import version
from secrets import token_hex
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from foundation_nats.agent.prompts import Attachment, Prompt, Reply
from foundation_nats.api.cluster import Cluster
from foundation_nats.base.clock import wall_ms
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.rpc import REPLY_PREFIX, to_json
from foundation_nats.bus.wire import Message as WireMessage
from foundation_nats.bus.wire import Route as WireRoute
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    FoundationError,
    NoRespondersError,
)
from foundation_nats.gateways.prompting import Prompter
from foundation_nats.gateways.roster import Listed, Roster
from foundation_nats.gateways.web import App, missing

try:
    from a2a.server.context import ServerCallContext
    from a2a.server.request_handlers import RequestHandler
    from a2a.server.request_handlers.response_helpers import agent_card_to_dict
    from a2a.server.routes.common import DefaultServerCallContextBuilder
    from a2a.server.routes.jsonrpc_routes import create_jsonrpc_routes
    from a2a.types import (
        AgentCapabilities,
        AgentCard,
        AgentInterface,
        AgentSkill,
        Artifact,
        CancelTaskRequest,
        GetTaskRequest,
        ListTasksRequest,
        ListTasksResponse,
        Message,
        Part,
        Role,
        SendMessageRequest,
        SubscribeToTaskRequest,
        Task,
        TaskArtifactUpdateEvent,
        TaskState,
        TaskStatus,
        TaskStatusUpdateEvent,
    )
    from a2a.utils.errors import (
        ContentTypeNotSupportedError,
        ExtendedAgentCardNotConfiguredError,
        InternalError,
        InvalidParamsError,
        PushNotificationNotSupportedError,
        TaskNotCancelableError,
        TaskNotFoundError,
        UnsupportedOperationError,
    )
    from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from foundation_nats.gateways.a2a_tasks import (
        OVER,
        STORED,
        STREAMED,
        Recorded,
        TaskBook,
    )
except ImportError as error:
    raise missing("a2a", error) from error

CARD = "/.well-known/agent-card.json"
PROTOCOL = "1.0"
RUNS_MAX = 1000
"""Tasks that one gateway is at; more are refused."""
MESSAGE_MAX = 512 * 1024
"""Bytes of one message."""
PAGE_MAX = 100
EVENTS_MAX = 1000
"""That wait for one listener."""
_SWEEP_S = 5.0
_POLL_S = 0.5
_MODES = ["text/plain", "application/json", "application/octet-stream"]
_FOREVER = 10 * 365 * 86400.0

Event = Task | TaskStatusUpdateEvent | TaskArtifactUpdateEvent


@dataclass(slots=True)
class _Run:
    """A task that this process is at."""

    record: Recorded
    subscribers: set[asyncio.Queue[Event]] = field(default_factory=set)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    job: asyncio.Task[None] | None = None

    def tell(self, event: Event) -> None:
        for queue in self.subscribers:
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                # Who reads so slowly gets it all at once, instead of piece by piece.
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(_copied(self.record.task))


class A2AGateway(RequestHandler):
    """The gateway; `open` it, serve `app`, and `close` it."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        only: Collection[str] = (),
        patience_s: float = 30.0,
        answer_s: float = 300.0,
        keep_s: float = 86400.0,
    ) -> None:
        """Make one.

        Args:
            only: agents, ``deployment:NAME`` or ``capability:NAME``; empty: all that answer prompts.
            answer_s: how long a request waits for its task; the task goes on.
            keep_s: how long a task that is over is kept.

        Raises:
            ConfigError: an argument is wrong.
        """
        self._cluster = cluster
        self._roster = Roster(cluster, only)
        self._prompter = Prompter(cluster, patience_s=patience_s, answer_s=answer_s)
        self._book = TaskBook(cluster, keep_s=keep_s)
        self._answer_s = answer_s
        self.id = token_hex(8)
        """Of this process."""
        self.url = "http://127.0.0.1"
        """Where others reach it; in the cards."""
        self._runs: dict[str, _Run] = {}
        self._route: WireRoute | None = None
        self._scope: TaskScope | None = None
        self._beginning: set[str] = set()
        """Tasks that are being written down, and have no run yet."""
        self._doubted: set[str] = set()
        """Gateways that did not answer at the last look."""
        self._log = get_logger("gateway").bind(protocol="a2a")

    # ---- life -------------------------------------------------------------------

    async def open(self) -> None:
        """Follow agents and tasks, and go on with those that a gateway has left.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        self._scope = TaskScope("a2a")
        try:
            self._route = self._cluster.bus.subscribe(
                self._cluster.subjects.gateway(self.id), self._on_probe
            )
            await self._roster.open(self._scope)
            self._book.subscribe(lambda line: self._on_line(line.id, line.state))
            await self._book.open(self._scope)
        except BaseException:
            await self.close()
            raise
        self._scope.start(self._sweep(), "sweep")

    async def close(self) -> None:
        """Let go of all tasks: the stored ones wait for the next gateway, the others fail. Idempotent."""
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            if run.job is not None:
                run.job.cancel()
        if runs:
            await asyncio.wait([run.job for run in runs if run.job is not None], timeout=3.0)
        for run in runs:
            if run.record.mode == STREAMED:
                with suppress(FoundationError, TimeoutError):
                    async with asyncio.timeout(3.0):
                        await self._finish(run, TaskState.TASK_STATE_FAILED, _STOPPED)
        if self._route is not None:
            self._cluster.bus.unsubscribe(self._route)
            self._route = None
        if self._scope is not None:
            await self._scope.close()

    def _on_probe(self, message: WireMessage) -> None:
        if message.reply.startswith(REPLY_PREFIX):
            with suppress(BusError):
                self._cluster.bus.publish(message.reply, b"{}")

    # ---- HTTP -----------------------------------------------------------------------

    def app(self) -> App:
        """The ASGI application: cards and JSON-RPC, of each agent and of the whole."""
        return Starlette(
            routes=[
                Route(CARD, self._root_card, methods=["GET"]),
                Route("/agents/{agent}" + CARD, self._agent_card, methods=["GET"]),
                *self._rpc("/"),
                *self._rpc("/agents/{agent}"),
            ]
        )

    def _rpc(self, path: str) -> list[Route]:
        return create_jsonrpc_routes(
            self, path, context_builder=_ContextBuilder(), enable_v0_3_compat=True
        )

    async def _root_card(self, _request: Request) -> Response:
        listed = self._roster.all()
        if len(listed) == 1:
            return JSONResponse(agent_card_to_dict(self.card_of(listed[0])))
        return JSONResponse(agent_card_to_dict(self.card()))

    async def _agent_card(self, request: Request) -> Response:
        found = self._roster.get(request.path_params["agent"])
        if found is None:
            return JSONResponse({"error": "there is no such agent"}, status_code=404)
        return JSONResponse(agent_card_to_dict(self.card_of(found)))

    def card_of(self, item: Listed) -> AgentCard:
        """The card of one agent."""
        url = f"{self.url}/agents/{item.id}"
        return self._card(
            item.id,
            item.description or f"The agent {item.id}.",
            [_interface(url)],
            [_skill(item, "prompt")],
        )

    def card(self) -> AgentCard:
        """The card of all of them: a skill for each; `tenant` says which is meant."""
        listed = self._roster.all()
        names = ", ".join(item.id for item in listed[:20])
        return self._card(
            self._cluster.name,
            f"Agents of the cluster {self._cluster.name}: {names or 'none just now'}. Each has a card "
            f"of its own at /agents/ID{CARD}.",
            [_interface(self.url + "/")] + [_interface(self.url + "/", item.id) for item in listed],
            [_skill(item, item.id) for item in listed],
        )

    def _card(
        self,
        name: str,
        description: str,
        interfaces: Sequence[AgentInterface],
        skills: Sequence[AgentSkill],
    ) -> AgentCard:
        return AgentCard(
            name=name,
            description=description,
            version=version("foundation-nats"),
            supported_interfaces=interfaces,
            capabilities=AgentCapabilities(streaming=True, push_notifications=False),
            default_input_modes=_MODES,
            default_output_modes=_MODES,
            skills=skills,
        )

    # ---- messages ---------------------------------------------------------------------

    async def on_message_send(
        self, params: SendMessageRequest, context: ServerCallContext
    ) -> Task | Message:
        """Begin a task (or find it, if this message has begun one), and wait for it unless told not to."""
        run = await self._begin(params, context, STORED)
        if isinstance(run, Recorded):
            return _cut(run.task, _history(params))
        if not params.configuration.return_immediately:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._answer_s):
                    await run.done.wait()
        return _cut(run.record.task, _history(params))

    async def on_message_send_stream(
        self, params: SendMessageRequest, context: ServerCallContext
    ) -> AsyncGenerator[Any, None]:
        """Begin a task, and tell of it while it is made; who stops listening does not stop it."""
        run = await self._begin(params, context, STREAMED)
        if isinstance(run, Recorded):
            yield run.task
            return
        async for event in self._follow(run):
            yield event

    async def _begin(
        self, params: SendMessageRequest, context: ServerCallContext, mode: str
    ) -> _Run | Recorded:
        """The run of the task that this message begins; a record: it is over, or somebody else's."""
        agent = self._agent_of(params, context)
        message = params.message
        if message.task_id:
            known = await self._book_get(message.task_id)
            if known is None or known.agent != agent:
                raise TaskNotFoundError
            raise UnsupportedOperationError(
                f"Task {known.task.id} takes no further messages: begin a new one, "
                "with the same contextId."
            )
        if message.ByteSize() > MESSAGE_MAX:
            raise InvalidParamsError(f"A message may have {MESSAGE_MAX:,} bytes.")
        read_message(message)
        if len(self._runs) >= RUNS_MAX:
            raise InternalError(f"This gateway is at {RUNS_MAX:,} tasks already: try again.")
        record = _new_record(agent, mode, self.id, message)
        self._beginning.add(record.task.id)
        try:
            record, is_new = await self._book.begin(record)
            return self._begun(record, is_new)
        except FoundationError as error:
            raise InternalError(str(error)) from error
        finally:
            self._beginning.discard(record.task.id)

    def _begun(self, record: Recorded, is_new: bool) -> _Run | Recorded:
        run = self._runs.get(record.task.id)
        if run is not None or record.is_over:
            return run or record
        if not is_new and record.by != self.id and record.mode == STREAMED:
            return record
        return self._start(record)

    def _agent_of(self, params: Any, context: ServerCallContext) -> str:
        name = context.state.get("agent") or context.tenant
        listed = self._roster.all()
        if not name and len(listed) == 1:
            name = listed[0].id
        if not name:
            names = ", ".join(item.id for item in listed[:20]) or "none just now"
            raise InvalidParamsError(
                f"Say which agent is meant, by /agents/ID in the URL or as tenant: {names}."
            )
        if self._roster.get(name) is None:
            raise InvalidParamsError(f"There is no agent {name!r} that answers prompts here.")
        return str(name)

    async def _follow(self, run: _Run) -> AsyncGenerator[Event, None]:
        queue: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        run.subscribers.add(queue)
        try:
            yield _copied(run.record.task)
            while not (run.done.is_set() and queue.empty()):
                taking = asyncio.ensure_future(queue.get())
                ending = asyncio.ensure_future(run.done.wait())
                try:
                    await asyncio.wait({taking, ending}, return_when=asyncio.FIRST_COMPLETED)
                    if taking.done():
                        yield taking.result()
                finally:
                    taking.cancel()
                    ending.cancel()
        finally:
            run.subscribers.discard(queue)

    # ---- work -----------------------------------------------------------------------

    def _start(self, record: Recorded) -> _Run:
        assert self._scope is not None
        run = _Run(record)
        self._runs[record.task.id] = run
        run.job = self._scope.start(self._work(run), "task")
        return run

    async def _work(self, run: _Run) -> None:
        id = run.record.task.id
        try:
            try:
                prompt = read_message(run.record.task.history[0])
                if run.record.mode == STORED:
                    await self._ask_stored(run, prompt)
                else:
                    async for reply in self._prompter.stream(run.record.agent, prompt):
                        self._add(run, [reply])
                await self._finish(run, TaskState.TASK_STATE_COMPLETED, None)
            except FoundationError as error:
                self._log.info("task failed", task=id, error=str(error))
                await self._finish(run, TaskState.TASK_STATE_FAILED, _told(error))
        except BusError as error:
            # It is open, and nobody's: the next look finds it.
            self._log.warning("task not written down", task=id, error=str(error))
        finally:
            if self._runs.get(id) is run:
                del self._runs[id]
            run.done.set()
        if run.record.mode == STORED and run.record.is_over:
            await self._prompter.forget(_box(id))

    async def _ask_stored(self, run: _Run, prompt: Prompt) -> None:
        id = run.record.task.id

        async def still() -> bool:
            known = await self._book.get(id)
            canceled = known is not None and known.task.status.state == _CANCELED
            # Of a canceled one the answer is waited for, to be thrown away.
            return known is not None and (not known.is_over or canceled)

        replies = await self._prompter.ask_stored(
            run.record.agent,
            id,
            prompt,
            box=_box(id),
            since=run.record.asked,
            still=still,
            answer_s=_FOREVER,
        )
        self._add(run, replies or [])

    def _add(self, run: _Run, replies: Sequence[Reply]) -> None:
        task = run.record.task
        parts = [part for reply in replies for part in parts_of(reply)]
        if not parts:
            return
        is_first = not task.artifacts
        if is_first:
            task.artifacts.append(Artifact(artifact_id="answer", name="answer"))
        joined(task.artifacts[0], parts)
        run.tell(
            TaskArtifactUpdateEvent(
                task_id=task.id,
                context_id=task.context_id,
                artifact=Artifact(artifact_id="answer", name="answer", parts=parts),
                append=not is_first,
            )
        )

    async def _finish(self, run: _Run, state: int, text: str | None) -> None:
        """Write down how it has ended, unless somebody else has; and tell those that listen."""
        made = run.record.task

        def step(known: Recorded) -> Recorded | None:
            if known.is_over:
                return None
            task = _copied(known.task)
            task.status.CopyFrom(_status(state, task, text))
            if state == TaskState.TASK_STATE_COMPLETED:
                task.artifacts.extend(made.artifacts)
            return replace(known, task=task)

        found = await self._book.change(made.id, step)
        if found is not None:
            run.record = found
            task = found.task
            run.tell(
                TaskStatusUpdateEvent(
                    task_id=task.id, context_id=task.context_id, status=task.status
                )
            )

    # ---- tasks ------------------------------------------------------------------------

    async def on_get_task(self, params: GetTaskRequest, context: ServerCallContext) -> Task | None:
        """A task, as it is stored; what a running one has said so far, if it runs here."""
        run = self._runs.get(params.id)
        if run is not None:
            return _cut(run.record.task, _history(params))
        known = await self._book_get(params.id)
        return None if known is None else _cut(known.task, _history(params))

    async def on_list_tasks(
        self, params: ListTasksRequest, context: ServerCallContext
    ) -> ListTasksResponse:
        """Tasks, the latest first."""
        agent = context.state.get("agent") or context.tenant
        size = params.page_size if params.HasField("page_size") else 50
        if not 1 <= size <= PAGE_MAX:
            raise InvalidParamsError(f"pageSize must be 1 to {PAGE_MAX}.")
        if params.page_token and not params.page_token.isdecimal():
            raise InvalidParamsError("This pageToken is none of ours.")
        after = params.status_timestamp_after.ToNanoseconds() / 1e9
        found = sorted(
            (
                line
                for line in self._book.lines.values()
                if (not agent or line.agent == agent)
                and (not params.context_id or line.context == params.context_id)
                and (not params.status or line.state == params.status)
                and line.changed >= after
            ),
            key=lambda line: (-line.changed, line.id),
        )
        start = int(params.page_token or 0)
        page = found[start : start + size]
        records = [await self._book_get(line.id) for line in page]
        tasks = [_cut(item.task, _history(params)) for item in records if item is not None]
        if not params.include_artifacts:
            for task in tasks:
                del task.artifacts[:]
        more = start + size < len(found)
        return ListTasksResponse(
            tasks=tasks,
            next_page_token=str(start + size) if more else "",
            page_size=size,
            total_size=len(found),
        )

    async def on_cancel_task(
        self, params: CancelTaskRequest, context: ServerCallContext
    ) -> Task | None:
        """End a task. A streamed one's handler is ended, and nothing of it is kept; a stored one may be handled."""
        if await self._book_get(params.id) is None:
            return None

        def step(known: Recorded) -> Recorded | None:
            if known.is_over:
                raise TaskNotCancelableError
            task = _copied(known.task)
            text = None if known.mode == STREAMED else _MAY_BE_HANDLED
            task.status.CopyFrom(_status(_CANCELED, task, text))
            return replace(known, task=task)

        try:
            after = await self._book.change(params.id, step)
        except FoundationError as error:
            raise InternalError(str(error)) from error
        if after is None:
            return None
        self._on_line(params.id, _CANCELED)
        return after.task

    def _on_line(self, id: str, state: int) -> None:
        """A task has changed: if it was ended by somebody else, so are those that listen here."""
        run = self._runs.get(id)
        if run is None or run.done.is_set() or state != _CANCELED:
            return
        if run.record.task.status.state == _CANCELED:
            return
        task = run.record.task
        text = None if run.record.mode == STREAMED else _MAY_BE_HANDLED
        task.status.CopyFrom(_status(_CANCELED, task, text))
        run.tell(TaskStatusUpdateEvent(task_id=id, context_id=task.context_id, status=task.status))
        run.done.set()
        if run.record.mode == STREAMED and run.job is not None:
            run.job.cancel()

    async def on_subscribe_to_task(
        self, params: SubscribeToTaskRequest, context: ServerCallContext
    ) -> AsyncGenerator[Any, None]:
        """Tell of a task from now on; of one that runs elsewhere, when it is over."""
        run = self._runs.get(params.id)
        if run is not None:
            async for event in self._follow(run):
                yield event
            return
        known = await self._book_get(params.id)
        if known is None:
            raise TaskNotFoundError
        if known.is_over:
            raise UnsupportedOperationError("The task is over: get it.")
        yield known.task
        while not known.is_over:
            await asyncio.sleep(_POLL_S)
            known = await self._book_get(params.id)
            if known is None:
                return
        yield known.task

    async def _book_get(self, id: str) -> Recorded | None:
        if not id.replace("-", "").isalnum():
            return None
        try:
            return await self._book.get(id)
        except FoundationError as error:
            raise InternalError(str(error)) from error

    # ---- what other gateways have left ------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            try:
                await self._take_over()
            except FoundationError as error:
                self._log.info("open tasks not looked at", error=str(error))
            await asyncio.sleep(_SWEEP_S)

    async def _take_over(self) -> None:
        left = [
            line
            for line in self._book.lines.values()
            if line.state not in OVER
            and line.id not in self._runs
            and line.id not in self._beginning
        ]
        dead: set[str] = set()
        for by in {line.by for line in left} - {self.id}:
            try:
                await self._cluster.bus.request(
                    self._cluster.subjects.gateway(by), b"", timeout=2.0
                )
            except NoRespondersError:
                dead.add(by)
            except BusTimeoutError:
                pass  # it may be slow
        # One that streams loses its task to a wrong opinion: twice in a row, then.
        sure, self._doubted = dead & self._doubted, dead
        for line in left:
            if line.by == self.id or (line.by in dead and line.mode == STORED) or line.by in sure:
                await self._adopt(line.id, {self.id, *dead})

    async def _adopt(self, id: str, owners: set[str]) -> None:
        def step(known: Recorded) -> Recorded | None:
            if known.is_over or known.by not in owners:
                return None
            return replace(known, by=self.id)

        found = await self._book.change(id, step)
        if found is None or found.is_over or found.by != self.id:
            return
        if id in self._runs or id in self._beginning:
            return
        if found.mode == STORED:
            self._start(found)
        else:
            await self._finish(_Run(found), TaskState.TASK_STATE_FAILED, _BROKEN_OFF)

    # ---- not offered --------------------------------------------------------------------

    async def on_create_task_push_notification_config(self, params: Any, context: Any) -> Any:
        """Not offered."""
        raise PushNotificationNotSupportedError

    async def on_get_task_push_notification_config(self, params: Any, context: Any) -> Any:
        """Not offered."""
        raise PushNotificationNotSupportedError

    async def on_list_task_push_notification_configs(self, params: Any, context: Any) -> Any:
        """Not offered."""
        raise PushNotificationNotSupportedError

    async def on_delete_task_push_notification_config(self, params: Any, context: Any) -> None:
        """Not offered."""
        raise PushNotificationNotSupportedError

    async def on_get_extended_agent_card(self, params: Any, context: Any) -> AgentCard:
        """Not offered."""
        raise ExtendedAgentCardNotConfiguredError


_CANCELED = TaskState.TASK_STATE_CANCELED
_MAY_BE_HANDLED = "Canceled; the agent may have handled it, or may still."
_BROKEN_OFF = "The gateway ended in the middle of the answer; the agent may have handled it."
_STOPPED = "The gateway was stopped in the middle of the answer; nothing of it was kept."


class _ContextBuilder(DefaultServerCallContextBuilder):
    """Keeps which agent the URL names."""

    def build(self, request: Request) -> ServerCallContext:
        context = super().build(request)
        context.state["agent"] = request.path_params.get("agent", "")
        return context


# ---- the protocol's words ---------------------------------------------------------------


def read_message(message: Message) -> Prompt:
    """A message as a prompt: its text, its files, and its data as JSON.

    Raises:
        InvalidParamsError: it says nothing.
        ContentTypeNotSupportedError: a file of it is only a link.
    """
    texts: list[str] = []
    files: list[Attachment] = []
    for number, part in enumerate(message.parts):
        match part.WhichOneof("content"):
            case "text":
                texts.append(part.text)
            case "raw":
                name = part.filename or f"file-{number}"
                files.append(Attachment.of(name, part.raw, part.media_type or None))
            case "data":
                texts.append(to_json(MessageToDict(part.data)).decode())
            case "url":
                raise ContentTypeNotSupportedError(
                    "A file has to come with its bytes: links are not followed."
                )
    try:
        return Prompt(
            text="\n".join(texts) or "\n".join(f"[{item.filename}]" for item in files),
            attachments=files,
            context=message.context_id or None,
            metadata=MessageToDict(message.metadata),
        )
    except ValidationError as error:
        raise InvalidParamsError("The message has no parts that say anything.") from error


def parts_of(reply: Reply) -> list[Part]:
    """A piece of an answer as parts."""
    texts = [Part(text=reply.text, media_type="text/plain")] if reply.text else []
    files = [
        Part(
            raw=item.data(),
            filename=item.filename,
            media_type=item.media_type or "application/octet-stream",
        )
        for item in reply.attachments
    ]
    return [*texts, *files]


def joined(artifact: Artifact, parts: Sequence[Part]) -> None:
    """Add *parts*; text that follows on text is one part."""
    for part in parts:
        last = artifact.parts[-1] if artifact.parts else None
        if last is not None and last.HasField("text") and part.HasField("text"):
            last.text += part.text
        else:
            artifact.parts.append(part)


def _new_record(agent: str, mode: str, by: str, message: Message) -> Recorded:
    """The task that *message* begins; the same for the same message, so that it may be sent again."""
    said = (agent, mode, message.SerializeToString(deterministic=True))
    id = blake2b(repr(said).encode(), digest_size=16).hexdigest()
    kept = Message()
    kept.CopyFrom(message)
    kept.task_id = id
    kept.context_id = message.context_id or str(uuid4())
    task = Task(id=id, context_id=kept.context_id, history=[kept])
    task.status.CopyFrom(_status(TaskState.TASK_STATE_WORKING, task, None))
    return Recorded(agent, mode, by, wall_ms() / 1000, task)


def _status(state: int, task: Task, text: str | None) -> TaskStatus:
    status = TaskStatus(state=state)  # type: ignore[arg-type]
    status.timestamp.FromMilliseconds(wall_ms())
    if text is not None:
        status.message.CopyFrom(
            Message(
                message_id=str(uuid4()),
                role=Role.ROLE_AGENT,
                task_id=task.id,
                context_id=task.context_id,
                parts=[Part(text=text)],
            )
        )
    return status


def _told(error: FoundationError) -> str:
    return f"{error} The agent may have handled it." if error.outcome == "unknown" else str(error)


def _copied(task: Task) -> Task:
    found = Task()
    found.CopyFrom(task)
    return found


def _history(params: Any) -> int | None:
    """How many messages are wanted; None: all."""
    where = params.configuration if isinstance(params, SendMessageRequest) else params
    return int(where.history_length) if where.HasField("history_length") else None


def _cut(task: Task, history: int | None) -> Task:
    found = _copied(task)
    if history is not None:
        kept = list(found.history)[-history:] if history > 0 else []
        del found.history[:]
        found.history.extend(kept)
    return found


def _interface(url: str, tenant: str = "") -> AgentInterface:
    return AgentInterface(
        url=url, protocol_binding="JSONRPC", tenant=tenant, protocol_version=PROTOCOL
    )


def _skill(item: Listed, id: str) -> AgentSkill:
    return AgentSkill(
        id=id,
        name=item.id,
        description=item.description or f"The agent {item.id}.",
        tags=list(item.capabilities),
    )


def _box(id: str) -> str:
    return f"a2a-{id}"


__all__ = ["CARD", "A2AGateway", "joined", "parts_of", "read_message"]
