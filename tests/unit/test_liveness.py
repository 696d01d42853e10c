"""The failure detector's stories (``scripts/liveness_*.txt``), and what holds in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.cluster.liveness import (
    BusDisturbed,
    Confirm,
    Confirmed,
    Effect,
    Event,
    ForceFailover,
    Forgot,
    Heard,
    Left,
    LivenessDetector,
    OwnLag,
    ProbeAnswered,
    ProbeMissed,
    StormBegan,
    StormEnded,
    Tick,
    Verdict,
    VerdictChanged,
)
from foundation_nats.testing.scripts import Command, ScriptError, run_script

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("liveness_*.txt"))
GRACE_S = 12.0


class _Player:
    """Plays a script's commands on a detector; ``new`` begins another story."""

    def __init__(self) -> None:
        self.detector = LivenessDetector()
        self.now = 0.0

    def perform(self, command: Command) -> Iterator[str]:
        if command.name == "new":
            options = {key: float(value) for key, value in command.options.items()}
            self.detector, self.now = LivenessDetector(**options), 0.0  # type: ignore[arg-type]
            yield "ok"
        elif command.name == "show":
            for node, (incarnation, verdict) in sorted(self.detector.snapshot().items()):
                yield f"{node}@{incarnation} {verdict}"
            yield str(self.detector.statistics())
        else:
            now = command.number("t")
            assert now >= self.now, "time runs forwards"
            self.now = now
            for event in self._events(command):
                for effect in self.detector.step(event, self.now):
                    yield _show(effect)
            due = self.detector.deadline()
            yield "next: never" if due is None else f"next: {due:g}"

    def _events(self, command: Command) -> Iterator[Event]:
        match command.name:
            case "tick":
                yield Tick()
            case "disturbed":
                yield BusDisturbed()
            case "force":
                yield ForceFailover()
            case "lag":
                yield OwnLag(float(command.argument()))
            case "forgot":
                yield Forgot(command.argument())
            case name:
                for word in command.arguments:
                    node, _, incarnation = word.partition("@")
                    yield self._about(name, node, int(incarnation), command)

    def _about(self, name: str, node: str, incarnation: int, command: Command) -> Event:
        match name:
            case "heard":
                return Heard(node, incarnation)
            case "left":
                return Left(node, incarnation)
            case "missed":
                return ProbeMissed(node, incarnation)
            case "answered":
                return ProbeAnswered(node, incarnation)
            case "confirmed":
                answers = {"yes": True, "no": False, "nobody": None}
                return Confirmed(node, incarnation, answers[command.option("reachable")])
            case _:
                raise ScriptError(f"unknown command {name!r}")


def _show(effect: Effect) -> str:
    match effect:
        case VerdictChanged(node, incarnation, old, new, cause):
            return f"{node}@{incarnation}: {old or '-'} -> {new} ({cause})"
        case Confirm(node, incarnation):
            return f"confirm {node}@{incarnation}"
        case StormBegan(nodes, until):
            return f"storm: {' '.join(nodes)} held until {until:g}"
        case StormEnded():
            return "storm is over"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_stories_end_as_told(script: Path) -> None:
    """Each transcript is played and compared."""
    run_script(script, _Player().perform)


def test_there_are_stories() -> None:
    """A glob that finds nothing would pass for ever."""
    assert len(SCRIPTS) >= 4


def test_what_is_shown_cannot_be_changed() -> None:
    """A snapshot is of its moment, and nobody writes to it."""
    detector = LivenessDetector()
    detector.step(Heard("a", 1), 0.0)
    shown = detector.snapshot()
    detector.step(Left("a", 1), 1.0)
    assert dict(shown) == {"a": (1, Verdict.UP)}
    with pytest.raises(TypeError):
        shown["a"] = (1, Verdict.DOWN)  # type: ignore[index]
    assert detector.verdict("a") is Verdict.DOWN
    assert detector.incarnation("a") == 1
    assert detector.verdict("b") is None
    assert detector.incarnation("b") is None


def test_settings_that_contradict_each_other_are_refused() -> None:
    """Nobody can be down before being suspect."""
    with pytest.raises(AssertionError):
        LivenessDetector(suspect_after_s=5.0, down_after_s=5.0)


def test_the_deadline_is_exact_whatever_the_fractions_are() -> None:
    """A step at the deadline does what the deadline was for; no loop can spin on it."""
    for thousandths in range(1, 400):
        detector = LivenessDetector()
        detector.step(Heard("a", 1), thousandths / 1000 * 1.1)
        effects: list[Effect] = []
        for _ in range(3):  # suspect, ask, and no answer
            due = detector.deadline()
            assert due is not None
            effects += detector.step(Tick(), due)
        assert len(effects) == 3, thousandths
        assert detector.verdict("a") is Verdict.DOWN


# Mostly about few nodes and first lives, or three misses in a row would be a rare event.
_NODES = st.sampled_from(["a", "a", "a", "a", "b", "b", "c", "d", "e"])
_LIVES = st.integers(1, 3)
_EVENTS = st.one_of(
    st.builds(Heard, _NODES, _LIVES),
    st.builds(Heard, _NODES, st.just(1)),
    st.builds(Left, _NODES, _LIVES),
    st.builds(Confirmed, _NODES, _LIVES, st.sampled_from([True, False, None])),
    st.builds(ProbeMissed, _NODES, _LIVES),
    st.builds(ProbeMissed, _NODES, st.just(1)),
    st.builds(ProbeMissed, st.just("a"), st.just(1)),
    st.builds(ProbeAnswered, _NODES, _LIVES),
    st.builds(OwnLag, st.floats(-1.0, 10.0)),
    st.just(ForceFailover()),
    st.just(BusDisturbed()),
    st.just(Tick()),
)
_HISTORIES = st.lists(
    st.tuples(_EVENTS, st.sampled_from([0.0, 0.0, 0.2, 0.2, 0.5, 1.0, 2.0, 5.0, 31.0])),
    min_size=10,
    max_size=120,
)


def _play(detector: LivenessDetector, history: list[tuple[Event, float]]) -> Iterator[_Step]:
    """All steps of *history*, and those that the detector's own deadlines add in between."""
    now = 0.0
    for event, gap_s in history:
        until = now + gap_s
        while (due := detector.deadline()) is not None and due <= until:
            assert due > now or now == 0.0, "a deadline that has passed would make the loop spin"
            now = due
            yield Tick(), now, detector.step(Tick(), now)
        now = until
        yield event, now, detector.step(event, now)


_Step = tuple[Event, float, list[Effect]]


@settings(max_examples=150, deadline=None)
@given(_HISTORIES)
def test_down_is_final_for_an_incarnation(history: list[tuple[Event, float]]) -> None:
    """Once down, a life is never anything else, and no life is older than one seen before."""
    detector = LivenessDetector()
    over: dict[str, int] = {}
    believed: dict[str, tuple[int, Verdict]] = {}
    for _, _, effects in _play(detector, history):
        for effect in effects:
            if isinstance(effect, VerdictChanged):
                node, life = effect.node, effect.incarnation
                assert life > over.get(node, 0)
                before = believed.get(node)
                if effect.old is None:
                    assert before is None or before[0] < life
                else:
                    assert before == (life, effect.old)
                believed[node] = (life, effect.new)
                if effect.new is Verdict.DOWN:
                    over[node] = life
            elif isinstance(effect, Confirm):
                assert effect.incarnation > over.get(effect.node, 0)
        assert dict(detector.snapshot()) == believed


@settings(max_examples=150, deadline=None)
@given(_HISTORIES)
def test_nobody_is_declared_down_within_the_grace(history: list[tuple[Event, float]]) -> None:
    """After a disturbance only a good-bye ends a life."""
    disturbed_at = float("-inf")
    for event, now, effects in _play(LivenessDetector(), history):
        if isinstance(event, BusDisturbed):
            disturbed_at = now
        for effect in effects:
            if isinstance(effect, VerdictChanged) and effect.new is Verdict.DOWN:
                assert effect.cause == "left" or now >= disturbed_at + GRACE_S


@settings(max_examples=150, deadline=None)
@given(_HISTORIES)
def test_no_verdict_is_given_in_a_storm(history: list[tuple[Event, float]]) -> None:
    """While the brake holds only a good-bye ends a life; it ends when it said, or by force."""
    until: float | None = None
    for event, now, effects in _play(LivenessDetector(), history):
        for effect in effects:
            match effect:
                case StormBegan(nodes, end):
                    assert until is None
                    assert nodes
                    until = end
                case StormEnded():
                    assert until is not None
                    assert now >= until or isinstance(event, ForceFailover)
                    until = None
                case VerdictChanged(new=Verdict.DOWN, cause=cause) if cause != "left":
                    assert until is None
                case _:
                    pass


@settings(max_examples=100, deadline=None)
@given(_HISTORIES)
def test_a_dead_node_is_found_after_all(history: list[tuple[Event, float]]) -> None:
    """Whatever has happened: when all fall silent, all are down in bounded time."""
    detector = LivenessDetector()
    now = 0.0
    for _, now, _ in _play(detector, history):  # noqa: B007
        pass
    detector.step(OwnLag(0.0), now)
    # Grace, silence and an unanswered question, then at most the hold of a storm.
    for _ in _play(detector, [(Tick(), now + GRACE_S + 5.0 + 1.0 + 2 * 30.0)]):
        pass
    assert detector.deadline() is None
    assert all(verdict is Verdict.DOWN for _, verdict in detector.snapshot().values())


_BAD_NEWS = st.lists(
    st.tuples(
        st.sampled_from(
            [ProbeMissed("a", 1), ProbeMissed("b", 1), Confirmed("a", 1, False), ForceFailover()]
        ),
        st.sampled_from([0.0, 0.1, 0.2, 0.4, 1.0]),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(_BAD_NEWS, _BAD_NEWS)
def test_no_amount_of_bad_news_ends_a_life_within_the_grace(
    before: list[tuple[Event, float]], after: list[tuple[Event, float]]
) -> None:
    """Neither of the two roads is taken, whatever was begun before the disturbance."""
    detector = LivenessDetector(storm_fraction=2.0)
    for node in ("a", "b", "c"):
        detector.step(Heard(node, 1), 0.0)
    end = 0.0
    for _, end, _ in _play(detector, before):  # noqa: B007
        pass
    for node in ("a", "b"):  # whoever is down stays so; the others are in full health
        detector.step(Heard(node, 1), end)
    alive = {n for n, (_, verdict) in detector.snapshot().items() if verdict is not Verdict.DOWN}
    detector.step(BusDisturbed(), end)
    now = end
    for event, gap_s in after:
        now += gap_s
        if now >= end + GRACE_S:
            break
        detector.step(event, now)
        assert all(detector.verdict(node) is not Verdict.DOWN for node in alive)


def test_what_a_person_says_is_real_makes_no_storm_of_what_falls_next() -> None:
    """Two fall and are held; forced, they are down, and the third falls without a hold."""
    detector = LivenessDetector()
    for name in ("a", "b", "c", "d", "e"):
        detector.step(Heard(name, 1), 0.0)

    def fall(names: str, at: float) -> list[Effect]:
        found: list[Effect] = []
        for tick in range(3):
            for name in names:
                found += detector.step(ProbeMissed(name, 1), at + 0.2 * tick)
        return found

    assert any(isinstance(effect, StormBegan) for effect in fall("ab", 1.0))
    held = detector.held()
    assert held
    effects = detector.step(ForceFailover(), 2.0)
    assert {e.node for e in effects if isinstance(e, VerdictChanged) and e.new is Verdict.DOWN} == {
        *held
    }
    assert detector.held() == ()
    effects = fall("c", 2.5)
    assert not [effect for effect in effects if isinstance(effect, StormBegan)]
    assert detector.verdict("c") is Verdict.DOWN
