"""The `Envelope` of a signal (CloudEvents 1.0, structured JSON), its `Target` and its `Receipt`; topics.

Pure. An envelope on the wire is one JSON object, so that ``nats sub 'fnd.C.>'``
is readable and programs in other languages can join. Extension attributes are
lower-case words without punctuation, as CloudEvents asks.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from foundation_schemas.base import WireModel, check_name
from foundation_schemas.label import parse_expression

SPEC_VERSION = "1.0"
TYPE_LENGTH_MAX = 256
TOPIC_TOKENS_MAX = 16
ATTEMPTS_MAX = 100
"""Of one signal: what its sender may ask for."""
_KINDS = (
    "ID, agent:ID, capability:NAME, any:NAME, deployment:NAME, label:EXPRESSION, topic:NAME "
    "or everyone"
)


def check_topic(text: str) -> str:
    """Return *text* if a signal can be published on it: names joined by dots.

    Raises:
        ValueError: it is not.
    """
    tokens = text.split(".")
    if len(tokens) > TOPIC_TOKENS_MAX:
        raise ValueError(f"{text[:40]!r} is no topic: more than {TOPIC_TOKENS_MAX} words")
    try:
        for token in tokens:
            check_name(token)
    except ValueError as error:
        raise ValueError(f"{text[:40]!r} is no topic: {error}") from None
    return text


def check_topic_pattern(text: str) -> str:
    """Return *text* if it is a topic, in which ``*`` may stand for a word and a last ``>`` for the rest.

    Raises:
        ValueError: it is not.
    """
    tokens = text.split(".")
    if tokens[-1] == ">":
        tokens[-1] = "x"
    check_topic(".".join("x" if word == "*" else word for word in tokens))
    return text


def matches_topic(pattern: str, topic: str) -> bool:
    """Whether *topic* fits *pattern*, by the rules of NATS subjects."""
    wanted, found = pattern.split("."), topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(found) <= len(wanted):
            return False
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(
        a in ("*", b) for a, b in zip(wanted, found, strict=True)
    )


def check_attempts(attempts: int | None) -> int | None:
    """Return *attempts* if a signal may be tried so often; None: as the receiver's node is set.

    Raises:
        ValueError: it may not.
    """
    if attempts is not None and not 1 <= attempts <= ATTEMPTS_MAX:
        raise ValueError(f"attempts must be from 1 to {ATTEMPTS_MAX}, not {attempts}")
    return attempts


class TargetKind(StrEnum):
    """How a target names its receivers."""

    AGENT = "agent"
    CAPABILITY = "capability"
    ANY = "any"
    DEPLOYMENT = "deployment"
    LABEL = "label"
    TOPIC = "topic"
    EVERYONE = "everyone"


class Target(WireModel):
    """Who shall receive a signal: one agent, all or any with a capability, subscribers, everyone …"""

    kind: TargetKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``ID``, ``agent:ID``, ``capability:NAME``, ``any:NAME``, ``deployment:NAME``,
        ``label:EXPRESSION``, ``topic:NAME`` or ``everyone``.

        Raises:
            ValueError: the text names no kind of target, or its name is not valid.
        """
        if text == "everyone":
            return cls(kind=TargetKind.EVERYONE)
        kind, colon, name = text.partition(":")
        if not colon:
            return cls(kind=TargetKind.AGENT, name=check_name(text))
        match kind:
            case "agent" | "capability" | "any" | "deployment":
                return cls(kind=TargetKind(kind), name=check_name(name))
            case "label":
                for part in name.split(";"):
                    parse_expression(part)
                return cls(kind=TargetKind.LABEL, name=name)
            case "topic":
                return cls(kind=TargetKind.TOPIC, name=check_topic(name))
        raise ValueError(f"{text!r} is not a target: use {_KINDS}")

    def __str__(self) -> str:
        return self.kind if self.kind is TargetKind.EVERYONE else f"{self.kind}:{self.name}"


class Envelope(WireModel):
    """One signal on the wire: CloudEvents 1.0 attributes, `data`, and our extensions."""

    specversion: str = SPEC_VERSION
    id: str = Field(min_length=1, max_length=256)
    """Unique per source; a repeat with the same id takes effect once."""
    source: str = Field(min_length=1, max_length=256)
    """Who sent it: ``agent:<id>`` or ``client:<name>``."""
    type: str = Field(min_length=1, max_length=TYPE_LENGTH_MAX)
    subject: str | None = None
    """The target as the sender wrote it."""
    time: str | None = None
    """UTC, RFC 3339; for people, never compared with another clock."""
    datacontenttype: str = "application/json"
    data: Any = None
    traceparent: str | None = None
    cause: str | None = None
    """The id of the signal whose handling emitted this one."""
    deadline: str | None = None
    """UTC, RFC 3339: not handled after it, by the clock of the receiver's machine."""
    replyto: str | None = None
    """The box that gets the handler's result in the commit of its effects; not of an ask."""
    attempts: int | None = Field(default=None, ge=1, le=ATTEMPTS_MAX)
    """How often its handling is tried; None: as the receiver's node is set."""
    urgent: bool = False
    """Handled before those in its mailbox that are not."""
    onerror: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)
    """The type of the signal that its sender, an agent, gets if it is given up."""


class Receipt(WireModel):
    """Proof that a signal is stored.

    Once held, the signal takes effect or is found among the dead letters,
    under the broker's sync mode (docs/guarantees.md).
    """

    id: str
    target: str
    stream: str
    sequence: int
    duplicate: bool = False
    """The same id was stored before; this call added nothing."""


class GivenUp(WireModel):
    """The data of what a sender gets back if its signal is given up: see ``emit(…, on_error=…)``."""

    id: str
    """Of the signal that was given up."""
    type: str
    target: str
    agent: str
    """Whose dead letter it is; ``route``: of a signal for many."""
    code: str
    """The stable error code, as in `errors.py`; ``expired``: its deadline had passed."""
    reason: str
    attempts: int
    data: Any = None
    """As it was sent; None where it is too large to be sent back."""


class DeadLetter(WireModel):
    """A signal that was given up, with the reason."""

    agent: str
    signal: dict[str, Any] | None = None
    """The envelope; None where the bytes were none (then `raw` has them)."""
    raw: str | None = None
    sequence: int = 0
    """Its sequence in the mailbox stream."""
    code: str
    """The stable error code, as in `errors.py`."""
    reason: str
    attempts: int = 1
    traceback: str | None = None
    at: str
    """UTC, RFC 3339."""
