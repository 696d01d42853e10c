"""Small pure decisions: ids, filters, trimming, settings, errors, class declarations."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest

import foundation_nats
from foundation_nats import Agent, Signal, State, on
from foundation_nats import errors as errors_module
from foundation_nats.agent.agent import start_arguments
from foundation_nats.agent.handling import handlings
from foundation_nats.agent.loading import describe, run_name
from foundation_nats.agent.record import OutboxItem, decode_record, encode_record
from foundation_nats.base import failpoint
from foundation_nats.bus.rpc import error_body
from foundation_nats.config import Config, ControlConfig
from foundation_nats.control import pacing
from foundation_nats.control.declaring import declared
from foundation_nats.control.trust import is_flapping
from foundation_nats.errors import ConfigError, FoundationError, StateInvalidError, error_from_wire
from foundation_nats.node.trimmer import Consumed, Mark, trim_to
from foundation_nats.observe.filters import parse
from foundation_nats.signaling.envelope import emitted_id, message_id, traceparent_for
from foundation_schemas import AgentSpec, Deployment, NodeLoss, OnNodeLoss, RecoveredFrom


def every_error(root: type[FoundationError] = FoundationError) -> list[type[FoundationError]]:
    """The class and all below it that are part of the platform's own tree."""
    below = [c for c in root.__subclasses__() if c.__module__ == errors_module.__name__]
    return [root] + [found for child in below for found in every_error(child)]


def test_every_error_has_its_code_its_place_in_the_drawing_and_crosses_the_wire() -> None:
    """Unique codes; drawn in the docstring; the same class on the other side."""
    classes = every_error()
    assert len({error.code for error in classes}) == len(classes)
    drawing = errors_module.__doc__ or ""
    for error in classes:
        assert error.__name__ in drawing
        body = error_body(error("what", n=1))["error"]
        back = error_from_wire(body["code"], body["message"], body["details"])
        assert type(back) is error
        assert back.details["n"] == 1


def test_public_names_are_sorted_documented_and_importable() -> None:
    """`foundation_nats.__all__` is what it says."""
    assert foundation_nats.__all__ == sorted(foundation_nats.__all__)
    for name in foundation_nats.__all__:
        assert inspect.getdoc(getattr(foundation_nats, name)), name


def test_ids_differ_by_target_source_cause_and_index_and_repeat() -> None:
    """What the stream deduplicates by."""
    assert message_id("a", "s", "1") == message_id("a", "s", "1")
    assert (
        len({message_id("a", "s", "1"), message_id("b", "s", "1"), message_id("a", "t", "1")}) == 3
    )
    ids = {emitted_id(salt, c, i, t) for salt in "xy" for c in "12" for i in (0, 1) for t in "ab"}
    assert len(ids) == 16
    first = traceparent_for("id", None)
    second = traceparent_for("other", first)
    assert second[:36] == first[:36]
    assert second[36:52] != first[36:52]


def test_filters_compare_paths_and_evaluate_no_code() -> None:
    """Absent paths and other types do not match; nonsense is refused."""
    body = {"type": "order.placed", "data": {"amount": 12, "tags": ["new"], "text": "a and b"}}
    for text, expected in {
        "data.amount > 10": True,
        "data.amount > 12": False,
        'type == "order.placed" and data.amount <= 12': True,
        "data.tags contains new": True,
        'data.text == "a and b"': True,
        "data.nothing == 1": False,
        'data.amount > "x"': False,
        "data.tags.0 == new": True,
    }.items():
        assert parse(text)(body) is expected, text
    for nonsense in ("", "amount", "__import__('os')", "a = 1"):
        with pytest.raises(ConfigError):
            parse(nonsense)


def test_trimming_waits_for_age_unless_the_mailbox_fills() -> None:
    """Young signals are evidence against late repeats; counts are the mailbox's own."""
    consumed = Consumed()
    consumed.marks.extend([Mark(0.0, 10, 10), Mark(5.0, 900, 20), Mark(9.0, 5000, 30)])
    rules = {"min_age_s": 5.0, "batch": 10, "pressure": 100}
    assert trim_to(consumed, 4.0, **rules) is None
    assert trim_to(consumed, 5.0, **rules) == Mark(0.0, 10, 10)
    assert trim_to(consumed, 10.0, **rules) == Mark(5.0, 900, 20)
    assert trim_to(consumed, 4.0, min_age_s=5.0, batch=10, pressure=30) == Mark(9.0, 5000, 30)
    assert trim_to(consumed, 10.0, min_age_s=5.0, batch=25, pressure=100) is None
    consumed.prompt = True
    assert trim_to(consumed, 0.0, **rules) == Mark(9.0, 5000, 30)
    assert trim_to(Consumed(), 99.0, **rules) is None


def test_settings_come_from_the_environment_and_survive_a_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nested names, aliases, relations that name both values, and the way to a child process."""
    monkeypatch.setenv("FOUNDATION_SERVER", "nats://a:1,nats://b:2")
    monkeypatch.setenv("FOUNDATION_LIVENESS__DOWN_AFTER_S", "4")
    config = Config.load(cluster="c")
    assert config.bus.servers == ("nats://a:1", "nats://b:2")
    assert config.liveness.fence_s == 3.0
    for key, value in config.to_environment().items():
        monkeypatch.setenv(key, value)
    assert Config.load() == config
    for name, value, reason in (
        ("FOUNDATION_LIVENESS__DOWN_AFTER_S", "1", "down_after_s"),
        ("FOUNDATION_LEASE__TTL_S", "5", "ttl_s"),
        ("FOUNDATION_CLUSTER", "a.b", "valid name"),
        ("FOUNDATION_MAILBOX__MAILBOX_MAX", "many", "mailbox_max"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=reason):
                Config.load()


def test_records_say_who_wrote_them_and_damage_is_not_read() -> None:
    """Encoded by hand, decoded with every check."""
    value = encode_record(
        epoch=3,
        commit=9,
        writer=b'{"node":"n","incarnation":1,"worker":"w"}',
        cursor=7,
        mark="t",
        run="m:C",
        state=b'{"a":1}',
        salt="s",
        emitted=1,
        outbox=[OutboxItem("subject", "id", b'{"x":1}')],
        outbox_since="t",
    )
    record = decode_record("a", value)
    assert (record.epoch, record.commit, record.cursor) == (3, 9, 7)
    assert record.state == {"a": 1}
    assert record.outbox[0].body == {"x": 1}
    assert record.outbox_since == "t"
    with pytest.raises(StateInvalidError, match="damaged"):
        decode_record("a", value[:-5])
    with pytest.raises(StateInvalidError, match="version"):
        decode_record("a", value.replace(b'"v":1', b'"v":2'))


class Base(Agent):
    """A base."""

    @on("one")
    async def one(self, signal: Signal[int]) -> str:
        return "base"


class Derived(Base):
    """Overrides without the mark."""

    async def one(self, signal: Signal[int]) -> str:
        return "derived"

    @on("two")
    def two(self, signal: Signal) -> None: ...

    async def on_start(self, recovered: RecoveredFrom | None) -> None: ...


def test_declarations_are_checked_when_they_are_made() -> None:
    """Handlers by type, overriding, hooks by the names they take, and mistakes."""
    routes = handlings(Derived)
    assert routes.types() == ["one", "two"]
    one, two = routes.find("one", {}), routes.find("two", {})
    assert one is not None
    assert one.function is Derived.one
    assert two is not None
    assert two.is_async is False
    recovered = RecoveredFrom(node="n", epoch=1, reason="node_down")
    assert start_arguments(Derived, recovered) == {"recovered": recovered}
    assert start_arguments(Base, None) == {"recovered_from": None}
    with pytest.raises(ConfigError, match="both"):

        class _Twice(Agent):
            @on("x")
            def a(self, signal: Signal) -> None: ...

            @on("x")
            def b(self, signal: Signal) -> None: ...

    with pytest.raises(ConfigError, match="State"):

        class _BadState(Agent):
            State = dict  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="signal type"):
        on("two words")
    with pytest.raises(ConfigError, match="inside a function"):

        class _Local(Agent):
            pass

        run_name(_Local)
    assert run_name(Base) == "tests.unit.test_small_decisions:Base"
    info = describe("tests.unit.test_small_decisions:Derived")
    assert info.ok
    assert info.handles == ["one", "two"]
    assert "no class" in (describe("tests.unit.test_small_decisions:Nobody").error or "")


class Needy(Agent):
    """Its state can't begin empty."""

    class State(State):
        must: int


def test_a_state_without_defaults_is_refused_with_its_field() -> None:
    """Named before anything runs."""
    assert "must" in (describe("tests.unit.test_small_decisions:Needy").error or "")


def test_failpoints_have_known_names_and_actions() -> None:
    """A typo is an error, not a test that can't fail."""
    assert set(failpoint.parse("commit.before_cas=kill; claim.read=1in5(sleep(2))")) == {
        "commit.before_cas",
        "claim.read",
    }
    for wrong in ("commit.befor_cas=kill", "claim.read=explode"):
        with pytest.raises(ValueError):
            failpoint.parse(wrong)
    later = failpoint.parse("claim.read=after(3,raise)")["claim.read"]
    later()
    later()
    with pytest.raises(failpoint.FailpointError):
        later()


@pytest.mark.parametrize(
    ("now", "stormed_at", "left"),
    [
        (100.0, None, 0.0),
        (100.0, 100.0, 60.0),
        (130.0, 100.0, 30.0),
        (160.0, 100.0, 0.0),
        (999.0, 100.0, 0.0),
    ],
)
def test_how_long_agents_are_given_out_slowly(
    now: float, stormed_at: float | None, left: float
) -> None:
    """From the end of the storm on, for a while."""
    assert pacing.left_s(now, stormed_at, ControlConfig()) == left


@pytest.mark.parametrize(
    ("left", "alive", "most", "pause"),
    [
        (0.0, 3, 10_000, 0.0),
        (5.0, 3, 30, 0.25),
        (5.0, 0, 10, 0.25),
        (5.0, 5_000, 10_000, 0.25),
    ],
)
def test_how_fast_agents_are_given_out(left: float, alive: int, most: int, pause: float) -> None:
    """Some per node that lives, and never more than usual."""
    config = ControlConfig(pace_per_node=10, pace_every_s=0.25)
    assert pacing.commands_max(left, alive, config, usual=10_000) == most
    assert pacing.pause_s(left, config) == pause


@pytest.mark.parametrize(
    ("short_lives", "lived_s", "flaps"),
    [
        (0, 0.0, False),
        (2, 0.0, False),
        (3, 0.0, True),
        (3, 59.0, True),
        (9, 60.0, False),
        (3, None, True),
    ],
)
def test_whether_a_node_flaps(short_lives: int, lived_s: float | None, flaps: bool) -> None:
    """By its short lives in a row, until it has been stable."""
    assert is_flapping(short_lives, lived_s, ControlConfig()) is flaps


class Patient(Agent):
    """Waits for its node for a while."""

    on_node_loss: ClassVar[Any] = {"policy": "stop", "grace_s": 5}


def test_a_class_says_what_becomes_of_it_when_its_node_is_lost() -> None:
    """With a grace; what the wish says goes before."""
    said = describe(f"{__name__}:Patient").on_node_loss
    assert said == NodeLoss(policy=OnNodeLoss.STOP, grace_s=5)
    wish = Deployment(name="a", spec=AgentSpec(run="m:C"))
    assert declared(wish, describe(f"{__name__}:Patient")).spec.on_node_loss == said
    wish = Deployment(name="a", spec=AgentSpec(run="m:C", on_node_loss="restart"))
    assert declared(wish, describe(f"{__name__}:Patient")).spec.on_node_loss is OnNodeLoss.RESTART
