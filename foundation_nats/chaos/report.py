"""A campaign's figures as text: a few lines for a terminal, and the tables of docs/reliability.md.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    happened, missing = found["faults_by_kind"], found.get("kinds_missing", [])
    lines.append(
        f"{len(happened)} of {len(happened) + len(missing)} kinds of faults"
        + (f"; not: {', '.join(missing)}" if missing else "")
    )
    if found["exits"]:
        lines.append(f"nodes ended by themselves and were started again: {_exits(found)}")
        lines += [f"  {text}" for text in found["exits_told"]]
    for run in found["runs"]:
        lines.append(
            f"seed {run['seed']}: {run['verdict']} {run['failure'] or run['void']}".rstrip()
        )
        lines += [f"  {text}" for text in [*run["violations"], *run["undecided"]]]
    return "\n".join(lines)


def _exits(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {sort}" for sort, count in sorted(found["exits"].items()))


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
        f"| kinds of faults among them, of those possible | {len(found['faults_by_kind'])} / "
        f"{len(found['faults_by_kind']) + len(found.get('kinds_missing', []))} |",
        f"| signals lost | {found['lost']} |",
        f"| effects repeated | {found['repeated']} |",
        f"| violations of any invariant | {found['violations']} |",
        f"| healthy nodes declared down | {found['false_downs']} |",
        f"| nodes that ended by themselves, and were started again | {_exits(found) or 0} |",
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


def failover(found: Mapping[str, Any], command: str) -> str:
    """The section about single faults; *found* as `chaos.failover.summary` says, with its circumstances."""
    nodes, brokers = found["nodes"], found["brokers"]
    lines = [
        f"{found['at']}, version {found['version']} ({found['commit']}), {found['cores']} cores that "
        "other work was using, too: one fault at a time on a cluster at rest, three nodes, twelve "
        f"agents, default timers. Repeat it with `{command}`. Seconds from the fault, median and "
        "worst of *n*; so few say what is usual, and little about what is rare.",
        "",
        "| fault | n | declared down | the last of its agents runs | and answers "
        "| agents not back |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {item['what']} | {item['faults']} | {_both(item['verdict_s'])} "
            f"| {_both(item['running_s'])} | {_both(item['answers_s'])} "
            f"| {item['agents_not_back']} of {item['agents']} |"
            for item in nodes.values()
        ),
        "",
        f"*Not back*: no answer within {found['patience_s']:g} s. A worker that is killed is started "
        "again by its node, which is not declared down. *n* is smaller than what was asked for where "
        "several attempts found no victim with agents.",
        "",
        "| fault | brokers | n | no receipt for | no answer for | agents moved |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {item['what']} | {item['brokers']} | {item['faults']} | {_both(item['write_s'])} "
            f"| {_both(item['ask_s'])} | {item['moved']} |"
            for item in brokers.values()
        ),
        "",
        "A broker that is killed or stopped stays away for 3 s.",
    ]
    return "\n".join(lines)


def _both(spread: Mapping[str, float]) -> str:
    if not spread["n"]:
        return "–"
    return f"{spread['p50']:.2f} / {spread['max']:.2f} s"


def soak(found: Mapping[str, Any], gains: Sequence[Mapping[str, Any]], command: str) -> str:
    """The section about a soak of one round; *gains* as `Round.to_json` has them."""
    verdict = ", ".join(found["verdicts"])
    lines = [
        f"{found['at']}, version {found['version']} ({found['commit']}), {found['cores']} cores that "
        f"other work was using, too; {found['seconds'] / 60:.0f} minutes, {found['receipts']:,} "
        f"receipted signals under {found['faults']} faults: {verdict}. Repeat it with `{command}`.",
        "",
        "| of | series | nearest to its allowance | at the beginning | gained | allowed |",
        "|---|--:|---|--:|--:|--:|",
        *(
            f"| {item['unit']} | {item['series']} | {item['name']} | {item['base']:,.1f} "
            f"| {item['gain']:+,.2f} | {item['allowed']:,.1f} |"
            for item in gains
        ),
    ]
    return "\n".join(lines)


def replaced(text: str, section: str, *, mark: str = "chaos") -> str:
    """*text* with *section* between the marks of that name.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the text has no {begin} … {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{section}\n\n{end}{rest.partition(end)[2]}"
