"""TLS both ways, nkeys, tokens of users: real servers let in who may come in, and nobody speaks in plain text unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nkeys
import pytest
import trustme

from foundation_nats import Cluster
from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig, Config
from foundation_nats.errors import BusUnavailableError, ConfigError, PermissionDeniedError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer
from tests.integration.test_credentials import _USER, _key, _trust


def _certificates(folder: Path, ca: str, *names: str) -> None:
    """Files ``CA.pem``, and ``NAME.pem`` with ``NAME.key`` for each name, valid for 127.0.0.1."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / f"{ca}.pem")
    authority.private_key_pem.write_to_path(folder / f"{ca}.key")
    for name in names:
        issued = authority.issue_cert("127.0.0.1", common_name=name)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, certificates of a server and a client, and another CA with a client."""
    folder = tmp_path_factory.mktemp("papers")
    _certificates(folder, "ca", "server", "client")
    _certificates(folder, "other", "stranger")
    return folder


def _tls(papers: Path, more: str = "") -> EmbeddedConfig:
    return EmbeddedConfig(
        extra=f'tls {{ cert_file: "{papers}/server.pem", key_file: "{papers}/server.key", '
        f'ca_file: "{papers}/ca.pem"{more} }}\n'
    )


async def _works(config: BusConfig) -> None:
    bus = await Bus.connect(config, "test")
    try:
        await bus.flush()
        await bus.request("$JS.API.INFO", b"")
    finally:
        await bus.close()


def _context(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, **values: object) -> None:
    folder = home / "nats" / "context"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))


async def test_a_server_that_asks_for_certificates_gets_ours_and_we_check_its_own(
    papers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By settings, and by a context from Python and as a node; strangers stay out on either side."""
    mine = {"cert": str(papers / "client.pem"), "key": str(papers / "client.key")}
    ca = str(papers / "ca.pem")
    async with TestServer(_tls(papers, ", verify: true")) as server:

        def config(**given: str) -> BusConfig:
            return BusConfig.model_validate(
                {"servers": (server.url,), "connect_timeout_s": 1.0, **given}
            )

        await _works(config(ca=ca, **mine))
        with pytest.raises(BusUnavailableError, match="TLS failed"):
            await Bus.connect(config(ca=str(papers / "other.pem"), **mine), "distrustful")
        with pytest.raises(BusUnavailableError, match="TLS failed"):
            await Bus.connect(config(), "without a CA")
        theirs = {"cert": str(papers / "stranger.pem"), "key": str(papers / "stranger.key")}
        with pytest.raises(BusUnavailableError):
            await Bus.connect(config(ca=ca, **theirs), "stranger")
        _context(tmp_path, monkeypatch, "prod", url=server.url, ca=ca, **mine)
        async with Cluster.connect("context://prod") as cluster:
            await cluster.send("nobody", "hello", {})
            assert cluster.config.bus.servers == ("context://prod",)
        monkeypatch.setenv("FOUNDATION_SERVER", "context://")
        monkeypatch.setenv("NATS_CONTEXT", "prod")
        await _works(Config.load().bus)


async def test_a_server_may_want_tls_before_it_says_anything(papers: Path) -> None:
    """``handshake_first``: who waits for its word first waits for too long."""
    given: dict[str, Any] = {"ca": str(papers / "ca.pem"), "connect_timeout_s": 0.7}
    async with TestServer(_tls(papers, ', handshake_first: "800ms"')) as server:
        await _works(BusConfig(servers=(server.url,), tls_first=True, **given))
        with pytest.raises(BusUnavailableError):
            await Bus.connect(BusConfig(servers=(server.url,), **given), "late")


async def test_who_asks_for_tls_never_speaks_in_plain_text(papers: Path) -> None:
    """A server without it gets neither a name nor a password; one that leaves the choice encrypts."""
    ca = str(papers / "ca.pem")
    auth = 'authorization: {user: "u", password: "p"}\n'
    async with TestServer(EmbeddedConfig(extra=auth)) as server:
        for url, given in ((server.url, ca), (server.url.replace("nats://", "tls://"), None)):
            config = BusConfig(
                servers=(url,), ca=given, user="u", password="p", connect_timeout_s=1
            )
            with pytest.raises(BusUnavailableError, match="offers none"):
                await Bus.connect(config, "careful")
        await _works(BusConfig(servers=(server.url,), user="u", password="p"))
    both = _tls(papers).extra + "allow_non_tls: true\n"
    async with TestServer(EmbeddedConfig(extra=both)) as server:
        bus = await Bus.connect(BusConfig(servers=(server.url,), ca=ca), "encrypted")
        try:
            connection = bus._client._transport
            assert connection is not None
            writer = connection._io_writer  # type: ignore[attr-defined]
            assert writer.get_extra_info("ssl_object") is not None
        finally:
            await bus.close()


async def test_a_client_that_is_cut_off_encrypts_again(
    papers: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server dies and comes back: the same certificate, checked the same way; asyncio has no word to say."""
    async with TestServer(_tls(papers)) as server:
        bus = await Bus.connect(
            BusConfig(servers=(server.url,), ca=str(papers / "ca.pem")), "enduring"
        )
        try:
            await server.restart()
            await bus.wait_connected(10)
            await bus.flush()
            writer = bus._client._transport._io_writer  # type: ignore[union-attr]
            assert writer.get_extra_info("ssl_object") is not None
        finally:
            await bus.close()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_an_nkey_opens_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one, and none, does not; nor is the seed in any error. The inbox may be one's own."""
    _, public, seed = _key(_USER, "user")
    _, _, other = _key(_USER, "other")
    path, wrong, broken = tmp_path / "user.nk", tmp_path / "other.nk", tmp_path / "broken.nk"
    path.write_bytes(seed + b"\n")
    wrong.write_bytes(other)
    broken.write_bytes(seed[:-3])
    allowed = '{subscribe: ["_INBOX.mine.>"]}'
    users = f"authorization: {{users: [{{nkey: {public}, permissions: {allowed}}}]}}\n"
    async with TestServer(EmbeddedConfig(extra=users)) as server:
        servers = (server.url,)
        await _works(BusConfig(servers=servers, nkey=str(path), inbox_prefix="_INBOX.mine"))
        for given in (None, str(wrong)):
            refused = BusConfig(servers=servers, nkey=given, connect_timeout_s=0.5)
            with pytest.raises(PermissionDeniedError, match="refused"):
                await Bus.connect(refused, "stranger")
        for bad, says in ((broken, "no seed of a user"), (tmp_path / "none", "can't be read")):
            with pytest.raises(ConfigError, match=says) as caught:
                await Bus.connect(BusConfig(servers=servers, nkey=str(bad)), "wrong")
            assert seed.decode()[:20] not in str(caught.value)
        values = {"url": server.url, "nkey": str(path), "inbox_prefix": "_INBOX.mine"}
        _context(tmp_path, monkeypatch, "keyed", **values)
        await _works(BusConfig(servers=("context://keyed",)))
        # What the settings say themselves goes before, and is taken whole.
        with pytest.raises(PermissionDeniedError):
            await Bus.connect(
                BusConfig(servers=("context://keyed",), token="t", connect_timeout_s=0.5), "token"
            )


async def test_a_users_jwt_with_its_seed_opens_the_server(tmp_path: Path) -> None:
    """As the two halves of a credentials file would."""
    extra, creds = _trust(tmp_path)
    lines = creds.read_text().splitlines()
    seed = tmp_path / "user.nk"
    seed.write_text(lines[5])
    assert nkeys.from_seed(bytearray(lines[5].encode())).public_key.startswith(b"U")
    async with TestServer(EmbeddedConfig(extra=extra)) as server:
        await _works(BusConfig(servers=(server.url,), nkey=str(seed), user_jwt=lines[1]))
        with pytest.raises(PermissionDeniedError):
            await Bus.connect(
                BusConfig(servers=(server.url,), nkey=str(seed), connect_timeout_s=0.5), "without"
            )


async def test_files_that_are_no_certificates_are_named(papers: Path, tmp_path: Path) -> None:
    """Before anything is sent: there is no server."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    cases = (
        ({"ca": str(empty)}, "no file of certificates"),
        ({"ca": str(tmp_path / "none.pem")}, "bus.ca.*can't be read"),
        ({"cert": str(papers / "client.pem"), "key": str(papers / "other.key")}, "no client cert"),
        ({"cert": str(papers / "client.pem")}, "in the same file"),
    )
    for given, says in cases:
        with pytest.raises(ConfigError, match=says):
            await Bus.connect(BusConfig.model_validate({"servers": ("127.0.0.1:1",), **given}), "x")
