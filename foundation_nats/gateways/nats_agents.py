"""`NatsAgents`: agents that answer prompts, as agents of the Synadia Agent Protocol for NATS, v0.3.

Each agent is an instance of the micro service ``agents``, with the subjects
``agents.prompt|status|hb.<agent>.<owner>.<session>``: the agent is its deployment (or itself), the
owner by default the cluster, the session its id. A deployment of several replicas is there as a
whole, too, with the session ``default``: any of those that run answers.

Prompts come over the gateway's own connection, from the queue group that the protocol names: run two
gateways, and either may die. A prompt that one of them was at when it died is lost to its asker, who
sees no end; it is never put twice.

The protocol is spoken by hand, as one of a few subjects and three kinds of JSON; it is tested against
the official client. Not spoken: questions of the agent to its asker (``query``), and sender identity:
who may prompt is for the server's permissions on ``agents.prompt.>``.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.metadata import version
from secrets import token_hex
from typing import Any

import orjson
from pydantic import ValidationError

from foundation_nats.agent.prompts import Prompt, Reply
from foundation_nats.api.cluster import Cluster
from foundation_nats.base.clock import utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.micro import Endpoint, Instance, MicroServices
from foundation_nats.bus.rpc import REPLY_PREFIX
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BusError,
    BusUnavailableError,
    ConfigError,
    DecodeError,
    FoundationError,
    MailboxFullError,
    OverloadError,
    PayloadInvalidError,
    PayloadTooLargeError,
    UnhandledSignalError,
)
from foundation_nats.gateways.prompting import Prompter
from foundation_nats.gateways.roster import Listed, Roster
from foundation_schemas import Target

PROTOCOL = "0.3"
SERVICE = "agents"
QUEUE = "agents"
WHOLE = "default"
"""The session of a deployment as a whole."""
PROMPTS_MAX = 1000
"""That one gateway is at; more are refused."""
ACK = b'{"type":"status","data":"ack"}'
ACK_EVERY_S = 15.0
"""Askers give up on a stream that is silent for a minute."""
_ENVELOPE = 64 * 1024
"""What a prompt may grow by on its way to the agent."""
_UNITS = (("GB", 1024**3), ("MB", 1024**2), ("KB", 1024))
_CODES: tuple[tuple[type[FoundationError], int], ...] = (
    (AgentNotFoundError, 404),
    (PayloadInvalidError, 400),
    (PayloadTooLargeError, 400),
    (DecodeError, 400),
    (UnhandledSignalError, 404),
    (OverloadError, 429),
    (MailboxFullError, 429),
    (AskTimeoutError, 504),
    (AgentUnavailableError, 503),
    (BusUnavailableError, 503),
)


@dataclass(slots=True)
class _Served:
    """One agent, or one deployment, as the protocol sees it."""

    target: str
    description: str
    agent: str
    session: str
    instance: Instance
    prompts: Endpoint
    routes: list[Route] = field(default_factory=list)


class NatsAgents:
    """The gateway; `open` it, and `close` it."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        owner: str | None = None,
        only: Collection[str] = (),
        stored: bool = False,
        patience_s: float = 30.0,
        answer_s: float = 300.0,
        beat_s: int = 30,
    ) -> None:
        """Make one.

        Args:
            owner: the owner's name in subjects; None: the cluster's.
            only: agents, ``deployment:NAME`` or ``capability:NAME``; empty: all that answer prompts.
            stored: put prompts as durable questions: they survive the agent's death in the middle,
                and their answers come as a whole.
            beat_s: between two heartbeats.

        Raises:
            ConfigError: an argument is wrong.
        """
        if beat_s < 1:
            raise ConfigError(f"Heartbeats every {beat_s} s are too many: 1 s at least.")
        self._cluster = cluster
        self._bus = cluster.bus
        self._owner = token(owner or cluster.name)
        self._roster = Roster(cluster, only)
        self._prompter = Prompter(cluster, patience_s=patience_s, answer_s=answer_s)
        self._stored = stored
        self._beat_s = beat_s
        self._id = token_hex(6)
        self._served: dict[str, _Served] = {}
        self._active = 0
        self._micro: MicroServices | None = None
        self._scope: TaskScope | None = None
        self._log = get_logger("gateway").bind(protocol="nats-agents")

    # ---- life -------------------------------------------------------------------

    async def open(self) -> None:
        """Be seen, and serve until `close`.

        Raises:
            BusTimeoutError, BusUnavailableError: the registry could not be read.
        """
        self._scope = TaskScope("nats-agents")
        self._micro = MicroServices(self._bus, SERVICE)
        try:
            await self._roster.open(self._scope)
            self._roster.subscribe(self._update)
            self._update()
            await self._bus.flush()
        except BaseException:
            await self.close()
            raise
        self._scope.start(self._keep_beating(), "beats")

    async def close(self) -> None:
        """Be seen no more; prompts in hand end with an error. Idempotent."""
        for key in list(self._served):
            self._withdraw(key)
        if self._micro is not None:
            self._micro.close()
        if self._scope is not None:
            await self._scope.close()
        with suppress(BusError):
            await self._bus.flush()

    @property
    def served(self) -> dict[str, str]:
        """What is served: prompt subject to target."""
        return {self._subject("prompt", item): item.target for item in self._served.values()}

    # ---- who is served ------------------------------------------------------------

    def _update(self) -> None:
        wanted = self._wanted()
        for key in list(self._served):
            known = self._served[key]
            if key not in wanted or wanted[key][2] != known.description:
                self._withdraw(key)
        for key, (target, family, description, session) in wanted.items():
            if key not in self._served:
                self._serve(key, target, family, description, session)

    def _wanted(self) -> dict[str, tuple[str, str, str, str]]:
        """Key to target, family, description, session."""
        found: dict[str, tuple[str, str, str, str]] = {}
        wholes: dict[str, Listed] = {}
        for item in self._roster.all():
            key = f"{family_token(item.family)}.{token(item.id)}"
            found[key] = (item.id, item.family, _text_of(item), token(item.id))
            if item.deployment is not None and item.deployment != item.id:
                wholes.setdefault(item.deployment, item)
        for name, item in wholes.items():
            key = f"{family_token(name)}.{WHOLE}"
            found.setdefault(key, (f"deployment:{name}", name, _text_of(item), WHOLE))
        return found

    def _serve(self, key: str, target: str, family: str, description: str, session: str) -> None:
        assert self._micro is not None
        agent = family_token(family)
        tail = f"{agent}.{self._owner}.{session}"
        prompts = Endpoint(
            "prompt",
            f"agents.prompt.{tail}",
            QUEUE,
            {"max_payload": size_text(self._payload_max), "attachments_ok": "true"},
        )
        status = Endpoint("status", f"agents.status.{tail}", QUEUE)
        id = blake2b(f"{self._id}.{key}".encode(), digest_size=11).hexdigest()
        instance = Instance(
            id,
            version("foundation-nats"),
            description,
            {
                "agent": agent,
                "owner": self._owner,
                "session": session,
                "protocol_version": PROTOCOL,
                "platform": "foundation_nats",
                "target": target,
            },
            [prompts, status],
        )
        served = _Served(target, description, agent, session, instance, prompts)
        served.routes = [
            self._bus.subscribe(
                prompts.subject, lambda message: self._on_prompt(served, message), queue=QUEUE
            ),
            self._bus.subscribe(
                status.subject, lambda message: self._on_status(served, message), queue=QUEUE
            ),
        ]
        self._served[key] = served
        self._micro.announce(instance)
        self._beat(served)

    def _withdraw(self, key: str) -> None:
        served = self._served.pop(key)
        for route in served.routes:
            self._bus.unsubscribe(route)
        if self._micro is not None:
            self._micro.withdraw(served.instance.id)

    @property
    def _payload_max(self) -> int:
        return max(1024, self._bus.max_payload - _ENVELOPE)

    def _subject(self, verb: str, served: _Served) -> str:
        return f"agents.{verb}.{served.agent}.{self._owner}.{served.session}"

    # ---- signs of life --------------------------------------------------------------

    def _pulse(self, served: _Served) -> bytes:
        prompts = served.prompts
        return orjson.dumps(
            {
                "agent": served.agent,
                "owner": self._owner,
                "session": served.session,
                "instance_id": served.instance.id,
                "ts": utc_text(),
                "interval_s": self._beat_s,
                "protocol_version": PROTOCOL,
                "endpoints": {
                    "prompt": {"subject": prompts.subject, "metadata": dict(prompts.metadata)}
                },
            }
        )

    def _beat(self, served: _Served) -> None:
        with suppress(BusError):  # the next one will be heard
            self._bus.publish(self._subject("hb", served), self._pulse(served))

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            for served in list(self._served.values()):
                self._beat(served)

    def _on_status(self, served: _Served, message: Message) -> None:
        if message.reply.startswith(REPLY_PREFIX):
            with suppress(BusError):
                self._bus.publish(message.reply, self._pulse(served))

    # ---- prompts --------------------------------------------------------------------

    def _on_prompt(self, served: _Served, message: Message) -> None:
        if not message.reply.startswith(REPLY_PREFIX):
            self._log.warning("prompt without an inbox to answer to", subject=message.subject)
            return
        assert self._scope is not None
        self._scope.start(self._answer(served, message), "prompt")

    async def _answer(self, served: _Served, message: Message) -> None:
        began = time.monotonic_ns()
        self._active += 1
        error: FoundationError | None = None
        try:
            if self._active > PROMPTS_MAX:
                raise OverloadError(f"This gateway is at {PROMPTS_MAX:,} prompts already.")
            prompt = read_prompt(message.data, self._payload_max)
            self._bus.publish(message.reply, ACK)
            async with aclosing(self._replies(served, prompt)) as replies:
                await self._pass_on(message.reply, replies)
        except FoundationError as found:
            error = found
        except asyncio.CancelledError:
            error = AgentUnavailableError("This gateway is being stopped; prompt again.")
            raise
        finally:
            self._active -= 1
            point = served.prompts
            point.requests += 1
            point.busy_ns += time.monotonic_ns() - began
            if error is not None:
                point.errors += 1
                point.last_error = one_line(str(error))
            self._end(message.reply, error)

    def _replies(self, served: _Served, prompt: Prompt) -> AsyncGenerator[Reply, None]:
        if not self._stored:
            return self._prompter.stream(served.target, prompt)
        return self._stored_replies(served.target, prompt)

    async def _stored_replies(self, target: str, prompt: Prompt) -> AsyncGenerator[Reply, None]:
        agent = target
        if target.startswith("deployment:"):
            agent = await self._cluster._one_of(Target.parse(target))
        id = token_hex(12)
        box = f"prompt-{id}"
        try:
            for reply in await self._prompter.ask_stored(agent, id, prompt, box=box) or ():
                yield reply
        finally:
            # The asker's inbox is all that knows of it: nobody comes back for the answer.
            await self._prompter.forget(box)

    async def _pass_on(self, reply: str, replies: AsyncGenerator[Reply, None]) -> None:
        acks = asyncio.create_task(self._keep_acknowledging(reply), name="nats-agents.acks")
        try:
            async for item in replies:
                self._bus.publish(reply, chunk(item))
        finally:
            acks.cancel()

    async def _keep_acknowledging(self, reply: str) -> None:
        while True:
            await asyncio.sleep(ACK_EVERY_S)
            with suppress(BusError):
                self._bus.publish(reply, ACK)

    def _end(self, reply: str, error: FoundationError | None) -> None:
        try:
            if error is not None:
                code = code_of(error)
                text = one_line(str(error))
                self._log.info("prompt failed", code=code, error=text)
                headers = {"Nats-Service-Error-Code": str(code), "Nats-Service-Error": text}
                self._bus.publish(reply, b"", headers=headers)
            self._bus.publish(reply, b"")
        except BusError as lost:
            self._log.warning("answer not brought to its end", error=str(lost))


# ---- the protocol's words ---------------------------------------------------------------


def read_prompt(data: bytes, bytes_max: int) -> Prompt:
    """A request off the wire: plain text, or a JSON object.

    Raises:
        DecodeError: it is none.
        PayloadTooLargeError: it exceeds what was announced.
    """
    if len(data) > bytes_max:
        raise PayloadTooLargeError(f"The prompt exceeds max_payload {size_text(bytes_max)}.")
    if not data.strip():
        raise DecodeError("The prompt is empty.")
    try:
        if not data.lstrip().startswith(b"{"):
            return Prompt(text=data.decode())
        body: dict[str, Any] = orjson.loads(data)
        text, files = body.pop("prompt", None), body.pop("attachments", None)
        return Prompt.model_validate({"text": text, "attachments": files or [], "metadata": body})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]).replace("text", "prompt", 1)
        raise DecodeError(f"The prompt is not valid: {where}: {first['msg']}.") from error
    except ValueError as error:
        raise DecodeError(f"The prompt is neither text nor JSON: {error}.") from error


def chunk(reply: Reply) -> bytes:
    """A piece of the answer as it goes over the wire."""
    data: Any = reply.text
    if reply.attachments:
        files = [{"filename": f.filename, "content": f.content} for f in reply.attachments]
        data = {"text": reply.text, "attachments": files}
    return orjson.dumps({"type": "response", "data": data})


def code_of(error: FoundationError) -> int:
    """The protocol's number for *error*."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 500)


def token(name: str) -> str:
    """*name* as the protocol's owner or session: itself, or escaped as the official SDKs do."""
    if re.fullmatch(r"[a-z0-9_-]+", name):
        return name
    return base64.urlsafe_b64encode(name.encode()).rstrip(b"=").decode()


def family_token(name: str) -> str:
    """*name* as the protocol's agent, which may have lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9-]", "-", name.lower())


def size_text(size: int) -> str:
    """A number of bytes in the protocol's words."""
    for unit, factor in _UNITS:
        if size >= factor and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


def one_line(text: str) -> str:
    """*text* as it may stand in a header."""
    return " ".join(text.split()).encode("ascii", "replace").decode()[:500]


def _text_of(item: Listed) -> str:
    return item.description or f"Agent {item.id}."


__all__ = ["NatsAgents", "chunk", "code_of", "read_prompt", "token"]
