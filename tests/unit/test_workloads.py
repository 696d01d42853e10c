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


def test_a_timer_that_was_set_by_a_clock_that_was_behind_may_ring_earlier() -> None:
    """By as much as it was behind, and only what was set there."""
    history, found = timers()
    for operation in history.operations:
        operation.by = {"after_s": 1.0, "clock_s": 1000.0}
    state = found["states"]["alarm-0"]
    state["rung"] = [["s", _S], ["a", _S // 4]]
    (only,) = told("timers", history, found)
    assert "by a 750 ms before its time" in only
    state["clocks"] = {"a": 999.2}
    assert told("timers", history, found) == []
    state["clocks"] = {"a": 999.8}
    (only,) = told("timers", history, found)
    assert "by a 550 ms before its time" in only
    state["clocks"] = {"a": 4600.0}
    (only,) = told("timers", history, found)
    assert "by a 750 ms before its time" in only


def test_a_timer_that_was_set_by_a_clock_that_was_ahead_is_not_waited_for() -> None:
    """It may ring in an hour, but it must be set, and ring once."""
    history, found = timers()
    for operation in history.operations:
        operation.by = {"after_s": 1.0, "clock_s": 1000.0}
    state = found["states"]["alarm-0"]
    state["rung"] = [["s", _S]]
    (only,) = told("timers", history, found)
    assert only.startswith("lost: alarm-0 rung never applied a")
    state["clocks"] = {"a": 4600.0}
    assert told("timers", history, found) == []
    state["rung"] = [["s", _S], ["a", _S], ["a", _S]]
    (only,) = told("timers", history, found)
    assert only.startswith("repeated: alarm-0 rung applied a 2")
    state["rung"], state["set"] = [["s", _S]], []
    (only,) = told("timers", history, found)
    assert only.startswith("lost: alarm-0 set never applied a")


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


# ---- families ---------------------------------------------------------------------


def family(*log: tuple[Any, ...], **changes: Any) -> dict[str, Any]:
    """One guardian that wrote this down, and its children as they are after it by right."""
    return {
        "states": {
            "guardian-0": {"applied": ["k"], "log": [list(item) for item in log]},
            "guardian-1": {"applied": [], "log": []},
            "guardian-0_calm": {"log": ["start", "d1", "start"]},
            "guardian-0_keen": {"log": ["start", "d2", "start"]},
            "guardian-0_head": {"log": ["start"], "ends": [[1, "stopped"], [2, "stopped"]]},
            "guardian-0_head_leaf": {"log": ["start"]},
            "guardian-0_sick": {},
        },
        "dead": {},
        "wished": {
            "guardian-0_calm": "guardian-0",
            "guardian-0_keen": "guardian-0",
            "guardian-0_head": "guardian-0",
            "guardian-0_head_leaf": "guardian-0_head",
        },
        "status": dict.fromkeys(
            [f"guardian-0_{tag}" for tag in ("calm", "keen", "head", "head_leaf")], "running"
        ),
        **changes,
    }


LIVES = (
    ("have", "calm", False), ("started", "calm", 1), ("exited", "calm", 1, "stopped", "done", False),
    ("end", "calm", False), ("have", "calm", False), ("have", "calm", True), ("started", "calm", 2),
    ("end", "calm", True), ("have", "calm", True), ("exited", "calm", 2, "stopped", "", True),
    ("started", "calm", 3),
    ("have", "keen", False), ("started", "keen", 4),
    ("have", "sick", False), ("exited", "sick", 5, "failed", "sick", False),
    ("have", "head", False), ("started", "head", 6),
)  # fmt: skip
SENT = Operation("family.order.guardian-0", "send", "guardian-0", "k", 0, 5, "ok")


def test_children_that_come_and_go_as_they_are_told_are_sound() -> None:
    """One that ends by itself, one that is ended and had again meanwhile, one that is given up."""
    assert told("family", History([SENT]), family(*LIVES)) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([("exited", "calm", 3, "stopped", "", False)], "ghost: guardian-0 heard 2 times that calm"),
        ([("exited", "keen", 4, "stopped", "", False)], "heard that keen has stopped, unasked"),
        ([("exited", "head", 6, "failed", "x", False)], "heard that head has failed, unasked: x"),
        ([("exited", "sick", 5, "failed", "", False)], "repeated: guardian-0 heard of end 5 of sick"),
        ([("exited", "sick", 7, "failed", "", False)], "ghost: guardian-0 heard of an end of sick"),
        ([("started", "calm", 3)], "repeated: guardian-0 heard of start 3 of calm again"),
        ([("started", "sick", 5)], "heard of start 5 of sick after its end"),
        ([("have", "sick", True)], "ghost: guardian-0 was told to have sick: True"),
        ([("have", "keen", False)], "forgotten: guardian-0 was told to have keen: False"),
        ([("end", "keen", True)], "untold: guardian-0 waits for the end of guardian-0_keen"),
        ([("have", "sick", False)], "untold: guardian-0 has not heard that guardian-0_sick has failed"),
        (
            [("end", "keen", True), ("exited", "keen", 4, "stopped", "", False)],
            "left behind: guardian-0_keen is running",
        ),
        (
            [("end", "keen", True), ("exited", "keen", 4, "refused", "full", False)],
            "was refused keen: full",
        ),
        (
            [("end", "keen", True), ("exited", "keen", 4, "stopped", "", True)],
            "has keen after its end: True",
        ),
    ],
)  # fmt: skip
def test_planted_lives_of_children_are_found(more: list[tuple[Any, ...]], says: str) -> None:
    """Told twice, for no reason, never; had by nobody, kept though it is had no more."""
    found = told("family", History([SENT]), family(*LIVES, *more))
    assert any(says in text for text in found), found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"wished": {}}, "lost: guardian-0_calm of guardian-0 is not wished for"),
        ({"status": {}}, "lost: guardian-0_calm of guardian-0 is nowhere"),
        (
            {"status": {**family()["status"], "guardian-0_head_leaf": "failed"}},
            "lost: guardian-0_head_leaf of guardian-0_head is failed",
        ),
        (
            {"wished": {**family()["wished"], "guardian-0_head_leaf": "guardian-0"}},
            "guardian-0_head_leaf of guardian-0_head is not wished for",
        ),
        ({"dead": {"guardian-0": ["k"]}}, "both: guardian-0 applied k, which is a dead letter"),
    ],
)
def test_planted_trees_are_found(change: dict[str, Any], says: str) -> None:
    """A child that nobody wishes for, that runs nowhere, that has another parent."""
    found = told("family", History([SENT]), family(*LIVES, **change))
    assert any(text.startswith(says) or says in text for text in found), found


@pytest.mark.parametrize(
    ("agent", "state", "says"),
    [
        ("guardian-0_calm", {"log": ["start", "d1"]}, "untold: guardian-0_calm has ended by d1"),
        ("guardian-0_calm", {"log": ["start"]}, "ghost: guardian-0 heard 1 times that calm"),
        ("guardian-0_keen", {"log": ["start", "d2", "start", "d2", "start"]}, "ended by d2 2 times"),
        ("guardian-0_head", {"log": ["start"], "ends": [[1, "s"], [1, "s"]]}, "end 1 2 times"),
        ("guardian-0", {"applied": [], "log": LIVES}, "lost: guardian-0 never applied k"),
    ],
)  # fmt: skip
def test_planted_states_of_families_are_found(agent: str, state: dict[str, Any], says: str) -> None:
    """What children and heads say themselves counts, too."""
    found = family(*LIVES)
    found["states"][agent] = state
    texts = told("family", History([SENT]), found)
    assert any(says in text for text in texts), texts


def test_a_child_that_is_active_twice_is_found_by_its_answers() -> None:
    """An older activation answered after a later one had."""

    def who(epoch: int, at_ns: int) -> Operation:
        by = {"epoch": epoch, "at_ns": at_ns, "host": "h"}
        return Operation("family.who.guardian-0", "who", "guardian-0_calm", None, 0, 5, "ok", by=by)

    found = family(*LIVES)
    assert told("family", History([SENT, who(1, 10), who(2, 20)]), found) == []
    (only,) = told("family", History([SENT, who(2, 10), who(1, 20)]), found)
    assert "guardian-0_calm answered under epoch 1" in only
