"""The actions that are there: what they do, and what they refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from foundation_nats import Agent, Plan, action, ref
from foundation_nats.agent.actions import run_action, stock
from foundation_nats.agent.actions.stock import (
    Http,
    ListFiles,
    ReadFile,
    WriteFile,
    branch,
    calculate,
    date_add,
    date_diff,
    fail,
    for_each,
    noop,
    now,
    sleep,
)
from foundation_nats.agent.tools import catalogue
from foundation_nats.errors import ActionError, ActionInvalidError, ConfigError
from foundation_nats.testing import AgentHarness


@action
async def double(item: int) -> int:
    """Twice."""
    return item * 2


async def test_control_flow_as_data() -> None:
    """In a plan that is JSON."""
    plan = (
        Plan("flow")
        .step("numbers", noop, {"value": [1, 2, 3]})
        .step("twice", for_each, {"items": ref("numbers"), "action": "double"})
        .step(
            "end",
            branch,
            {
                "condition": ref("twice")[0],
                "then": {"action": "calculate", "params": {"expression": "1 + 1"}},
            },
        )
        .step("none", branch, {"condition": False, "then": {"action": "double"}})
        .step("wait", sleep, {"seconds": 0})
    )

    class Flow(Agent):
        actions = (noop, for_each, branch, sleep, double, calculate)

    data = Plan.parse(plan.model_dump_json())
    async with AgentHarness(Flow) as flow:
        found = await flow.agent.ctx.run(data)
    assert found == {
        "numbers": [1, 2, 3],
        "twice": [2, 4, 6],
        "end": 2,
        "none": None,
        "wait": 0.0,
    }
    with pytest.raises(ActionError, match="on purpose"):
        await run_action(fail, {"message": "on purpose"})
    with pytest.raises(ActionInvalidError):
        await run_action(sleep, {"seconds": 1e9})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-(a - 1) ** 2", -1.0),
        ("7 // 2 + 7 % 4", 6),
        ("sqrt(16) + max(1, 2) - abs(-3)", 3.0),
        ("1 < a <= 2 and not a > 5", True),
        ("10 if a > 1 else 20", 10),
        ("round(pi, 2)", 3.14),
        ("round(25, -999999999)", 0),
    ],
)
async def test_expressions(expression: str, value: Any) -> None:
    """As people write them."""
    assert await run_action(calculate, {"expression": expression, "names": {"a": 2}}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "(1).__class__",
        "[1][0]",
        "'a' * 9",
        "lambda: 1",
        "a.b",
        "open('x')",
        "x := 1",
        "9 ** 9 ** 9",
        "2 ** 99999",
        "10.0 ** 400",
        "1 / 0",
        "sqrt(-1)",
        "(-8) ** 0.5",
        "1 +",
        "nobody + 1",
        "max(key=1)",
        "1e308 * 10",
        "-" * 60 + "1",
        "1j",
    ],
)
async def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    """At once, whatever it tries."""
    with pytest.raises(ActionError):
        await asyncio.wait_for(run_action(calculate, {"expression": expression}), 2)


async def test_clocks() -> None:
    """With zones."""
    assert (await run_action(now)).endswith("+00:00")
    with pytest.raises(ActionError, match="no time zone"):
        await run_action(now, {"zone": "Mars/Base"})
    assert await run_action(date_add, {"time": "2026-02-28T12:00:00", "days": 1}) == (
        "2026-03-01T12:00:00+00:00"
    )
    pair = {"start": "2026-01-01T00:00:00Z", "end": "2026-01-01T02:00:00+01:00"}
    assert await run_action(date_diff, pair) == 3600.0
    with pytest.raises(ActionError, match="calendars"):
        await run_action(date_add, {"time": "9999-12-31T00:00:00", "days": 9})


async def test_files_are_below_their_root(tmp_path: Path) -> None:
    """Whatever the path says."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("no")
    (root / "link").symlink_to(tmp_path / "secret")
    read, write = ReadFile(root, bytes_max=10), WriteFile(root, bytes_max=10)
    assert await run_action(write, {"path": "sub/a.txt", "text": "hello"}) == 5
    assert await run_action(write, {"path": "sub/a.txt", "text": "again"}) == 5
    assert await run_action(read, {"path": "sub/../sub/a.txt"}) == "again"
    assert await run_action(ListFiles(root), {"path": "sub"}) == [
        {"name": "a.txt", "directory": False, "bytes": 5}
    ]
    listed = await run_action(ListFiles(root))
    assert [(item["name"], item["directory"]) for item in listed] == [
        ("link", False),
        ("sub", True),
    ]
    for path in ("../secret", str(tmp_path / "secret"), "link", "sub/../../secret"):
        with pytest.raises(ActionError, match="outside"):
            await run_action(read, {"path": path})
        with pytest.raises(ActionError, match="outside"):
            await run_action(write, {"path": path, "text": "x"})
    for path, match in (("nothing", "No such file"), ("sub", "directory"), ("a\0b", "null")):
        with pytest.raises(ActionError, match=match):
            await run_action(read, {"path": path})
    (root / "long").write_text("x" * 11)
    (root / "bytes").write_bytes(b"\xff")
    for path, match in (("long", "longer than 10"), ("bytes", "no text")):
        with pytest.raises(ActionError, match=match):
            await run_action(read, {"path": path})
    with pytest.raises(ActionError, match="longer than 10"):
        await run_action(write, {"path": "x", "text": "x" * 11})
    with pytest.raises(ActionError, match="can't be written"):
        await run_action(write, {"path": "no/x", "text": "x"})
    assert (tmp_path / "secret").read_text() == "no"
    assert sorted(item.name for item in root.iterdir()) == ["bytes", "link", "long", "sub"]


@asynccontextmanager
async def _site(heads: list[str]) -> AsyncIterator[str]:
    """A server that notes requests; ``/path`` decides the answer."""

    tasks: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        path = head.split(" ")[1].partition("?")[0]
        status, more, body = {
            "/json": ("200 OK", "Content-Type: application/json\r\n", '{"a": 1}'),
            "/long": ("200 OK", "", "x" * 100),
            "/away": ("302 Found", "Location: http://example.invalid/\r\n", ""),
            "/near": ("302 Found", "Location: /json\r\n", ""),
            "/round": ("302 Found", "Location: /round\r\n", ""),
        }.get(path, ("404 Not Found", "", "nothing"))
        if path != "/never":
            text = f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write((text + body).encode())
            await writer.drain()
        else:
            await reader.read()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.wait(tasks)


async def test_http_is_bounded_in_hosts_time_and_size() -> None:
    """And says what went wrong."""
    heads: list[str] = []
    async with _site(heads) as site:
        http = Http(["127.0.0.1"], headers={"Authorization": "k"}, bytes_max=50, timeout=2)
        found = await run_action(http, {"url": f"{site}/json", "query": {"q": "1"}})
        assert (found.status, found.body) == (200, {"a": 1})
        assert "/json?q=1" in heads[-1]
        assert "authorization: k" in heads[-1].lower()
        assert "idempotency-key" not in heads[-1].lower()
        assert (await run_action(http, {"url": f"{site}/else"})).status == 404
        assert (await run_action(http, {"url": f"{site}/near"})).status == 302
        await run_action(http, {"url": f"{site}/json", "method": "POST", "body": {"b": 2}})
        assert "idempotency-key: http/send" in heads[-1].lower()
        following = Http(["127.0.0.1"], redirects=2)
        assert (await run_action(following, {"url": f"{site}/near"})).body == {"a": 1}
        quick = Http(["*"], timeout=0.05)
        for action_, url, match in (
            (http, f"{site}/long", "longer than 50"),
            (http, "http://example.invalid/", "may not be asked"),
            (http, "file:///etc/passwd", "no http"),
            (following, f"{site}/away", "example.invalid may not be asked"),
            (following, f"{site}/round", "more than 2 times"),
            (quick, f"{site}/never", r"does not answer|took longer"),
        ):
            with pytest.raises(ActionError, match=match):
                await run_action(action_, {"url": url})
    for hosts in ([], "example.org"):
        with pytest.raises(ConfigError, match="name the hosts"):
            Http(hosts)


def test_all_of_them_are_tools() -> None:
    """With a description each."""
    simple = [getattr(stock, name) for name in stock.__all__ if name[0].islower()]
    made = [ReadFile("."), WriteFile("."), ListFiles("."), Http(["x"])]
    tools = catalogue([*simple, *made])
    assert all(tool.description for tool in tools)
    assert len({tool.name for tool in tools}) == len(stock.__all__)
