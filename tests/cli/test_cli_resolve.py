"""Which server, cluster and credentials the options come to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from foundation_cli import runtime
from foundation_cli.connection import Shared, load_config, resolve
from foundation_cli.runtime import UpFile
from foundation_nats.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FOUNDATION_") or name == "NATS_CONTEXT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def _context(tmp_path: Path, name: str, **values: str) -> None:
    folder = tmp_path / "config" / "nats" / "context"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))


def _select(tmp_path: Path, name: str) -> None:
    (tmp_path / "config" / "nats" / "context.txt").write_text(name + "\n")


def _entry(cluster: str, url: str, pid: int | None = None) -> UpFile:
    pid = os.getpid() if pid is None else pid
    started = runtime.process_start(pid) or ""
    return UpFile(cluster, url, pid, started, "/data", "process")


def test_without_anything_it_is_the_local_default() -> None:
    """No flag, no environment, no context, nothing running."""
    found = resolve(Shared())
    assert (found.urls, found.cluster) == (("nats://127.0.0.1:4222",), "default")


def test_each_source_beats_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flag, environment, context, running `up`, default: removed one by one."""
    _context(tmp_path, "prod", url="nats://context:4222", user="u", password="p")
    _select(tmp_path, "prod")
    runtime.write(_entry("default", "nats://running:4222"))
    monkeypatch.setenv("FOUNDATION_SERVER", "nats://env:4222")
    assert resolve(Shared(server="flag:4222")).urls == ("nats://flag:4222",)
    assert resolve(Shared(server="flag:4222")).user is None
    assert resolve(Shared()).urls == ("nats://env:4222",)
    assert resolve(Shared(context="prod")).urls == ("nats://context:4222",)
    monkeypatch.delenv("FOUNDATION_SERVER")
    found = resolve(Shared())
    assert (found.urls, found.user, found.password) == (("nats://context:4222",), "u", "p")
    assert "p" not in repr(found).partition("password")[2]
    (tmp_path / "config" / "nats" / "context.txt").unlink()
    assert resolve(Shared()).urls == ("nats://running:4222",)


def test_the_environment_may_name_a_context_and_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS_CONTEXT beats the selected one; FOUNDATION_CLUSTER counts with any server."""
    _context(tmp_path, "one", url="nats://one:4222")
    _context(tmp_path, "two", url="nats://two:4222,nats://three:4222", token="t")
    _select(tmp_path, "one")
    monkeypatch.setenv("NATS_CONTEXT", "two")
    monkeypatch.setenv("FOUNDATION_CLUSTER", "blue")
    found = resolve(Shared())
    assert found.urls == ("nats://two:4222", "nats://three:4222")
    assert (found.token, found.cluster) == ("t", "blue")
    assert resolve(Shared(cluster="green")).cluster == "green"


def test_a_missing_context_names_the_known_ones(tmp_path: Path) -> None:
    """And a name can't leave the folder."""
    _context(tmp_path, "one", url="nats://one:4222")
    with pytest.raises(ConfigError, match="Known: one"):
        resolve(Shared(context="tow"))
    with pytest.raises(ConfigError, match="not the name"):
        resolve(Shared(context="../one"))


def test_what_a_context_says_of_keys_and_certificates_reaches_the_settings(tmp_path: Path) -> None:
    """And what can't be done is refused: better than to connect without it."""
    files = {"cert": "/a.pem", "key": "/a.key", "ca": "/ca.pem", "nkey": "/a.nk"}
    _context(tmp_path, "tls", url="tls://one:4222", inbox_prefix="_INBOX.me", **files)
    bus = load_config(resolve(Shared(context="tls"))).bus
    assert (bus.cert, bus.key, bus.ca, bus.nkey) == tuple(files.values())
    assert (bus.inbox_prefix, bus.servers) == ("_INBOX.me", ("tls://one:4222",))
    creds = tmp_path / "a.creds"
    creds.touch()
    found = resolve(Shared(context="tls", creds=str(creds)))
    assert (found.nkey, found.ca, found.creds) == (None, "/ca.pem", str(creds))
    _context(tmp_path, "domain", url="nats://one:4222", jetstream_domain="hub")
    with pytest.raises(ConfigError, match="'jetstream_domain'"):
        resolve(Shared(context="domain"))


def test_the_only_running_cluster_is_found_whatever_its_name() -> None:
    """`foundation up -c demo` then `foundation status`."""
    runtime.write(_entry("demo", "nats://demo:1"))
    found = resolve(Shared())
    assert (found.urls, found.cluster) == (("nats://demo:1",), "demo")
    runtime.write(_entry("other", "nats://other:1"))
    with pytest.raises(ConfigError, match="demo, other"):
        resolve(Shared())
    assert resolve(Shared(cluster="other")).urls == ("nats://other:1",)
    runtime.write(_entry("default", "nats://default:1"))
    assert resolve(Shared()).cluster == "default"


def test_a_file_whose_process_is_gone_is_ignored() -> None:
    """Neither a free pid nor one that now belongs to another process counts."""
    entry = _entry("demo", "nats://demo:1")
    runtime.write(UpFile(entry.cluster, entry.url, 2**22 + 1, "", "", "process"))
    assert runtime.running() == []
    runtime.write(UpFile(entry.cluster, entry.url, entry.pid, "1", "", "process"))
    assert runtime.running() == []
    runtime.path_of("demo").write_text("{")
    assert runtime.running() == []


def test_the_runtime_file_is_private_and_only_its_owner_removes_it() -> None:
    """A newer `up` of the same cluster keeps its file when the older one ends."""
    older, newer = _entry("demo", "nats://old:1"), _entry("demo", "nats://new:1")
    runtime.write(older)
    assert runtime.path_of("demo").stat().st_mode & 0o777 == 0o600
    runtime.write(newer)
    runtime.remove(older)
    assert [entry.url for entry in runtime.running()] == ["nats://new:1"]
    runtime.remove(newer)
    assert runtime.running() == []
    assert list(runtime.runtime_dir().iterdir()) == []


def test_a_password_in_a_url_is_not_shown() -> None:
    """Errors name the servers, never what opens them."""
    found = resolve(Shared(server="nats://me:secret@host:4222,nats://token@other"))
    assert found.shown == "nats://host:4222, nats://other"


def test_missing_credentials_are_said_before_connecting(tmp_path: Path) -> None:
    """A wrong --creds is a usage error, not a refused connection."""
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(Shared(server="x", creds=str(tmp_path / "no.creds")))
