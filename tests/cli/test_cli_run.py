"""`foundation run` against a real server: what it prints, how it ends, and that it goes on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from foundation_nats import Cluster
from foundation_nats.coordination import workqueue
from foundation_nats.testing import TestServer


async def _run(server: TestServer, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "foundation_cli.main", "run", "-s", server.url, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = await asyncio.to_thread(call)
    return done.returncode, done.stdout, done.stderr


async def test_two_shells_meet_at_a_barrier(server: TestServer) -> None:
    """Both are told the generation; alone it breaks, and says who is missing."""
    both = await asyncio.gather(
        *(
            _run(server, "barrier", "b", "--parties", "x,y", "--as", name, "-o", "json")
            for name in "xy"
        )
    )
    for code, out, err in both:
        assert code == 0, err
        assert json.loads(out) == {"barrier": "b", "generation": 1}
    code, out, err = await _run(server, "barrier", "b", "--parties", "2", "--wait", "300ms")
    assert (code, out) == (1, "")
    assert "missing 1 of 2" in err
    code, _, err = await _run(server, "barrier", "b", "--parties", "x,y")
    assert code == 2
    assert "none of the barrier's parties: x, y" in err


async def test_shells_vote(server: TestServer) -> None:
    """By `cast`; the result is printed to whoever asks, again and again."""
    arguments = ["vote", "v", "--choice", "yes", "--choice", "no", "--cast", "--wait", "20s"]
    voters = ["--voter", "ann=2", "--voter", "bob", "--voter", "cy"]
    waiting = asyncio.create_task(_run(server, *arguments, *voters, "-o", "json"))
    deadline = asyncio.get_running_loop().time() + 20
    while (await _run(server, "cast", "v", "ann", "yes"))[0] != 0:
        assert asyncio.get_running_loop().time() < deadline
    code, out, _ = await _run(server, "cast", "v", "bob", "yes")
    assert (code, out) == (0, "bob votes yes; that decides it: yes\n")
    code, out, err = await waiting
    assert code == 0, err
    assert (json.loads(out)["choice"], json.loads(out)["missing"]) == ("yes", ["cy"])
    assert (await _run(server, "vote", "v", "-o", "json"))[1] == out
    code, _, err = await _run(server, "cast", "v", "cy", "no")
    assert code == 1
    assert "is over" in err
    code, _, err = await _run(server, "vote", "none")
    assert code == 4
    assert "There is no vote none" in err
    code, _, err = await _run(server, "vote", "w", "--choice", "yes")
    assert code == 2
    assert "both --choice and --voter" in err


async def test_an_auction_without_bidders_has_no_award(server: TestServer) -> None:
    """Exit code 1, and the reasons; tests/examples has one with an award."""
    code, out, err = await _run(server, "auction", "a", "--bidder", "nobody", "-o", "json")
    assert code == 1, err
    assert json.loads(out)["refused"] == {"nobody": "there is no such agent"}
    code, _, err = await _run(server, "auction", "b", "--bidder", "no body")
    assert code == 2
    assert "'no body' is no id of an agent" in err


async def test_shells_put_and_work(server: TestServer) -> None:
    """Lines in, one command per item; what fails is tried again and is dead at last."""
    lines = "".join(json.dumps({"n": n, "who": "ab"[n % 2]}) + "\n" for n in range(6))
    code, out, err = await _run(
        server, "put", "q", "-", "--key", ".who", "--id", ".n", "-o", "json", stdin=lines
    )
    assert code == 0, err
    put = [json.loads(line) for line in out.splitlines()]
    assert [item["id"] for item in put] == list("012345")
    code, out, err = await _run(server, "work", "q", "--drain", "--concurrency", "2")
    assert (code, err) == (0, "6 items done\n")
    done = [json.loads(line) for line in out.splitlines()]
    for key in "ab":
        numbers = [item["data"]["n"] for item in done if item["key"] == key]
        assert numbers == sorted(numbers)
    assert len(done) == 6
    await _run(server, "put", "q", '"bad"', "--id", "bad")
    python = [sys.executable, "-c", "import json; print(json.loads(input())['data'])"]
    code, out, _ = await _run(server, "work", "q", "--drain", "--", *python)
    assert (code, out) == (0, "bad\n")
    code, _, err = await _run(server, "dead", "q")
    assert code == 0
    assert "No dead letters." in err
    await _run(server, "put", "q", "1", "--id", "worse")
    async with Cluster.connect(server.url) as cluster:
        jobs = workqueue(cluster, "q")
        item = await jobs.take()
        assert item is not None
        await item.bury("tired of it")
    code, out, _ = await _run(server, "dead", "q", "-o", "json")
    (letter,) = json.loads(out)
    assert (letter["item"]["id"], letter["reason"]) == ("worse", "tired of it")
    code, out, _ = await _run(server, "dead", "q", "--replay", str(letter["sequence"]))
    assert code == 0
    once = "import json, sys; sys.exit(3 if json.loads(input())['attempt'] == 1 else 0)"
    fails = [sys.executable, "-c", once]
    code, out, err = await _run(server, "work", "q", "--drain", "--", *fails)
    assert code == 0
    assert "attempt 1:" in err
    assert "ended with 3" in err
    assert err.endswith("1 items done\n")
    code, _, err = await _run(server, "put", "q", "{}", "--key", ".who")
    assert code == 2
    assert "has no 'who'" in err
    code, _, err = await _run(server, "put", "q", "{")
    assert code == 2


async def test_a_saga_needs_steps(server: TestServer) -> None:
    """Wrong ones are named; without an agent it is undone, which is no success."""
    code, _, err = await _run(server, "saga", "none")
    assert code == 4
    assert "There is no saga none" in err
    code, _, err = await _run(server, "saga", "s", "[1]")
    assert code == 2
    assert "one per line or in a list" in err
    step = {"name": "a", "agent": "nobody", "type": "t", "undo": None, "timeout_s": 0.2}
    code, out, err = await _run(server, "saga", "s", "-", "-o", "json", stdin=json.dumps(step))
    assert code == 1, err
    found = json.loads(out)
    assert (found["state"], found["error"]) == ("undone", "a: no answer within 0.2 s")


async def test_a_shell_leads_and_another_follows(server: TestServer) -> None:
    """Lines are appended by who leads; who follows prints them, with index and term."""
    following = asyncio.create_task(
        _run(server, "leader-follower", "g", "--after", "0", "--count", "3", "-o", "json")
    )
    code, out, err = await _run(server, "leader-follower", "g", "-", "--as", "a", stdin="1\n2\n")
    assert code == 0, err
    assert out == "1 (term 1): 1\n2 (term 1): 2\n"
    code, out, err = await _run(
        server, "leader-follower", "g", '[{"n": 3}]', "--as", "b", "-o", "json"
    )
    assert code == 0, err
    last = json.loads(out)
    assert (last["group"], last["index"], last["value"]) == ("g", 3, {"n": 3})
    code, out, err = await following
    assert code == 0, err
    seen = [json.loads(line) for line in out.splitlines()]
    assert [entry["value"] for entry in seen] == [1, 2, {"n": 3}]
    assert seen[-1]["term"] == last["term"] > seen[0]["term"]
    code, _, err = await _run(server, "leader-follower", "g", "[1]")
    assert code == 2
    assert "Only a member appends" in err
