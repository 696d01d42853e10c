"""A campaign's figures as text: a few lines for a terminal, and the tables of docs/reliability.md.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foundation_nats.chaos.faults import KINDS

BEGIN = "<!-- chaos -->"
END = "<!-- /chaos -->"


def summary(found: Mapping[str, Any]) -> str:
    """What a person wants to know first."""
    verdicts = ", ".join(f"{count} {word}" for word, count in sorted(found["verdicts"].items()))
    lines = [
        f"{found['rounds']} rounds in {found['seconds']:,.0f} s: {verdicts}",
        f"{found['receipts']:,} receipted signals under {found['faults']} faults: "
        f"{found['lost']} lost, {found['repeated']} repeated, {found['violations']} violations, "
        f"{found['false_downs']} false verdicts",
    ]
    for kind, values in found["failover_s"].items():
        lines.append(
            f"{kind:<14} agents run again after p50 {values['p50']:.2f} s, "
            f"max {values['max']:.2f} s ({values['count']} faults)"
        )
    for run in found["runs"]:
        lines.append(
            f"seed {run['seed']}: {run['verdict']} {run['failure'] or run['void']}".rstrip()
        )
        lines += [f"  {text}" for text in [*run["violations"], *run["undecided"]]]
    return "\n".join(lines)


def markdown(found: Mapping[str, Any], command: str) -> str:
    """The section of docs/reliability.md."""
    settled = found["settled_s"]
    lines = [
        f"{found['at']}, version {found['version']} ({found['commit']}), {found['cores']} shared "
        f"cores, {found['rounds']} rounds of different seeds in {found['seconds'] / 60:.0f} minutes. "
        f"Repeat it with `{command}`.",
        "",
        "| figure | value |",
        "|---|--:|",
        f"| receipted signals | {found['receipts']:,} |",
        f"| operations by clients: ok / did not happen / unknown | "
        f"{found['operations'].get('ok', 0):,} / {found['operations'].get('fail', 0):,} / "
        f"{found['operations'].get('unknown', 0):,} |",
        f"| faults that took effect | {found['faults']} |",
        f"| signals lost | {found['lost']} |",
        f"| effects repeated | {found['repeated']} |",
        f"| violations of any invariant | {found['violations']} |",
        f"| healthy nodes declared down | {found['false_downs']} |",
        f"| rounds passed / all | {found['verdicts'].get('passed', 0)} / {found['rounds']} |",
        f"| settled after the last fault, p50 / max | {settled.get('p50', 0):.1f} s / "
        f"{settled.get('max', 0):.1f} s |",
        "",
        "From the fault until the last of the victim's agents runs elsewhere (verdicts of the lab "
        "are quicker than the defaults: `down_after_s` is 3 s):",
        "",
        "| fault | p50 | p99 | max | faults |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {KINDS[kind].what} | {v['p50']:.2f} s | {v['p99']:.2f} s | {v['max']:.2f} s "
            f"| {v['count']} |"
            for kind, v in found["failover_s"].items()
        ),
        "",
        "| what happened | times |",
        "|---|--:|",
        *(
            f"| {KINDS[kind].what} | {count} |"
            for kind, count in sorted(found["faults_by_kind"].items(), key=lambda item: -item[1])
        ),
        "",
        "| checker | looked at |",
        "|---|--:|",
        *(f"| {name} | {count:,} |" for name, count in sorted(found["checked"].items())),
    ]
    return "\n".join(lines)


def replaced(text: str, section: str) -> str:
    """*text* with *section* between the marks.

    Raises:
        ValueError: the marks are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"the text has no {BEGIN} … {END}")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.partition(END)[2]}"
