"""What somebody does in their first ten minutes, by the commands alone, each within its time.

The times are generous for machines that do other things, too; each step prints what it took (``-s``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

_FOUNDATION = [sys.executable, "-m", "foundation_cli.main"]


class Person:
    """Somebody with a terminal."""

    def __init__(self, home: Path) -> None:
        self.here = home
        (home / "tmp").mkdir()
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("FOUNDATION_", "NATS_"))
        }
        self.env |= {
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "TMPDIR": str(home / "tmp"),
        }

    def types(self, *words: str, within: float) -> str:
        """A command that succeeds in time; what it prints."""
        began = time.monotonic()
        done = subprocess.run(
            [*_FOUNDATION, *words],
            cwd=self.here,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        took = time.monotonic() - began
        print(f"{took:6.2f} s  foundation {' '.join(words)}")
        assert done.returncode == 0, done.stderr
        assert took < within, f"{words[0]} took {took:.1f} s"
        return done.stdout

    def types_until(self, wanted: str, *words: str, within: float) -> str:
        """The same command again and again, until it prints that."""
        began, said = time.monotonic(), ""
        while time.monotonic() - began < within:
            done = subprocess.run(
                [*_FOUNDATION, *words],
                cwd=self.here,
                env=self.env,
                capture_output=True,
                text=True,
                timeout=60,
            )
            said = done.stdout + done.stderr
            if wanted in said:
                took = time.monotonic() - began
                print(f"{took:6.2f} s  until `foundation {' '.join(words)}` says {wanted!r}")
                return said
        raise AssertionError(f"{words} does not say {wanted!r} within {within} s, but: {said}")

    @contextlib.contextmanager
    def starts(self, *words: str, log: Path) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on, in another terminal."""
        with log.open("w") as output:
            process = subprocess.Popen(
                [*_FOUNDATION, *words],
                cwd=self.here,
                env=self.env,
                stdout=output,
                stderr=output,
                text=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(20)


def shows(log: Path, wanted: str, *, within: float) -> str:
    """What a terminal shows, once it shows that."""
    began = time.monotonic()
    while wanted not in (text := log.read_text()):
        assert time.monotonic() - began < within, f"{wanted!r} is not shown, but: {text}"
        time.sleep(0.02)
    print(f"{time.monotonic() - began:6.2f} s  until {wanted!r} is shown")
    return text


def test_the_first_ten_minutes(tmp_path: Path) -> None:
    """From an empty folder to an agent that survives an edit and a killed node, and nothing left."""
    person = Person(tmp_path)
    assert "foundation up agents.yaml" in person.types("init", "demo", within=5)
    person.here = tmp_path / "demo"
    log = tmp_path / "up.log"
    words = ("up", "agents.yaml", "--reload", "--workers", "1", "--respawn")
    with person.starts(*words, log=log) as process:
        text = shows(log, "Ctrl-C stops everything.", within=20)
        assert "Cluster default is up at nats://127.0.0.1:" in text
        family = psutil.Process(process.pid).children(recursive=True)

        add = ("ask", "visits", "counter.add", '{"amount": 1}')
        with person.starts("tap", "-o", "json", log=tmp_path / "tap.log"):
            time.sleep(0.7)  # a tap says nothing before there is something
            assert person.types(*add, within=5) == "1\n"
            assert "counter.add" in shows(tmp_path / "tap.log", "visits", within=10)

        code = person.here / "counter.py"
        code.write_text(code.read_text().replace("+= signal.data.amount", "+= 10"))
        shows(log, "Reloaded counter.py: 1 agent", within=15)
        assert person.types(*add, within=5) == "11\n"

        (person.here / "agents.yaml").write_text(
            "version: 1\nagents:\n"
            "  - {name: visits, run: 'counter:Counter', critical: true}\n"
            "  - {name: many, run: 'counter:Counter', replicas: 2}\n"
        )
        person.types_until("10", "ask", "many-1", "counter.add", "{}", within=20)
        person.types("scale", "many", "5", within=20)
        person.types_until("10", "ask", "many-4", "counter.add", "{}", within=20)

        info = json.loads(person.types("agent", "visits", "-o", "json", within=5))
        node = next(
            child for child in family if info["node"] in child.cmdline() and child.children()
        )
        node.kill()
        person.types_until("21", *add, within=20)
        story = person.types("why", "visits", within=5)
        assert f"{info['node']}, where it was, went down" in story
        assert "with new code, going on from its stored state" in story

        family = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        print(f"{time.monotonic() - began:6.2f} s  until all is over")
    assert not [child for child in family if child.is_running() and not is_zombie(child)]
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    # What a node that was killed had logged stays to be read.
    assert all(path.suffix == ".log" for path in left), left
    assert not any((tmp_path / "tmp").iterdir())


def is_zombie(process: psutil.Process) -> Any:
    """Whether it is dead, and only not reaped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
