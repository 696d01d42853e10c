"""Exit code 7: the server denies what a command does, said by the command itself."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig, Config
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer

pytestmark = [pytest.mark.timeout(60)]

_USERS = """
authorization {
  users = [
    {user: admin, password: all}
    {user: reader, password: some, permissions: {publish: {deny: ["fnd.*.signal.>"]}, subscribe: ">"}}
  ]
}
"""


def command(folder: Path, url: str, password: str, *arguments: str) -> tuple[int, str, str]:
    """Run a command as the reader."""
    done = subprocess.run(
        [sys.executable, "-m", "foundation_cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=folder,
        env={
            **os.environ,
            "FOUNDATION_SERVER": url,
            "FOUNDATION_USER": "reader",
            "FOUNDATION_PASSWORD": password,
            "XDG_CONFIG_HOME": str(folder),
        },
    )
    return done.returncode, done.stdout, done.stderr


async def test_a_denied_command_ends_with_7_and_says_what_was_denied(tmp_path: Path) -> None:
    """A publish that the user may not do, and a password that is wrong; what is allowed is done."""
    async with TestServer(EmbeddedConfig(extra=_USERS)) as server:
        bus = await Bus.connect(
            BusConfig(servers=(server.url,), user="admin", password="all"), "admin"
        )
        try:
            await assets.ensure(bus, Config())
        finally:
            await bus.close()

        async def run(password: str, *arguments: str) -> tuple[int, str, str]:
            return await asyncio.to_thread(command, tmp_path, server.url, password, *arguments)

        code, out, err = await run("some", "agents", "-o", "json")
        assert (code, json.loads(out)) == (0, []), err
        code, out, err = await run(
            "some", "send", "visits", "counter.add", "{}", "--queue", "-o", "json"
        )
        assert code == 7, err
        assert out == ""
        error = json.loads(err)["error"]
        assert "signal.agent.visits" in json.dumps(error)
        code, _, err = await run("wrong", "agents")
        assert code == 7, err
        assert err.startswith("error: ")
        assert "some" not in err
