"""`foundation doctor`: what is wrong with the cluster, why it matters, and what mends it.

Reads, and writes one key that it deletes again. Exit code 0: all well, 1:
warnings, 2: something is broken. A check that cannot be made says so; it
never counts as passed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render, runtime
from foundation_cli.connection import Shared, connected, run, with_shared

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_SHOWN = 5
_DEAD_LOOKED_AT = 1000


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""


Check = Callable[["Cluster"], Awaitable[list[Finding]]]


async def check_server(cluster: Cluster) -> list[Finding]:
    """The server's version, and whether it has JetStream."""
    from foundation_nats.bus import assets
    from foundation_nats.errors import ServerError

    facts = cluster.bus.server_facts
    try:
        assets.check_server(facts)
    except ServerError as error:
        return [
            Finding(
                "server",
                Level.CRITICAL,
                error.message,
                "Mailboxes, state and leases are kept in JetStream.",
                error.hint or "",
            )
        ]
    version = facts.get("version", "unknown")
    return [Finding("server", Level.OK, f"nats-server {version} with JetStream at {cluster.url}")]


async def check_storage(cluster: Cluster) -> list[Finding]:
    """The account's limits, how full the store is, and when writes reach the disk."""
    from foundation_nats.bus.streams import api

    found = await api(cluster.bus, "INFO")
    limits = found.get("limits", {})
    limit, used = int(limits.get("max_storage", -1)), int(found.get("storage", 0))
    findings = []
    if limit > 0 and used > 0.8 * limit:
        level = Level.CRITICAL if used > 0.95 * limit else Level.WARNING
        findings.append(
            Finding(
                "storage",
                level,
                f"The account's storage is {used / limit:.0%} full ({used:,} of {limit:,} bytes).",
                "A full store refuses signals and state; agents come to a halt.",
                "Raise max_file of the account, or discard dead letters: foundation dead list",
            )
        )
    else:
        room = f"{limit:,} bytes" if limit > 0 else "no limit"
        findings.append(Finding("storage", Level.OK, f"{used:,} bytes used, {room}"))
    findings.append(_sync(cluster, found))
    return findings


def _sync(cluster: Cluster, found: dict[str, Any]) -> Finding:
    entry = next((item for item in runtime.running() if item.url == cluster.url), None)
    if entry is None:
        return Finding(
            "sync",
            Level.OK,
            "When writes reach the disk can't be seen from a client (sync_interval of the server).",
            "Without `sync_interval: always`, a power failure can lose what was acknowledged last.",
            "Set `jetstream { sync_interval: always }` where that matters, or run three servers.",
        )
    return Finding("sync", Level.OK, f"foundation up --durability {entry.durability}")


async def check_streams(cluster: Cluster) -> list[Finding]:
    """Streams and buckets against what is declared."""
    from foundation_nats.bus import assets

    findings = []
    for item in await assets.drift(cluster.bus, cluster.config):
        if item.setting == "exists":
            findings.append(
                Finding(
                    "streams",
                    Level.CRITICAL,
                    f"The stream {item.stream} is missing.",
                    "What it kept is lost, and what it should keep is refused.",
                    "Restore it from a backup (nats stream restore); or accept the loss: "
                    "foundation doctor --repair, then restart the nodes",
                )
            )
            continue
        findings.append(
            Finding(
                "streams",
                Level.WARNING,
                f"{item.stream}: {item.setting} is {item.actual!r}, declared is {item.declared!r}.",
                "The guarantees are argued for the declared settings.",
                f"nats stream edit {item.stream}",
            )
        )
    return findings or [Finding("streams", Level.OK, "all streams and buckets are as declared")]


async def check_round_trip(cluster: Cluster) -> list[Finding]:
    """Write, read and delete one key."""
    import time
    from secrets import token_hex

    from foundation_nats.bus.kv import Bucket
    from foundation_nats.errors import FoundationError

    bucket = Bucket(cluster.bus, cluster.subjects, "coordination")
    key = f"doctor-{token_hex(8)}"
    began = time.perf_counter()
    try:
        revision = await bucket.create(key, b"{}", ttl_s=60.0)
        read = await bucket.read(key)
        await bucket.delete(key, expected=revision)
    except FoundationError as error:
        return [
            Finding(
                "round trip",
                Level.CRITICAL,
                f"A key could not be written and read: {error.message}",
                "Agents can't store their state, and no leader can be elected.",
                error.hint or "Look at the server's log.",
            )
        ]
    took = (time.perf_counter() - began) * 1000
    if read is None or read.value != b"{}":
        return [
            Finding(
                "round trip",
                Level.CRITICAL,
                "A key that was written could not be read back.",
                "Reads must go to the stream's leader; the server answers otherwise.",
                "Look at the server's log.",
            )
        ]
    if took > 1000:
        return [
            Finding(
                "round trip",
                Level.WARNING,
                f"Writing, reading and deleting a key took {took:.0f} ms.",
                "Every signal costs such a write.",
                "Look at the server's disk and network.",
            )
        ]
    return [Finding("round trip", Level.OK, f"a key written, read and deleted in {took:.0f} ms")]


async def check_nodes(cluster: Cluster) -> list[Finding]:
    """Nodes that are not up, and the leader."""
    nodes = await cluster.nodes.list()
    leader = await cluster.leader()
    up = [node for node in nodes if node.status == "up"]
    findings = []
    if not up:
        findings.append(
            Finding(
                "nodes",
                Level.CRITICAL,
                "No node is up.",
                "Signals are stored, but nobody handles them.",
                f"foundation node start -s {cluster.url} -c {cluster.name}",
            )
        )
    else:
        findings.append(Finding("nodes", Level.OK, f"{len(up)} up"))
    for node in nodes:
        if node.status != "up":
            findings.append(
                Finding(
                    "nodes",
                    Level.WARNING,
                    f"Node {node.name} is {node.status}.",
                    "Its agents are started elsewhere, as their on_node_loss says.",
                    f"foundation node start --name {node.name}",
                )
            )
    if leader is None:
        findings.append(
            Finding(
                "leader",
                Level.CRITICAL,
                "The cluster has no leader.",
                "Nobody places agents or notices lost nodes.",
                "One is elected within seconds of a node being up: foundation nodes",
            )
        )
    else:
        findings.append(Finding("leader", Level.OK, f"{leader.holder}, term {leader.term}"))
    return findings


async def check_brake(cluster: Cluster) -> list[Finding]:
    """Whether failover is held back, and which nodes are not trusted."""
    from foundation_cli.status import brake_text

    brake = await cluster.nodes.brake()
    findings = []
    if brake is not None and (text := brake_text(render.plain(brake))):
        findings.append(
            Finding(
                "failover",
                Level.CRITICAL if brake.held_for_s is not None else Level.WARNING,
                f"{text[0].upper()}{text[1:]}.",
                "Many nodes seemed dead at once: that is more often the network than the nodes, "
                "and all their agents at once may be too much for those that are left.",
                "If they are really gone: foundation failover",
            )
        )
    for node in await cluster.nodes.list():
        if node.distrusted:
            findings.append(
                Finding(
                    "failover",
                    Level.WARNING,
                    f"Node {node.name} flaps: its last {node.short_lives} lives were short.",
                    "It gets agents only if no other node can take them, until it was stable.",
                    f"foundation why node:{node.name}",
                )
            )
    return findings or [Finding("failover", Level.OK, "nothing is held back, no node flaps")]


async def check_agents(cluster: Cluster) -> list[Finding]:
    """Agents that do not run."""
    agents = await cluster.agents.list()
    findings = []
    for status, level, why in (
        ("failed", Level.CRITICAL, "Their signals wait; they are tried again with back-off."),
        ("unavailable", Level.WARNING, "Their node is lost; their signals wait."),
        ("pending", Level.WARNING, "No node has taken them; their signals wait."),
    ):
        found = [agent for agent in agents if agent.status == status]
        if not found:
            continue
        names = "; ".join(
            f"{agent.id}: {agent.reason or 'no reason given'}" for agent in found[:_SHOWN]
        )
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        findings.append(
            Finding(
                "agents",
                level,
                f"{len(found)} {status}. {names}{more}.",
                why,
                f"foundation agents --status {status}",
            )
        )
    running = sum(agent.status == "running" for agent in agents)
    return findings or [Finding("agents", Level.OK, f"{running} of {len(agents)} running")]


async def check_dead_letters(cluster: Cluster) -> list[Finding]:
    """The oldest dead letters."""
    letters = await cluster.dead.list(limit=_DEAD_LOOKED_AT)
    if not letters:
        return [Finding("dead letters", Level.OK, "none")]
    oldest = letters[0].letter
    count = f"{len(letters)}" if len(letters) < _DEAD_LOOKED_AT else f"at least {len(letters)}"
    return [
        Finding(
            "dead letters",
            Level.WARNING,
            f"{count}; the oldest is for {oldest.agent}, {render.age(oldest.at)}: {oldest.reason}",
            "These signals were given up and have had no effect.",
            "foundation dead list",
        )
    ]


CHECKS: tuple[tuple[str, Check], ...] = (
    ("server", check_server),
    ("storage", check_storage),
    ("streams", check_streams),
    ("round trip", check_round_trip),
    ("nodes", check_nodes),
    ("failover", check_brake),
    ("agents", check_agents),
    ("dead letters", check_dead_letters),
)


async def examine(cluster: Cluster, limit_s: float) -> list[Finding]:
    """Every check's findings, in order; one that fails is a finding itself."""
    import asyncio

    from foundation_nats.errors import FoundationError

    findings: list[Finding] = []
    for name, check in CHECKS:
        try:
            findings += await asyncio.wait_for(check(cluster), max(limit_s, 1.0) * 2)
        except (FoundationError, TimeoutError) as error:
            text = str(error) or f"no answer within {max(limit_s, 1.0) * 2:g} s"
            findings.append(
                Finding(
                    name,
                    Level.CRITICAL,
                    f"This could not be checked: {text}",
                    "What can't be seen may be broken.",
                    "foundation doctor --timeout 30s",
                )
            )
    return findings


@with_shared
def doctor(
    shared: Shared,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Make lost streams anew, empty: accept what that costs."),
    ] = False,
) -> None:
    """Examine the cluster: what is wrong, and what mends it.

    Exit code 0: all well, 1: warnings, 2: something is broken.

    Example: foundation doctor -o json
    """

    async def main() -> list[Finding]:
        async with connected(shared, missing="make" if repair else "leave") as cluster:
            return await examine(cluster, shared.timeout_s)

    findings = run(main)
    worst = worst_of(findings)
    body = {
        "schema": f"{render.SCHEMA}/doctor",
        "level": worst,
        "findings": render.plain(findings),
    }
    if not render.document(shared, body):
        for finding in findings:
            _show(finding)
    if code := list(Level).index(worst):
        raise typer.Exit(code)


def worst_of(findings: list[Finding]) -> Level:
    """The worst level among them."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def _show(finding: Finding) -> None:
    head = render.status_word(finding.level) + " " * (8 - len(finding.level))
    render.write(f"{head}  {finding.check:<12}  {render.clean(finding.what)}")
    if finding.why and (finding.level is not Level.OK or finding.fix):
        render.write(f"{'':<24}why: {render.clean(finding.why)}")
    if finding.fix:
        render.write(f"{'':<24}fix: {render.clean(finding.fix)}")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(doctor)
