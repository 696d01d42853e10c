"""`on_prompt`: the handler of an agent that is talked to in plain words, by people or other agents.

A prompt is a signal like any other, of type ``prompt``: it may be sent, asked, and answered item
by item. A class that handles it provides the capability ``prompt``, by which gateways find its
agents: see `foundation_nats.gateways`.

Pure.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Any, TypeVar, overload

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from foundation_nats.agent.handling import Handler, on
from foundation_nats.agent.signal import Payload
from foundation_nats.bus.rpc import to_json

PROMPT = "prompt"
"""The type of the signals, and the capability of those that handle them."""

H = TypeVar("H", bound=Handler)


class Attachment(BaseModel):
    """A file that goes with a prompt or a reply."""

    model_config = ConfigDict(extra="ignore")

    filename: str
    content: str
    """Base64, with padding."""
    media_type: str | None = None

    @field_validator("content")
    @classmethod
    def _check(cls, value: str) -> str:
        try:
            base64.b64decode(value, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the content of an attachment must be base64: {error}") from error
        return value

    @classmethod
    def of(cls, filename: str, data: bytes, media_type: str | None = None) -> Attachment:
        """An attachment of these bytes."""
        content = base64.b64encode(data).decode("ascii")
        return cls(filename=filename, content=content, media_type=media_type)

    def data(self) -> bytes:
        """Its bytes."""
        return base64.b64decode(self.content)


class Prompt(Payload, type=PROMPT):
    """What is said to an agent; as JSON an object, or just the text.

    Example:
        >>> await cluster.ask("guide", Prompt(text="Where is the station?"))
    """

    model_config = ConfigDict(extra="ignore")

    text: str = Field(min_length=1)
    attachments: list[Attachment] = Field(default_factory=list)
    context: str | None = None
    """Which conversation it belongs to, where the asker says it."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """What else the asker's protocol carries; nobody has checked it."""

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value


class Reply(BaseModel):
    """A piece of an answer: for handlers that answer with more than text."""

    text: str = ""
    attachments: list[Attachment] = Field(default_factory=list)


def as_reply(item: Any) -> Reply | None:
    """What a prompt's handler has returned or yielded, once it was JSON; None: it has said nothing.

    Text is text; an object with `text` or `attachments` is a `Reply`; all else is told as JSON.
    """
    if item is None or item == "":
        return None
    if isinstance(item, str):
        return Reply(text=item)
    if isinstance(item, dict) and item.keys() <= {"text", "attachments"} and item:
        try:
            return Reply.model_validate(item)
        except ValueError:
            pass  # something of the agent's own that only looks like one
    return Reply(text=orjson.dumps(orjson.loads(to_json(item))).decode())


@overload
def on_prompt(handler: H, /) -> H: ...
@overload
def on_prompt(
    *, priority: int = 0, timeout: float | None = None
) -> Callable[[Handler], Handler]: ...
def on_prompt(handler: Any = None, /, *, priority: int = 0, timeout: float | None = None) -> Any:
    """Mark a method as what answers prompts: ``on(Prompt)``, with or without arguments.

    It takes a ``Signal[Prompt]`` and returns text, a `Reply` or anything that is JSON; an async
    generator answers piece by piece, see `Cluster.ask_stream`.

    Example:
        >>> class Guide(Agent):
        ...     @on_prompt
        ...     async def answer(self, signal: Signal[Prompt]) -> AsyncIterator[str]:
        ...         yield "You said: "
        ...         yield signal.data.text
    """
    mark = on(Prompt, priority=priority, timeout=timeout)
    return mark if handler is None else mark(handler)


__all__ = ["PROMPT", "Attachment", "Prompt", "Reply", "as_reply", "on_prompt"]
