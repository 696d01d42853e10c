"""Who hears whom, groups of nodes, what is told of them, and how it is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_cli import render
from foundation_cli.topology import lines
from foundation_nats.cluster.hearing import EVERY_BEATS, Hearing
from foundation_nats.cluster.topology import (
    Group,
    Healed,
    Observer,
    OneWay,
    Parted,
    PartitionWatch,
    Topology,
    components,
    groups_of,
    one_way_links,
    topology,
)
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_schemas import LeaseRecord, Load, NodeRecord, NodeStatus, RttReply

A, B, C, D = "a", "b", "c", "d"


def _all_hear(names: Iterable[str]) -> dict[str, set[str]]:
    names = set(names)
    return {name: names - {name} for name in names}


# ---- groups -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alive", "fresh", "stale", "expected"),
    [
        ("", {}, {}, []),
        ("a", {A: ""}, {}, [("a", True)]),
        ("abc", _all_hear("abc"), {}, [("abc", True)]),
        # Two halves that both speak to us.
        ("abcd", {A: "b", B: "a", C: "d", D: "c"}, {}, [("ab", True), ("cd", True)]),
        # Over another: a and c hear each other by b alone.
        ("abc", {A: "b", B: "ac", C: "b"}, {}, [("abc", True)]),
        # One way: c is heard and hears nobody.
        ("abc", {A: "bc", B: "ac", C: ""}, {}, [("ab", True), ("c", True)]),
        # A ring that is heard in one direction is a group all the same.
        ("abc", {A: "b", B: "c", C: "a"}, {}, [("abc", True)]),
        # Nothing comes from c, and nobody hears it.
        ("abc", {A: "b", B: "a"}, {C: "ab"}, [("ab", True), ("c", False)]),
        # Nothing comes from c, which is heard by b: it may just not say it (an older version).
        ("abc", {A: "b", B: "ac"}, {}, [("abc", True)]),
        # Two that vanished together are as they last said: together …
        ("abc", {A: ""}, {B: "ac", C: "ab"}, [("a", True), ("bc", False)]),
        # … or apart.
        ("abc", {A: ""}, {B: "a", C: "a"}, [("a", True), ("b", False), ("c", False)]),
        # Of two of which nothing was ever heard, nothing speaks against it.
        ("abc", {A: ""}, {}, [("a", True), ("bc", False)]),
        # Who is not alive counts for nothing, also as a way.
        ("ac", {A: "b", B: "ac", C: "b"}, {}, [("a", True), ("c", True)]),
        # The larger known group first.
        ("abcd", {A: "", B: "cd", C: "bd", D: "bc"}, {}, [("bcd", True), ("a", True)]),
    ],
)
def test_groups_are_who_hears_each_other(
    alive: str, fresh: dict[str, str], stale: dict[str, str], expected: list[tuple[str, bool]]
) -> None:
    """By name, one row per situation."""
    assert groups_of(alive, fresh, stale) == tuple(
        Group(tuple(nodes), known) for nodes, known in expected
    )


_GRAPHS = st.integers(0, 9).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            str(here): st.sets(st.sampled_from([str(n) for n in range(count)]))
            for here in range(count)
        }
    )
)


def _reaches(edges: Mapping[str, Iterable[str]], root: str) -> set[str]:
    found, work = {root}, [root]
    while work:
        for there in edges[work.pop()]:
            if there not in found:
                found.add(there)
                work.append(there)
    return found


@given(_GRAPHS)
def test_components_are_mutual_reachability(edges: dict[str, set[str]]) -> None:
    """Two vertices share a component if and only if each reaches the other."""
    found = components(edges)
    assert sorted(name for part in found for name in part) == sorted(edges)
    part_of = {name: number for number, part in enumerate(found) for name in part}
    reach = {name: _reaches(edges, name) for name in edges}
    for here in edges:
        for there in edges:
            is_mutual = there in reach[here] and here in reach[there]
            assert (part_of[here] == part_of[there]) == is_mutual


@given(_GRAPHS)
def test_groups_of_nodes_that_all_speak_are_those_components(edges: dict[str, set[str]]) -> None:
    """Whatever short cut is taken when all is well."""
    expected = {frozenset(part) for part in components(edges)}
    assert {frozenset(group.nodes) for group in groups_of(edges, edges)} == expected


@given(_GRAPHS, st.data())
def test_every_node_is_in_one_group_whatever_is_unknown(
    edges: dict[str, set[str]], data: st.DataObject
) -> None:
    """Fresh, stale or never said."""
    kinds = {name: data.draw(st.sampled_from(["fresh", "stale", "never"])) for name in edges}
    fresh = {name: edges[name] for name in edges if kinds[name] == "fresh"}
    stale = {name: edges[name] for name in edges if kinds[name] == "stale"}
    groups = groups_of(edges, fresh, stale)
    assert sorted(name for group in groups for name in group.nodes) == sorted(edges)
    for group in groups:
        assert group.is_known == any(name in fresh for name in group.nodes)


def test_a_chain_longer_than_the_stack_is_no_trouble() -> None:
    """Components without recursion."""
    edges = {str(n): [str((n + 1) % 5000)] for n in range(5000)}
    assert [len(part) for part in components(edges)] == [5000]


def test_one_way_links_are_those_that_both_ends_tell_of() -> None:
    """Of who said nothing, nothing is concluded."""
    assert one_way_links("abc", {A: "bc", B: "ac", C: "b"}) == (OneWay(C, A),)
    assert one_way_links("abc", {A: "bc", B: "ac"}) == ()


# ---- telling ----------------------------------------------------------------------------


def _groups(*parts: str) -> list[Group]:
    return [Group(tuple(part), True) for part in parts]


def test_a_partition_is_told_once_it_has_lasted_and_healed_once_that_has() -> None:
    """A flicker is neither."""
    watch = PartitionWatch(1.5)
    assert watch.step(_groups("abc"), "abc", 0.0) is None
    assert watch.step(_groups("ab", "c"), "abc", 0.5) is None
    assert watch.step(_groups("abc"), "abc", 1.0) is None
    assert watch.step(_groups("ab", "c"), "abc", 2.0) is None
    assert watch.step(_groups("ab", "c"), "abc", 3.4) is None
    parts = ((A, B), (C,))
    assert watch.step(_groups("ab", "c"), "abc", 3.5) == Parted(parts)
    assert watch.step(_groups("ab", "c"), "abc", 9.0) is None, "told once"
    assert watch.step(_groups("abc"), "abc", 10.0) is None
    assert watch.step(_groups("abc"), "abc", 11.5) == Healed(parts, ())
    assert watch.step(_groups("abc"), "abc", 20.0) is None


def test_to_be_given_up_heals_nothing() -> None:
    """Down, c is in no group; it is healed when c is back, or forgotten."""
    for known, gone in (("abc", ()), ("ab", (C,))):
        watch = PartitionWatch(1.0)
        watch.step(_groups("ab", "c"), "abc", 0.0)
        assert isinstance(watch.step(_groups("ab", "c"), "abc", 1.0), Parted)
        for at in (2.0, 5.0, 9.0):
            assert watch.step(_groups("ab"), "abc", at) is None
        last = _groups("abc") if C in known else _groups("ab")
        watch.step(last, known, 10.0)
        assert watch.step(last, known, 11.0) == Healed(((A, B), (C,)), gone)


def test_other_groups_are_told_anew() -> None:
    """From two groups to three."""
    watch = PartitionWatch(1.0)
    watch.step(_groups("ab", "c"), "abc", 0.0)
    assert isinstance(watch.step(_groups("ab", "c"), "abc", 1.0), Parted)
    watch.step(_groups("a", "b", "c"), "abc", 2.0)
    assert watch.step(_groups("a", "b", "c"), "abc", 3.0) == Parted(((A,), (B,), (C,)))


def test_what_is_seen_during_a_pause_does_not_count() -> None:
    """A leader that doesn't hear itself begins to count anew."""
    watch = PartitionWatch(1.0)
    watch.step(_groups("a", "b"), "ab", 0.0)
    watch.pause()
    assert watch.step(_groups("a", "b"), "ab", 5.0) is None
    assert isinstance(watch.step(_groups("a", "b"), "ab", 6.0), Parted)


# ---- hearing ----------------------------------------------------------------------------


def test_who_is_heard_is_said_when_it_changes_and_now_and_then() -> None:
    """Twice after a change, then in every tenth beat."""
    hearing = Hearing(1.5)
    said = []
    for beat in range(40):
        now = beat * 0.5
        hearing.heard(A, 1, None, now)
        if beat >= 15:
            hearing.heard(B, 1, None, now)
        said.append(hearing.to_say(now, [A] if beat < 15 else [A, B]))
    assert said[0] == said[1] == [A]
    assert said[15] == said[16] == [A, B]
    beats = [beat for beat, names in enumerate(said) if names is not None]
    assert beats == [0, 1, 1 + EVERY_BEATS, 15, 16, 26, 36]


def test_as_long_as_somebody_is_missing_every_beat_says_so() -> None:
    """Whoever begins to listen then learns it at once."""
    hearing = Hearing(1.5)
    hearing.heard(A, 1, None, 0.0)
    hearing.heard(B, 1, None, 0.0)
    for beat in range(20):
        now = beat * 0.5
        hearing.heard(A, 1, None, now)
        said = hearing.to_say(now, [A, B])
        if now > 1.5:
            assert said == [A]


def test_what_a_node_said_in_an_earlier_life_is_forgotten() -> None:
    """And what it says in this one is kept between the beats that say it."""
    hearing = Hearing(1.5)
    assert hearing.heard(A, 1, [B, C], 0.0)
    assert not hearing.heard(A, 1, None, 0.5)
    assert not hearing.heard(A, 1, [C, B], 1.0)
    assert hearing.report(A) == frozenset({B, C})
    assert hearing.heard(A, 2, None, 1.5)
    assert hearing.report(A) is None


def test_standing_still_makes_nobody_silent() -> None:
    """Ages don't grow while this process didn't run."""
    hearing = Hearing(1.5)
    hearing.heard(A, 1, None, 10.0)
    assert hearing.names(11.4) == {A}
    assert hearing.names(20.0) == frozenset()
    hearing.excuse(9.0)
    assert hearing.names(20.0) == {A}


# ---- the picture ------------------------------------------------------------------------


def _view(
    name: str,
    status: NodeStatus = NodeStatus.UP,
    hears: str | Iterable[str] | None = None,
    **labels: str,
) -> NodeView:
    record = NodeRecord(name=name, incarnation=7, workers=[f"{name}-w0"], labels=labels)
    said = None if hears is None else frozenset(hears)
    return NodeView(
        record, status, Load(agents=10), heard=status is not NodeStatus.DOWN, hears=said
    )


def _answer(name: str, hears: Iterable[str], peers: Mapping[str, float | None]) -> RttReply:
    return RttReply(
        node=name,
        incarnation=7,
        load=Load(agents=12),
        server="s1",
        server_rtt_ms=0.4,
        hears=sorted(hears),
        peers=dict(peers),
    )


def _picture(
    views: list[NodeView],
    answers: list[RttReply],
    heard: Iterable[str],
    absent: Iterable[str] = (),
    revision: int = 3,
) -> Topology:
    return topology(
        ClusterView(MappingProxyType({view.name: view for view in views}), revision),
        cluster="test",
        at="2026-11-23T12:00:00.000Z",
        observer=Observer("s1", 0.2, tuple(sorted(heard))),
        leader=LeaseRecord(holder=A, incarnation=7, term=2, ttl_s=15),
        measured={answer.node: answer for answer in answers},
        absent=set(absent),
    )


def test_what_a_node_answers_goes_before_what_is_believed() -> None:
    """Status, load, distance; and a node nobody listens for is down."""
    found = _picture(
        [
            _view(A, NodeStatus.SUSPECT, zone="x"),
            _view(B, NodeStatus.DOWN, zone="y"),
            _view(C, zone="x"),
            _view(D),
        ],
        [_answer(A, "", {}), _answer(B, "a", {A: 1.0})],
        heard="d",
        absent="c",
    )
    assert {node.name: str(node.status) for node in found.nodes} == {
        A: "up",
        B: "up",
        C: "down",
        D: "up",
    }
    assert [node.answered for node in found.nodes] == [True, True, False, False]
    assert dict(found.zones) == {"x": (A, C), "y": (B,), "": (D,)}
    assert found.totals["agents"] == 12 + 12 + 10
    assert found.totals["up"] == 3
    assert found.totals["answered"] == 2
    assert found.servers[0].nodes == (A, B)
    assert found.matrix[B] == {A: 1.0, D: None}
    assert C not in found.matrix
    assert [node.leader for node in found.nodes] == [True, False, False, False]


def test_only_the_cluster_gives_nodes_up() -> None:
    """Its leader, or what is written in their records; an observer alone holds them suspect."""
    down = [_view(name, NodeStatus.DOWN, hears="abcd") for name in (B, C, D)]
    ended = down[2].record.model_copy(update={"ended": True})
    views = [_view(A), down[0], down[1], NodeView(ended, NodeStatus.DOWN, heard=False)]
    answer = _answer(A, "", {B: None, C: None})
    alone = _picture(views, [answer], heard="a")
    assert [str(node.status) for node in alone.nodes] == ["up", "suspect", "suspect", "down"]
    assert alone.groups == (Group((A,), True), Group((B, C), False))
    leads = answer.model_copy(update={"gave_up": {B: 7, C: 6}})
    led = _picture(views, [leads], heard="a")
    assert [str(node.status) for node in led.nodes] == ["up", "down", "suspect", "down"]


def test_an_answered_ping_counts_for_both_ways() -> None:
    """Of a node that has just joined, no heartbeat has come yet."""
    found = _picture(
        [_view(A), _view(B)],
        [_answer(A, "", {B: 0.5}), _answer(B, "", {A: None})],
        heard="ab",
    )
    assert not found.partitioned
    assert found.one_way == ()


def test_a_node_that_does_not_answer_but_is_heard_says_itself_whom_it_hears() -> None:
    """Deaf, it beats on: that is a one-way link, and a group of its own."""
    found = _picture(
        [_view(A), _view(B), _view(C, hears="")],
        [_answer(A, "bc", {B: 0.5, C: None}), _answer(B, "ac", {A: 0.5, C: None})],
        heard="abc",
    )
    assert found.partitioned
    assert found.groups == (Group((A, B), True), Group((C,), True))
    assert found.one_way == (OneWay(C, A), OneWay(C, B))
    assert found.node(C) is not None


def test_what_is_not_heard_any_more_is_stale() -> None:
    """The last words of c, that it hears all, count for nothing."""
    found = _picture(
        [_view(A), _view(B), _view(C, NodeStatus.SUSPECT, hears="ab")],
        [_answer(A, "b", {B: 0.5, C: None}), _answer(B, "a", {A: 0.5, C: None})],
        heard="ab",
    )
    assert found.groups == (Group((A, B), True), Group((C,), False))
    c = found.node(C)
    assert c is not None
    assert c.status is NodeStatus.SUSPECT


# ---- drawing ----------------------------------------------------------------------------


def _drawn(found: Topology, **options: object) -> list[str]:
    arguments = {"width": 100, **options}
    return list(lines(render.plain(found), **arguments))  # type: ignore[arg-type]


def test_three_nodes_are_drawn_with_their_matrix() -> None:
    """Zones, the leader's mark, distances, and nothing alarming."""
    names = "abc"
    found = _picture(
        [_view(name, zone="east" if name != C else "west") for name in names],
        [_answer(n, set(names) - {n}, {p: 0.5 for p in names if p != n}) for n in names],
        heard=names,
    )
    text = _drawn(found)
    assert text == [
        "cluster  test, seen from s1 (0.2 ms), revision 3",
        "leader   a, term 2",
        "nodes    3 up",
        "totals   36 agents, 3 workers, 1 server, 2 zones",
        "",
        "zone east  2 nodes",
        "├─ a  up  leader  12 agents  s1 0.4 ms",
        "└─ b  up          12 agents  s1 0.4 ms",
        "zone west  1 node",
        "└─ c  up          12 agents  s1 0.4 ms",
        "",
        "round trips in ms, from row to column; - for no answer in time",
        "     a    b    c",
        "a    ·  0.5  0.5",
        "b  0.5    ·  0.5",
        "c  0.5  0.5    ·",
    ]
    assert not any("round trips" in line for line in _drawn(found, matrix=False))
    assert "`- b" in "\n".join(_drawn(found, is_unicode=False))


def test_a_partition_is_loud() -> None:
    """Who is where, who leads, and from where nothing comes."""
    found = _picture(
        [_view(A), _view(B), _view(C, NodeStatus.SUSPECT, hears="ab")],
        [_answer(A, "b", {B: 0.5, C: None}), _answer(B, "a", {A: 0.5, C: None})],
        heard="ab",
    )
    text = _drawn(found)
    at = text.index("PARTITION  2 groups of nodes do not hear each other")
    assert text[at + 1] == "  group 1  a, b  (leads)"
    assert text[at + 2] == "  group 2  c  (nothing comes from there)"
    assert "└─ c  suspect          10 agents  does not answer" in text
    assert text[-3:] == ["a    ·  0.5  -", "b  0.5    ·  -", "c    -    -  ·"]


def test_fifty_nodes_fit_on_a_page() -> None:
    """A matrix too wide for the terminal becomes a summary, unless it is asked for."""
    names = [f"worker-node-{number:02}" for number in range(50)]
    heard = set(names)
    found = _picture(
        [_view(name, zone=f"z{index % 3}") for index, name in enumerate(names)],
        [
            _answer(n, heard - {n}, {p: float(i) for i, p in enumerate(names) if p != n})
            for n in names[:49]
        ],
        heard=names,
    )
    text = _drawn(found)
    assert len(text) <= 80
    assert max(map(len, text)) <= 100
    assert "round trips between nodes: 2,401 of 2,450 answered" in text
    whole = _drawn(found, matrix=True)
    assert len(whole) > 100
    assert max(map(len, whole)) < 270


def test_names_from_the_cluster_cannot_move_the_cursor() -> None:
    """They are cleaned wherever they are drawn."""
    found = _picture([_view(A, zone="\x1b[31mred\nblue")], [], heard="a")
    assert all("\x1b" not in line and "\n" not in line for line in _drawn(found))
