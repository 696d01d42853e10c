"""`Roster` and `Senses`: what is made of what is learned, without a bus and without a clock."""

from __future__ import annotations

from foundation_nats.cluster.liveness import Tick, Verdict
from foundation_nats.cluster.roster import Outcome, Roster, Turned
from foundation_nats.cluster.senses import Senses
from foundation_nats.config import LivenessConfig
from foundation_schemas import Heartbeat, Load, NodeRecord, NodeStatus

_CONFIG = LivenessConfig(heartbeat_interval_s=0.5, suspect_after_s=1.5, down_after_s=5.0)


def beat(node: str, incarnation: int, *, draining: bool = False) -> Heartbeat:
    """A heartbeat as another node sends it."""
    return Heartbeat(
        node=node, incarnation=incarnation, beat=1, sent_at=0.0, draining=draining, load=Load()
    )


def verdicts(outcomes: list[Outcome]) -> list[tuple[str, Verdict]]:
    """The verdicts among what has come of something."""
    return [(item.change.node, item.change.new) for item in outcomes if isinstance(item, Turned)]


def heard(*names: str, at: float = 0.0) -> Roster:
    """A roster of "me" that has read and heard these nodes in their life 1."""
    roster = Roster("me", _CONFIG)
    for name in names:
        assert roster.read(NodeRecord(name=name, incarnation=1), at).must_greet
        assert roster.hear(beat(name, 1), at).is_news
    return roster


def silent(roster: Roster, node: str) -> list[Outcome]:
    """Nothing is heard of anybody until nobody confirms that *node* lives."""
    outcomes: list[Outcome] = []
    for now in (2.0, 6.0, 8.0):
        outcomes += roster.step(Tick(), now)
        for name in roster.others_alive() - {node}:
            outcomes += roster.hear(beat(name, 1), now).outcomes
    return outcomes


def test_a_node_that_was_only_read_about_is_suspect_until_it_is_heard() -> None:
    """A record says what a node is, never that it lives."""
    roster = Roster("me", _CONFIG)
    learned = roster.read(NodeRecord(name="a", incarnation=1), 0.0)
    assert learned.must_greet
    assert learned.is_news
    assert roster.views["a"].status is NodeStatus.SUSPECT
    assert roster.hear_pong("a", 1, 0.1) is not None
    assert roster.views["a"].status is NodeStatus.UP
    roster.hear(beat("a", 1, draining=True), 0.2)
    assert roster.views["a"].status is NodeStatus.DRAINING


def test_an_opinion_is_taken_back_and_a_seal_is_not() -> None:
    """Silence makes an opinion; what is written down is over for good."""
    roster = heard("a", "b", "c", "d")
    assert ("a", Verdict.DOWN) in verdicts(silent(roster, "a"))
    assert roster.is_down("a", 1)
    assert roster.opinions() == [("a", 1)]
    assert not roster.hear(beat("a", 1), 8.1).is_news, "a ghost"
    assert roster.take_back("a", 1, 8.2) is not None
    assert not roster.is_down("a", 1)
    assert roster.views["a"].status is NodeStatus.SUSPECT
    roster.hear(beat("a", 1), 8.3)
    assert roster.views["a"].status is NodeStatus.UP

    ended = NodeRecord(name="a", incarnation=1, ended=True)
    assert verdicts(roster.read(ended, 8.4).outcomes) == [("a", Verdict.DOWN)]
    assert roster.is_sealed("a", 1)
    assert roster.take_back("a", 1, 8.5) is None
    roster.judge_anew(7, 8.6)
    assert roster.is_down("a", 1)
    assert roster.is_down("me", 6)
    assert not roster.is_down("me", 7)


def test_a_node_that_comes_back_was_down() -> None:
    """So that its return is told as one, and not as the first sight of a node."""
    roster = heard("a", "b", "c", "d")
    silent(roster, "a")
    roster.read(NodeRecord(name="a", incarnation=2), 9.0)
    assert roster.views["a"].status is NodeStatus.SUSPECT
    roster = heard("a", "b", "c", "d")
    silent(roster, "a")
    (back,) = roster.hear(beat("a", 2), 9.0).outcomes
    assert isinstance(back, Turned)
    assert back.was_down
    assert roster.views["a"].status is NodeStatus.SUSPECT, "its record is on its way"


def test_a_record_that_has_expired_says_nothing_of_a_node_that_is_heard() -> None:
    """Its TTL is garbage collection; of a node that left, it is the end."""
    roster = heard("a", "b")
    assert not roster.lose("a", 0.1).is_news
    assert roster.views["a"].status is NodeStatus.UP
    assert verdicts(roster.hear_farewell("b", 1, 0.2)) == [("b", Verdict.DOWN)]
    assert roster.lose("b", 0.3).is_news
    assert "b" not in roster.views
    assert roster.is_down("b", 1)


def test_who_does_not_hear_itself_may_not_judge_silence() -> None:
    """Nor for as long after as it is asked to have heard."""
    senses = Senses(beat_every_s=0.5, now=0.0)
    assert not senses.is_deaf(1.0)
    assert not senses.has_turned(False)
    assert senses.is_deaf(1.5)
    assert senses.has_turned(True)
    assert not senses.hears_itself(1.0, 1.5)
    senses.heard_itself(2.0)
    assert not senses.is_deaf(2.0)
    assert not senses.hears_itself(1.0, 2.0)
    senses.heard_itself(3.0)
    assert senses.hears_itself(1.0, 3.0)


def test_the_greatest_lag_is_remembered_for_a_while() -> None:
    """A small one is none; and after five seconds without, we are as quick as ever."""
    senses = Senses(beat_every_s=0.5, now=0.0)
    assert senses.lag(0.01, 0.0) is None
    assert senses.lag(0.4, 1.0) == 0.4
    assert senses.lag(0.1, 2.0) is None
    assert senses.lag(0.5, 3.0) == 0.5
    assert senses.lag(0.0, 7.0) is None
    assert senses.lag(0.0, 8.1) == 0.0
    assert senses.lag(0.0, 9.0) is None
