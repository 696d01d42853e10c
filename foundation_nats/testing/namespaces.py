"""`Lan`: a network of its own for each server and node of a test, and the partitions in it.

IO: network namespaces, joined by a bridge that is in a namespace, too; needs root and Linux
(`can_part` says what is missing). Nothing outside of them is touched, and the kernel removes
all of it when this process ends, however it ends: namespaces are held by open files, not by names.

What a proxy (`Link`) can't show: packets are lost below TCP, so the kernel repeats them, waits
twice as long each time, and comes back when it likes; servers and nodes that share a machine
don't share its network. Verbs:

- `Lan.partition`: a host's cable is pulled. Its sockets stay open and hear nothing.
- `Lan.silence`: what one host sends to another is lost, not the other way round.
- `Lan.split`: groups of hosts that reach nobody outside of their group.
- `Lan.narrow`: a line of so many kbit/s, with a queue that drops what doesn't fit.

A way to lose packets in one direction and in silence is a wrong address: the sender is made to
believe that the receiver has a network card that nobody has. (A blackhole route would tell the
sender at once.)
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

from foundation_nats.node.embedded import EmbeddedConfig, probe_server
from foundation_nats.testing.brokers import ROUTE_PINGS
from foundation_nats.testing.links import Link
from foundation_nats.testing.scratch import Scratch, run_program
from foundation_nats.testing.server import TestServer

T = TypeVar("T")

PORT = 4222
ROUTES_PORT = 6222
_CLONE_NEWNET = 0x40000000
_NOBODY = "02:00:00:00:00:fe"
_BURST = "16kb"
_QUEUE = "400ms"


@functools.cache
def can_part() -> str | None:
    """None if networks of their own work here; else the reason why not."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "nsenter") if not shutil.which(name)]
    if missing:
        return f"there is no {', '.join(missing)}"
    try:
        with Lan() as lan:
            lan.host("a")
            lan.host("b")
            lan.silence("a", "b")
            lan.narrow("a", 1000)
            lan.heal()
    except OSError as error:
        return f"a network can't be made: {error}"
    return None


@dataclass(slots=True)
class Host:
    """One end of the network: a namespace with an address."""

    name: str
    address: str
    namespace: int
    """An open file that keeps it."""
    port: str
    """Its end at the bridge."""
    lost: set[str] = field(default_factory=set)
    """The addresses to which what it sends is lost."""
    is_narrow: bool = False

    @property
    def prefix(self) -> list[str]:
        """A command that runs another one on this host, by becoming it."""
        return ["nsenter", f"--net={_path(self.namespace)}"]

    @property
    def url(self) -> str:
        """A NATS server on this host, as the others reach it."""
        return f"nats://{self.address}:{PORT}"

    async def dial(self, address: str, port: int) -> socket.socket:
        """A connection from this host, for somebody outside of the network."""
        connected = _inside(self.namespace, lambda: socket.socket())
        try:
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, (address, port))
        except BaseException:
            connected.close()
            raise
        return connected


class Lan(Scratch):
    """A ``with`` around one bridge and the hosts at it.

    Example:
        >>> with Lan() as lan:
        ...     async with LanServer(lan.host("broker")) as server:
        ...         node = lan.host("n1")
        ...         cluster.start_node("n1", prefix=node.prefix, environment={…: server.lan_url})
        ...         lan.partition("n1")
    """

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self._bridge: int | None = None

    def _make(self) -> None:
        self._bridge = _new_namespace()
        _run(self._bridge, "ip link add lan type bridge", "ip link set lan up")

    def close(self) -> None:
        """Let the kernel take it all away; what runs on a host keeps that host alone. Idempotent."""
        for host in self.hosts.values():
            os.close(host.namespace)
        self.hosts.clear()
        if self._bridge is not None:
            os.close(self._bridge)
            self._bridge = None

    def host(self, name: str) -> Host:
        """The host of that name; a new one at its first mention."""
        if name not in self.hosts:
            self.hosts[name] = self._new_host(name, len(self.hosts) + 1)
        return self.hosts[name]

    def _new_host(self, name: str, number: int) -> Host:
        bridge = self._middle
        host = Host(name, f"10.213.0.{number}", _new_namespace(), f"port{number}")
        try:
            _run(
                bridge,
                f"ip link add {host.port} type veth peer name eth0 netns {_path(host.namespace)}",
                f"ip link set {host.port} master lan up",
            )
            _run(
                host.namespace,
                f"ip address add {host.address}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
            )
        except BaseException:
            os.close(host.namespace)
            raise
        return host

    @property
    def _middle(self) -> int:
        if self._bridge is None:
            raise RuntimeError("the network is not up; use it in a with statement")
        return self._bridge

    # ---- trouble ----------------------------------------------------------------

    def partition(self, name: str) -> None:
        """Pull the host's cable: nobody hears it, and it hears nobody."""
        _run(self._middle, f"ip link set {self.hosts[name].port} down")

    def silence(self, sender: str, receiver: str) -> None:
        """Lose what *sender* sends to *receiver* from now on; the other direction works."""
        source, target = self.hosts[sender], self.hosts[receiver]
        _run(
            source.namespace,
            f"ip neighbour replace {target.address} lladdr {_NOBODY} dev eth0 nud permanent",
        )
        source.lost.add(target.address)

    def split(self, *groups: Collection[str]) -> None:
        """Part these groups from each other; hosts in none of them reach all.

        Raises:
            ValueError: a host is in two groups.
        """
        names = [name for group in groups for name in group]
        if len(names) != len(set(names)):
            raise ValueError("a host can't be on two sides of a split")
        for group in groups:
            for sender in group:
                for receiver in set(names) - set(group):
                    self.silence(sender, receiver)

    def narrow(self, name: str, kbit_per_s: int) -> None:
        """Make the host's line so narrow, in both directions."""
        host = self.hosts[name]
        shape = f"root tbf rate {kbit_per_s}kbit burst {_BURST} latency {_QUEUE}"
        _run(self._middle, f"tc qdisc replace dev {host.port} {shape}")
        _run(host.namespace, f"tc qdisc replace dev eth0 {shape}")
        host.is_narrow = True

    def dropped(self, name: str) -> int:
        """How many packets a narrow line has thrown away, in both directions."""
        said = _run(self._middle, f"tc -s qdisc show dev {self.hosts[name].port}")
        said += _run(self.hosts[name].namespace, "tc -s qdisc show dev eth0")
        return sum(int(count) for count in re.findall(r"dropped (\d+)", said))

    def heal(self, *names: str) -> None:
        """Undo everything, for these hosts or for all."""
        for host in [self.hosts[name] for name in names] or list(self.hosts.values()):
            _run(self._middle, f"ip link set {host.port} up")
            for address in host.lost:
                _run(host.namespace, f"ip neighbour del {address} dev eth0")
            host.lost.clear()
            if host.is_narrow:
                _run(self._middle, f"tc qdisc del dev {host.port} root")
                _run(host.namespace, "tc qdisc del dev eth0 root")
                host.is_narrow = False


class LanServer(TestServer):
    """A server on a host of its own.

    `lan_url` is where nodes in the network reach it. `url` is a door for the test, which is
    outside: it opens on the server's own host, and stays open whatever becomes of the network.

    Args:
        peers: the hosts of all servers, for one of a NATS cluster.
    """

    def __init__(self, host: Host, *, peers: Collection[Host] = ()) -> None:
        extra = ""
        if peers:
            routes = ", ".join(f'"nats-route://{peer.address}:{ROUTES_PORT}"' for peer in peers)
            extra = (
                f'cluster {{ name: C, listen: "{host.address}:{ROUTES_PORT}", '
                f"no_advertise: true, {ROUTE_PINGS}, routes: [{routes}] }}"
            )
        # Nobody but the hosts of the network can reach it, so it needs no guard.
        config = EmbeddedConfig(host=host.address, port=PORT, insecure=True, extra=extra)
        super().__init__(config)
        self.host = host
        self._door: Link | None = None

    @property
    def lan_url(self) -> str:
        """Where the other hosts reach it."""
        return self.host.url

    async def start(self) -> None:
        """Start it, and open the door.

        Raises:
            ServerError: it ends at its start.
        """
        self._door = await Link.open(self.host.address, PORT, dial=self.host.dial)
        await super().start()

    async def stop(self) -> None:
        """End it cleanly, and close the door; idempotent."""
        await super().stop()
        if self._door is not None:
            await self._door.close()
            self._door = None

    def _prefix(self) -> list[str]:
        return self.host.prefix

    def _may_listen(self, port: int) -> bool:
        return True  # the host is its alone

    async def _probe(self, url: str) -> None:
        assert self._door is not None
        await probe_server(self._door.url, timeout=1.0)

    async def _wait_ready(self) -> None:
        assert self._door is not None
        await super()._wait_ready()
        self.url = self._door.url


def _path(namespace: int) -> str:
    return f"/proc/{os.getpid()}/fd/{namespace}"


def _run(namespace: int, *commands: str) -> str:
    """What the system's programs print in a namespace, run one after the other.

    Raises:
        OSError: one failed; says what it said.
    """
    inside = ["nsenter", f"--net={_path(namespace)}"]
    return "".join(run_program(*inside, *command.split()) for command in commands)


def _new_namespace() -> int:
    """An open file that keeps a new network namespace."""

    def make() -> int:
        _libc("unshare", _CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


def _inside(namespace: int, do: Callable[[], T]) -> T:
    """What *do* returns in the namespace; a socket stays in the one that it was made in."""

    def enter() -> T:
        _libc("setns", namespace, _CLONE_NEWNET)
        return do()

    return _in_thread(enter)


def _in_thread(do: Callable[[], T]) -> T:
    """Run it in a thread of its own: a namespace is a matter of the thread, and ends with it."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(do())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def _libc(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


__all__ = ["Host", "Lan", "LanServer", "can_part"]
