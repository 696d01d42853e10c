"""What `plan` prints of the nodes that a manifest asks for."""

from __future__ import annotations

import pytest

from foundation_cli.deploy import plan_json, show_plan
from foundation_nats.config import ControlConfig
from foundation_nats.control.diff import preview


@pytest.mark.parametrize(("min_nodes", "said"), [(0, False), (3, True)])
def test_a_plan_says_when_fewer_nodes_are_up_than_are_asked_for(
    min_nodes: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only then: a deploy would wait."""
    found = plan_json(preview({}, [], {}, {}, ControlConfig(), min_nodes=min_nodes))
    assert (found["nodes_up"], found["min_nodes"]) == (0, min_nodes)
    show_plan(found)
    assert ("0 nodes are up, and the manifest asks for 3" in capsys.readouterr().out) is said
