"""The `Envelope` of a signal (CloudEvents 1.0, structured JSON), its `Target` and its `Receipt`.

Pure. An envelope on the wire is one JSON object, so that ``nats sub 'fnd.C.>'``
is readable and programs in other languages can join. Extension attributes are
lower-case words without punctuation, as CloudEvents asks.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from foundation_schemas.base import WireModel, check_name

SPEC_VERSION = "1.0"
TYPE_LENGTH_MAX = 256


class TargetKind(StrEnum):
    """How a target names its receivers."""

    AGENT = "agent"
    CAPABILITY = "capability"
    ANY = "any"
    DEPLOYMENT = "deployment"
    EVERYONE = "everyone"


class Target(WireModel):
    """Who shall receive a signal: one agent, all or any with a capability, a deployment, everyone."""

    kind: TargetKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``ID``, ``agent:ID``, ``capability:NAME``, ``any:NAME``, ``deployment:NAME`` or ``everyone``.

        Raises:
            ValueError: the text names no kind of target, or its name is not valid.
        """
        if text == "everyone":
            return cls(kind=TargetKind.EVERYONE)
        kind, colon, name = text.partition(":")
        if not colon:
            return cls(kind=TargetKind.AGENT, name=check_name(text))
        if kind not in ("agent", "capability", "any", "deployment"):
            raise ValueError(
                f"{text!r} is not a target: use ID, agent:ID, capability:NAME, any:NAME, "
                "deployment:NAME or everyone"
            )
        return cls(kind=TargetKind(kind), name=check_name(name))

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
