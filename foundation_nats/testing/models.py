"""`ScriptedModel`: a language model for tests: a real HTTP server that speaks chat completions and says what it was told.

What it says next goes by how many answers the request already holds since its last user message, not by
how often it was asked. So whoever asks again, after a crash, hears the same; `requests` tells how often.

It is as strict as a real endpoint about what it is sent: each call of a tool must be answered, and the
schema of a strict tool must require all and close all. It knows no language, and counts words as tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import orjson

_BODY_MAX = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Use:
    """The model wants a tool."""

    tool: str
    arguments: Mapping[str, Any] | str = field(default_factory=dict)
    """Or what it writes instead of JSON."""


Said = str | Use | Sequence[Use]
Turn = Said | Callable[[list[dict[str, Any]]], Said]
"""What it says; or a function of the messages so far that returns it."""


class ScriptedModel:
    """Say *turns*, one after the other, to each user message.

    Example:
        >>> async with ScriptedModel([Use("add", {"a": 1, "b": 2}), "It is 3."]) as model:
        ...     config = {"model": {"url": model.url, "model": "scripted"}}
        ...     async with AgentHarness(Assistant, config=config) as agent:
        ...         assert await agent.ask("say", "1 and 2?") == "It is 3."
        ...     assert len(model.requests) == 2
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.turns = list(turns)
        self.requests: list[dict[str, Any]] = []
        """The bodies of all that was asked, those that it has refused among them."""
        self.keys: list[str] = []
        """The idempotency keys that came with them."""
        self.url = ""
        """What a `ChatModel` takes."""
        self._failures: list[tuple[int, dict[str, str]]] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._gate: asyncio.Event | None = None

    def fail(
        self, status: int, *, times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next requests with this status."""
        self._failures += [(status, dict(headers or {}))] * times

    def hold(self) -> Callable[[], None]:
        """Answer nobody from now on, until what this returns is called."""
        self._gate = gate = asyncio.Event()

        def release() -> None:
            self._gate = None
            gate.set()

        return release

    async def start(self) -> None:
        """Listen, on a free port of the loopback."""
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    async def stop(self) -> None:
        """Close, whoever waits."""
        if self._server is not None:
            self._server.close()
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> ScriptedModel:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ---- the server -------------------------------------------------------------------

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                status, headers, body = await self._serve(reader)
                lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}"]
                headers |= {"Content-Type": "application/json", "Connection": "close"}
                headers["Content-Length"] = str(len(body))
                lines += [f"{key}: {value}" for key, value in headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                await writer.drain()
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            key.strip().lower(): value.strip()
            for key, _, value in (line.partition(":") for line in head[1:] if line)
        }
        size = int(headers.get("content-length", "0"))
        if size > _BODY_MAX:
            return _refused(413, "too long")
        data = await reader.readexactly(size)
        method, path, *_ = head[0].split(" ")
        if (method, path) != ("POST", "/v1/chat/completions"):
            return _refused(404, f"there is no {method} {path}")
        try:
            request = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            return _refused(400, str(error))
        self.requests.append(request)
        self.keys.append(headers.get("idempotency-key", ""))
        if self._gate is not None:
            await self._gate.wait()
        if self._failures:
            status, more = self._failures.pop(0)
            return status, more, _refused(status, "as told")[2]
        wrong = complaint(request)
        if wrong:
            return _refused(400, wrong)
        return 200, {}, orjson.dumps(self._completion(request))

    def _completion(self, request: Mapping[str, Any]) -> dict[str, Any]:
        messages = request["messages"]
        said = 0
        for earlier in reversed(messages):
            if earlier["role"] == "user":
                break
            said += earlier["role"] == "assistant"
        turn: Any = self.turns[said] if said < len(self.turns) else "I have nothing more to say."
        if callable(turn):
            turn = turn(messages)
        uses = [turn] if isinstance(turn, Use) else [] if isinstance(turn, str) else list(turn)
        text = turn if isinstance(turn, str) else None
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if uses:
            message["tool_calls"] = [_call(use, f"call-{said}-{n}") for n, use in enumerate(uses)]
        asked = len(orjson.dumps(messages).split())
        answered = len(orjson.dumps(message).split())
        return {
            "id": f"chatcmpl-{token_hex(6)}",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "finish_reason": "tool_calls" if uses else "stop",
                }
            ],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": answered,
                "total_tokens": asked + answered,
            },
        }


def _call(use: Use, id: str) -> dict[str, Any]:
    plain = use.arguments
    text = plain if isinstance(plain, str) else orjson.dumps(plain).decode()
    return {"id": id, "type": "function", "function": {"name": use.tool, "arguments": text}}


def _refused(status: int, why: str) -> tuple[int, dict[str, str], bytes]:
    return status, {}, orjson.dumps({"error": {"message": why, "type": "invalid_request_error"}})


def complaint(request: Any) -> str:
    """What a real endpoint would not take about *request*; empty: nothing."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return "model is missing"
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return "messages is missing or empty"
    open_: list[str] = []
    for message in messages:
        role = message.get("role")
        if role == "tool":
            if message.get("tool_call_id") not in open_:
                return "a message of a tool answers no call"
            open_.remove(message["tool_call_id"])
            continue
        if open_:
            return f"these calls of tools are not answered: {', '.join(open_)}"
        if role not in ("system", "user", "assistant"):
            return f"{role!r} is no role"
        open_ = [call["id"] for call in message.get("tool_calls") or ()]
    if open_:
        return f"these calls of tools are not answered: {', '.join(open_)}"
    for tool in request.get("tools") or ():
        function = tool.get("function", {})
        wrong = _loose(function.get("parameters")) if function.get("strict") else ""
        if wrong:
            return f"tool {function.get('name')}: {wrong}"
    return ""


def _loose(schema: Any) -> str:
    """What makes a schema none for strict mode."""
    if isinstance(schema, list):
        return next((wrong for item in schema if (wrong := _loose(item))), "")
    if not isinstance(schema, dict):
        return ""
    if "$ref" in schema or "default" in schema:
        return "neither $ref nor default is allowed"
    if schema.get("type") == "object":
        if schema.get("additionalProperties") is not False:
            return "additionalProperties must be false"
        if sorted(schema.get("required", ())) != sorted(schema.get("properties", ())):
            return "all properties must be required"
        return _loose(list(schema.get("properties", {}).values()))
    return _loose([schema.get("items"), *schema.get("anyOf", ())])


__all__ = ["ScriptedModel", "Use"]
