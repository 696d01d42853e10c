"""Targets and topics: what they mean, which are refused, and who is picked."""

from __future__ import annotations

import pytest

from foundation_nats.cluster.registry import Held
from foundation_nats.signaling.receivers import pick, selected, subscribers
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    MoveOrder,
    Target,
    TargetKind,
    matches_topic,
)


def held(id: str, status: AgentStatus = AgentStatus.RUNNING, **spec: object) -> Held:
    """A record in the registry."""
    made = AgentSpec.model_validate({"run": "m:C", **spec})
    return Held(AgentRecord(id=id, status=status, spec=made, deployment=id.partition("-")[0]), 1)


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("orders.*", "orders.new", True),
        ("orders.*", "orders.new.eu", False),
        ("orders.*", "orders", False),
        ("orders.>", "orders.new.eu", True),
        ("orders.>", "orders", False),
        (">", "orders", True),
        ("*.new", "orders.new", True),
        ("orders.new", "orders.new", True),
        ("orders.new", "orders.old", False),
    ],
)
def test_patterns_fit_topics_as_subjects_do(pattern: str, topic: str, fits: bool) -> None:
    """One word for a star, one or more for a last `>`."""
    assert matches_topic(pattern, topic) is fits


@pytest.mark.parametrize("text", ["label:zone=eu", "label:a in (x, y);!b", "topic:orders.new"])
def test_targets_are_read_and_written(text: str) -> None:
    """They survive a round trip."""
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["topic:", "topic:a..b", "topic:a.*", "topic:a b", "label:", "label:a=", "label:a=b;", "l:x"],
)
def test_what_is_no_target_is_refused(text: str) -> None:
    """A pattern is for subscribers; nobody publishes to one."""
    with pytest.raises(ValueError):
        Target.parse(text)


@pytest.mark.parametrize("topic", ["", "a.>.b", "a..b", "a b", "orders*", ".".join("x" * 17)])
def test_what_is_no_pattern_is_refused(topic: str) -> None:
    """In a subscription."""
    with pytest.raises(ValueError):
        AgentSpec.model_validate({"run": "m:C", "subscribe": [topic]})


def test_labels_select_by_all_expressions() -> None:
    """Joined by semicolons; nonsense selects nobody."""
    records = {
        name: held(name, labels=labels)
        for name, labels in {"a": {"zone": "eu"}, "b": {"zone": "eu", "spot": ""}, "c": {}}.items()
    }
    assert [h.record.id for h in selected(records, "zone=eu;!spot")] == ["a"]
    assert selected(records, "") == []
    assert Target.parse("label:zone=eu").kind is TargetKind.LABEL


def test_subscribers_are_each_once_and_groups_by_name() -> None:
    """All-subscribers by id; a group is its name, else the deployment."""
    shared = {"topic": "orders.*", "mode": "one-of-group"}
    records = [
        held("a", subscribe=["orders.*", "orders.new"]),
        held("w-0", subscribe=[shared, {**shared, "topic": "orders.new"}]),
        held("w-1", subscribe=[shared]),
        held("v-0", subscribe=[{**shared, "group": "w"}]),
        held("x", subscribe=["other"]),
    ]
    each, groups = subscribers(records, "orders.new")
    assert list(each) == ["a"]
    assert {name: [h.record.id for h in found] for name, found in groups.items()} == {
        "w": ["w-0", "w-1", "v-0"]
    }


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({}, True),
        ({"status": AgentStatus.UNAVAILABLE}, True),
        ({"status": AgentStatus.MOVING, "desired": "stop", "move": MoveOrder(why="")}, True),
        ({"desired": "stop", "returns": True}, True),
        ({"status": AgentStatus.STOPPED, "desired": "stop", "returns": True}, True),
        ({"desired": "stop"}, False),
    ],
)
def test_whoever_shall_run_receives_also_while_it_is_stopped_to_be_moved_or_changed(
    change: dict[str, object], counts: bool
) -> None:
    """Only who was told to end for good does not."""
    item = held("a", subscribe=["t"])
    item = Held(item.record.model_copy(update=change), 1)
    each, _ = subscribers([item], "t")
    assert (item.record.is_wanted, bool(each)) == (counts, counts)


def test_the_pick_prefers_who_runs_then_who_has_less_to_do() -> None:
    """Equals are told apart by the key, so that many keys spread."""
    idle, busy = held("idle"), held("busy")
    down = held("down", AgentStatus.UNAVAILABLE)
    load = {"idle": 0.0, "busy": 2.0, "down": 0.0}
    assert pick([busy, down, idle], "k", lambda record: load[record.id]) == "idle"
    assert pick([down, busy], "k", lambda record: load[record.id]) == "busy"
    assert {pick([idle, busy], str(n)) for n in range(50)} == {"idle", "busy"}


def test_the_digest_of_an_old_spec_does_not_change() -> None:
    """What 0.1 did not know costs no restart while it says nothing."""
    assert AgentSpec(run="m:C").digest() == AgentSpec(run="m:C", labels={}, subscribe=[]).digest()
    assert AgentSpec(run="m:C").digest() != AgentSpec(run="m:C", labels={"a": "b"}).digest()
