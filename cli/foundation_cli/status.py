"""Commands that show what there is: status, agents, agent, deployments, leader; the nodes' columns.

Read only. JSON shapes are part of the contract: lists for `nodes`, `agents` and
`deployments`, one object for the others; new fields may come, none goes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Output, Shared, connected, run, with_shared
from foundation_cli.render import Column

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

AGENT_STATUSES = (
    "pending",
    "starting",
    "running",
    "moving",
    "unavailable",
    "failed",
    "stopped",
    "hibernated",
)
NODE_STATUSES = ("up", "suspect", "down", "draining")

AGENT_COLUMNS = (
    Column("id", lambda a: a["id"]),
    Column("status", lambda a: a["status"]),
    Column("node", lambda a: a["node"]),
    Column("epoch", lambda a: a["epoch"], right=True),
    Column("deployment", lambda a: a["deployment"]),
    Column("capabilities", lambda a: ",".join(a["capabilities"])),
    Column("reason", lambda a: a.get("reason"), free=True),
)
NODE_COLUMNS = (
    Column("name", lambda n: n["name"]),
    Column("status", lambda n: n["status"]),
    Column("leader", lambda n: "yes" if n.get("leader") else ""),
    Column("agents", lambda n: n["agents"], right=True),
    Column("cpu", lambda n: _percent(n["load"].get("cpu")), right=True),
    Column("memory", lambda n: _percent(n["load"].get("memory")), right=True),
    Column("backlog", lambda n: n["load"].get("backlog", 0), right=True),
    Column("workers", lambda n: _count(n.get("workers")), right=True),
    Column("incarnation", lambda n: n["incarnation"], right=True),
    Column("capacity", lambda n: render.labels_text(n["capacity"])),
    Column("labels", lambda n: render.labels_text(n["labels"])),
    Column("offers", lambda n: ",".join(n.get("capabilities") or [])),
    Column("host", lambda n: n.get("host")),
    Column("distrust", lambda n: _distrust(n)),
    Column("cordon", lambda n: _cordon(n), free=True),
)
DEPLOYMENT_COLUMNS = (
    Column("name", lambda d: d["name"]),
    Column("run", lambda d: d["run"]),
    Column("desired", lambda d: d["desired"], right=True),
    Column("running", lambda d: d["running"], right=True),
    Column("pending", lambda d: d["pending"], right=True),
    Column("failed", lambda d: d["failed"], right=True),
    Column("settled", lambda d: d["settled"]),
    Column("critical", lambda d: d["critical"]),
    Column("revision", lambda d: d["revision"], right=True),
    Column("state", lambda d: deployment_state(d), free=True),
    Column("reason", lambda d: first_reason(d), free=True),
)


def deployment_state(deployment: dict[str, Any]) -> str:
    """What becomes of it: its rollout, and how it scales itself; empty where there is nothing to say."""
    parts = []
    if deployment.get("rolling"):
        word = "paused" if deployment.get("paused") else "rolling"
        parts.append(f"{word} {deployment['updated']}/{deployment['desired']}")
    elif deployment.get("paused"):
        parts.append("paused")
    if stuck := deployment.get("stuck"):
        parts.append(f"stuck: {stuck}")
    if rolled_back := deployment.get("rolled_back"):
        parts.append(f"rolled back: {rolled_back}")
    if auto := deployment.get("autoscale"):
        aims = [f"{key} {auto[key]:g}" for key in ("backlog", "cpu") if auto.get(key) is not None]
        if auto.get("metric"):
            aims.append(f"{auto['metric']} {auto['target']:g}")
        parts.append(f"scales {auto['min']}-{auto['max']} by {', '.join(aims)}")
    return "; ".join(parts)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.0f}%"


def _count(items: Any) -> int | str:
    return len(items) if isinstance(items, list) else ""


def first_reason(deployment: dict[str, Any]) -> str:
    """The reason of one agent that does not run, and how many more there are."""
    reasons: dict[str, str] = deployment.get("reasons") or {}
    for agent, reason in reasons.items():
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return f"{agent}: {reason}{more}"
    return ""


async def overview(cluster: Cluster) -> dict[str, Any]:
    """The object `status -o json` prints."""
    import asyncio

    nodes, agents, deployments, leader, brake = await asyncio.gather(
        cluster.nodes.list(),
        cluster.agents.list(),
        cluster.deployments.list(),
        cluster.leader(),
        cluster.nodes.brake(),
    )
    by_node = Counter(str(node.status) for node in nodes)
    by_agent = Counter(str(agent.status) for agent in agents)
    return {
        "schema": f"{render.SCHEMA}/status",
        "cluster": cluster.name,
        "server": cluster.url,
        "leader": leader.holder if leader is not None else None,
        "nodes": {word: by_node.get(word, 0) for word in NODE_STATUSES},
        "agents": {word: by_agent.get(word, 0) for word in AGENT_STATUSES},
        "brake": None if brake is None else render.plain(brake),
        "deployments": render.plain(deployments),
    }


def brake_text(brake: dict[str, Any] | None) -> str:
    """What holds failover back or slows it down, in a sentence; empty where nothing does."""
    if brake is None:
        return ""
    if brake.get("held_for_s") is not None:
        names = ", ".join(brake["held"]) or "nodes"
        return f"failover of {names} is held back for {brake['held_for_s']:.0f} s more"
    if brake.get("paced_for_s") is not None:
        return f"lost agents are started slowly for {brake['paced_for_s']:.0f} s more"
    return ""


def _distrust(node: dict[str, Any]) -> str:
    return f"flaps ({node['short_lives']} short lives)" if node.get("distrusted") else ""


def _cordon(node: dict[str, Any]) -> str:
    """Why the node gets no agents, where that is so."""
    return (node.get("cordon_reason") or "yes") if node.get("cordoned") else ""


def _counts(numbers: dict[str, int], always: str) -> str:
    parts = [
        f"{count} {render.status_word(word)}"
        for word, count in numbers.items()
        if count or word == always
    ]
    return ", ".join(parts)


@with_shared
def status(shared: Shared) -> None:
    """Show the cluster at a glance.

    Example: foundation status -o json
    """

    async def main() -> tuple[dict[str, Any], str | None]:
        # Imported here: `moves` needs this module's own.
        from foundation_cli.moves import offer

        async with connected(shared) as cluster:
            found = await overview(cluster)
            if shared.format is not Output.TABLE:
                return found, None
            return found, await offer(cluster, await cluster.nodes.list())

    found, hint = run(main)
    if render.document(shared, found):
        return
    render.write(f"cluster  {render.clean(found['cluster'])} at {render.clean(found['server'])}")
    render.write(f"leader   {render.clean(found['leader'] or 'none')}")
    render.write(f"nodes    {_counts(found['nodes'], 'up')}")
    render.write(f"agents   {_counts(found['agents'], 'running')}")
    if brake := brake_text(found["brake"]):
        render.write(f"brake    {render.clean(brake)}; `foundation failover` ends that")
    if found["deployments"]:
        render.write("")
        render.table(DEPLOYMENT_COLUMNS, found["deployments"])
    if hint is not None:
        render.talk(hint)


@with_shared
def agents(
    shared: Shared,
    node: Annotated[
        str | None,
        typer.Option(metavar="NODE", help="Only on this node.", autocompletion=complete.nodes),
    ] = None,
    capability: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only with this capability.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(metavar="WORD", help=f"Only {', '.join(AGENT_STATUSES)}.")
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only of this deployment.", autocompletion=complete.deployments
        ),
    ] = None,
) -> None:
    """List the agents.

    Example: foundation agents --status pending
    """
    if status is not None and status not in AGENT_STATUSES:
        raise typer.BadParameter(
            f"{status!r} is none of {', '.join(AGENT_STATUSES)}.", param_hint="--status"
        )

    async def main() -> Any:
        async with connected(shared) as cluster:
            return render.plain(
                await cluster.agents.list(
                    node=node, capability=capability, status=status, deployment=deployment
                )
            )

    found = run(main)
    if not render.document(shared, found):
        render.table(AGENT_COLUMNS, found, empty="No such agents.")


@with_shared
def agent(
    shared: Shared,
    id: Annotated[
        str, typer.Argument(metavar="ID", help="The agent's id.", autocompletion=complete.agents)
    ],
    release: Annotated[
        bool,
        typer.Option("--release", help="Try a failed agent again at once, out of quarantine."),
    ] = False,
) -> None:
    """Show one agent: where it runs, and its stored state.

    Example: foundation agent visits
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            if release:
                await cluster.agents.release(id)
            info = await get_agent(cluster, id)
            found: dict[str, Any] = {"schema": f"{render.SCHEMA}/agent", **render.plain(info)}
            found["stored"] = render.plain(await cluster.agents.state(id))
            return found

    found = run(main)
    if render.document(shared, found):
        return
    recovered = found.get("recovered_from")
    stored = found.get("stored")
    items: list[tuple[str, object]] = [
        ("id", found["id"]),
        ("status", found["status"]),
        ("reason", found.get("reason")),
        ("node", found["node"]),
        ("epoch", found["epoch"]),
        ("since", render.age(found.get("since"))),
        ("run", found.get("run")),
        ("deployment", found["deployment"]),
        ("critical", found.get("critical")),
        ("capabilities", ",".join(found["capabilities"])),
    ]
    if recovered:
        items.append(
            (
                "recovered",
                f"from {recovered['node']}, epoch {recovered['epoch']}: {recovered['reason']}",
            )
        )
    if stored:
        items += [
            ("commits", stored.get("commit")),
            ("cursor", stored.get("cursor")),
            ("outbox", _count(stored.get("outbox"))),
            ("state", render.json_text(stored.get("state"))),
        ]
    render.record(items)


async def get_agent(cluster: Cluster, id: str) -> Any:
    """The agent *id*.

    Raises:
        AgentNotFoundError: there is none; its hint names the ones that look like it.
    """
    from foundation_nats.errors import AgentNotFoundError

    try:
        return await cluster.agents.get(id)
    except AgentNotFoundError as error:
        ids = [item.id for item in await cluster.agents.list()]
        raise AgentNotFoundError(
            f"There is no agent {id!r} in cluster {cluster.name!r}.",
            hint=did_you_mean(id, ids) or "`foundation agents` lists them.",
            **error.details,
        ) from error


def did_you_mean(word: str, known: list[str]) -> str | None:
    """A question that names the known words nearest to *word*; None where none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(item) for item in near)}?" if near else None


@with_shared
def deployments(shared: Shared) -> None:
    """List the deployments: what is wished, and what runs.

    Example: foundation deployments -o yaml
    """

    async def main() -> Any:
        async with connected(shared) as cluster:
            return render.plain(await cluster.deployments.list())

    found = run(main)
    if not render.document(shared, found):
        render.table(
            DEPLOYMENT_COLUMNS,
            found,
            empty="No deployments. Make one with `foundation deploy MANIFEST`.",
        )


@with_shared
def leader(shared: Shared) -> None:
    """Show which node leads the cluster, and its term.

    Example: foundation leader
    """

    async def main() -> Any:
        async with connected(shared) as cluster:
            lease = await cluster.leader()
            if lease is None:
                from foundation_nats.errors import NotFoundError

                raise NotFoundError(
                    f"Cluster {cluster.name!r} has no leader now.",
                    hint="One is elected within seconds once a node is up; see `foundation nodes`.",
                )
            return {"schema": f"{render.SCHEMA}/leader", **render.plain(lease)}

    found = run(main)
    if not render.document(shared, found):
        render.record([(name, found[name]) for name in ("holder", "term", "incarnation", "ttl_s")])


@with_shared
def failover(
    shared: Shared,
    force: Annotated[
        bool,
        typer.Option("--force", help="Said or not: the command overrides the brake in any case."),
    ] = False,
) -> None:
    """Fail over now what the storm brake holds back: the lost nodes are really gone.

    When many nodes seem dead at once, it is more likely that the network is sick: nothing is
    moved for half a minute, and then slowly, so that the nodes that are left keep up. This says
    that it is real, and that they can take it: everything is started elsewhere at once.
    `foundation status` shows whether anything is held back.

    Example: foundation failover --force
    """

    async def main() -> list[str]:
        async with connected(shared) as cluster:
            return await cluster.nodes.force_failover()

    told = run(main)
    if not render.document(shared, {"told": told}):
        render.write(f"told {', '.join(told) or 'nobody'}")


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    for command in (status, agents, agent, deployments, leader, failover):
        app.command()(command)
