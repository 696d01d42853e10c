"""`ChatModel`: a language model behind an endpoint that speaks OpenAI's chat completions, by the `httpx` library.

One request, one answer. What is worth trying again (no connection, 408, 409, 429, 5xx) is tried again with
growing pauses, or as ``Retry-After`` says. Needs the extra ``http``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation_nats.base.resilience import backoff_s
from foundation_nats.errors import ActionError, ConfigError

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({408, 409, 429})
_ERROR_MAX = 300


class ChatModel(BaseModel):
    """Where the model is, and how it is asked.

    Raises:
        ConfigError: the address is none (by `of`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = "https://api.openai.com/v1"
    """Up to ``/v1``."""
    model: str
    key_env: str = "OPENAI_API_KEY"
    """The environment variable of the worker that holds the key; none is sent if it is not set."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one request."""
    retries: int = Field(default=2, ge=0)
    answer_max_bytes: int = Field(default=1024 * 1024, gt=0)
    options: dict[str, Any] = Field(default_factory=dict)
    """More of the request's body, as ``{"temperature": 0.2}``."""

    def of(self, config: Mapping[str, Any]) -> ChatModel:
        """The model, with what an agent's configuration says in ``model``.

        Raises:
            ConfigError: it does not fit.
        """
        over = config.get("model")
        try:
            found = self if not over else ChatModel(**{**self.model_dump(), **over})
        except (ValidationError, TypeError) as error:
            raise ConfigError(f"config.model is wrong: {error}") from error
        if not found.url.startswith(("http://", "https://")):
            raise ConfigError(f"{found.url!r} is no http or https URL of a model")
        return found

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        idempotency_key: str = "",
    ) -> Completion:
        """The model's next message.

        Raises:
            ActionError: it has no answer, or none that is a chat completion.
            ConfigError: `httpx` is not installed.
        """
        try:
            import httpx
        except ImportError:
            raise ConfigError(
                "ChatModel needs httpx: pip install 'foundation-nats[http]'"
            ) from None
        body = {"model": self.model, "messages": list(messages), **self.options}
        if tools:
            body["tools"] = list(tools)
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        key = os.environ.get(self.key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        tries = 0
        async with httpx.AsyncClient(timeout=self.timeout) as client:
            while True:
                tries += 1
                wait = backoff_s(tries, random.random(), first_s=0.5, most_s=30.0)
                try:
                    async with asyncio.timeout(self.timeout):
                        response = await self._post(client, body, headers)
                except (httpx.HTTPError, TimeoutError) as error:
                    what = f"does not answer: {str(error) or type(error).__name__}"
                    cause: Exception | None = error
                else:
                    status, after, answer = response
                    if status == 200:
                        return _read(answer)
                    what, cause = f"answers {status}: {_complaint(answer)}", None
                    if status not in _AGAIN and status < 500:
                        raise self._error(what)
                    wait = _retry_after(after, wait)
                if tries > self.retries:
                    raise self._error(what) from cause
                await asyncio.sleep(wait)

    async def _post(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> tuple[int, str | None, bytes]:
        """Status, ``Retry-After`` and body."""
        url = f"{self.url.rstrip('/')}/chat/completions"
        async with client.stream("POST", url, json=body, headers=dict(headers)) as response:
            found = bytearray()
            async for chunk in response.aiter_bytes():
                found += chunk
                if len(found) > self.answer_max_bytes:
                    raise self._error(f"answers more than {self.answer_max_bytes:,} bytes")
            return response.status_code, response.headers.get("retry-after"), bytes(found)

    def _error(self, what: str) -> ActionError:
        return ActionError(f"The model {self.model} at {self.url} {what}.", model=self.model)


class Call(BaseModel):
    """A call of a tool that a model asks for."""

    id: str
    name: str
    arguments: str
    """JSON, as the model has written it."""


class Completion(BaseModel):
    """One message of a model."""

    text: str = ""
    calls: list[Call] = Field(default_factory=list)
    tokens: int = 0
    """Of question and answer together, as the endpoint counts them; 0 if it doesn't."""
    reason: str = ""
    """Why it has ended: ``stop``, ``tool_calls``, ``length`` …"""

    def message(self) -> dict[str, Any]:
        """As it is sent back with the next question."""
        body: dict[str, Any] = {"role": "assistant", "content": self.text or None}
        if self.calls:
            body["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        return body


class _Function(BaseModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _ToolCall(BaseModel):
    id: str | None = None
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    total_tokens: int = 0


class _Answer(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _read(answer: bytes) -> Completion:
    """What is used of a chat completion; what else is in it is left alone."""
    try:
        found = _Answer.model_validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ActionError(
            f"The model's answer is no chat completion: {where + ': ' if where else ''}"
            f"{first['msg']}."
        ) from error
    choice = found.choices[0]
    calls = []
    for number, call in enumerate(choice.message.tool_calls or ()):
        arguments = call.function.arguments
        if not isinstance(arguments, str):  # some local servers
            arguments = orjson.dumps(arguments).decode()
        calls.append(
            Call(id=call.id or f"call-{number}", name=call.function.name, arguments=arguments)
        )
    return Completion(
        text=choice.message.content or "",
        calls=calls,
        tokens=0 if found.usage is None else found.usage.total_tokens,
        reason=choice.finish_reason or "",
    )


def _complaint(answer: bytes) -> str:
    try:
        found = orjson.loads(answer)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        found = answer.decode("utf-8", "replace")
    return str(found).strip().rstrip(".")[:_ERROR_MAX]


def _retry_after(text: str | None, wait: float) -> float:
    try:
        return wait if text is None else min(60.0, max(0.0, float(text)))
    except ValueError:
        return wait


__all__ = ["Call", "ChatModel", "Completion"]
