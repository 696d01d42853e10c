"""What an entry of ``servers`` may say, and what is said about a wrong one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from foundation_nats.discovery.dns import Service, in_order
from foundation_nats.discovery.file import read
from foundation_nats.discovery.locator import is_locator, parse, shown
from foundation_nats.discovery.servers import Servers, find
from foundation_nats.errors import BusUnavailableError, ConfigError


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("nats://a:4222", False),
        ("tls://a", False),
        ("wss://a:443", False),
        ("a:4222", False),
        ("dns://a", True),
        ("mdns://", True),
        ("file:///a", True),
    ],
)
def test_only_what_must_be_looked_up_is_a_locator(entry: str, expected: bool) -> None:
    """A NATS URL is used as it is."""
    assert is_locator(entry) is expected


def test_a_locator_keeps_the_case_of_its_place_and_hides_its_password() -> None:
    """Names of clusters have a case; passwords have no place in texts."""
    locator = parse("k8s://me:secret@Nats.Prod:4333?domain=x.local")
    assert (locator.host, locator.port) == ("Nats.Prod", 4333)
    assert locator.options == {"domain": "x.local"}
    assert locator.url("::1", 1) == "nats://me:secret@[::1]:1"
    assert "secret" not in locator.shown + repr(locator)
    assert shown("nats://token@host:1") == "nats://host:1"
    assert shown("token@host") == "host"
    assert parse("dns://[::1]:5").host == "::1"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("consul://x", "dns, dns\\+srv, file, k8s, mdns"),
        ("dns://x:port", "Port"),
        ("dns://x#y", "#"),
        ("dns://x?nameserver", "can't be read"),
        ("dns://", "names no host"),
        ("dns://x?nameservr=1.1.1.1", "'nameservr'"),
        ("dns://x/path", "'/path'"),
        ("dns://x?nameserver=ns.example.org", "no IP address"),
        ("dns+srv://_nats._tcp.x:4222", "the records give the ports"),
        ("dns+srv://x?tls=maybe", "true or false"),
        ("k8s://nats", "SERVICE.NAMESPACE"),
        ("k8s://nats.prod.svc", "SERVICE.NAMESPACE"),
        ("file://relative/path", "three slashes"),
        ("mdns://u:p@x", "credentials"),
        ("mdns://?interface=eth0", "eth0"),
    ],
)
async def test_a_wrong_locator_is_named_with_what_is_wrong(entry: str, said: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigError, match=said):
        await Servers([entry]).resolve(1.0)


async def test_plain_urls_are_not_touched() -> None:
    """Whoever uses no locator pays nothing."""
    servers = Servers(["nats://b:1", "a"])
    assert servers.is_fixed
    assert await servers.resolve(1.0) == ["nats://b:1", "a"]
    assert not servers.has_changed()


@pytest.mark.parametrize(
    "text",
    [
        "# ours\nnats://a:1\n\n  b:2  \n",
        '["nats://a:1", "b:2"]',
        "- nats://a:1\n- b:2\n",
        "---\n- nats://a:1\n- b:2\n",
        "[nats://a:1, 'b:2']",
    ],
)
def test_a_file_may_be_lines_or_json_or_yaml(text: str) -> None:
    """In the order of the file."""
    assert read(text) == ["nats://a:1", "nats://b:2"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nats://a:1 nats://b:1", "no NATS URL"),
        ("- nats://a\n- {b: c}", "no NATS URL"),
        ("dns://a", "locators can't"),
        ("- a\n  b: :", "."),
        ("[1]", "no NATS URL"),
    ],
)
def test_a_file_with_something_else_is_refused(text: str, said: str) -> None:
    """The error shows the item."""
    with pytest.raises(ValueError, match=said):
        read(text)


async def test_missing_empty_and_broken_files_are_told_apart(tmp_path: Path) -> None:
    """What may come later is not there yet; what is wrong must be corrected."""
    path = tmp_path / "servers"
    with pytest.raises(BusUnavailableError, match="No such file"):
        await find(f"file://{path}", 1.0)
    path.write_text("# nothing yet\n")
    with pytest.raises(BusUnavailableError, match="names no server"):
        await find(f"file://{path}", 1.0)
    path.write_text("{")
    with pytest.raises(ConfigError, match=str(path)):
        await find(f"file://{path}", 1.0)
    path.write_text("x" * 2_000_000)
    with pytest.raises(ConfigError, match="1 MiB"):
        await find(f"file://{path}", 1.0)


async def test_one_entry_that_leads_nowhere_hides_no_other(tmp_path: Path) -> None:
    """Only if none leads anywhere it is an error, which names each."""
    missing = [f"file://{tmp_path}/a", f"file://{tmp_path}/b"]
    assert await Servers([*missing, "nats://c:1"]).resolve(1.0) == ["nats://c:1"]
    with pytest.raises(BusUnavailableError, match=r"/a can't be read.*/b can't be read"):
        await Servers(missing).resolve(1.0)


def test_srv_records_come_by_priority_then_by_weight() -> None:
    """RFC 2782: a heavier record is first more often, a weight of 0 seldom."""
    records = [Service(2, 0, 1, "last"), Service(1, 90, 1, "heavy"), Service(1, 10, 1, "light")]
    first = Counter(in_order(records)[0].target for _ in range(500))
    assert 380 < first["heavy"] < 495
    assert first["light"] > 5
    assert all(in_order(records)[2].target == "last" for _ in range(50))


async def test_a_package_can_add_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an entry point as installing the package writes it."""
    (tmp_path / "our_finder.py").write_text(
        "from foundation_nats.discovery.locator import Found\n"
        "async def resolve(locator, timeout_s):\n"
        "    if locator.host == 'broken':\n"
        "        raise KeyError('no such thing')\n"
        "    return [Found(locator.url(locator.host + '.found', 4222))]\n"
    )
    info = tmp_path / "our_finder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-finder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[foundation_nats.discovery]\nfinder = our_finder:resolve\ngone = no_such_module:resolve\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert await Servers(["finder://x"]).resolve(1.0) == ["nats://x.found:4222"]
    with pytest.raises(BusUnavailableError, match="KeyError"):
        await Servers(["finder://broken"]).resolve(1.0)
    with pytest.raises(ConfigError, match="no_such_module"):
        Servers(["gone://x"])
