"""Label expressions: what they mean, and that a mistake is told with what was expected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foundation_schemas import AgentSpec, PlacementPolicy, Spread, parse_expression

LABELS = {"zone": "a", "cores": "16", "gpu": "", "kind": "big iron", "k8s.io/arch": "arm64"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("zone", None),
        ("gpu", None),
        ("spot", "has no label spot (needs spot)"),
        ("!spot", None),
        ("! zone", "has zone=a (needs ! zone)"),
        ("zone=a", None),
        ("zone == b", "has zone=a (needs zone == b)"),
        ("zone != b", None),
        ("zone!=a", "has zone=a (needs zone!=a)"),
        ("disk != hdd", None),
        ("disk = hdd", "has no label disk (needs disk = hdd)"),
        ("zone in (a, b)", None),
        ("zone in (b,c)", "has zone=a (needs zone in (b,c))"),
        ("zone not in (b)", None),
        ("zone  notin  (a)", "has zone=a (needs zone notin (a))"),
        ("disk notin (hdd)", None),
        ("cores > 8", None),
        ("cores>=16", None),
        ("cores < 16", "has cores=16 (needs cores < 16)"),
        ("cores <= 16.0", None),
        ("cores > -1", None),
        ("ram > 8", "has no label ram (needs ram > 8)"),
        ("zone > 8", "has zone=a, which is not a number (needs zone > 8)"),
        ("kind = 'big iron'", None),
        ('kind in ("big iron", small)', None),
        ("k8s.io/arch = arm64", None),
        ("in in (in)", "has no label in (needs in in (in))"),
    ],
)
def test_an_expression_holds_or_says_why_not(text: str, reason: str | None) -> None:
    """The reason is read after the node's name."""
    assert parse_expression(text).why_not(LABELS) == reason
    assert parse_expression(text).matches(LABELS) == (reason is None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("  ", "it is empty"),
        ("!", "a label's name is expected, not nothing"),
        ("= a", "a label's name is expected, not '='"),
        ("'zone' = a", "a label's name is expected, not 'zone'"),
        ("zone =", "a value is expected after '=', not nothing"),
        ("zone = (", "a value is expected after '=', not '('"),
        ("zone in a, b", "a list such as (a, b) is expected after 'in'"),
        ("zone in ()", "a value is expected after '(', not ')'"),
        ("zone in (a b)", "',' or ')' is expected after 'a', not 'b'"),
        ("zone in (a", "',' or ')' is expected after 'a', not nothing"),
        ("zone not a", "'in' is expected after 'not'"),
        ("zone inn (a)", "did you mean 'in'?"),
        ("zone is a", "'is' is not an operator"),
        ("zone ( a", "'(' is not an operator"),
        ("zone = a b", "'b' is too much; write one expression per item"),
        ("zone = a && gpu", "'&&' is not understood; the operators are =, =="),
        ("zone ~ a", "'~' is not understood"),
        ("zone = 'a", "does not end"),
        ("cores > many", "'many' is not a number"),
        ("cores > nan", "'nan' is not a number"),
        ("x" * 600, "longer than 512"),
    ],
)
def test_a_mistake_is_told_when_the_policy_is_made(text: str, why: str) -> None:
    """Not by the leader, later."""
    with pytest.raises(ValidationError) as caught:
        PlacementPolicy(expressions=["zone", text])
    assert why in caught.value.errors()[0]["msg"]


@given(st.text(alphabet="ab1 =!<>(),'\"innot~.", max_size=20))
def test_any_text_is_read_or_refused_by_a_value_error(text: str) -> None:
    """Nothing else is raised, and what is read can be asked."""
    try:
        found = parse_expression(text)
    except ValueError as error:
        refusal = str(error)
    else:
        assert isinstance(found.matches({"a": "1", "b": "x"}), bool)
        return
    assert refusal.startswith("label expression ")


def test_what_a_spec_doesnt_say_doesnt_change_its_digest() -> None:
    """The digests of 0.1 still hold, so that an upgrade restarts no agent."""
    assert AgentSpec(run="m:C").digest() == "5e22e570e48c"
    said = [
        {"expressions": ["gpu"]},
        {"anti_affinity": True},
        {"anti_affinity": "zone"},
        {"max_per_node": 1},
        {"spread": "zone"},
        {"spread": {"label": "zone"}},
        {"spread": {"label": "zone", "max_skew": 2}},
        {"spread": {"label": "zone", "when_unsatisfiable": "anyway"}},
    ]
    specs = [AgentSpec(run="m:C", placement=PlacementPolicy.model_validate(p)) for p in said]
    assert len({spec.digest() for spec in specs}) == len(said)
    assert all(AgentSpec.model_validate_json(s.model_dump_json()) == s for s in specs)


def test_a_plain_spread_orders_and_an_object_rules() -> None:
    """`skew_max` is what must never be exceeded."""
    assert PlacementPolicy(spread="zone").skew_max is None
    assert PlacementPolicy(spread=Spread(label="zone")).skew_max == 1
    anyway = PlacementPolicy.model_validate(
        {"spread": {"label": "zone", "max_skew": 3, "when_unsatisfiable": "anyway"}}
    )
    assert (anyway.skew_max, anyway.spread_label) == (None, "zone")
    for wrong in (
        {"max_per_node": 0},
        {"anti_affinity": ""},
        {"spread": {"label": "zone", "max_skew": 0}},
        {"spread": {"max_skew": 1}},
    ):
        with pytest.raises(ValidationError):
            PlacementPolicy.model_validate(wrong)
