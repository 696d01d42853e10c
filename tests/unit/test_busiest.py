"""Which agents are named as the busiest, at which rates, and how they are shown."""

from __future__ import annotations

from foundation_cli import top
from foundation_cli.render import Column
from foundation_nats.node.busiest import Counted, Looks, together
from foundation_schemas import AgentLoad, BusiestReply


def counted(id: str, handled: int = 0, asked: int = 0, backlog: int = 0) -> Counted:
    return Counted(id, handled, asked, backlog, False)


def test_rates_are_differences_between_looks() -> None:
    looks = Looks()
    first = looks.look(10.0, [counted("a", 100), counted("b", 7)], 5)
    assert (first.handled_s, first.asked_s) == (None, None)
    assert first.agents == []  # nobody has anything to do, as far as is known
    second = looks.look(12.0, [counted("a", 140, 4), counted("b", 7)], 5)
    assert (second.handled_s, second.asked_s) == (20.0, 2.0)
    assert [(item.id, item.handled_s, item.asked_s) for item in second.agents] == [("a", 20.0, 2.0)]


def test_an_activation_that_counts_anew_has_no_negative_rate() -> None:
    looks = Looks()
    looks.look(0.0, [counted("a", 1000)], 5)
    (agent,) = looks.look(2.0, [counted("a", 6)], 5).agents
    assert agent.handled_s == 3.0


def test_a_look_long_ago_is_no_measure_and_two_at_once_share_one() -> None:
    looks = Looks()
    looks.look(0.0, [counted("a")], 5)
    assert looks.look(100.0, [counted("a", 500)], 5).handled_s is None
    shared = looks.look(101.0, [counted("a", 510)], 5)
    assert shared.handled_s == 10.0
    assert looks.look(101.01, [counted("a", 511)], 5) is shared


def test_the_fullest_come_first_and_the_fastest_are_beside_them() -> None:
    agents = [counted(f"idle-{n}") for n in range(50)]
    agents += [counted(f"full-{n}", backlog=n) for n in range(1, 5)]
    looks = Looks()
    looks.look(0.0, agents, 2)
    fast = [counted("fast-1", 10), counted("fast-2", 20), counted("fast-3", 30)]
    found = looks.look(1.0, [*agents, *fast], 2)
    assert [item.id for item in found.agents] == ["full-4", "full-3", "fast-3", "fast-2"]
    assert found.handled_s == 60.0


def test_what_workers_say_is_put_together() -> None:
    one = BusiestReply(agents=[AgentLoad(id="a", backlog=3)], handled_s=5.0, asked_s=0.0)
    new = BusiestReply(agents=[AgentLoad(id="b", backlog=9)])
    found = together([one, new], 5)
    assert [item.id for item in found.agents] == ["b", "a"]
    assert found.handled_s == 5.0
    assert together([new], 5).handled_s is None


def test_rows_are_shared_fairly() -> None:
    assert top.shares(10, [2, 3, 1]) == [2, 3, 1]
    assert top.shares(10, [2, 100, 3]) == [2, 5, 3]
    assert top.shares(9, [100, 100, 100]) == [3, 3, 3]
    assert top.shares(1, [5, 5, 5]) == [1, 0, 0]
    assert top.shares(-4, [5, 5]) == [0, 0]


def test_columns_that_have_no_room_are_left_out_not_cut() -> None:
    columns = [
        Column("id", lambda row: row["id"]),
        Column("count", lambda row: row["count"]),
        Column("why", lambda row: row["why"], free=True),
    ]
    rows = [{"id": "x" * 20, "count": 7, "why": "long " * 40}]
    assert len(top.fitting(columns, rows, 80)) == 3
    assert len(top.fitting(columns, rows, 27)) == 2
    assert len(top.fitting(columns, rows, 26)) == 1
    assert len(top.fitting(columns, rows, 5)) == 1


def test_bars_are_as_high_as_what_they_show() -> None:
    assert top.bars([]) == top.bars([0.0, 0.0]) == ""
    assert top.bars([0.0, 4.0, 8.0]) == " ▄█"
