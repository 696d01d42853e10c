"""Where agents are placed: filters, rankings, and that nothing is ever placed where it may not be."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.placement.constraints import Usage
from foundation_nats.placement.place import Placement, Unplaceable, Wanted, place
from foundation_nats.placement.strategies import STRATEGIES, Strategy
from foundation_schemas import AgentSpec, Load, NodeRecord, NodeStatus, PlacementPolicy


def node(
    name: str, *, status: NodeStatus = NodeStatus.UP, load: Load | None = None, **record: Any
) -> NodeView:
    """A node's view."""
    return NodeView(NodeRecord(name=name, incarnation=1, **record), status, load or Load())


def cluster(*views: NodeView) -> dict[str, NodeView]:
    """Views by name."""
    return {view.name: view for view in views}


def spec(strategy: str = "load_balanced", *, resources: Any = None, **policy: Any) -> AgentSpec:
    """A spec with this placement."""
    return AgentSpec(
        run="m:C",
        resources=resources or {},
        placement=PlacementPolicy(strategy=strategy, **policy),
    )


def placed(
    wanted: AgentSpec,
    nodes: dict[str, NodeView],
    count: int = 1,
    *,
    used: dict[str, Usage] | None = None,
    leader: str | None = None,
    seed: int = 0,
) -> list[str]:
    """The chosen nodes, ``-`` for none."""
    found = place(
        [Wanted(f"a-{i}", wanted, "a") for i in range(count)],
        nodes,
        used or {},
        leader,
        random.Random(seed),
    )
    return [item.node if isinstance(item, Placement) else "-" for item in found]


@pytest.mark.parametrize(
    ("view", "wanted", "reason"),
    [
        (node("n", status=NodeStatus.DOWN), spec(), "is down"),
        (node("n", status=NodeStatus.SUSPECT), spec(), "is suspect"),
        (node("n", status=NodeStatus.DRAINING), spec(), "is draining"),
        (node("n"), spec(require=["gpu"]), "lacks the capability gpu"),
        (node("n"), spec(labels={"zone": "a"}), "has no label zone (needs zone=a)"),
        (
            node("n", labels={"zone": "b"}),
            spec(labels={"zone": "a"}),
            "has zone=b (needs zone=a)",
        ),
        (node("n"), spec(resources={"gpu": 1}), "does not offer gpu (needs 1)"),
        (
            node("n", capacity={"gpu": 1}),
            spec(resources={"gpu": 2}),
            "offers 1 gpu in all (needs 2)",
        ),
        (node("n"), spec("leader_only"), "is not the leader's node"),
        (node("n"), spec("sprad"), "can't be ranked: no strategy 'sprad'"),
    ],
)
def test_a_node_that_does_not_qualify_is_refused_with_its_reason(
    view: NodeView, wanted: AgentSpec, reason: str
) -> None:
    """There is no fallback, and the reason is told per node."""
    (found,) = place([Wanted("a", wanted)], cluster(view), {}, None, random.Random(0))
    assert found == Unplaceable({"n": reason})


def test_reasons_are_one_line_for_people() -> None:
    """Nodes with the same reason are named together."""
    nodes = cluster(node("n0"), node("n1"), node("n2", status=NodeStatus.DOWN))
    (found,) = place([Wanted("a", spec(require=["gpu"]))], nodes, {}, None, random.Random(0))
    assert isinstance(found, Unplaceable)
    assert found.text() == "n0, n1 lacks the capability gpu; n2 is down"
    (found,) = place([Wanted("a", spec())], {}, {}, None, random.Random(0))
    assert isinstance(found, Unplaceable)
    assert found.text() == "no node is known"


def test_a_burst_spreads_evenly() -> None:
    """The decisions of one pass count for each other."""
    nodes = cluster(*(node(f"n{i}") for i in range(4)))
    assert set(Counter(placed(spec(), nodes, 100)).values()) == {25}


def test_a_burst_evens_out_what_is_there() -> None:
    """What a node holds already counts."""
    used = {"n0": Usage(agents=10)}
    assert Counter(placed(spec(), cluster(node("n0"), node("n1")), 30, used=used)) == {
        "n0": 10,
        "n1": 20,
    }


def test_more_workers_take_more_and_a_busy_node_takes_less() -> None:
    """Pressure is per worker and grows with load above one half."""
    by_workers = cluster(node("n0", workers=["a", "b", "c"]), node("n1", workers=["d"]))
    assert Counter(placed(spec(), by_workers, 40)) == {"n0": 30, "n1": 10}
    by_load = cluster(node("n0", load=Load(cpu=0.9)), node("n1", load=Load(cpu=0.4)))
    counts = Counter(placed(spec(), by_load, 100))
    assert counts["n0"] < 40


def test_slots_are_counted_only_where_they_are_declared() -> None:
    """Each agent takes one slot unless it says otherwise."""
    nodes = cluster(node("n0", capacity={"slots": 2}), node("n1"))
    assert Counter(placed(spec(), nodes, 10)) == {"n0": 2, "n1": 8}
    only = cluster(node("n0", capacity={"slots": 3}))
    assert placed(spec(resources={"slots": 2}), only, 2) == ["n0", "-"]


def test_an_overloaded_node_comes_last_whatever_the_strategy() -> None:
    """It is used when nobody else qualifies, and only then."""
    for strategy in STRATEGIES:
        if strategy == Strategy.LEADER_ONLY:
            continue
        nodes = cluster(node("n0", load=Load(memory=0.97)), node("n1", capacity={"slots": 3}))
        assert Counter(placed(spec(strategy), nodes, 5, leader="n0")) == {"n1": 3, "n0": 2}


def test_capability_matched_prefers_the_match_and_spares_the_specialist() -> None:
    """Most preferred capabilities first; among equals the one that offers least else."""
    nodes = cluster(
        node("n0", capabilities=["cpu"]),
        node("n1", capabilities=["cpu", "gpu"]),
        node("n2", capabilities=["cpu", "gpu", "tpu"]),
    )
    wanted = spec("capability_matched", require=["cpu"], prefer=["gpu"])
    assert placed(wanted, nodes, 2) == ["n1", "n1"]
    assert placed(spec("capability_matched", require=["cpu"]), nodes) == ["n0"]


def test_leader_only_and_local_preferred() -> None:
    """The first has no alternative, the second does."""
    nodes = cluster(node("n0"), node("n1", capacity={"slots": 1}))
    assert placed(spec("leader_only"), nodes, 2, leader="n1") == ["n1", "-"]
    assert placed(spec("local_preferred"), nodes, 2, leader="n1") == ["n1", "n0"]


def test_spread_by_deployment_and_by_label() -> None:
    """Replicas avoid each other: on nodes, or on the values of a label."""
    nodes = cluster(*(node(f"n{i}", labels={"zone": "a" if i < 3 else "b"}) for i in range(4)))
    used = {"n3": Usage(agents=50)}
    assert Counter(placed(spec("spread"), nodes, 8, used=used)) == dict.fromkeys(nodes, 2)
    counts = Counter(placed(spec(spread="zone"), nodes, 8, used=used))
    assert counts["n3"] == 4


def test_pack_fills_one_node_before_the_next() -> None:
    """The fullest that has room."""
    nodes = cluster(*(node(f"n{i}", capacity={"slots": 4}) for i in range(3)))
    assert sorted(Counter(placed(spec("pack"), nodes, 8)).values()) == [4, 4]


def test_random_is_repeatable_by_its_seed() -> None:
    """Randomness comes from outside."""
    nodes = cluster(*(node(f"n{i}") for i in range(5)))
    first = placed(spec("random"), nodes, 50, seed=7)
    assert first == placed(spec("random"), nodes, 50, seed=7)
    assert len(set(first)) == 5


def test_consistent_hash_moves_only_what_must_move() -> None:
    """Without a node, only its agents have another place."""
    nodes = cluster(*(node(f"n{i}") for i in range(5)))
    before = placed(spec("consistent_hash"), nodes, 200)
    del nodes["n2"]
    after = placed(spec("consistent_hash"), nodes, 200)
    for old, new in zip(before, after, strict=True):
        assert new == old or old == "n2"


def test_a_preferred_node_is_taken_if_it_qualifies_and_only_means_only() -> None:
    """`prefer` gives way to the filters; `only` gives way to nothing."""
    nodes = cluster(node("n0"), node("n1", status=NodeStatus.DOWN), node("n2"))
    wanted = [
        Wanted("a", spec(), prefer="n2"),
        Wanted("b", spec(), prefer="n1"),
        Wanted("c", spec(), only="n1"),
        Wanted("d", spec(), only="n9"),
    ]
    found = place(wanted, nodes, {}, None, random.Random(0))
    assert found == [
        Placement("n2"),
        Placement("n0"),
        Unplaceable({"n1": "is down"}),
        Unplaceable({"n9": "is not known"}),
    ]


@st.composite
def passes(draw: st.DrawFn) -> tuple[dict[str, NodeView], dict[str, Usage], list[Wanted]]:
    """Nodes, what they hold, and agents with all sorts of demands."""
    nodes = cluster(
        *(
            node(
                f"n{i}",
                status=draw(st.sampled_from(list(NodeStatus))),
                load=Load(memory=draw(st.sampled_from([0.1, 0.96]))),
                capabilities=draw(st.lists(st.sampled_from(["x", "y"]), unique=True)),
                labels=draw(st.dictionaries(st.just("zone"), st.sampled_from(["a", "b"]))),
                capacity=draw(
                    st.dictionaries(st.sampled_from(["slots", "gpu"]), st.integers(0, 6))
                ),
            )
            for i in range(draw(st.integers(0, 5)))
        )
    )
    used = {
        name: Usage(agents=1, resources={"slots": 1.0}) for name in nodes if draw(st.booleans())
    }
    kinds = [
        spec(
            draw(st.sampled_from(STRATEGIES)),
            resources=draw(
                st.dictionaries(st.sampled_from(["slots", "gpu"]), st.sampled_from([0, 1, 2.5]))
            ),
            require=draw(st.sampled_from([[], ["x"]])),
            labels=draw(st.sampled_from([{}, {"zone": "a"}])),
            spread=draw(st.sampled_from([None, "zone"])),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    wanted = [
        Wanted(f"a-{i}", draw(st.sampled_from(kinds)), draw(st.sampled_from(["g", "h"])))
        for i in range(draw(st.integers(0, 20)))
    ]
    return nodes, used, wanted


@settings(max_examples=300, deadline=None)
@given(passes(), st.sampled_from([None, "n0", "n3"]))
def test_no_demand_is_ever_broken(
    made: tuple[dict[str, NodeView], dict[str, Usage], list[Wanted]], leader: str | None
) -> None:
    """Status, capabilities, labels and capacity hold for every placement of every pass."""
    nodes, used, wanted = made
    before = {name: usage.copy() for name, usage in used.items()}
    found = place(wanted, nodes, used, leader, random.Random(1))
    assert used == before
    taken = {name: usage.copy() for name, usage in used.items()}
    for want, item in zip(wanted, found, strict=True):
        if isinstance(item, Unplaceable):
            assert set(item.reasons) == set(nodes)
            continue
        record, policy = nodes[item.node].record, want.spec.placement
        assert nodes[item.node].status is NodeStatus.UP
        assert set(policy.require) <= set(record.capabilities)
        assert all(record.labels.get(key) == value for key, value in policy.labels.items())
        assert policy.strategy != Strategy.LEADER_ONLY or item.node == leader
        for name, amount in want.spec.resources.items():
            assert name == "slots" or amount == 0 or name in record.capacity
        taken.setdefault(item.node, Usage()).add(want.spec, want.group)
        for name in {"slots", *want.spec.resources}:
            capacity = record.capacity.get(name)
            if capacity is not None and want.spec.resources.get(name, 1) > 0:
                assert taken[item.node].resources[name] <= capacity + 1e-6


def test_ten_thousand_placements_take_well_under_half_a_second() -> None:
    """The cost per decision does not grow with the number of agents."""
    nodes = cluster(*(node(f"n{i}", capacity={"slots": 2000}) for i in range(10)))
    began = time.process_time()
    assert len(set(placed(spec(), nodes, 10_000))) == 10
    assert time.process_time() - began < 0.5


def test_a_view_is_asked_by_name_capability_and_status() -> None:
    """Answers come in the order of names."""
    view = ClusterView(
        cluster(
            node("b", capabilities=["x"]), node("a", capabilities=["x"], status=NodeStatus.DOWN)
        ),
        7,
    )
    assert [found.name for found in view.having("x")] == ["a", "b"]
    assert [found.name for found in view.with_status(NodeStatus.UP)] == ["b"]
    assert view.get("c") is None
    assert view.revision == 7
