"""Does a quantity grow without end? Judged by the median slope of its samples after a warm-up (invariant 7).

The slope is the Theil-Sen estimator (Sen, 1968): the median of the slopes between
all pairs of samples, which a few outliers, such as a garbage collection or a burst,
don't move. Steady growth is what a leak looks like; a quantity that rises and then
stays is none, which is why the first part of the samples doesn't count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from foundation_nats.chaos.checkers.judgement import Judgement

_WARM_UP = 0.4
"""Of the time, which does not count: caches, pools and allocators fill up."""
_SPAN_MIN, _SPAN_MIN_S = 0.5, 120.0
"""Half of the longest series, or two minutes: a process that was started late still fills up."""
_SAMPLES_MIN = 8
_SAMPLES_MAX = 200
"""Of one series; more are thinned out, because pairs are many."""


@dataclass(frozen=True, slots=True)
class Series:
    """One quantity over time."""

    name: str
    unit: str
    samples: Sequence[tuple[float, float]]
    """(seconds, value), in order of time."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What may be gained in the time looked at, and is no drift."""

    share: float
    """Of the value at the beginning."""
    absolute: float
    """In the unit of the series, however small the beginning."""


def gained(samples: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(value at the end of the warm-up, gain from there to the end by the median slope).

    None: too few samples to tell.
    """
    if not samples:
        return None
    begin, end = samples[0][0], samples[-1][0]
    settled = [item for item in samples if item[0] >= begin + (end - begin) * _WARM_UP]
    settled = settled[:: max(1, len(settled) // _SAMPLES_MAX)]
    if len(settled) < _SAMPLES_MIN:
        return None
    slopes = [
        (later[1] - sooner[1]) / (later[0] - sooner[0])
        for index, sooner in enumerate(settled)
        for later in settled[index + 1 :]
        if later[0] > sooner[0]
    ]
    base = statistics.median(value for _, value in settled[: len(settled) // 4 + 1])
    return base, statistics.median(slopes) * (settled[-1][0] - settled[0][0])


def _of_those_who_stayed(series: Iterable[Series]) -> list[Series]:
    """The series that are long enough, compared with the longest."""
    found = [item for item in series if item.samples]
    longest = max((_span(item) for item in found), default=0.0)
    return [item for item in found if _span(item) >= min(longest * _SPAN_MIN, _SPAN_MIN_S)]


def _span(series: Series) -> float:
    return series.samples[-1][0] - series.samples[0][0]


@dataclass(frozen=True, slots=True)
class Gain:
    """Of all series of a unit the one that came nearest to what is allowed, or went beyond it."""

    unit: str
    series: int
    """How many were long enough to look at."""
    name: str
    base: float
    gain: float
    allowed: float
    grows: bool


def worst_gains(series: Iterable[Series], allowed: Mapping[str, Allowance]) -> list[Gain]:
    """For people: by unit, how near to a drift it was."""
    counts: dict[str, int] = {}
    worst: dict[str, Gain] = {}
    for item in _of_those_who_stayed(series):
        found = gained(item.samples)
        if found is None:
            continue
        base, gain = found
        limit = max(allowed[item.unit].absolute, base * allowed[item.unit].share)
        counts[item.unit] = counts.get(item.unit, 0) + 1
        before = worst.get(item.unit)
        if before is None or gain / limit > before.gain / before.allowed:
            worst[item.unit] = Gain(item.unit, 0, item.name, base, gain, limit, gain > limit)
    return [replace(item, series=counts[item.unit]) for item in worst.values()]


def check_drift(series: Iterable[Series], allowed: Mapping[str, Allowance]) -> Judgement:
    """No series gains more than its unit's allowance; those too short are not looked at."""
    judgement = Judgement("drift", 7)
    for item in _of_those_who_stayed(series):
        found = gained(item.samples)
        if found is None:
            continue
        judgement.looked_at += 1
        base, gain = found
        limit = allowed[item.unit]
        if gain > max(limit.absolute, base * limit.share):
            minutes = (item.samples[-1][0] - item.samples[0][0]) * (1 - _WARM_UP) / 60
            judgement.violated(
                f"{item.name} was {base:,.1f} {item.unit} and gained {gain:,.1f} "
                f"in {minutes:.1f} minutes",
                "grows",
            )
    return judgement
