"""Networks of their own: what is cut off hears nothing, in the direction that was meant, until it is healed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from foundation_nats.base.clock import monotonic
from foundation_nats.testing.namespaces import Lan, LanServer, _inside, can_part

pytestmark = pytest.mark.skipif(can_part() is not None, reason=can_part() or "")

PORT = 7000
SILENCE_S = 0.05


class Post:
    """A socket on each host, by which they send each other what they are called."""

    def __init__(self, lan: Lan, names: str) -> None:
        self.lan = lan
        self._stack = ExitStack()
        self.sockets = {name: self._open(name) for name in names}

    def _open(self, name: str) -> socket.socket:
        host = self.lan.host(name)
        opened = _inside(host.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._stack.enter_context(opened)
        opened.bind((host.address, PORT))
        opened.settimeout(SILENCE_S)
        return opened

    def passes(self, sender: str, receiver: str) -> bool:
        """Whether something that one sends reaches the other."""
        for _ in range(3):  # the first one may wait for an address
            self.sockets[sender].sendto(sender.encode(), (self.lan.host(receiver).address, PORT))
        heard: list[bytes] = []
        with suppress(TimeoutError):
            while True:
                heard.append(self.sockets[receiver].recv(16))
        return sender.encode() in heard

    def ways(self) -> set[str]:
        """All that pass, as sender and receiver."""
        names = list(self.sockets)
        return {a + b for a in names for b in names if a != b and self.passes(a, b)}

    def heals(self) -> bool:
        """Whether all pass, at the latest when each has asked anew who has which address."""
        deadline = monotonic() + 5
        while self.ways() != ALL:
            if monotonic() > deadline:
                return False
        return True

    def close(self) -> None:
        """Close the sockets."""
        self._stack.close()


@pytest.fixture
def post() -> Iterator[Post]:
    """Three hosts."""
    with Lan() as lan:
        opened = Post(lan, "abc")
        yield opened
        opened.close()


ALL = {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_packets_are_lost_where_it_was_said_and_nowhere_else(post: Post) -> None:
    """A pulled cable, one direction, a split; and no error tells the sender."""
    lan = post.lan
    assert post.heals()
    lan.partition("a")
    assert post.ways() == {"bc", "cb"}
    lan.heal("a")
    assert post.heals()
    lan.silence("a", "b")
    assert post.ways() == ALL - {"ab"}
    lan.heal()
    lan.split("a", "bc")
    assert post.ways() == {"bc", "cb"}
    lan.heal()
    lan.split("a", "b", "c")
    assert post.ways() == set()
    lan.heal()
    assert post.heals()
    with pytest.raises(ValueError, match="two sides"):
        lan.split("ab", "bc")


def test_a_narrow_line_drops_what_does_not_fit(post: Post) -> None:
    """Fifty kilobytes at once do not go through a queue of some."""
    sockets, lan = post.sockets, post.lan
    assert post.passes("a", "b")
    lan.narrow("a", 100)
    for _ in range(50):
        sockets["a"].sendto(bytes(1000), (lan.host("b").address, PORT))
    sockets["b"].settimeout(1.0)
    count = 0
    with suppress(TimeoutError):
        while True:
            sockets["b"].recv(2000)
            count += 1
    assert 0 < count < 45
    lan.heal()


async def test_a_server_is_reached_by_its_door_though_its_cable_is_pulled() -> None:
    """The test sees what goes on, whatever becomes of the network; nothing is left afterwards."""
    before = asyncio.all_tasks()
    with Lan() as lan:
        async with LanServer(lan.host("b")) as server:
            lan.partition("b")
            host, _, port = server.url.removeprefix("nats://").partition(":")
            assert host == "127.0.0.1"
            reader, writer = await asyncio.open_connection(host, int(port))
            async with asyncio.timeout(5):
                assert (await reader.readline()).startswith(b"INFO ")
            writer.close()
            await writer.wait_closed()
            server.kill()
            await server.restart()
            assert server.url.endswith(f":{port}")
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before
