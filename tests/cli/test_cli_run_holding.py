"""`foundation run lock|semaphore|election|counter`, and reading a group: commands that run while a right is theirs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from foundation_cli.main import run as command
from foundation_cli.run import _SECTIONS
from foundation_nats import Cluster
from foundation_nats.coordination import leader_follower
from foundation_nats.testing import TestServer, eventually

TOKEN = [sys.executable, "-c", "import os; print(os.environ['FOUNDATION_TOKEN'])"]


def _begin(server: TestServer, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "foundation_cli.main", "run", "-s", server.url, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = await asyncio.to_thread(process.communicate, timeout=60)
    return process.returncode, out, err


async def _run(server: TestServer, *arguments: str) -> tuple[int, str, str]:
    return await _end(_begin(server, *arguments))


def _stays(path: Path) -> list[str]:
    """A command that starts another one, writes down both pids, and stays."""
    program = (
        "import os, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(path)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}} ')\n"
        "time.sleep(600)\n"
    )
    return [sys.executable, "-c", program]


async def _pids(path: Path) -> list[int]:
    await eventually(lambda: path.exists() and path.read_text().endswith(" "), timeout=30)
    return [int(pid) for pid in path.read_text().split()]


def _are_gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    )


async def test_a_command_runs_under_a_lock_and_others_wait(
    server: TestServer, tmp_path: Path
) -> None:
    """It finds its token; its exit code is ours; who does not get the lock says who has it."""
    code, out, err = await _run(server, "lock", "nightly", "--", *TOKEN)
    assert code == 0, err
    first = int(out)
    assert f"the lock nightly is held, token {first}" in err
    async with Cluster.connect(server.url) as cluster:
        mine = cluster.leases.lock("nightly", owner="someone")
        await mine.acquire()
        code, out, err = await _run(server, "lock", "nightly", "--wait", "300ms", "--", *TOKEN)
        assert (code, out) == (1, "")
        assert "was held by someone" in err
        await mine.release()
    fails = [sys.executable, "-c", "raise SystemExit(3)"]
    assert (await _run(server, "lock", "nightly", "--", *fails))[0] == 3
    code, out, err = await _run(server, "lock", "nightly", "--", str(tmp_path / "none"))
    assert code == 2
    assert "can't be run: No such file" in err
    code, out, _ = await _run(server, "lock", "nightly", "--", *TOKEN)
    assert int(out) > first


async def test_a_command_is_ended_when_its_lock_is_lost(server: TestServer, tmp_path: Path) -> None:
    """With all that it has started, before others may have the lock."""
    path = tmp_path / "pids"
    holding = _begin(server, "lock", "it", "--ttl", "1s", "--", *_stays(path))
    pids = await _pids(path)
    server.kill()
    code, _, err = await _end(holding)
    assert code == 1
    assert "the lock it was lost, and" in err
    await eventually(lambda: _are_gone(pids), message="they are ended")
    await server.restart()


async def test_sigterm_ends_the_command_and_gives_the_permit_back(
    server: TestServer, tmp_path: Path
) -> None:
    """At once; only so many are held at a time."""
    path = tmp_path / "pids"
    given = ("semaphore", "gpu", "--permits", "1")
    holding = _begin(server, *given, "--as", "trainer", "--", *_stays(path))
    pids = await _pids(path)
    code, _, err = await _run(server, *given, "--wait", "300ms", "--", *TOKEN)
    assert code == 1
    assert "(by trainer)" in err
    holding.send_signal(signal.SIGTERM)
    code, _, err = await _end(holding)
    assert code == 143, err
    assert _are_gone(pids)
    code, _, err = await _run(server, *given, "--wait", "2s", "--", *TOKEN)
    assert code == 0, err
    code, _, err = await _run(server, "semaphore", "gpu", "--permits", "2", "--", *TOKEN)
    assert code == 2
    assert "has 1 permits, not 2" in err


async def test_who_is_elected_runs_its_command(server: TestServer, tmp_path: Path) -> None:
    """The next one does when the first is told to stop, in a later term."""
    path = tmp_path / "pids"
    one = _begin(server, "election", "boss", "--as", "one", "--", *_stays(path))
    pids = await _pids(path)
    two = _begin(server, "election", "boss", "--as", "two", "--", *TOKEN)
    one.send_signal(signal.SIGTERM)
    code, _, err = await _end(one)
    assert code == 143, err
    assert _are_gone(pids)
    first = int(err.split("one leads boss in term ")[1].split()[0])
    code, out, err = await _end(two)
    assert code == 0, err
    assert int(out) > first
    three = _begin(server, "election", "boss", "--as", "three", "-o", "json")
    assert three.stdout is not None
    line = json.loads(await asyncio.to_thread(three.stdout.readline))
    assert (line["candidate"], line["state"]) == ("three", "leads")
    assert line["term"] > int(out)
    three.send_signal(signal.SIGTERM)
    assert (await _end(three))[0] == 143


async def test_shells_count(server: TestServer) -> None:
    """Each under its name; a repeat by its number counts once."""
    assert (await _run(server, "counter", "hits"))[:2] == (0, "0\n")
    given = ("counter", "hits", "add", "5", "--as", "web-1", "-o", "json")
    code, out, err = await _run(server, *given)
    assert code == 0, err
    found = json.loads(out)
    assert (found["sequence"], found["value"]) == (1, 5)
    assert json.loads((await _run(server, *given, "--sequence", "1"))[1])["value"] == 5
    assert (await _run(server, "counter", "hits", "add", "--as", "b", "--", "-2"))[1] == "3\n"
    code, out, _ = await _run(server, "counter", "hits", "value", "-o", "json")
    assert json.loads(out)["writers"] == {"b": -2, "web-1": 5}


async def test_a_shell_reads_a_group(server: TestServer) -> None:
    """Its value, as the members make it, and how old that may be."""
    async with (
        Cluster.connect(server.url) as cluster,
        leader_follower(cluster, "sums", member="a", apply=lambda a, b: a + b, initial=0) as group,
    ):
        await group.led(timeout=10)
        for value in (3, 4):
            await group.append(value)
        given = ("leader-follower", "sums", "--read", "-o", "json")
        code, out, err = await _run(server, *given, "--apply", "sum", "--initial", "0")
        assert code == 0, err
        found = json.loads(out)
        assert (found["value"], found["index"], found["leader"]) == (7, 2, "a")
        assert found["age_s"] < 5
        assert found["newest"]["value"] == 4
        code, out, err = await _run(server, *given, "--max-age", "10s")
        assert code == 0, err
        assert "value" not in json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lock", "nightly"], "-- COMMAND"),
        (["semaphore", "gpu", "--permits", "0", "--", "true"], "permits"),
        (["election", "boss"], "--as"),
        (["counter", "hits", "less"], "neither value nor add"),
        (["leader-follower", "sums", "--read", "--as", "b"], "give it alone"),
        (["leader-follower", "sums", "--read", "--apply", "mean"], "none of sum, min, max, merge"),
    ],
)
def test_wrong_commands_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked of a server."""
    assert command(["run", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_help_says_what_the_commands_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    """In sections; each command is in one."""
    assert command(["run", "--help"]) == 0
    text = capsys.readouterr().out
    _, at_a_time, rest = text.partition("Only one, or so many, at a time:\n")
    assert at_a_time
    names = [line.split()[0] for line in rest.splitlines() if line.startswith("  ")]
    assert names[:3] == ["lock", "semaphore", "election"]
    assert set(names) == {f.__name__.replace("_", "-") for part in _SECTIONS.values() for f in part}
