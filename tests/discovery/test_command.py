"""`foundation discovery` from outside: what it prints and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foundation_nats.testing import TestServer
from foundation_nats.testing.brokers import free_port


def _run(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "foundation_cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_what_is_found_is_printed_without_passwords(tmp_path: Path) -> None:
    """As JSON with stable keys, or as a table."""
    path = tmp_path / "servers"
    path.write_text("nats://me:secret@10.0.0.1:4222\n10.0.0.2:4222\n")
    code, out, err = _run("discovery", "resolve", f"file://{path}", "nats://c:1", "-o", "json")
    assert (code, err) == (0, "")
    assert [row["url"] for row in json.loads(out)] == [
        "nats://10.0.0.1:4222",
        "nats://10.0.0.2:4222",
        "nats://c:1",
    ]
    assert set(json.loads(out)[0]) == {"url", "cluster", "locator", "note"}
    code, out, _ = _run("discovery", "resolve", f"file://{path}")
    assert code == 0
    assert "URL" in out
    assert "nats://10.0.0.1:4222" in out


def test_without_a_locator_it_shows_what_other_commands_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options and environment count."""
    path = tmp_path / "servers"
    path.write_text("nats://10.0.0.1:4222\n")
    monkeypatch.setenv("FOUNDATION_SERVER", f"file://{path}")
    code, out, _ = _run("discovery", "resolve", "-o", "json")
    assert code == 0
    assert json.loads(out)[0]["locator"] == f"file://{path}"


@pytest.mark.parametrize(
    ("entry", "code", "said"),
    [
        ("file:///no/such/file", 3, "/no/such/file"),
        ("dns://no-such-host.invalid", 3, "no-such-host.invalid"),
        ("k8s://nats", 2, "SERVICE.NAMESPACE"),
        ("consul://x", 2, "consul://x"),
    ],
)
def test_the_exit_code_says_what_kind_of_failure_it_was(entry: str, code: int, said: str) -> None:
    """3: nothing is there now; 2: the locator is wrong. JSON on stderr with -o json."""
    found, out, err = _run("discovery", "resolve", entry, "-o", "json", "--timeout", "3s")
    assert (found, out) == (code, "")
    assert said in json.loads(err)["error"]["message"]


async def test_every_command_takes_a_locator(tmp_path: Path) -> None:
    """By --server and by the environment."""
    path = tmp_path / "servers"
    async with TestServer() as server:
        path.write_text(f"{server.url}\n")
        code, _, err = _run("nodes", "-s", f"file://{path}", "-o", "json")
        assert (code, err) == (0, "")
    code, _, err = _run("nodes", "-s", f"file://{path}", "--timeout", "500ms")
    assert code == 3
    assert str(path) in err
    assert server.url.rpartition("/")[2] in err


def test_a_server_that_does_not_answer_is_not_announced() -> None:
    """Nor several, nor a locator."""
    code, _, err = _run("discovery", "announce", "-s", f"nats://127.0.0.1:{free_port()}")
    assert code == 3
    assert "not announced" in err
    code, _, err = _run("discovery", "announce", "-s", "dns://x")
    assert code == 2
    assert "by its URL" in err
