"""What the works of a campaign judge by themselves: sound rounds pass, and planted violations are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from foundation_nats.chaos.checkers import Judgement, check_linearizable, worst_gains
from foundation_nats.chaos.checkers.drift import Allowance, Series
from foundation_nats.chaos.history import History, Operation
from foundation_nats.chaos.judging import plain
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads import WORKLOADS
from foundation_nats.chaos.workloads.domains import check_items
from foundation_nats.chaos.workloads.steps import check_steps
from foundation_nats.chaos.workloads.wishes import WISH

_S = 1_000_000_000


def told(name: str, history: History, found: Mapping[str, Any]) -> list[str]:
    """The violations that the work *name* finds."""
    work = WORKLOADS[name](1)
    return [text for item in work.judge(plain(found), history, Seen()) for text in item.violations]


def test_every_work_names_its_clients_after_itself() -> None:
    """So that its operations are found, and no other's: no name begins another's with a dot."""
    assert all(name == kind.name for name, kind in WORKLOADS.items())
    assert all(kind.functions for kind in WORKLOADS.values())
    assert all("." not in name for name in WORKLOADS)


# ---- timers -----------------------------------------------------------------------


def timers() -> tuple[History, dict[str, Any]]:
    """One set by a client, one by the agent, both due a second later, and two ticks."""
    by = {"after_s": 1.0}
    history = History(
        [
            Operation("timers.schedule.0", "schedule", "alarm-0/schedule", "s", 0, 5, "ok", by=by),
            Operation("timers.set.0", "set", "alarm-0/set", "a", 0, 5, "ok", by=by),
        ]
    )
    state = {"set": ["a"], "rung": [["s", _S], ["a", _S + 5]], "ticks": ["t.1", "t.2"]}
    return history, {"states": {"alarm-0": state}, "dead": {}}


def test_timers_that_ring_once_and_in_time_are_sound() -> None:
    """And what died when it rang is answered for."""
    history, found = timers()
    assert told("timers", history, found) == []
    found["states"]["alarm-0"]["rung"] = [["s", _S]]
    found["dead"] = {"alarm-0": ["a"]}
    assert told("timers", history, found) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rung": [["s", _S]]}, "lost: alarm-0 rung never applied a"),
        ({"set": []}, "lost: alarm-0 set never applied a"),
        ({"rung": [["s", _S], ["s", _S + 1], ["a", _S]]}, "repeated: alarm-0 rung applied s 2"),
        ({"rung": [["s", _S // 2], ["a", _S]]}, "alarm-0 was rung by s 500 ms before its time"),
        ({"ticks": ["t.1", "t.1"]}, "repeated: alarm-0 ticked 2 times as t.1"),
        ({"rung": [["s", _S], ["a", _S], ["x", _S]]}, "ghost: alarm-0 rung applied x"),
    ],
    ids=["never", "not set", "twice", "early", "tick twice", "from nowhere"],
)
def test_planted_timers_are_found(change: dict[str, Any], says: str) -> None:
    """Each by itself."""
    history, found = timers()
    found["states"]["alarm-0"].update(change)
    (only,) = told("timers", history, found)
    assert only.startswith(says)


# ---- steps ------------------------------------------------------------------------


def line(step: str, token: str = "t", epoch: int = 1) -> dict[str, Any]:
    """What reached the world outside."""
    return {"key": "k", "step": step, "token": token, "epoch": epoch}


@pytest.mark.parametrize(
    "sink",
    [
        [line("pay"), line("mail")],
        # A crash between effect and record: nobody knew that it was done.
        [line("pay", "x"), line("pay", "t", 2), line("mail", "m", 2), line("mail", "n", 3)],
        # Frozen inside the step, and awake after its successor has gone on.
        [line("pay", "t", 2), line("mail", "m", 2), line("pay", "z", 1)],
    ],
    ids=["once", "in doubt", "frozen"],
)
def test_steps_that_are_repeated_only_in_doubt_are_sound(sink: list[dict[str, Any]]) -> None:
    """What the platform can't know it may do again."""
    assert check_steps(sink, [("k", "t")]).is_clean


@pytest.mark.parametrize(
    ("sink", "says"),
    [
        ([line("pay"), line("mail"), line("pay", "u")], "repeated: k was paid again under epoch 1"),
        ([line("pay"), line("mail"), line("pay", "u", 4)], "repeated: k was paid again"),
        ([line("pay", "u"), line("mail")], "ghost: k believes in payment t"),
        ([line("pay")], "lost: k is done and was never mailed"),
    ],
    ids=["same epoch", "later epoch", "no such payment", "not mailed"],
)
def test_planted_steps_are_found(sink: list[dict[str, Any]], says: str) -> None:
    """Each by itself."""
    judgement = check_steps(sink, [("k", "t")])
    assert judgement.violations_count == 1
    assert judgement.violations[0].startswith(says)


# ---- domains ----------------------------------------------------------------------


def append(item: str, outcome: str = "ok", process: str = "domain.0") -> Operation:
    """A proposal for the list."""
    return Operation(process, "append", "items", item, 1, 2, outcome)  # type: ignore[arg-type]


PROPOSED = [append("a"), append("b"), append("c", "unknown"), append("d", "fail")]


@pytest.mark.parametrize("items", [["a", "b"], ["a", "c", "b"]])
def test_a_sound_list_is_sound(items: list[str]) -> None:
    """What is unknown may be there or not."""
    assert check_items(PROPOSED, items).is_clean


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["a"], "lost: b was accepted"),
        (["a", "b", "b"], "repeated: b is there 2 times"),
        (["a", "b", "d"], "ghost: d was refused"),
        (["a", "b", "x"], "ghost: x was proposed by nobody"),
        (["b", "a"], "b is before what domain.0 appended first"),
    ],
)
def test_planted_items_are_found(items: list[str], says: str) -> None:
    """Each by itself."""
    judgement = check_items(PROPOSED, items)
    assert judgement.violations_count == 1
    assert judgement.violations[0].startswith(says)


# ---- wishes -----------------------------------------------------------------------


def wished(*steps: tuple[str, Any, Any] | tuple[str, Any, Any, str]) -> Judgement:
    """One after the other: (f, value, result, outcome)."""
    history = [
        Operation(
            "w", f, "wish-a", value, n * 10, n * 10 + 5, outcome[0] if outcome else "ok", result
        )  # type: ignore[arg-type]
        for n, (f, value, result, *outcome) in enumerate(steps)
    ]
    return check_linearizable(history, WISH)


def test_wishes_that_stand_are_sound() -> None:
    """Applied, scaled, deleted, and looked at in between; an unknown one may stand or not."""
    assert wished(
        ("look", None, None),
        ("scale", 2, False),
        ("apply", [1, 2], None),
        ("look", None, [1, 2]),
        ("scale", 0, True),
        ("look", None, [1, 0]),
        ("apply", [2, 1], None, "unknown"),
        ("scale", 2, True),
        ("look", None, [2, 2]),
        ("delete", None, True),
        ("delete", None, False),
        ("look", None, None),
    ).is_clean


@pytest.mark.parametrize(
    "steps",
    [
        [("apply", [1, 2], None), ("look", None, None)],
        [("apply", [1, 2], None), ("scale", 0, True), ("look", None, [1, 2])],
        [("apply", [1, 2], None), ("apply", [2, 2], None), ("look", None, [1, 2])],
        [("apply", [1, 2], None), ("delete", None, True), ("look", None, [1, 2])],
        [("apply", [1, 2], None), ("delete", None, False)],
        [("apply", [1, 2], None), ("delete", None, True), ("scale", 1, True)],
        [("look", None, [9, 1])],
    ],
    ids=[
        "apply lost", "scale lost", "second apply lost", "delete lost", "not found and there",
        "found and gone", "from nowhere",
    ],
)  # fmt: skip
def test_wishes_that_were_answered_and_lost_are_found(steps: list[Any]) -> None:
    """No order explains what operators were told."""
    assert wished(*steps).violations_count == 1


# ---- rings and sleepers -------------------------------------------------------------


def ring(drop: str = "", double: str = "") -> list[str]:
    """One token's way, with a hop that is missing or came twice."""
    work = WORKLOADS["ring"](1)
    states: dict[str, Any] = {f"station-{n}": {"applied": []} for n in range(5)}
    for hop in range(12):
        name = f"k/{hop}"
        times = 0 if name == drop else 2 if name == double else 1
        states[f"station-{(2 + hop) % 5}"]["applied"] += [name] * times
    sent = History([Operation("ring.1.0", "send", "station-2", "k", 1, 2, "ok")])
    found = {"states": states, "dead": {}}
    return [text for item in work.judge(found, sent, Seen()) for text in item.violations]


def test_a_token_passes_every_station_once_each_time() -> None:
    """A hop that is missing, or came twice, is found where it should have been."""
    assert ring() == []
    assert ring(drop="k/7")[0].startswith("lost: station-4 never applied k/7")
    assert ring(double="k/3")[0].startswith("repeated: station-0 applied k/3 2 times")


def test_registers_that_never_slept_have_shown_nothing() -> None:
    """Then a judge is idle, and the round void."""
    work = WORKLOADS["drowsy"](1)
    found = {"states": {"drowsy-0": {"woken": 0}, "drowsy-1": {}}}
    sleep = work.judge(found, History(), Seen())[-1]
    assert (sleep.checker, sleep.looked_at, sleep.may_be_idle) == ("sleep", 0, False)
    found["states"]["drowsy-0"]["woken"] = 3
    assert work.judge(found, History(), Seen())[-1].looked_at == 3


def test_the_series_nearest_to_its_allowance_is_told() -> None:
    """By unit; short ones don't count."""
    rising = [(float(n), 100.0 + n) for n in range(40)]
    flat = [(float(n), 500.0) for n in range(40)]
    found = worst_gains(
        [
            Series("a", "MB", flat), Series("b", "MB", rising), Series("c", "MB", rising[:3]),
            Series("d", "tasks", flat),
        ],
        {"MB": Allowance(0.1, 8.0), "tasks": Allowance(0.2, 16)},
    )  # fmt: skip
    assert [(item.unit, item.series, item.name, item.grows) for item in found] == [
        ("MB", 2, "b", True), ("tasks", 1, "d", False),
    ]  # fmt: skip
