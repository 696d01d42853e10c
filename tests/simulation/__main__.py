"""``python -m tests.simulation SEED [COUNT]``: tell one seed's story with every step, or run many and sum up."""

from __future__ import annotations

import sys
import time
from collections import Counter

from tests.simulation.story import generate
from tests.simulation.world import ViolationError, run


def main(arguments: list[str]) -> int:
    """Run; 1 if an invariant was broken."""
    pairs = "--pairs" in arguments
    numbers = [int(item) for item in arguments if not item.startswith("--")]
    if not numbers:
        print(__doc__)
        return 2
    first, count = numbers[0], numbers[1] if len(numbers) > 1 else 1
    if count == 1:
        story = generate(first, pairs=pairs)
        print(story.text())
        try:
            print(run(story, trace=print))
        except ViolationError as error:
            print(f"BROKEN {error}")
            return 1
        return 0
    began = time.perf_counter()
    broken: Counter[str] = Counter()
    over = Counter[str]()
    slowest = 0.0
    events = 0
    for seed in range(first, first + count):
        try:
            report = run(generate(seed, pairs=pairs))
            slowest = max(slowest, report.converged_after_s)
            events += report.events
            for line in report.over_capacity:
                over[line.rpartition("(")[2]] += 1
        except ViolationError as error:
            broken[error.invariant.value] += 1
            print(f"seed {seed}: {error}")
    took = time.perf_counter() - began
    print(
        f"{count} seeds in {took:.1f} s ({count / took * 60:.0f} a minute), {events} events; "
        f"slowest to heal: {slowest:.0f} s; over capacity: {dict(over)}; broken: {dict(broken)}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
