"""Servers by DNS, asked of a real nameserver on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundation_nats.discovery.servers import Servers, find
from foundation_nats.errors import BusUnavailableError
from tests.discovery.nameserver import Nameserver


@pytest.fixture
async def nameserver() -> AsyncIterator[Nameserver]:
    """A nameserver that knows nothing yet."""
    async with Nameserver() as running:
        yield running


async def test_every_address_of_a_name_is_a_server(nameserver: Nameserver) -> None:
    """Both families; the port and the credentials are the locator's."""
    nameserver.zone["nats.example.org", "A"] = ["10.0.0.1", "10.0.0.2"]
    nameserver.zone["nats.example.org", "AAAA"] = ["fd00::1"]
    entry = f"dns://me:pw@nats.example.org:4333?nameserver={nameserver.address}"
    found = await Servers([entry]).resolve(2.0)
    assert sorted(found) == [
        "nats://me:pw@10.0.0.1:4333",
        "nats://me:pw@10.0.0.2:4333",
        "nats://me:pw@[fd00::1]:4333",
    ]


async def test_the_system_resolver_needs_no_extra() -> None:
    """`localhost` is known everywhere, and dnspython is not imported for it."""
    program = (
        "import asyncio, sys\nfrom foundation_nats.discovery.servers import find\n"
        "found = asyncio.run(find('dns://localhost:4333', 5.0))\n"
        "assert 'nats://127.0.0.1:4333' in [item.url for item in found], found\n"
        "assert 'dns' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


async def test_a_headless_service_is_found_by_its_name_in_the_cluster(
    nameserver: Nameserver,
) -> None:
    """The whole name is asked for, in the cluster's domain or the one that is given."""
    nameserver.zone["nats.prod.svc.cluster.local", "A"] = ["10.1.0.7", "10.1.0.8"]
    nameserver.zone["nats.prod.svc.other.domain", "A"] = ["10.1.0.9"]
    option = f"nameserver={nameserver.address}"
    found = await Servers([f"k8s://nats.prod?{option}"]).resolve(2.0)
    assert sorted(found) == ["nats://10.1.0.7:4222", "nats://10.1.0.8:4222"]
    found = await Servers([f"k8s://nats.prod:4333?{option}&domain=other.domain"]).resolve(2.0)
    assert found == ["nats://10.1.0.9:4333"]
    with pytest.raises(BusUnavailableError, match=r"nats\.dev\.svc\.cluster\.local.*no such name"):
        await find(f"k8s://nats.dev?{option}", 2.0)


async def test_srv_records_give_host_port_and_order(nameserver: Nameserver) -> None:
    """The best priority first; a target without an address hides no other."""
    nameserver.zone["_nats._tcp.example.org", "SRV"] = [
        "20 0 4300 spare.example.org.",
        "10 5 4100 one.example.org.",
        "10 0 4200 gone.example.org.",
    ]
    nameserver.zone["one.example.org", "A"] = ["10.0.0.1"]
    nameserver.zone["spare.example.org", "A"] = ["10.0.0.3"]
    entry = f"dns+srv://_nats._tcp.example.org?nameserver={nameserver.address}"
    assert await Servers([entry]).resolve(2.0) == ["nats://10.0.0.1:4100", "nats://10.0.0.3:4300"]
    found = await Servers([f"{entry}&tls=true"]).resolve(2.0)
    assert found[2] == "tls://spare.example.org:4300"
    assert set(found[:2]) == {"tls://one.example.org:4100", "tls://gone.example.org:4200"}


async def test_what_the_nameserver_says_is_in_the_error(nameserver: Nameserver) -> None:
    """No such name, no such record, a service that says it is none, no answer in time."""
    nameserver.zone["a.example.org", "A"] = ["10.0.0.1"]
    nameserver.zone["off.example.org", "SRV"] = ["0 0 0 ."]
    option = f"nameserver={nameserver.address}"
    for entry, said in (
        (f"dns://b.example.org?{option}", "there is no such name"),
        (f"dns+srv://a.example.org?{option}", "no SRV record"),
        (f"dns+srv://off.example.org?{option}", "no such service"),
    ):
        with pytest.raises(BusUnavailableError, match=said) as caught:
            await find(entry, 2.0)
        assert entry in str(caught.value)
    nameserver.silent = True
    began = time.monotonic()
    with pytest.raises(BusUnavailableError, match="did not answer within"):
        await find(f"dns://a.example.org?{option}", 0.5)
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("entry", "package", "extra"),
    [
        ("dns+srv://_nats._tcp.x", "dns", "dns"),
        ("dns://x?nameserver=127.0.0.1", "dns", "dns"),
        ("mdns://", "zeroconf", "mdns"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    entry: str, package: str, extra: str
) -> None:
    """In a process that can't import it, as where it is not installed."""
    program = (
        "import asyncio, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from foundation_cli.main import run\n"
        f"sys.exit(run(['discovery', 'resolve', {entry!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2, done.stderr
    assert f"pip install 'foundation-nats[{extra}]'" in done.stderr
    assert entry in done.stderr or "mdns://" in done.stderr


_SILENT = """
import socket, subprocess, sys, time
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/resolv.conf"], check=True)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
words = ["discovery", "resolve", "dns://x.example.org", "--timeout", "1s"]
began = time.monotonic()
done = subprocess.run([sys.executable, "-m", "foundation_cli.main", *words], timeout=30)
print(done.returncode, time.monotonic() - began)
"""


def test_a_silent_system_resolver_does_not_hold_the_process(tmp_path: Path) -> None:
    """In namespaces whose only nameserver never answers; the C library would wait for ten seconds."""
    if subprocess.run(["unshare", "-Urnm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no namespaces")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    done = subprocess.run(
        ["unshare", "-Urnm", sys.executable, "-c", _SILENT, str(tmp_path / "resolv.conf")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "no answer within 1 s" in done.stderr
    code, seconds = done.stdout.split()
    assert code == "3"
    assert float(seconds) < 5
