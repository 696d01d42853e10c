"""`WireModel`, and the checked names from which subjects and keys are made.

Pure. A name is checked once, here, so that no dot, space, ``*`` or ``>`` ever
reaches a NATS subject or a key. Wire models are frozen and ignore fields they
do not know, so that an older reader survives a newer writer.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, WithJsonSchema

WIRE_VERSION = 1
NAME_LENGTH_MAX = 128

NAME_PATTERN = "^[A-Za-z0-9_-]{1,128}$"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")


def check_name(value: str) -> str:
    """Return *value* if it may be part of a subject.

    Raises:
        ValueError: it is empty, longer than 128, or holds anything but
            letters, digits, ``-`` and ``_``.
    """
    if not _NAME.match(value):
        shown = value if len(value) <= 40 else value[:40] + "…"
        raise ValueError(
            f"{shown!r} is not a valid name: use 1 to {NAME_LENGTH_MAX} letters, digits, '-' or '_'"
        )
    return value


def is_name(value: str) -> bool:
    """Whether *value* may be part of a subject."""
    return _NAME.match(value) is not None


Name = Annotated[
    str,
    AfterValidator(check_name),
    WithJsonSchema({"type": "string", "pattern": NAME_PATTERN}),
]
AgentId = Name
NodeId = Name
ClusterId = Name
Capability = Name


class WireModel(BaseModel):
    """The base of everything that crosses the bus."""

    # Built at first use: most processes need a few of the models only.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)
