"""Manifests: what is read, what is refused with line and remedy, and that export reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.control.diff import ChangeKind, diff, taken_over
from foundation_nats.control.manifest import (
    Manifest,
    export,
    load,
    load_manifest,
    parse,
    parse_manifest,
)
from foundation_nats.errors import ManifestError
from foundation_nats.placement.strategies import STRATEGIES
from foundation_schemas import (
    AgentSpec,
    Deployment,
    NodeLoss,
    OnNodeLoss,
    PlacementPolicy,
    Spread,
    Tier,
    WhenUnsatisfiable,
)

GOOD = """\
version: 1
agents:
  - name: a
    run: m.n:C
    replicas: 3
    critical: true
    capabilities: [x, y]
    resources: {cpu: 0.5, gpu: 1}
    placement:
      strategy: spread
      require: [gpu]
      spread: zone
      labels: {zone: a}
    on_node_loss: unavailable
    config: {x: [1, 2.5, null, true, "no"], 'y': {z: no}}
    restart: transient
  - {name: b, run: 'm:C'}
"""


def test_a_full_manifest_is_read() -> None:
    """Every key of the contract."""
    first, second = parse(GOOD)
    assert first == Deployment(
        name="a",
        replicas=3,
        spec=AgentSpec(
            run="m.n:C",
            critical=True,
            capabilities=["x", "y"],
            resources={"cpu": 0.5, "gpu": 1.0},
            placement=PlacementPolicy(
                strategy="spread", require=["gpu"], spread="zone", labels={"zone": "a"}
            ),
            on_node_loss=OnNodeLoss.UNAVAILABLE,
            config={"x": [1, 2.5, None, True, "no"], "y": {"z": "no"}},
            restart="transient",
        ),
    )
    assert second == Deployment(name="b", spec=AgentSpec(run="m:C"))


def replaced(old: str, new: str) -> str:
    """The good manifest with one thing wrong."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("", 1, ["is empty", "version: 1"]),
        ("- a", 1, ["a list"]),
        ("agents: []", 1, ["'version' is missing"]),
        ("version: 2\nagents: []", 1, ["version is 2", "version: 1"]),
        ("version: 1\nagent: []", 2, ["unknown key 'agent'", "'agents'"]),
        ("version: 1\nagents: {a: b}", 2, ["not a list"]),
        ("version: 1\nagents:\n  - a\n", 3, ["the text 'a'"]),
        (replaced("replicas", "replcas"), 5, ["'replcas'", "agent 'a'", "'replicas'"]),
        (replaced("strategy: spread", "stratgy: spread"), 10, ["'stratgy'", "'strategy'"]),
        (replaced("critical", "zzz"), 6, ["'zzz'", "Valid keys"]),
        (replaced("critical: true", "critical: yes"), 6, ["'yes'", "true or false"]),
        (replaced("m.n:C", "m.n"), 4, ["module:Class"]),
        (replaced("    run: m.n:C\n", ""), 3, ["has no 'run'"]),
        (replaced("name: b", "name: a"), 17, ["'a' is taken", "line 3"]),
        (replaced("name: b", "name: a-2"), 17, ["'a-2'", "replica of 'a'"]),
        (replaced("name: b", "name: a.b"), 17, ["not a valid name"]),
        (replaced("critical: true", "critical: true\n    critical: no"), 7, ["given twice"]),
        (replaced("[x, y]", "[x, 1]"), 7, ["the number 1", "quotes"]),
        (replaced("[x, y]", "[x, y.z]"), 7, ["'y.z'"]),
        (replaced("[x, y]", "x"), 7, ["a list"]),
        (replaced("gpu: 1", "gpu: lots"), 8, ["'gpu'", "not a number"]),
        (replaced("gpu: 1", "gpu: -1"), 8, ["0 or more"]),
        (replaced("strategy: spread", "strategy: sprad"), 10, ["'sprad'", "'spread'"]),
        (replaced("zone: a", "zone: 1"), 13, ["the number 1"]),
        (replaced("unavailable", "never"), 14, ["restart, unavailable, stop"]),
        (replaced("2.5", "2024-01-01"), 15, ["config.x.1", "JSON"]),
        (replaced("'y':", "1:"), 15, ["the number 1"]),
        (replaced("transient", "often"), 16, ["'often'"]),
        (replaced("replicas: 3", "replicas: -1"), 5, ["between 0 and"]),
        (replaced("replicas: 3", "replicas: '3'"), 5, ["whole number"]),
        (replaced("replicas: 3", "replicas: true"), 5, ["whole number"]),
        (replaced("replicas: 3", "tier: croe"), 5, ["'croe'", "core, app", "Did you mean 'core'"]),
        (replaced("replicas: 3", "teir: core"), 5, ["'teir'", "'tier'"]),
        (replaced("agents:", "cluster: 3\nagents:"), 2, ["the number 3", "{min_nodes: 3}"]),
        (replaced("agents:", "cluster:\n  min_node: 3\nagents:"), 3, ["'min_node'", "'min_nodes'"]),
        (replaced("agents:", "cluster: {min_nodes: 0}\nagents:"), 2, ["0, not 1 or more"]),
        (replaced("agents:", "cluster: {min_nodes: two}\nagents:"), 2, ["a whole number"]),
        (replaced("agents:", "cluster: {min_nodes: true}\nagents:"), 2, ["a whole number"]),
        (GOOD + " \tx: [", 18, ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_a_remedy(
    text: str, line: int, parts: list[str]
) -> None:
    """The message is for the person who wrote the manifest."""
    with pytest.raises(ManifestError) as caught:
        parse(text, source="agents.yaml")
    assert caught.value.details["line"] == line
    shown = str(caught.value)
    assert shown.startswith(f"agents.yaml, line {line}:")
    for part in parts:
        assert part in shown


def test_a_manifest_may_ask_for_nodes_and_say_what_is_core() -> None:
    """Neither is asked for by itself; the tier reads back, and is no reason for a restart."""
    text = replaced("agents:", "cluster: {min_nodes: 3}\nagents:").replace(
        "replicas: 3", "replicas: 3\n    tier: core"
    )
    found = parse_manifest(text)
    assert found.min_nodes == 3
    assert [item.tier for item in found.deployments] == [Tier.CORE, Tier.APP]
    assert parse(export(found.deployments)) == found.deployments
    assert parse_manifest(GOOD).min_nodes == 0
    assert parse_manifest("version: 1\ncluster:\nagents:") == Manifest([])
    (change, _) = diff({item.name: item for item in parse(GOOD)}, found.deployments)
    assert [(item.name, item.before, item.after) for item in change.fields] == [
        ("tier", "app", "core")
    ]
    assert not change.restarts


RULES = """\
version: 1
agents:
  - name: a
    run: m:C
    placement:
      expressions:
        - zone in (a, b)
        - cores > 8
      spread: {label: zone, max_skew: 2, when_unsatisfiable: anyway}
      anti_affinity: zone
      max_per_node: 3
"""


def test_every_rule_of_placement_is_read_and_written() -> None:
    """Objects and plain values."""
    (found,) = parse(RULES)
    assert found.spec.placement == PlacementPolicy(
        expressions=["zone in (a, b)", "cores > 8"],
        spread=Spread(label="zone", max_skew=2, when_unsatisfiable=WhenUnsatisfiable.ANYWAY),
        anti_affinity="zone",
        max_per_node=3,
    )
    assert parse(export([found])) == [found]
    (plain,) = parse(RULES.replace("anti_affinity: zone", "anti_affinity: true"))
    assert plain.spec.placement.anti_affinity is True
    assert parse(export([plain])) == [plain]


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("cores > 8", "cores >> 8", 8, ["'cores >> 8'", "a value is expected after '>'"]),
        ("cores > 8", "cores inn (8)", 8, ["did you mean 'in'?"]),
        ("cores > 8", "8", 8, ["the number 8", "quotes"]),
        ("expressions:", "expression:", 6, ["'expression'", "Did you mean 'expressions'?"]),
        ("max_skew", "maxskew", 9, ["'maxskew'", "spread of agent 'a'", "'max_skew'"]),
        ("max_skew: 2", "max_skew: 0", 9, ["'max_skew' is 0, not 1 or more"]),
        ("max_skew: 2", "max_skew: yes", 9, ["a whole number"]),
        ("anyway", "always", 9, ["'always'", "pending, anyway"]),
        ("label: zone, ", "", 9, ["no 'label'"]),
        ("{label: zone, max_skew: 2, when_unsatisfiable: anyway}", "[zone]", 9, ["a list"]),
        ("anti_affinity: zone", "anti_affinity: 1", 10, ["true, false or a label's name"]),
        ("anti_affinity: zone", "anti_affinity: ''", 10, ["empty"]),
        ("max_per_node: 3", "max_per_node: -1", 11, ["not 1 or more"]),
        ("max_per_node: 3", "max_per_node: lots", 11, ["a whole number"]),
        ("max_per_node: 3", "strategy: pak", 11, ["'pak'", "Did you mean 'pack'?"]),
    ],
)
def test_a_wrong_rule_of_placement_is_told_with_its_line(
    old: str, new: str, line: int, parts: list[str]
) -> None:
    """Key, line and the nearest valid one."""
    assert old in RULES
    with pytest.raises(ManifestError) as caught:
        parse(RULES.replace(old, new, 1))
    assert caught.value.details["line"] == line, str(caught.value)
    for part in parts:
        assert part in str(caught.value) + str(caught.value.hint)


def test_a_replica_count_that_does_not_reach_the_name_is_no_collision() -> None:
    """`a-3` is free beside three replicas of `a`."""
    assert len(parse(replaced("name: b", "name: a-3"))) == 2


def test_aliases_can_not_blow_up() -> None:
    """A manifest of ten lines does not expand to a billion items."""
    lines = ["version: 1", "agents:", "  - name: a", "    run: m:C", "    config:"]
    lines.append("      x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]")
    lines += [f"      x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ManifestError, match="too much"):
        parse("\n".join(lines))


def test_a_manifest_is_told_from_others_by_its_name_or_by_its_file(tmp_path: Path) -> None:
    """Its deployments carry it; what it prunes is what one of this name has applied."""
    named = "name: shop\n" + GOOD
    for text, file, name in ((GOOD, "bank.v2.yaml", "bank.v2"), (named, "bank.yaml", "shop")):
        path = tmp_path / file
        path.write_text(text)
        found = load_manifest(path)
        assert (found.name, found.owners) == (name, {name})
        assert {item.manifest for item in found.deployments} == {name}
        # Also when a program has read them first, and when nothing is left in it.
        assert Manifest(found.deployments).owners == {name}
    assert parse_manifest("version: 1\nname: shop\nagents: []").owners == {"shop"}
    assert parse_manifest(GOOD).owners == {""}
    assert Manifest([]).owners == {""}
    with pytest.raises(ManifestError, match="line 1: 'name' is the number 7, not text"):
        parse("name: 7\n" + GOOD)
    # That it is another one's from now on is written down, but no change to it.
    changes = diff({item.name: item for item in parse(GOOD)}, parse(named))
    assert {change.kind for change in changes} == {ChangeKind.SAME}
    assert [item.manifest for item in taken_over(changes)] == ["shop", "shop"]
    assert taken_over(diff({item.name: item for item in parse(named)}, parse(named))) == []


def test_a_file_that_is_not_there_is_a_manifest_error(tmp_path: Path) -> None:
    """So that the CLI has one thing to catch."""
    with pytest.raises(ManifestError, match="no file"):
        load(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").write_text(GOOD)
    assert len(load(tmp_path / "y.yaml")) == 2


names = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)
texts = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """Any wish a manifest can say."""
    amount = st.sampled_from([0.0, 0.25, 1.0, 8.0, 1024.0])
    return Deployment(
        name=draw(names),
        replicas=draw(st.none() | st.integers(0, 1000)),
        spec=AgentSpec(
            run=draw(st.sampled_from(["m:C", "a.b.c:D.E"])),
            critical=draw(st.booleans()),
            durable=draw(st.booleans()),
            capabilities=draw(st.lists(names, max_size=3)),
            resources=draw(st.dictionaries(names, amount, max_size=2)),
            placement=PlacementPolicy(
                strategy=draw(st.sampled_from(STRATEGIES)),
                require=draw(st.lists(names, max_size=2)),
                prefer=draw(st.lists(names, max_size=2)),
                spread=draw(
                    st.none()
                    | names
                    | st.builds(
                        Spread,
                        label=names,
                        max_skew=st.integers(1, 5),
                        when_unsatisfiable=st.sampled_from(list(WhenUnsatisfiable)),
                    )
                ),
                expressions=draw(st.sampled_from([[], ["gpu", "!spot", "cores > 8"]])),
                anti_affinity=draw(st.booleans() | names),
                max_per_node=draw(st.none() | st.integers(1, 9)),
                labels=draw(st.dictionaries(names, texts, max_size=2)),
            ),
            on_node_loss=draw(
                st.none()
                | st.sampled_from(list(OnNodeLoss))
                | st.builds(
                    NodeLoss, policy=st.sampled_from(list(OnNodeLoss)), grace_s=st.floats(0.1, 1e6)
                )
            ),
            config=draw(st.dictionaries(texts, json_values, max_size=3)),
            restart=draw(st.sampled_from(["permanent", "transient", "temporary"])),
        ),
    )


@settings(max_examples=60, deadline=None)
@given(deployments())
def test_what_is_exported_reads_back(deployment: Deployment) -> None:
    """Every wish survives the way through YAML."""
    assert parse(export([deployment])) == [deployment]


def loss(text: str) -> str:
    """A manifest whose agent says this of the loss of its node."""
    return f"version: 1\nagents:\n  - name: a\n    run: m:C\n    on_node_loss: {text}\n"


def test_the_loss_of_a_node_may_have_a_grace() -> None:
    """A word, or the word and the seconds; and back again."""
    (found,) = parse(loss("{policy: stop, grace_s: 5}"))
    assert found.spec.on_node_loss == NodeLoss(policy=OnNodeLoss.STOP, grace_s=5)
    assert parse(export([found])) == [found]
    (plain,) = parse(loss("{policy: stop}"))
    assert plain.spec.on_node_loss is OnNodeLoss.STOP
    assert "on_node_loss: stop" in export([plain])


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("{policy: stopp, grace_s: 5}", "'policy' is 'stopp'", "'stop'"),
        ("{grace_s: 5}", "has no 'policy'", "restart, unavailable, stop"),
        ("{policy: stop, grace: 5}", "unknown key 'grace'", "grace_s"),
        ("{policy: stop, grace_s: soon}", "'grace_s' is the text 'soon'", ""),
        ("{policy: stop, grace_s: 0}", "not more than 0", "Leave it out"),
        ("[stop]", "'on_node_loss'", ""),
    ],
)
def test_a_wrong_grace_is_named(text: str, says: str, hint: str) -> None:
    """With its line and what would be right."""
    with pytest.raises(ManifestError) as caught:
        parse(loss(text))
    assert says in caught.value.message
    assert "line 5" in caught.value.message
    assert hint in (caught.value.hint or "")
