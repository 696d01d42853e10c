"""What ``make bench`` keeps and how it judges; the figures themselves are not tested here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import ROWS, Row, judge, merged, missed, read_figures


def line(text: str, ours: float, target: str = "") -> dict[str, Any]:
    """A figure as it is kept."""
    return {"figure": text, "ours": ours, "target": target}


def test_a_partial_run_keeps_what_was_measured_before() -> None:
    """In the order of the table; a figure that is not measured any more goes."""
    first, second, third = (row.text for row in ROWS[:3])
    before = [line(third, 1.0), line(first, 1.0), line("of another age", 1.0)]
    found = merged(before, [line(second, 2.0), line(third, 2.0)])
    assert [(item["figure"], item["ours"]) for item in found] == [
        (first, 1.0),
        (second, 2.0),
        (third, 2.0),
    ]


def test_figures_of_a_file_without_dates_have_that_of_its_run(tmp_path: Path) -> None:
    """And none come from a file that is not there or broken."""
    path = tmp_path / "latest.json"
    assert read_figures(path) == []
    path.write_text("{")
    assert read_figures(path) == []
    machine = {"at": "2026-01-02", "runs": 2, "cores": 2}
    path.write_text(json.dumps({"machine": machine, "figures": [line("a", 1.0)]}))
    assert read_figures(path) == [{**line("a", 1.0), "at": "2026-01-02", "runs": 2}]


@pytest.mark.parametrize(
    ("row", "value", "ratio", "is_missed"),
    [
        (Row("w", "more", "k", "k", "/s", 0.8, None, True), 1.0, 0.79, True),
        (Row("w", "more", "k", "k", "/s", 0.8, None, True), 1.0, 0.8, False),
        (Row("w", "less", "k", "k", "s", 1.3), 1.0, 1.31, True),
        (Row("w", "at most", "k", None, "s", None, 2.0), 2.1, None, True),
        (Row("w", "at most", "k", None, "s", None, 2.0), 1.9, None, False),
        (Row("w", "no target", "k", None, "s"), 1e9, None, False),
    ],
)
def test_which_figures_miss_their_target(
    row: Row, value: float, ratio: float | None, is_missed: bool
) -> None:
    """By the ratio or by the value; what `--check` goes by."""
    found = missed([line(row.text, value, judge(row, value, ratio))])
    assert found == ([row.text] if is_missed else [])
