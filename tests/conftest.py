"""Shared by all tests: real servers, a clean environment, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from foundation_nats.testing import TestServer

AGENTS = Path(__file__).parent / "agents"
"""Where the agents that tests deploy are found by nodes."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Whoever runs the tests in the background of a shell has it ignored, and by inheritance
    # every command that a test starts; Ctrl-C must mean to them what it means to people.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", action="store_true", help="run the long fault campaigns too")
    parser.addoption("--seed", type=int, default=None, help="repeat a campaign by its seed")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test."""
    for name in list(os.environ):
        if name.startswith(("FOUNDATION_", "NATS_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a child process behind fails."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    if "server" in request.fixturenames:
        return  # the server of the session outlives the test
    left = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in before and child.status() != psutil.STATUS_ZOMBIE
    ]
    assert not left, f"left behind: {left}"


@pytest.fixture
def chaos(request: pytest.FixtureRequest) -> None:
    """Only under --chaos."""
    if not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    """A nats-server of the test's own (it starts in some 20 ms)."""
    async with TestServer() as running:
        yield running
