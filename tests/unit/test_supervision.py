"""The supervisor's stories (``scripts/supervision_*.txt``), and the limit that holds in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.node.supervision import (
    Effect,
    Escalate,
    Event,
    Exited,
    GiveUp,
    Policy,
    Removed,
    Restart,
    RestartIntensity,
    Started,
    Supervisor,
    Tick,
)
from foundation_nats.testing.scripts import Command, ScriptError, run_script

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("supervision_*.txt"))


class _Player:
    """Plays a script's commands on a supervisor; ``new`` begins another story."""

    def __init__(self) -> None:
        self._begin({})

    def _begin(self, options: dict[str, float]) -> None:
        restarts = int(options.pop("max_restarts", 10))
        self.supervisor = Supervisor(max_restarts=restarts, **options)  # type: ignore[arg-type]
        self.now = 0.0

    def perform(self, command: Command) -> Iterator[str]:
        if command.name == "new":
            self._begin({key: float(value) for key, value in command.options.items()})
            yield "ok"
        elif command.name == "show":
            yield f"children: {' '.join(self.supervisor.keys) or 'none'}"
            yield str(self.supervisor.statistics())
        else:
            now = command.number("t")
            assert now >= self.now, "time runs forwards"
            self.now = now
            shown = [_show(effect) for effect in self.supervisor.step(_event(command), now)]
            due = self.supervisor.deadline()
            yield "; ".join(shown) or f"next: {'never' if due is None else f'{due:g}'}"


def _event(command: Command) -> Event:
    match command.name:
        case "started":
            return Started(command.argument(), Policy(command.option("policy", "permanent")))
        case "failed":
            return Exited(command.argument(), command.option("reason", "crashed"))
        case "ended":
            return Exited(command.argument(), "done", is_normal=True)
        case "blamed":
            return Exited(command.argument(), "its agent's fault", is_blamed=True)
        case "removed":
            return Removed(command.argument())
        case "tick":
            return Tick()
        case other:
            raise ScriptError(f"unknown command {other!r}")


def _show(effect: Effect) -> str:
    match effect:
        case Restart(key, delay_s):
            return f"restart {key} after {delay_s:g} s"
        case GiveUp(key, reason):
            return f"give up {key}: {reason}"
        case Escalate(key, reason):
            return f"escalate {key}: {reason}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_stories_end_as_told(script: Path) -> None:
    """Each transcript is played and compared."""
    run_script(script, _Player().perform)


def test_there_are_stories() -> None:
    """A glob that finds nothing would pass for ever."""
    assert len(SCRIPTS) >= 2


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_restarts": -1},
        {"window_s": 0.0},
        {"backoff_first_s": 0.0},
        {"backoff_first_s": 2.0, "backoff_max_s": 1.0},
        {"good_life_s": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings_: dict[str, float]) -> None:
    """Each limit is a limit."""
    with pytest.raises(AssertionError):
        Supervisor(**settings_)  # type: ignore[arg-type]


def test_the_back_off_never_overflows() -> None:
    """A child that fails for years waits thirty seconds each time, not for ever, not an error."""
    supervisor = Supervisor(max_restarts=5000, window_s=1.0)
    supervisor.step(Started("a"), 0.0)
    for second in range(3000):
        supervisor.step(Started("a"), float(second))
        effects = supervisor.step(Exited("a", "crashed"), float(second))
    assert effects == [Restart("a", 30.0)]


_KEYS = st.sampled_from(["a", "b", "c", "d"])
_EVENTS = st.one_of(
    st.builds(Started, _KEYS, st.sampled_from(Policy)),
    st.builds(Started, _KEYS),
    st.builds(Exited, _KEYS, st.just("crashed"), st.booleans()),
    st.builds(Exited, _KEYS, st.just("crashed")),
    st.builds(Removed, _KEYS),
    st.just(Tick()),
)
_HISTORIES = st.lists(
    st.tuples(_EVENTS, st.sampled_from([0.0, 0.0, 0.1, 0.3, 1.0, 4.9, 5.0, 61.0])),
    min_size=20,
    max_size=200,
)


@settings(max_examples=200, deadline=None)
@given(history=_HISTORIES, max_restarts=st.integers(0, 4))
def test_the_intensity_is_never_exceeded(
    history: list[tuple[Event, float]], max_restarts: int
) -> None:
    """In no window are more restarts decided than allowed; and none is refused without need."""
    supervisor = Supervisor(max_restarts=max_restarts, window_s=5.0)
    known: dict[str, Policy] = {}
    times: list[float] = []
    now = 0.0
    for event, gap_s in history:
        now += gap_s
        in_window = sum(now < time + 5.0 for time in times)
        effects = supervisor.step(event, now)
        due = supervisor.deadline()
        assert due is None or due > now
        match event:
            case Started(key, policy):
                known[key] = policy
            case Removed(key):
                known.pop(key, None)
            case Exited() | Tick():
                pass
        for effect in effects:
            assert isinstance(event, Exited)
            assert effect.key == event.key
            policy = known[effect.key]
            wants = policy is Policy.PERMANENT or (
                policy is Policy.TRANSIENT and not event.is_normal
            )
            match effect:
                case Restart(_, delay_s):
                    assert wants
                    assert in_window < max_restarts
                    assert delay_s == 0.0 or 0.1 <= delay_s <= 30.0
                    times.append(now)
                case Escalate(key):
                    assert wants
                    assert in_window == max_restarts
                    del known[key]
                case GiveUp(key):
                    assert not wants
                    del known[key]
        if isinstance(event, Exited) and event.key in known:
            assert effects, "the end of a child that is known has a consequence"
        assert set(supervisor.keys) == set(known)


def test_the_intensity_counts_what_is_in_the_window() -> None:
    """The window slides; what is as old as the window is out of it."""
    intensity = RestartIntensity(2, 5.0)
    assert [intensity.permit(now) for now in (0.0, 1.0, 4.9, 5.0, 5.5, 6.0)] == [
        *(True, True, False),
        *(True, False, True),
    ]
    assert intensity.spent(6.0) == 2
    assert intensity.spent(100.0) == 0
