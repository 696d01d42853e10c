"""Errors show the user's line first, and leave ours out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from foundation_nats.base import frames
from foundation_nats.errors import ConfigError, HandlerError
from foundation_nats.testing import AgentHarness

_SOURCE = """
import json
from foundation_nats import Agent, Signal, on


class Orders(Agent):
    @on("read")
    async def read(self, signal: Signal) -> None:
        self.parse("{")

    def parse(self, text: str) -> None:
        json.loads(text)

    @on("wrap")
    async def wrap(self, signal: Signal) -> None:
        try:
            self.parse("{")
        except ValueError as error:
            raise LookupError("no such order") from error

    @on("emit")
    async def emit_badly(self, signal: Signal) -> None:
        self.emit("two words", to="agent:x")

    @on("deep")
    async def deep(self, signal: Signal) -> None:
        def down(n: int) -> int:
            return down(n + 1)

        down(0)

    @on("plain")
    def plain(self, signal: Signal) -> None:
        raise KeyError("x")
"""


def line_of(text: str) -> int:
    """The number of the first line with *text*."""
    lines = _SOURCE.splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's module in a folder of their own, which is the working directory."""
    file = tmp_path / "orders.py"
    file.write_text(_SOURCE)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("orders", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "orders", module)
    spec.loader.exec_module(module)
    return module


async def failure(module: ModuleType, type_: str) -> HandlerError:
    """What asking for *type_* raises."""
    async with AgentHarness(module.Orders) as agent:
        with pytest.raises(HandlerError) as caught:
            await agent.ask(type_)
    return caught.value


@pytest.mark.parametrize(
    ("type_", "text", "function"),
    [
        ("read", "json.loads(text)", "Orders.parse"),
        ("wrap", "raise LookupError", "Orders.wrap"),
        ("emit", 'self.emit("two words"', "Orders.emit_badly"),
        ("deep", "return down(n + 1)", "Orders.deep.<locals>.down"),
        ("plain", 'raise KeyError("x")', "Orders.plain"),
    ],
)
async def test_the_users_line_comes_first(
    orders: ModuleType, type_: str, text: str, function: str
) -> None:
    """In the message, and as the first lines of the traceback; no frame of ours."""
    error = await failure(orders, type_)
    place = f"orders.py:{line_of(text)} in {function}"
    assert error.message.endswith(f"({place})")
    assert error.details["where"] == place
    first, second, *_ = error.details["traceback"].splitlines()
    assert first == place
    assert second.strip().startswith(text)
    assert "foundation_nats" not in error.details["traceback"].replace("foundation_nats import", "")


async def test_causes_are_told_and_recursion_is_short(orders: ModuleType) -> None:
    """The chain as Python tells it; a thousand equal frames are counted."""
    text = (await failure(orders, "wrap")).details["traceback"]
    assert "json.decoder.JSONDecodeError" in text
    assert "direct cause of the following" in text
    text = (await failure(orders, "deep")).details["traceback"]
    assert "the same" in text
    assert len(text) < 2000


async def test_everything_is_shown_on_demand(
    orders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``FOUNDATION_TRACEBACKS=full`` is for those who look for a bug of ours."""
    monkeypatch.setenv("FOUNDATION_TRACEBACKS", "full")
    assert "foundation_nats/" in (await failure(orders, "read")).details["traceback"]


def test_an_error_of_our_own_keeps_its_frames() -> None:
    """Nothing is left out where no user's code is involved."""
    try:
        raise ConfigError("x")
    except ConfigError as error:
        found = frames.of_traceback(error.__traceback__)
    ours = [frames.Frame(frames.__file__, 1, "f")]
    assert frames.user_frame(ours) is None
    assert frames.without_ours(ours) == ours
    assert frames.user_frame([*ours, *found]) == found[-1]


def test_an_installed_agents_own_package_is_the_users() -> None:
    """Not the library that it calls, nor the standard library."""
    site = next(root for root in frames._library_roots() if root.endswith("site-packages/"))
    agent = frames.Frame(f"{site}shop/agents.py", 7, "Shop.sell")
    inner = frames.Frame(f"{site}shop/stock.py", 9, "take")
    library = frames.Frame(f"{site}httpx/_client.py", 20, "send")
    stdlib = frames.Frame(json.__file__, 3, "loads")
    assert frames.user_frame([agent, inner, library, stdlib]) == inner


def test_a_native_dump_is_read_innermost_last() -> None:
    """What `faulthandler` writes, of the first thread alone."""
    text = (
        "Stack (most recent call first):\n"
        '  File "/home/me/shop.py", line 9 in take\n'
        '  File "/home/me/shop.py", line 7 in sell\n'
        "\n"
        '  File "/home/me/other.py", line 1 in other\n'
    )
    assert frames.of_fault(text) == [
        frames.Frame("/home/me/shop.py", 7, "sell"),
        frames.Frame("/home/me/shop.py", 9, "take"),
    ]


def test_a_syntax_error_names_its_own_line(tmp_path: Path) -> None:
    """Not the import that met it."""
    file = tmp_path / "bad.py"
    file.write_text("x = 1\ndef f(:\n")
    with pytest.raises(SyntaxError) as caught:
        compile(file.read_text(), str(file), "exec")
    assert frames.summary(caught.value) == f"SyntaxError: invalid syntax ({file}:2)"
    assert "def f(:" in frames.trace(caught.value)
