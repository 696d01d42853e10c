"""Moves between nodes: what they achieve, what they never touch, and that they come to an end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.control.rebalance import (
    Balance,
    Drain,
    Move,
    Rebalance,
    drain_moves,
    rebalance,
    usage_of,
)
from foundation_nats.placement.constraints import Tally, crowded, full, needs, unfit
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    Load,
    NodeRecord,
    NodeStatus,
    Spread,
)


def node(
    name: str, *, status: NodeStatus = NodeStatus.UP, load: Load | None = None, **record: Any
) -> NodeView:
    """A node's view."""
    return NodeView(NodeRecord(name=name, incarnation=1, **record), status, load or Load())


def cluster(*views: NodeView) -> dict[str, NodeView]:
    """Views by name."""
    return {view.name: view for view in views}


def wish(name: str, replicas: int, **spec: Any) -> Deployment:
    """A deployment; what isn't of the spec is of its placement."""
    own = {key: spec.pop(key) for key in list(spec) if key in AgentSpec.model_fields}
    return Deployment(
        name=name, replicas=replicas, spec=AgentSpec(run="m:C", placement=spec, **own)
    )


def on(wished: Deployment, nodes: Iterable[str], **values: Any) -> dict[str, Held]:
    """Its agents, running on these nodes in this order."""
    digest = wished.spec.digest()
    return {
        agent: Held(
            AgentRecord.model_validate(
                {
                    "id": agent,
                    "deployment": wished.name,
                    "status": AgentStatus.RUNNING,
                    "node": place,
                    "incarnation": 1,
                    "epoch": 1,
                    "spec": wished.spec,
                    "digest": digest,
                    **values,
                }
            ),
            1,
        )
        for agent, place in zip(wished.agent_ids(), nodes, strict=True)
    }


def made(held: Mapping[str, Held], moves: Iterable[Move]) -> dict[str, Held]:
    """The records once the moves are made."""
    after = dict(held)
    for move in moves:
        assert after[move.agent].record.node == move.source
        record = after[move.agent].record.model_copy(update={"node": move.target})
        after[move.agent] = Held(record, 2)
    return after


def counts(held: Mapping[str, Held]) -> dict[str | None, int]:
    """Agents per node."""
    return dict(Counter(item.record.node for item in held.values()))


def balanced(
    wishes: list[Deployment],
    held: Mapping[str, Held],
    nodes: dict[str, NodeView],
    strategy: Balance = Balance.EVEN_DISTRIBUTION,
    **options: Any,
) -> Rebalance:
    """The proposal."""
    desired = {wished.name: wished for wished in wishes}
    return rebalance(desired, held, nodes, strategy=strategy, **options)


def test_a_node_that_joined_gets_its_share_and_then_nothing_more() -> None:
    """As few moves as need be."""
    wished = wish("a", 30)
    held = on(wished, ["n0", "n1", "n2"] * 10)
    nodes = cluster(*(node(f"n{i}") for i in range(4)))
    found = balanced([wished], held, nodes, threshold=0.0)
    after = made(held, found.moves)
    assert sorted(counts(after).values()) == [7, 7, 8, 8]
    assert len(found.moves) == 7
    assert all(move.target == "n3" and "agents per worker" in move.why for move in found.moves)
    assert balanced([wished], after, nodes, threshold=0.0).moves == ()


@pytest.mark.parametrize(("first", "moves"), [(11, 0), (12, 1), (14, 2)])
def test_what_gains_less_than_the_threshold_is_left_alone(first: int, moves: int) -> None:
    """One agent more or less is no reason to move; a tenth of the load is the default."""
    wished = wish("a", first + 9)
    held = on(wished, ["n0"] * first + ["n1"] * 9)
    found = balanced([wished], held, cluster(node("n0"), node("n1")))
    assert len(found.moves) == moves


def test_the_budget_ends_a_proposal_and_says_so() -> None:
    """The next one goes on."""
    wished = wish("a", 40)
    held, nodes = on(wished, ["n0"] * 40), cluster(node("n0"), node("n1"))
    found = balanced([wished], held, nodes, budget=5)
    assert (len(found.moves), found.is_complete) == (5, False)
    whole = balanced([wished], held, nodes)
    assert whole.is_complete
    exact = balanced([wished], held, nodes, budget=len(whole.moves))
    assert exact.is_complete
    assert exact.moves == whole.moves
    assert balanced([wished], held, nodes, budget=0).moves == ()


@pytest.mark.parametrize(
    "values",
    [
        {"status": AgentStatus.PENDING, "node": None},
        {"status": AgentStatus.STARTING},
        {"status": AgentStatus.MOVING},
        {"status": AgentStatus.FAILED},
        {"desired": "stop"},
        {"digest": "another"},
        {"incarnation": 0},
        {"move": {"to": "n1", "incarnation": 1}},
    ],
)
def test_only_agents_that_run_as_wished_are_moved(values: dict[str, Any]) -> None:
    """The others are in other hands."""
    wished = wish("a", 10)
    held = on(wished, ["n0"] * 10, **values)
    assert balanced([wished], held, cluster(node("n0"), node("n1"))).moves == ()


def test_an_agent_on_its_way_takes_its_place_on_both_nodes() -> None:
    """Until its source has let it go."""
    wished = wish("a", 2)
    held = on(wished, ["n0", "n0"], move={"to": "n1", "incarnation": 1})
    used = usage_of(held, cluster(node("n0"), node("n1")))
    assert {name: usage.agents for name, usage in used.items()} == {"n0": 2, "n1": 2}
    assert set(usage_of(held, cluster(node("n0"), node("n2")))) == {"n0"}


@pytest.mark.parametrize("strategy", ["leader_only", "local_preferred", "pack", "of-a-package"])
def test_agents_whose_place_is_not_about_load_stay(strategy: str) -> None:
    """So do those that wait for their node."""
    for wished in (wish("a", 10, strategy=strategy), wish("a", 10, on_node_loss="unavailable")):
        held = on(wished, ["n0"] * 10)
        for balance in Balance:
            assert balanced([wished], held, cluster(node("n0"), node("n1")), balance).moves == ()


def test_what_is_cheap_goes_first() -> None:
    """Not critical, without state, small."""
    wishes = [
        wish("a", 2, critical=True),
        wish("b", 2, resources={"memory_mb": 9}),
        wish("c", 2, resources={"memory_mb": 1}),
        wish("d", 2, durable=False, resources={"memory_mb": 20}),
    ]
    held = {agent: item for w in wishes for agent, item in on(w, ["n0"] * 2).items()}
    capacity = {"memory_mb": 100}
    nodes = cluster(node("n0", capacity=capacity), node("n1", capacity=capacity))
    found = balanced(wishes, held, nodes)
    assert [move.agent for move in found.moves] == ["d-0", "d-1", "c-0", "c-1"]


def test_load_based_relieves_the_busy_node_and_calls_noise_noise() -> None:
    """The same number of agents, but one machine is near its end."""
    wished = wish("a", 40)
    held = on(wished, ["n0", "n1"] * 20)
    nodes = cluster(node("n0", load=Load(cpu=0.9)), node("n1", load=Load(cpu=0.3)))
    found = balanced([wished], held, nodes, Balance.LOAD_BASED)
    assert {move.source for move in found.moves} == {"n0"}
    assert 3 <= len(found.moves) <= 8
    assert balanced([wished], held, nodes).moves == ()
    noisy = cluster(node("n0", load=Load(cpu=0.53)), node("n1", load=Load(cpu=0.48)))
    assert balanced([wished], held, noisy, Balance.LOAD_BASED).moves == ()


def test_capability_based_moves_to_the_better_match_and_frees_specialists() -> None:
    """Preferred capabilities for everyone, sparing specialists for `capability_matched`."""
    nodes = cluster(node("n0"), node("n1", capabilities=["gpu"], capacity={"slots": 5}), node("n2"))
    likes = wish("a", 2, prefer=["gpu"])
    spares = wish("b", 2, strategy="capability_matched")
    free = wish("c", 1)
    held = {**on(likes, ["n0", "n2"]), **on(spares, ["n1", "n2"]), **on(free, ["n1"])}
    found = balanced([likes, spares, free], held, nodes, Balance.CAPABILITY_BASED)
    after = made(held, found.moves)
    where = {agent: item.record.node for agent, item in after.items()}
    assert (where["a-0"], where["a-1"], where["c-0"]) == ("n1", "n1", "n1")
    assert where["b-0"] in ("n0", "n2")
    assert {move.why for move in found.moves} >= {"n1 offers gpu"}
    assert balanced([likes, spares, free], after, nodes, Balance.CAPABILITY_BASED).moves == ()


def test_a_zone_that_came_back_gets_its_share_of_a_strict_spread() -> None:
    """The skew that its loss forced is put right first, whatever the strategy."""
    nodes = cluster(*(node(f"n{i}", labels={"zone": "abc"[i]}) for i in range(3)))
    wished = wish("a", 9, spread=Spread(label="zone"))
    held = on(wished, ["n0"] * 5 + ["n1"] * 4)
    for strategy in Balance:
        found = balanced([wished], held, nodes, strategy, threshold=0.9)
        after = counts(made(held, found.moves))
        assert max(after.values()) - min(after.values()) <= 1
        assert "max_skew 1" in found.moves[0].why


def test_agents_by_consistent_hash_go_where_the_ring_wants_them_and_nowhere_else() -> None:
    """A join moves its share; a second look moves nothing."""
    wished = wish("a", 300, strategy="consistent_hash")
    nodes = cluster(*(node(f"n{i}") for i in range(5)))
    held = made(on(wished, ["n0"] * 300), balanced([wished], on(wished, ["n0"] * 300), nodes).moves)
    more = {**nodes, "n5": node("n5")}
    found = balanced([wished], held, more)
    assert {move.target for move in found.moves} == {"n5"}
    assert 0 < len(found.moves) < 2 * 300 / 6
    assert balanced([wished], made(held, found.moves), more).moves == ()


def test_draining_says_where_everyone_goes_and_who_can_not() -> None:
    """Critical agents get what room there is; the others hear why, per node."""
    nodes = cluster(
        node("n0"),
        node("n1", capacity={"slots": 2}),
        node("n2", status=NodeStatus.SUSPECT),
        node("n3", cordoned=True, cordon_reason="disk swap"),
    )
    wishes = [
        wish("a", 2),
        wish("z", 1, critical=True),
        wish("p", 1, on_node_loss="unavailable"),
        wish("l", 1, strategy="leader_only"),
    ]
    held = {agent: item for w in wishes for agent, item in on(w, ["n0"] * w.size()).items()}
    desired = {w.name: w for w in wishes}
    found = drain_moves("n0", desired, held, nodes, leader="n0")
    assert [(move.agent, move.target) for move in found.moves] == [("z-0", "n1"), ("a-0", "n1")]
    assert found.stuck["a-1"] == {
        "n1": "has too little slots left of 2 (needs 1)",
        "n2": "is suspect",
        "n3": "is cordoned (disk swap)",
    }
    assert "on_node_loss" in found.stuck["p-0"]["n1"]
    assert found.stuck["l-0"]["n1"] == "is not the leader's node"
    assert drain_moves("n9", desired, held, nodes) == Drain(())


def test_a_drained_node_does_not_stand_in_its_own_way() -> None:
    """Its replicas leave it before they count where they go."""
    nodes = cluster(*(node(f"n{i}", labels={"zone": "aab"[i]}) for i in range(3)))
    for policy in ({"anti_affinity": "zone"}, {"spread": Spread(label="zone")}):
        wished = wish("a", 2, **policy)
        held = on(wished, ["n0", "n2"])
        found = drain_moves("n0", {"a": wished}, held, nodes)
        assert [move.target for move in found.moves] == ["n1"]


@st.composite
def fleets(
    draw: st.DrawFn,
) -> tuple[list[Deployment], dict[str, Held], dict[str, NodeView]]:
    """Nodes, and agents that run wherever they may, as evenly as chance has it."""
    nodes = cluster(
        *(
            node(
                f"n{i}",
                status=draw(st.sampled_from([NodeStatus.UP] * 4 + [NodeStatus.SUSPECT])),
                cordoned=draw(st.integers(0, 5)) == 0,
                workers=["w"] * draw(st.integers(0, 2)),
                load=Load(
                    cpu=draw(st.sampled_from([0.1, 0.7, 0.9])),
                    memory=draw(st.sampled_from([0.2, 0.2, 0.97])),
                ),
                capabilities=draw(st.sampled_from([[], ["x"], ["x", "y"]])),
                labels={"zone": draw(st.sampled_from(["a", "b", "c"]))},
                capacity=draw(st.sampled_from([{}, {"slots": 4}, {"slots": 9, "gpu": 2}])),
            )
            for i in range(draw(st.integers(1, 6)))
        )
    )
    wishes = [
        wish(
            f"d{k}",
            draw(st.integers(1, 8)),
            critical=draw(st.booleans()),
            resources=draw(st.sampled_from([{}, {}, {"gpu": 1}])),
            strategy=draw(
                st.sampled_from(
                    ["load_balanced", "spread", "capability_matched", "consistent_hash", "pack"]
                )
            ),
            prefer=draw(st.sampled_from([[], ["y"]])),
            require=draw(st.sampled_from([[], [], ["x"]])),
            spread=draw(st.sampled_from([None, "zone", Spread(label="zone", max_skew=1)])),
            anti_affinity=draw(st.sampled_from([False, False, True, "zone"])),
            max_per_node=draw(st.sampled_from([None, None, 2])),
        )
        for k in range(draw(st.integers(1, 4)))
    ]
    tally = Tally(nodes, {})
    held: dict[str, Held] = {}
    for wished in wishes:
        places = []
        for _ in wished.agent_ids():
            fit = [
                name
                for name, view in nodes.items()
                if unfit(
                    wished.spec,
                    NodeView(view.record.model_copy(update={"cordoned": False}), NodeStatus.UP),
                )
                is None
                and full(needs(wished.spec), view, tally.used[name]) is None
                and crowded(wished.spec.placement, wished.name, view, tally) is None
            ]
            place = draw(st.sampled_from(fit)) if fit else None
            places.append(place)
            if place is not None:
                tally.count(place, needs(wished.spec), wished.name)
        for (agent, item), place in zip(on(wished, places).items(), places, strict=True):
            held[agent] = item if place else on(wished, places, status="pending")[agent]
    return wishes, held, nodes


@settings(max_examples=400, deadline=None)
@given(fleets(), st.sampled_from(list(Balance)), st.sampled_from([0.0, 0.1]))
def test_moves_break_no_rule_improve_strictly_and_end(
    fleet: tuple[list[Deployment], dict[str, Held], dict[str, NodeView]],
    strategy: Balance,
    threshold: float,
) -> None:
    """Every rule holds after each single move; the sorted loads only go down; again gives nothing."""
    wishes, held, nodes = fleet
    by_name = {wished.name: wished for wished in wishes}
    found = balanced(wishes, held, nodes, strategy, threshold=threshold)
    assert found == balanced(wishes, held, nodes, strategy, threshold=threshold)
    assert len({move.agent for move in found.moves}) == len(found.moves)
    tally = Tally(nodes, usage_of(held, nodes))
    by_load = strategy is not Balance.CAPABILITY_BASED
    for move in found.moves:
        record = held[move.agent].record
        wished = by_name[record.deployment or ""]
        policy, target = wished.spec.placement, nodes[move.target]
        assert record.status is AgentStatus.RUNNING
        assert move.source != move.target
        assert unfit(wished.spec, target) is None
        skew = _skew(wished, nodes, tally)
        tally.count(move.source, needs(wished.spec), wished.name, -1)
        assert full(needs(wished.spec), target, tally.used[move.target]) is None
        assert crowded(policy, wished.name, target, tally) is None
        tally.count(move.target, needs(wished.spec), wished.name)
        if policy.skew_max is not None:
            assert _skew(wished, nodes, tally) <= max(policy.skew_max, skew)
        by_load = by_load and policy.skew_max is None and policy.strategy != "consistent_hash"
    if found.moves and by_load:
        assert sorted(found.after.values(), reverse=True) < sorted(
            found.before.values(), reverse=True
        )
    if not found.moves:
        assert found.before == found.after
    assert found.is_complete
    again = balanced(wishes, made(held, found.moves), nodes, strategy, threshold=threshold)
    assert again.moves == ()


def _skew(wished: Deployment, nodes: Mapping[str, NodeView], tally: Tally) -> int:
    held = tally.values(wished.name, "zone")
    zones = {
        view.record.labels["zone"] for view in nodes.values() if unfit(wished.spec, view) is None
    }
    return max(held.values()) - min((held.get(zone, 0) for zone in zones), default=0)


def test_twenty_thousand_agents_are_evened_out_in_a_second() -> None:
    """A node joins a hundred: its two hundred agents are found at once."""
    nodes = cluster(*(node(f"n{i:03d}") for i in range(101)))
    wishes = [wish(f"d{k}", 200) for k in range(100)]
    held: dict[str, Held] = {}
    for wished in wishes:
        held.update(on(wished, [f"n{i % 100:03d}" for i in range(200)]))
    began = time.process_time()
    found = balanced(wishes, held, nodes)
    assert time.process_time() - began < 2.0
    assert {move.target for move in found.moves} == {"n100"}
    assert 160 <= len(found.moves) <= 200
