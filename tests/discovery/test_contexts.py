"""Contexts of the NATS command line: what they say is used, what can't be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foundation_nats.config import BusConfig
from foundation_nats.discovery import contexts
from foundation_nats.discovery.servers import Servers, find
from foundation_nats.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of contexts."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NATS_CONTEXT", raising=False)
    (tmp_path / "nats" / "context").mkdir(parents=True)
    return tmp_path / "nats"


def write(home: Path, name: str, **values: object) -> None:
    """A context."""
    (home / "context" / f"{name}.json").write_text(json.dumps(values))


async def test_a_context_gives_servers_and_settings(home: Path) -> None:
    """All that it says, with ``~``; empty values are nothing."""
    said = {"nkey": "~/a.nk", "ca": "/ca.pem", "cert": "/c.pem", "key": "/k.pem", "token": ""}
    said["inbox_prefix"] = "_INBOX.me"
    write(home, "prod", url="one:4222, tls://two:4222", description="x", **said, tls_first=True)
    found = contexts.applied(BusConfig(servers=("context://prod",)))
    assert found.nkey == str(home.parent / "a.nk")
    assert (found.ca, found.cert, found.key, found.tls_first) == (
        "/ca.pem",
        "/c.pem",
        "/k.pem",
        True,
    )
    assert (found.token, found.inbox_prefix) == (None, "_INBOX.me")
    assert [item.url for item in await find("context://prod", 1)] == [
        "nats://one:4222",
        "tls://two:4222",
    ]


def test_what_the_settings_say_goes_before_and_identities_are_not_mixed(home: Path) -> None:
    """A token of one's own keeps the context's user out, not its CA."""
    write(home, "prod", user="u", password="p", ca="/theirs.pem", cert="/c.pem", key="/k.pem")
    found = contexts.applied(BusConfig(servers=("context://prod",), token="t", cert="/mine.pem"))
    assert (found.user, found.password, found.token) == (None, None, "t")
    assert (found.ca, found.cert, found.key) == ("/theirs.pem", "/mine.pem", None)


async def test_without_a_name_it_is_the_selected_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable goes before the selection; neither is an error."""
    write(home, "one", url="one:1")
    write(home, "two", url="two:2")
    with pytest.raises(ConfigError, match="No NATS context is selected"):
        await find("context://", 1)
    (home / "context.txt").write_text("one\n")
    assert [item.url for item in await find("context://", 1)] == ["nats://one:1"]
    monkeypatch.setenv("NATS_CONTEXT", "two")
    assert [item.url for item in await find("context://", 1)] == ["nats://two:2"]


async def test_the_url_may_be_a_locator_and_the_file_is_followed(home: Path) -> None:
    """A changed context is seen; a context of a context is refused."""
    servers = home / "servers"
    servers.write_text("nats://a:1\n")
    write(home, "prod", url=f"file://{servers}")
    found = Servers(["context://prod"])
    assert await found.resolve(1) == ["nats://a:1"]
    assert not found.has_changed()
    write(home, "prod", url="nats://b:2,nats://c:3")
    assert found.has_changed()
    assert await found.resolve(1) == ["nats://b:2", "nats://c:3"]
    write(home, "prod", url="context://other")
    with pytest.raises(ConfigError, match="context again"):
        await found.resolve(1)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"nsc": "nsc://o/a/u"}, ["'nsc'", "nsc generate creds"]),
        ({"jetstream_domain": "hub"}, ["'jetstream_domain'", "domain itself"]),
        ({"jetstream_api_prefix": "JS.hub"}, ["'jetstream_api_prefix'"]),
        ({"socks_proxy": "socks5://x"}, ["'socks_proxy'", "without a proxy"]),
        ({"user_seed": "SUSECRET"}, ["'user_seed'", "'nkey'"]),
        ({"windows_cert_store": "user"}, ["'windows_cert_store'", "without it"]),
        ({"user_jwt": "eySECRET"}, ["user_jwt needs nkey"]),
        ({"creds": "/c", "nkey": "/n"}, ["give one of them"]),
        ({"key": "/k"}, ["key needs cert"]),
        ({"inbox_prefix": "_REPLY"}, ["'_REPLY'", "_INBOX."]),
        ({"password": 42}, ["'password'", "not text"]),
        ({"tls_first": "yes"}, ["'tls_first'"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    home: Path, values: dict[str, object], parts: list[str]
) -> None:
    """With what to do about it, and without secrets."""
    write(home, "prod", **values)
    with pytest.raises(ConfigError) as caught:
        contexts.read("prod")
    text = f"{caught.value} {caught.value.hint}"
    assert all(part in text for part in parts), text
    assert "SECRET" not in text
    assert "42" not in text


def test_a_context_stands_alone_and_takes_no_options(home: Path) -> None:
    """It says who connects: to whom else would be a guess."""
    write(home, "prod", url="a:1")
    for servers, says in (
        (("context://prod", "nats://b:2"), "stands beside"),
        (("context://prod:4222",), "a port means nothing"),
        (("context://prod?x=1",), "wrong"),
        (("context://tow",), "Known: prod|no NATS context 'tow'"),
    ):
        with pytest.raises(ConfigError, match=says):
            contexts.applied(BusConfig(servers=servers))
