"""What of a recovered outbox must still be published: the answer that the stream itself gives.

The ids of emitted signals are the same at every repeat, and the stream forgets
an id only after its duplicate window, so a recovery soon after the crash just
publishes again. Later the receivers' mailboxes are searched for the ids, from
the time of the record on: an activation clears a published outbox within a
second, so what it still held when it ended was emitted in its last moments,
and consumed signals are kept for `trim_min_age_s` as evidence. The same search
comes before a living activation's own late retry.

All times compared here are the server's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from foundation_nats.agent.outgoing import Outbox
from foundation_nats.agent.record import OutboxItem
from foundation_nats.bus.streams import StreamReader

_SAFE_SHARE = 0.25
_PAGES_MAX = 400


def parse_time(text: str) -> datetime:
    """A server's RFC 3339 time; nanoseconds are cut."""
    head, dot, fraction = text.rstrip("Z").partition(".")
    digits = (fraction if dot else "0")[:6].ljust(6, "0")
    return datetime.fromisoformat(f"{head}.{digits}+00:00")


async def drop_published(
    reader_of: Callable[[str], StreamReader | None],
    clock: StreamReader,
    outbox: Outbox,
    *,
    window_s: float,
) -> None:
    """Drop from a recovered *outbox* what the streams already hold.

    *reader_of* gives the stream that stores a subject, None where a repeat can't
    be told (a signal for many, which is gone once it is expanded).

    Raises:
        BusTimeoutError, BusUnavailableError: not answered; nothing was dropped.
    """
    stored_at = outbox.recovered_at
    info = await clock.info()
    if not stored_at or "ts" not in info:
        return
    age = parse_time(info["ts"]) - parse_time(stored_at)
    if is_repeat_remembered(age.total_seconds(), window_s):
        return
    items = list(outbox.items.values())
    for msg_id in await find_stored(reader_of, items, parse_time(stored_at)):
        outbox.drop(msg_id)


def is_repeat_remembered(age_s: float, window_s: float) -> bool:
    """Whether the stream surely still knows the id of what was published *age_s* ago."""
    return age_s < window_s * _SAFE_SHARE


async def find_stored(
    reader_of: Callable[[str], StreamReader | None],
    items: Sequence[OutboxItem],
    since: datetime,
) -> set[str]:
    """The ids of *items* that the streams hold, stored after *since* of the server's time.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    start_text = (since - timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    by_subject: dict[str, set[str]] = {}
    for item in items:
        by_subject.setdefault(item.subject, set()).add(item.msg_id)
    found: set[str] = set()
    for subject, wanted in by_subject.items():
        reader = reader_of(subject)
        if reader is None:
            continue
        messages, more = await reader.page(subject, 1, start_time=start_text)
        for _ in range(_PAGES_MAX):
            found |= wanted & {message.headers.get("Nats-Msg-Id", "") for message in messages}
            if not more or not messages or wanted <= found:
                break
            messages, more = await reader.page(subject, messages[-1].sequence + 1)
    return found
