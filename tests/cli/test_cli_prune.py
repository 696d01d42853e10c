"""`foundation deploy --prune`: what a manifest doesn't name any more goes, and nothing of another's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from foundation_cli.main import run
from foundation_nats.testing import TestCluster
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

Shell = Callable[..., Awaitable[tuple[int, str, str]]]

FIRST = """
version: 1
name: shop
agents:
  - {name: carts, run: "fleet:Counter", replicas: 2}
  - {name: prices, run: "fleet:Counter", replicas: 2}
  - {name: clerk, run: "fleet:Counter"}
"""
LATER = """
version: 1
name: shop
agents:
  - {name: carts, run: "fleet:Counter", replicas: 3}
"""
OTHER = """
version: 1
agents:
  - {name: rates, run: "fleet:Counter", replicas: 2}
"""


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs `foundation …` in this process: exit code, stdout, stderr."""

    async def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(run, [*arguments])
        return code, *capsys.readouterr()

    return call


async def test_prune_deletes_what_its_own_manifest_dropped_and_nothing_else(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plan shows it before; another manifest's agents and those started alone run on."""
    shop, later, bank = tmp_path / "shop.yaml", tmp_path / "later.yaml", tmp_path / "bank.yaml"
    for path, text in ((shop, FIRST), (later, LATER), (bank, OTHER)):
        path.write_text(text)
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        for name, value in nodes.config.to_environment().items():
            monkeypatch.setenv(name, value)
        client = nodes.client
        for path in (shop, bank):
            code, _, err = await shell("deploy", str(path))
            assert code == 0, err
        await client.agents.start("fleet:Counter", id="alone")
        await client.send("clerk", "counter.add", {"amount": 7})
        before = {info.id: info for info in await client.agents.list()}

        # Without --prune nothing goes.
        code, out, _ = await shell("plan", str(later))
        assert (code, out.splitlines()) == (
            0,
            [
                "~ carts: replicas: 2 → 3",
                "",
                "   AGENT    NODE  WHAT",
                "+  carts-2  n1    would start there",
                "! clerk, prices: no longer in the manifest that has applied it; stays, "
                "unless --prune is given",
            ],
        )

        code, out, _ = await shell("plan", str(later), "--prune", "--exit-code")
        assert code == 6
        assert out.splitlines() == [
            "~ carts: replicas: 2 → 3",
            "- clerk: 1 agent, removed",
            "- prices: 2 agents, removed",
            "",
            "   AGENT     NODE  WHAT",
            "+  carts-2   n1    would start there",
            "-  clerk     n1    would leave, drained; its state is kept",
            "-  prices-0  n1    would leave, drained; its state is kept",
            "-  prices-1  n1    would leave, drained; its state is kept",
        ]
        code, shown, _ = await shell("deploy", str(later), "--prune", "--plan")
        assert (code, shown) == (0, out)
        assert {info.id for info in await client.agents.list()} == set(before)

        code, out, err = await shell("deploy", str(later), "--prune")
        assert code == 0, err
        assert "- clerk: 1 agent, removed" in err
        assert "- prices: 2 agents, removed" in err
        assert [line.split()[0] for line in out.splitlines()] == ["NAME", "carts"]
        after = {info.id: info for info in await client.agents.list()}
        assert set(after) == {"carts-0", "carts-1", "carts-2", "rates-0", "rates-1", "alone"}
        for id in ("rates-0", "rates-1", "alone", "carts-0", "carts-1"):
            assert (after[id].status, after[id].epoch) == ("running", before[id].epoch)

        # Nothing is left to prune, and the other manifest has nothing to say against it.
        for path in (later, bank):
            code, out, _ = await shell("plan", str(path), "--prune", "--exit-code")
            assert (code, out.splitlines()[-1]) == (0, "Nothing would change.")

        # One that comes to name what another has applied takes it over, which is no change to it.
        bank.write_text(OTHER + '  - {name: carts, run: "fleet:Counter", replicas: 3}\n')
        code, out, _ = await shell("plan", str(bank), "--prune", "--exit-code")
        assert (code, out.splitlines()[-1]) == (0, "Nothing would change.")
        code, _, err = await shell("deploy", str(bank))
        assert code == 0, err
        shop.write_text("version: 1\nname: shop\nagents: []\n")
        code, out, _ = await shell("deploy", str(shop), "--prune", "-o", "json")
        assert (code, json.loads(out)["changes"]) == (0, [])
        assert "carts-0" in {info.id for info in await client.agents.list()}
        stored = await client.agents.state("clerk")
        assert stored is not None
        assert stored["state"]["total"] == 7
