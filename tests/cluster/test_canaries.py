"""A secret is planted wherever one may be, and looked for wherever something is told (invariant 14).

In a setting (the password of the bus), in the environment of the nodes, and in fields of signals
that are handled, refused and fail. What is *stored for its owner* holds it by design: the mailbox,
the state that a handler made of it, and the signal in a dead letter, without which it could not be
replayed. What is told about it does not: logs, events, reasons, and every command's JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundation_nats.errors import FoundationError
from foundation_nats.testing import TestCluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

SETTING, VARIABLE, FIELD = "canary-setting-7f3a", "canary-variable-91bc", "canary-field-d04e"
CANARIES = (SETTING, VARIABLE, FIELD)

COMMANDS = (
    ("agents",),
    ("nodes",),
    ("deployments",),
    ("events",),
    ("doctor",),
    ("status",),
    ("topology",),
    ("why", "keeper-0"),
    ("schedules", "list"),
    ("steps", "list", "keeper-0"),
)
"""What people and programs look at; the dead letters are looked at field by field below."""


SCRIPT = """
import json, sys
from typer.testing import CliRunner
from foundation_cli.main import app

server, *commands = json.loads(sys.stdin.read())
found = []
for command in commands:
    ended = CliRunner().invoke(app, [*command, *server, "-o", "json"])
    found.append([ended.exit_code, ended.output])
print(json.dumps(found))
"""
"""All commands in one process, because starting one takes longer than running it."""


def told(url: str, *commands: tuple[str, ...]) -> list[str]:
    """What each command says, on both outputs; it is given the secrets, too."""
    environment = {**os.environ, "FOUNDATION_BUS__PASSWORD": SETTING, "SHOP_SECRET": VARIABLE}
    server = ["--server", url, "--cluster", "test"]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([server, *commands]), env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = json.loads(ended.stdout)
    for command, (code, output) in zip(commands, found, strict=True):
        assert code in (0, 1), (command, output)
        assert output, command
    return [output + ended.stderr for _, output in found]


def leaks(where: str, text: str) -> list[str]:
    """Which canaries are in *text*."""
    return [
        f"{canary} in {where}: …{around(text, canary)}…" for canary in CANARIES if canary in text
    ]


def around(text: str, canary: str) -> str:
    """The place."""
    at = text.index(canary)
    return text[max(0, at - 120) : at + 60]


async def test_planted_secrets_are_told_nowhere() -> None:
    """Not by nodes, not by events, not by commands; not even when their bearer fails."""
    environment = {
        "FOUNDATION_BUS__USER": "me",
        "FOUNDATION_BUS__PASSWORD": SETTING,
        "SHOP_SECRET": VARIABLE,
    }
    async with TestCluster(nodes=2, environment=environment) as nodes:
        cluster, url = nodes.client, nodes.config.bus.servers[0]
        run = "foundation_nats.chaos.agents"
        await cluster.agents.start(f"{run}:Ledger", id="keeper-0")
        await cluster.agents.start(f"{run}:Saboteur", id="saboteur-0")
        await cluster.send("keeper-0", "chaos.append", {"key": FIELD})
        refused = []
        for wrong in ({"key": {"nested": FIELD}}, {"yek": FIELD}, FIELD):
            await cluster.send("keeper-0", "chaos.append", wrong)
            with pytest.raises(FoundationError) as caught:
                await cluster.ask("keeper-0", "chaos.append", wrong)
            refused.append(str(caught.value))
        await cluster.send("saboteur-0", "sabotage.raise", {"token": FIELD})

        async def buried() -> bool:
            return len(await cluster.dead.list()) >= 4

        await eventually(buried, timeout=30, message="what can't be handled is a dead letter")
        letters = await cluster.dead.list()
        found = leaks("an error", "\n".join(refused))
        for letter in letters:
            plain = letter.model_dump(mode="json")
            plain["letter"].pop("signal")
            found += leaks(f"dead letter {letter.letter.agent}", str(plain))
        events = await cluster.events.list()
        assert events
        found += leaks("events", "\n".join(event.model_dump_json() for event in events))
        owner, *others = await asyncio.to_thread(told, url, ("agent", "keeper-0"), *COMMANDS)
        assert leaks("the state", owner), "its owner sees it, so that the search does search"
        for command, output in zip(COMMANDS, others, strict=True):
            found += leaks(" ".join(command), output)
        nodes.nodes["n1"].terminate()  # what a node says at its end, too
        await nodes.nodes["n1"].wait()
        for name, node in nodes.nodes.items():
            log = Path(node.log).read_text()
            assert "keeper-0" in log or "node is up" in log, "nothing was logged"
            found += leaks(f"the log of {name}", log)
    assert not found, "\n".join(found)


@pytest.mark.usefixtures("chaos")
def test_a_kept_round_holds_no_secret(tmp_path: Path) -> None:
    """Histories, logs and evidence can be handed on: what the environment held is not in them."""
    environment = {**os.environ, "FOUNDATION_BUS__PASSWORD": SETTING, "SHOP_SECRET": VARIABLE}
    subprocess.run(
        [
            sys.executable, "-m", "foundation_cli.main", "chaos", "--seconds", "4", "--seed", "3",
            "--workload", "counters", "--fault", "worker.kill", "--keep", str(tmp_path), "--keep-all",
        ],
        env=environment, timeout=100, check=False, capture_output=True,
    )  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"history.jsonl", "seen.jsonl", "round.json", "evidence.json"} <= {p.name for p in files}
    found = [leak for path in files for leak in leaks(path.name, path.read_text())]
    assert not found, "\n".join(found)
