"""The unit of commit as bytes: state, cursor and outbox of one agent in one value.

Pure. What is read back is checked completely; what is written is assembled
from parts that are JSON already, because every signal's effect passes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from foundation_nats.agent.steps import StepLedger
from foundation_nats.errors import StateInvalidError
from foundation_schemas import FamilyRecord, StateRecord


@dataclass(slots=True)
class OutboxItem:
    """An emitted signal: where it goes, under which id, and its envelope."""

    subject: str
    msg_id: str
    body: bytes
    headers: dict[str, str] | None = None
    """Besides the id: what makes it a timer."""
    refused_since: float | None = None
    """Since when its receiver has no room, on `monotonic`."""
    tried_since: float | None = None
    """When this activation first tried to publish it, on `monotonic`."""
    in_line: bool = False
    """This activation has taken it up: it stands in its receiver's line until it is stored there."""


def encode_record(
    *,
    epoch: int,
    commit: int,
    writer: bytes,
    cursor: int,
    mark: str,
    run: str,
    state: bytes,
    salt: str,
    emitted: int,
    outbox: list[OutboxItem],
    attempt: tuple[int, int] | None = None,
    outbox_since: str = "",
    skip: Sequence[int] = (),
    ahead: dict[int, str] | None = None,
    steps: StepLedger | None = None,
    sensors: dict[str, Any] | None = None,
    family: FamilyRecord | None = None,
    schema_version: int = 1,
    past: dict[str, Any] | None = None,
) -> bytes:
    """The record as JSON; *writer* and *state* are JSON already."""
    body: dict[str, Any] = {
        "v": 1,
        "epoch": epoch,
        "commit": commit,
        "writer": orjson.Fragment(writer),
        "cursor": cursor,
        "mark": mark,
        "run": run,
        "schema_version": schema_version,
        "state": orjson.Fragment(state),
        "salt": salt,
        "emitted": emitted,
        "outbox": [
            {
                "subject": item.subject,
                "msg_id": item.msg_id,
                "body": orjson.Fragment(item.body),
                **({"headers": item.headers} if item.headers else {}),
            }
            for item in outbox
        ],
    }
    if attempt is not None:
        body["attempt"] = attempt
    if outbox_since:
        body["outbox_since"] = outbox_since
    if skip:
        body["skip"] = skip
    if ahead:
        body["ahead"] = list(ahead.items())
    if steps:
        body["steps"] = steps.encoded()
    if sensors:
        body["sensors"] = sensors
    if family is not None and not family.is_blank:
        body["family"] = family.model_dump(mode="json", exclude_defaults=True)
    if past is not None:
        body["past"] = past
    return orjson.dumps(body)


def decode_record(agent: str, value: bytes) -> StateRecord:
    """A stored record.

    Raises:
        StateInvalidError: it is damaged, or of a version this release does not know.
    """
    try:
        record = StateRecord.model_validate_json(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StateInvalidError(
            f"The stored record of {agent} is damaged ({where}: {first['msg']}); "
            "nothing was overwritten.",
            hint="Restore it, or delete the key in the state bucket to begin anew.",
        ) from error
    if record.v != 1:
        raise StateInvalidError(
            f"The stored record of {agent} has version {record.v}, which this release does not "
            "know; nothing was overwritten.",
            hint="Run the release that wrote it, or a newer one.",
        )
    return record
