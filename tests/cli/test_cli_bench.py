"""`foundation bench`: every figure is there, beside its floor, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation_cli.main import run
from foundation_nats.bus.streams import api
from tests.cli.test_cli_nodes import running


def test_too_few_agents_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """100 ask at once, so there must be as many."""
    assert run(["bench", "--agents", "99"]) == 2
    assert "100" in capsys.readouterr().err


@pytest.mark.cluster
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("chaos")
async def test_a_running_cluster_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    async with running(tmp_path) as (cluster, shell):
        found = await shell.json("bench", "--attach", "--agents", "100", "--signals", "2000")
        assert found["schema"] == "foundation/v1/bench"
        assert (found["embedded"], found["nodes"], found["signals"]) == (False, 1, 2000)
        figures = {figure["name"]: figure for figure in found["figures"]}
        assert len(figures) == 7
        for figure in found["figures"]:
            assert figure["ours"] > 0
            if figure["unit"] != "s":
                assert figure["ratio"] == pytest.approx(figure["ours"] / figure["floor"])
        client = cluster.client
        assert await client.agents.list() == []
        assert await client.deployments.list() == []
        names = (await api(client.bus, "STREAM.NAMES", "", {}))["streams"]
        assert not [name for name in names if "floor" in name]
        state = f"KV_fnd_{client.name}_state"
        subjects = {"subjects_filter": ">"}
        held = (await api(client.bus, "STREAM.INFO", state, subjects))["state"].get("subjects")
        for subject in held or {}:
            message = await client.agents._state.read(subject.rpartition("state.")[2])
            assert message is None or message.value is None
