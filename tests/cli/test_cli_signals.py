"""`foundation send` for later, `schedules`, `signal` and `ask --all` against a real cluster."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def test_signals_for_later_are_set_listed_looked_up_and_cancelled() -> None:
    """And everybody behind a target is asked; mistakes have their exit codes."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client

        async def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
            command = [sys.executable, "-m", "foundation_cli.main", *arguments]
            command += ["-s", nodes.server.url, "-c", "test"]
            done = await asyncio.to_thread(
                subprocess.run,
                command,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
                input=stdin,
            )
            return done.returncode, done.stdout, done.stderr

        for name in ("a", "b"):
            await cluster.agents.start("fleet:Counter", id=name, capabilities=["counting"])
        add = ("a", "counter.add", '{"amount": 1}')
        code, out, err = await run("send", *add, "--after", "1h", "--id", "later")
        assert (code, out) == (0, "set later for agent:a, to be sent later\n")
        assert "foundation schedules cancel later" in err
        assert (await run("send", *add, "--cron", "0 9 * * *", "--zone", "Asia/Tokyo"))[0] == 0
        assert (await run("send", *add, "--after", "0s", "--id", "soon", "--ttl", "1m"))[0] == 0
        assert (await run("send", *add, "--cron", "nonsense"))[0] == 2
        assert (await run("send", *add, "--at", "2030-01-01T00:00:00Z", "--after", "1s"))[0] == 2

        async def rang() -> bool:
            return bool(await cluster.ask("a", "counter.add", {"amount": 0}) == 1)

        await eventually(rang, timeout=10)
        code, out, _ = await run("schedules", "list")
        assert code == 0
        assert "later" in out
        assert "0 9 * * * (Asia/Tokyo)" in out
        code, out, _ = await run("schedules", "cancel", "later", "-o", "json")
        assert (code, json.loads(out)[0]["name"]) == (0, "later")
        assert (await run("schedules", "cancel", "later"))[0] == 4
        code, out, err = await run("send", *add, "--wait-handled", "--attempts", "2", "-o", "json")
        assert code == 0, err
        assert (json.loads(out)["state"], json.loads(out)["result"]) == ("handled", 2)
        code, out, err = await run("send", "a", "counter.sing", "--wait-handled", "-o", "json")
        assert (code, json.loads(err)["error"]["code"]) == (1, "agent.unhandled_signal")
        assert (await run("send", *add, "--wait-handled", "--after", "1s"))[0] == 2
        text = '{"amount": 1}\n\n{"amount": \n{"amount": 2}\n'
        bulk = ("send", "b", "counter.add", "--lines", "--id", "bulk", "-o", "json")
        code, out, err = await run(*bulk, stdin=text)
        assert (code, json.loads(out)) == (1, {"stored": 2, "repeated": 0, "failed": 1})
        assert "line 3: not JSON" in err
        code, out, err = await run(*bulk, stdin=text.replace('{"amount": \n', "\n"))
        assert (code, json.loads(out)) == (0, {"stored": 0, "repeated": 2, "failed": 0})
        assert await cluster.ask("b", "counter.add", {"amount": -3}) == 0
        assert await cluster.ask("a", "counter.add", {"amount": -1}) == 1
        code, out, _ = await run("signal", "soon", "-o", "json")
        assert code == 0
        found = json.loads(out)
        assert (found["state"], found["deliveries"][0]["handled_by"]) == ("handled", "n1")
        assert found["deadline"]
        code, out, _ = await run("signal", "soon")
        assert "took" in out.lower()
        assert (await run("signal", "nobody knows it"))[0] == 4
        get = ("ask", "capability:counting", "counter.get", "--all")
        code, out, err = await run(*get)
        assert [line.split() for line in out.splitlines()[1:]] == [["a", "1"], ["b", "0"]]
        assert (await run(*get, "--quorum", "3", "--timeout", "1s"))[0] == 1
        assert (await run(*get[:3], "--quorum", "3"))[0] == 2
        code, out, err = await run("doctor")
        assert "TIMERS" not in out + err
