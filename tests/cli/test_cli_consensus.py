"""`foundation consensus` and `foundation lease` against a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from foundation_nats import Cluster
from foundation_nats.bus.streams import append
from foundation_nats.chaos.workloads.domains import Append, Write
from foundation_nats.testing import TestServer
from tests.cluster.domains import Store


async def _run(server: TestServer, *arguments: str) -> tuple[int, str, str]:
    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "foundation_cli.main", *arguments, "-s", server.url],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    done = await asyncio.to_thread(call)
    return done.returncode, done.stdout, done.stderr


async def test_domains_and_their_logs_are_shown(server: TestServer) -> None:
    """For people and for programs; what is no entry is said to be skipped."""
    async with Cluster.connect(server.url, name="writer") as cluster:
        code, out, err = await _run(server, "consensus", "list")
        assert (code, out) == (0, "")
        assert "No replicated domains." in err
        await cluster.consensus.propose(Store, Write(key="a", value="1"), id="first")
        await (await cluster.consensus.open(Store)).snapshot()
        await cluster.consensus.propose(Store, Append(item="x"), id="second")
        await append(cluster.bus, cluster.subjects.domain("store"), b"junk")
    code, out, _ = await _run(server, "consensus", "list")
    assert code == 0
    assert out.splitlines()[1].split()[:5] == ["store", "4", "3", "3", "1"]
    code, out, _ = await _run(server, "consensus", "list", "-o", "json")
    (info,) = json.loads(out)
    assert (info["name"], info["revision"], info["state"]["values"]) == ("store", 4, {"a": "1"})
    code, out, _ = await _run(server, "consensus", "log", "store")
    lines = out.splitlines()
    assert "first" in lines[1]
    assert '{"kind":"write","key":"a","value":"1"}' in lines[1]
    assert "skipped: Not a DomainEntry" in lines[3]
    code, out, _ = await _run(server, "consensus", "log", "store", "--limit", "2", "-o", "json")
    assert [entry["revision"] for entry in json.loads(out)] == [3, 4]
    assert json.loads(out)[0]["by"] == "writer"
    code, out, _ = await _run(server, "consensus", "show", "store")
    assert code == 0
    assert "at revision 1" in out
    code, _, err = await _run(server, "consensus", "show", "none")
    assert code == 4
    assert "There is no domain none." in err


async def test_leases_are_listed_with_holder_and_token(server: TestServer) -> None:
    """Held and free."""
    async with Cluster.connect(server.url, name="me") as cluster:
        mine = cluster.leases.lock("nightly")
        token = await mine.acquire()
        other = cluster.leases.lock("weekly")
        await other.acquire()
        await other.release()
        code, out, _ = await _run(server, "lease", "list")
        assert code == 0
        rows = [line.split() for line in out.splitlines()[1:]]
        assert rows[0][:4] == ["lock", "nightly", "me", str(token)]
        assert rows[1][:3] == ["lock", "weekly", "free"]
        code, out, _ = await _run(server, "lease", "list", "--kind", "lock", "-o", "json")
        assert [lease["holder"] for lease in json.loads(out)] == ["me", None]
        assert json.loads(out)[0]["ttl_s"] == 10
        await mine.release()
