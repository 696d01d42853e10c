"""Whether a mailbox holds what a repeat would store again: asked when the stream may have forgotten the id.

The stream drops repeats by their ``Nats-Msg-Id`` within its duplicate window. A repeat that
comes later (everything was down meanwhile) looks into the mailbox first, from the time of the
original on; consumed signals are kept there for `trim_min_age_s` as evidence.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from foundation_nats.bus.streams import StreamReader

SAFE_SHARE = 0.25
_PAGES_MAX = 400


def parse_time(text: str) -> datetime:
    """A server's RFC 3339 time; nanoseconds are cut."""
    head, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{head}.{(fraction or '0')[:6].ljust(6, '0')}+00:00")


async def server_now(reader: StreamReader) -> datetime | None:
    """The server's clock; None if it does not say."""
    text = (await reader.info()).get("ts")
    return None if text is None else parse_time(text)


async def is_stored(reader: StreamReader, subject: str, msg_id: str, since: datetime) -> bool:
    """Whether *subject* holds a message of that id, stored after *since* of the server's time.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    start = (since - timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    messages, more = await reader.page(subject, 1, start_time=start)
    for _ in range(_PAGES_MAX):
        if any(message.headers.get("Nats-Msg-Id") == msg_id for message in messages):
            return True
        if not more or not messages:
            return False
        messages, more = await reader.page(subject, messages[-1].sequence + 1)
    return False
