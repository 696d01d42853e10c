"""`make chaos`: twenty minutes of rounds over many seeds, and the section of docs/reliability.md.

Rounds take turns: everything at once on one broker, a flood of signals (which is where the
millions come from), everything on three brokers, a flood again. ``--failover N`` measures single
faults instead, N of each kind, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import orjson

from foundation_nats import __version__
from foundation_nats.chaos import failover, report
from foundation_nats.chaos.campaign import Campaign, Options, commit, run_campaign
from foundation_nats.chaos.report import markdown, replaced, summary

RESULTS = Path(__file__).parent / "results" / "chaos.json"
SOAK = Options(
    rate=0.5,
    workloads=("counters", "churn"),
    kinds=("link.cut", "link.delay", "link.mangle", "client.cut"),
    soak=True,
)
"""What `make soak` does, too."""
SOAKED = RESULTS.with_name("soak.json")
FAILOVER = RESULTS.with_name("failover.json")
DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"

_FLOOD = Options(seconds=20, workloads=("counters",), rate=20)
KINDS = (Options(seconds=20), _FLOOD, Options(seconds=20, brokers=3, rate=0.5), _FLOOD)
"""The rounds that take turns."""


async def campaign(seed: int, minutes: float, keep: Path) -> Campaign:
    """Rounds for so long; the one that is under way is ended."""
    found = Campaign()
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    turn = 0
    while time.monotonic() < deadline:
        options = replace(KINDS[turn % len(KINDS)], keep=keep)
        one = await run_campaign(found.next_seed(chance, options), options, rounds=1, say=_say)
        found.rounds += one.rounds
        turn += 1
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _failover(per_kind: int, seed: int, *, write: bool) -> int:
    """0 if every agent came back."""
    found = {
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
        "version": __version__,
        "commit": commit(),
        "cores": os.cpu_count(),
        "seed": seed,
        **failover.summary(asyncio.run(failover.measure(per_kind, seed=seed, say=_say))),
    }
    text = report.failover(found, f"make chaos CHAOS='--failover {per_kind}'")
    print(text)
    if write:
        FAILOVER.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), text, mark="failover"))
    return 1 if any(item["agents_not_back"] for item in found["nodes"].values()) else 0


def _soak(seconds: float, seed: int, *, write: bool) -> int:
    """0 if nothing grew and every promise was kept."""
    commit_found = commit()
    ended = asyncio.run(run_campaign(seed, replace(SOAK, seconds=seconds), rounds=1, say=_say))
    found = {**ended.to_json(), "commit": commit_found}
    gains = ended.rounds[0].to_json()["gains"]
    text = report.soak(found, gains, f"make chaos CHAOS='--soak {seconds:g}'")
    print(f"{summary(found)}\n\n{text}")
    if write:
        SOAKED.write_bytes(
            orjson.dumps({**found, "gains": gains}, option=orjson.OPT_INDENT_2) + b"\n"
        )
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), text, mark="soak"))
    return 0 if ended.is_passed else 1


def main() -> int:
    """0 if every round passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None, help="draws the seeds of the rounds")
    parser.add_argument("--keep", type=Path, default=None, help="evidence of rounds that fail")
    parser.add_argument(
        "--failover",
        type=int,
        nargs="?",
        const=5,
        metavar="N",
        help="measure single faults instead, N of each kind (5): some 2 minutes for each N",
    )
    parser.add_argument(
        "--soak", type=float, metavar="SECONDS", help="one long round that looks for drift instead"
    )
    parser.add_argument("--write", action="store_true", help="update the results and the docs")
    chosen = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if chosen.seed is None else chosen.seed
    if chosen.failover is not None:
        return _failover(chosen.failover, seed, write=chosen.write)
    if chosen.soak is not None:
        return _soak(chosen.soak, seed, write=chosen.write)
    keep = chosen.keep or Path(tempfile.mkdtemp(prefix="foundation-chaos-"))
    campaign_found = asyncio.run(campaign(seed, chosen.minutes, keep))
    found = campaign_found.to_json()
    print(summary(found))
    if not any(keep.iterdir()):
        keep.rmdir()
    else:
        print(f"evidence: {keep}")
    if chosen.write:
        RESULTS.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
        section = markdown(found, f"make chaos CHAOS='--minutes {chosen.minutes:g} --seed {seed}'")
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), section))
    return 0 if campaign_found.is_passed else 1


if __name__ == "__main__":
    sys.exit(main())
