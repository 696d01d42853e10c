"""Commands that look on: `top`, `history`, `replay`, `dashboard`, against one running cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from foundation_cli import top
from foundation_nats.api.dashboard import is_loopback, serving
from foundation_nats.api.pulse import Pulses
from foundation_nats.testing import TestCluster, eventually
from tests.cli.test_cli_nodes import running
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def test_top_names_who_is_busy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent that does not keep up, one that is asked, and what they do in a second."""
    async with running(tmp_path) as (cluster, shell):
        client = cluster.client
        await client.agents.start("fleet:Slow", id="slow")
        await client.agents.start("fleet:Counter", id="quick")
        pulses = Pulses(client)
        assert (await pulses.next()).rates.stored is None
        for _ in range(20):
            await client.send("slow", "slow.work", {"seconds": 30})

        async def busy() -> bool:
            await client.ask("quick", "counter.add", {"amount": 1})
            pulse = await pulses.next()
            agents = {item.id: item for item in pulse.busiest}
            return (
                agents.get("slow") is not None
                and agents["slow"].backlog >= 19
                and agents["slow"].node == "n1"
                and agents.get("quick") is not None
                and (agents["quick"].asked_s or 0) > 0
                and (pulse.rates.commits or 0) > 0
            )

        await eventually(busy, timeout=10, message="both are named")
        code, out, err = await shell.run("top", "--count", "2", "--every", "300ms", "-o", "json")
        assert code == 0, err
        for document in map(json.loads, out.splitlines()):
            assert document["schema"] == "foundation/v1/top"
            assert document["nodes"][0]["name"] == "n1"
            assert document["agents"]["running"] == 2
            assert document["busiest"][0]["id"] == "slow"
            assert document["rates"]["stored"] is not None
            assert {item["name"] for item in document["deployments"]} == {"slow", "quick"}
        assert len(out.splitlines()) == 2
        last = top.as_document(await pulses.next())
        top._print(last, [1.0])
        text = capsys.readouterr().out
        assert "HANDLED/S" in text
        assert "slow" in text
        assert "\x1b" not in text


async def test_history_and_replay_show_what_was_and_what_came_of_it(tmp_path: Path) -> None:
    """As tables and as JSON; a replay that is not exact ends with 1."""
    async with running(tmp_path) as (cluster, shell):
        client = cluster.client
        await client.agents.start("rememberer:Tally", id="tally")
        receipts = [
            await client.send("tally", "tally.add", {"amount": amount}) for amount in (1, 2, 3)
        ]

        async def is_handled() -> bool:
            state = await client.agents.state("tally")
            return state is not None and state["cursor"] >= receipts[-1].sequence

        await eventually(is_handled, timeout=10, message="all are handled")
        listed = await shell.json("history", "tally", "--last", "2", "--effects")
        assert listed["schema"] == "foundation/v1/history"
        assert [item["data"]["amount"] for item in listed["signals"]] == [2, 3]
        assert [item["outcome"] for item in listed["signals"]] == ["handled", "handled"]
        assert (listed["kept"], listed["unread"]) == (3, 0)
        assert listed["signals"][0]["effects"][0]["target"] == "agent:mirror"
        middle = str(receipts[1].sequence)
        code, out, err = await shell.run("replay", "tally", "--until", middle)
        assert code == 0, err
        assert f"state at #{middle}" in out
        assert '"total":3' in out
        assert "total: 1 → 3" in out
        await client.ask("tally", "tally.add", {"amount": 10})
        code, out, err = await shell.run("replay", "tally", "-o", "json")
        assert code == 1, err
        found = json.loads(out)
        assert (found["asides"], found["exact"]) == (1, False)
        assert found["state"]["total"] == 6


async def test_the_dashboard_shows_and_can_do_nothing(tmp_path: Path) -> None:
    """The page, its JSON, a live stream; other methods, names and hidden data."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as cluster:
        client = cluster.client
        await client.agents.start("fleet:Counter", id="visits")
        async with (
            serving(client, port=0, hide_data=True) as url,
            httpx.AsyncClient(base_url=url, timeout=10) as browser,
        ):
            page = await browser.get("/")
            assert page.status_code == 200
            nonce = (
                page.headers["content-security-policy"].partition("'nonce-")[2].partition("'")[0]
            )
            assert len(nonce) >= 16
            assert f'<script nonce="{nonce}">' in page.text
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "@NONCE@" not in page.text
            assert (await browser.get("/")).headers["content-security-policy"] != (
                page.headers["content-security-policy"]
            )
            pulse = (await browser.get("/api/pulse")).json()
            assert pulse["nodes"][0]["name"] == "n1"
            assert pulse["agents"]["running"] == 1
            for path, text in (
                ("/api/agents?text=VIS&status=running", '"visits"'),
                ("/api/topology", '"n1"'),
                ("/api/why?name=visits", "runs on n1"),
            ):
                answer = await browser.get(path)
                assert answer.status_code == 200, answer.text
                assert text in answer.text
            assert (await browser.get("/api/agents?text=nobody")).json()["total"] == 0
            for path, status in (
                ("/api/agent?id=nobody", 404),
                ("/api/agent", 400),
                ("/api/live?where=((", 400),
                ("/etc/passwd", 404),
            ):
                assert (await browser.get(path)).status_code == status, path
            assert (await browser.post("/api/pulse")).status_code == 405
            for name in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""):
                answer = await browser.get("/api/pulse", headers={"host": name})
                assert answer.status_code == 421, name
            async with browser.stream("GET", "/api/live?agent=visits") as stream:
                lines = stream.aiter_lines()
                assert await anext(lines) == "event: ready"
                receipt = await client.send("visits", "counter.add", {"amount": 4711})
                async for line in lines:
                    if line.startswith("data: ") and "counter.add" in line:
                        (item,) = json.loads(line[6:])["items"]
                        break
            assert (item["kind"], item["agent"], item["data"]) == ("signal", "visits", "(hidden)")

            async def handled() -> dict[str, Any] | None:
                found: dict[str, Any] = (await browser.get("/api/agent?id=visits")).json()
                stored = found["stored"] or {"cursor": 0}
                return found if stored["cursor"] >= receipt.sequence else None

            found = await eventually(handled, timeout=10, message="it is handled")
            assert found is not None
            assert found["history"]["signals"][-1]["sequence"] == receipt.sequence
            assert "4711" not in json.dumps(found)
            # A stream that is still open does not keep the server from ending.
            late = browser.stream("GET", "/api/live")
            await late.__aenter__()
        await late.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.evil.example", False),
        ("192.168.0.1", False),
        ("", False),
    ],
)
def test_what_counts_as_this_machine(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local
