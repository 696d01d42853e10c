"""``python -m tests.simulation SEED [COUNT]``: tell one seed's story with every step, or run many and sum up.

``--pairs`` adds nodes that are cut from each other alone; ``--without=NAME,…``
takes safeguards away; ``--minimise`` cuts a failing seed down, and with ``--save=NAME`` stores it in
``stories/``. A path of a stored story does instead of SEED.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.simulation.minimise import load, minimise, save, transcript
from tests.simulation.story import Story, generate
from tests.simulation.world import Bug, ViolationError, broken, run


def _tell(story: Story, missing: frozenset[Bug]) -> int:
    print(story.text())
    try:
        print(run(story, missing=missing, trace=print))
    except ViolationError as error:
        print(f"BROKEN {error}")
        return 1
    return 0


def _minimise(story: Story, missing: frozenset[Bug], name: str | None) -> int:
    error = broken(story, missing=missing)
    if error is None:
        print("This story breaks nothing.")
        return 2
    found = minimise(story, error.invariant, missing=missing)
    print(
        f"{found.story.text()}\n\n{transcript(found.story, missing=missing)}\n\n{found.runs} runs"
    )
    if name is not None:
        without = tuple(sorted(bug.name for bug in missing))
        why = "".join(f"Without the safeguard {bug.name}: {bug.value}.\n" for bug in missing)
        print(save(name, replace(found.story, without=without), f"{why}{found.error}"))
    return 1


def main(arguments: list[str]) -> int:
    """Run; 1 if an invariant was broken."""
    pairs = "--pairs" in arguments
    options = dict(item.split("=", 1) for item in arguments if "=" in item)
    missing: frozenset[Bug] = frozenset()
    if "--without" in options:
        missing |= {Bug[name.upper()] for name in options["--without"].split(",")}
    plain = [item for item in arguments if not item.startswith("--")]
    if not plain:
        print(__doc__)
        return 2
    if not plain[0].isdigit():
        return _tell(load(Path(plain[0])), missing)
    first, count = int(plain[0]), int(plain[1]) if len(plain) > 1 else 1
    if "--minimise" in arguments:
        return _minimise(generate(first, pairs=pairs), missing, options.get("--save"))
    if count == 1:
        return _tell(generate(first, pairs=pairs), missing)
    began = time.perf_counter()
    broken: Counter[str] = Counter()
    over = 0
    slowest = 0.0
    events = 0
    for seed in range(first, first + count):
        try:
            report = run(generate(seed, pairs=pairs), missing=missing)
            slowest = max(slowest, report.converged_after_s)
            events += report.events
            over += len(report.over_capacity)
        except ViolationError as error:
            broken[error.invariant.value] += 1
            print(f"seed {seed}: {error}")
    took = time.perf_counter() - began
    print(
        f"{count} seeds in {took:.1f} s ({count / took * 60:.0f} a minute), {events} events; "
        f"slowest to heal: {slowest:.0f} s; over capacity under two leaders: {over}; "
        f"broken: {dict(broken)}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
