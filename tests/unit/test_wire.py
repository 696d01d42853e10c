"""The wire parser: the same messages however the bytes are cut."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.bus.wire import Message, Route, WireClient

STREAM = (
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PONG\r\n"
    b"MSG a.b 1 _INBOX.x 0\r\n\r\n"
    b"HMSG a.c 1 _INBOX.y 22 27\r\nNATS/1.0\r\nKey: val\r\n\r\nhello\r\n"
    b"+OK\r\n"
    b"HMSG a.d 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"MSG other 9 2\r\nno\r\n"
    b"MSG last 1 4\r\n\r\n\r\n\r\n"
)


def parsed(chunks: list[bytes]) -> list[tuple[str, str, bytes, int, bytes | None]]:
    """What a route hears of these chunks."""
    heard: list[tuple[str, str, bytes, int, bytes | None]] = []

    def handler(message: Message) -> None:
        heard.append(
            (message.subject, message.reply, message.data, message.status, message.header(b"Key"))
        )

    async def feed() -> None:
        client = WireClient()
        client._pongs = []
        client.add_route(Route(">", handler))
        for chunk in chunks:
            await client._ps.parse(chunk)

    asyncio.run(feed())
    return heard


WHOLE = parsed([STREAM])


def test_every_kind_of_message_is_understood() -> None:
    """Reply or none, headers or none, an inline status, a payload of line ends; foreign sids dropped."""
    assert WHOLE == [
        ("a.b", "", b"hello", 0, None),
        ("a.b", "_INBOX.x", b"", 0, None),
        ("a.c", "_INBOX.y", b"hello", 0, b"val"),
        ("a.d", "", b"", 503, None),
        ("last", "", b"\r\n\r\n", 0, None),
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cuts_change_nothing(cuts: list[int]) -> None:
    """Messages may arrive in any pieces."""
    edges = sorted({0, len(STREAM), *cuts})
    pieces = [STREAM[a:b] for a, b in pairwise(edges)]
    assert parsed(pieces) == WHOLE


def test_an_error_in_a_handler_does_not_end_the_stream() -> None:
    """It is logged, and the next message is handled."""
    heard = []

    def handler(message: Message) -> None:
        heard.append(message.data)
        if len(heard) == 1:
            raise RuntimeError("bad handler")

    async def feed() -> None:
        client = WireClient()
        client.add_route(Route("a", handler))
        await client._ps.parse(b"MSG a 1 1\r\nx\r\nMSG a 1 1\r\ny\r\n")

    asyncio.run(feed())
    assert heard == [b"x", b"y"]
