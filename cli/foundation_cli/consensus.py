"""Commands for replicated domains and leases: list, show, and read the log; nothing is changed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared
from foundation_cli.render import Column

_HELP = "Replicated domains: list, show, read the log."
_LEASE_HELP = "Locks, elections and semaphores: who holds what."
_KINDS = ("leader", "lock", "election", "semaphore")

_DOMAINS = (
    Column("domain", lambda d: d["name"]),
    Column("revision", lambda d: d["revision"], right=True),
    Column("entries", lambda d: d["entries"], right=True),
    Column("in log", lambda d: d["stored"], right=True),
    Column("snapshot", lambda d: d["snapshot_revision"] or None, right=True),
    Column("bytes", lambda d: d["bytes"], right=True),
    Column("last", lambda d: render.age(d["last"]["at"]) if d["last"] else None),
)

_LOG = (
    Column("revision", lambda e: e["revision"], right=True),
    Column("age", lambda e: render.age(e["at"])),
    Column("by", lambda e: e["by"]),
    Column("id", lambda e: e["id"]),
    Column("operation", lambda e: _operation(e), free=True),
)

_LEASES = (
    Column("kind", lambda lease: lease["kind"]),
    Column("name", lambda lease: lease["name"]),
    Column("holder", lambda lease: lease["holder"] or "free"),
    Column("token", lambda lease: lease["token"], right=True),
    Column("since", lambda lease: render.age(lease["since"]) if lease["holder"] else None),
    Column("renewed", lambda lease: render.age(lease["renewed"])),
    Column("ttl", lambda lease: f"{lease['ttl_s']:g}s" if lease["ttl_s"] else None, right=True),
    Column("permits", lambda lease: lease["permits"], right=True),
)

_Domain = Annotated[
    str,
    typer.Argument(metavar="DOMAIN", help="The domain's name.", autocompletion=complete.domains),
]


def _operation(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return f"skipped: {entry['error']}"
    return render.json_text(entry["operation"])


@with_shared
def list_(shared: Shared) -> None:
    """List the replicated domains.

    Example: foundation consensus list
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            return [domain.model_dump(mode="json") for domain in await cluster.consensus.list()]

    found = run(main)
    if not render.document(shared, found):
        render.table(_DOMAINS, found, empty="No replicated domains.")


@with_shared
def show(shared: Shared, domain: _Domain) -> None:
    """Show one domain with the state of its newest snapshot.

    Example: foundation consensus show seats
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            found = (await cluster.consensus.show(domain)).model_dump(mode="json")
            return {**found, "hosts": await cluster.consensus.hosts(domain)}

    found = run(main)
    if render.document(shared, found):
        return
    last = found["last"]
    snapshot = found["snapshot_revision"]
    render.record(
        [
            ("domain", found["name"]),
            ("revision", found["revision"]),
            ("entries", f"{found['entries']}, {found['stored']} of them in the log"),
            ("replicas", found["replicas"]),
            ("bytes", found["bytes"]),
            (
                "followed by",
                ", ".join(f"{node} at {at}" for node, at in sorted(found["hosts"].items())) or None,
            ),
            ("last", f"{_operation(last)}, {render.age(last['at'])}" if last else None),
            (
                "snapshot",
                f"at revision {snapshot}, {render.age(found['snapshot_at'])}" if snapshot else None,
            ),
            ("state there", render.json_text(found["state"]) if snapshot else None),
        ]
    )


@with_shared
def log(
    shared: Shared,
    domain: _Domain,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most the newest N.")] = 100,
) -> None:
    """Read the entries that are still in a domain's log, oldest first.

    Example: foundation consensus log seats --limit 20
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            entries = await cluster.consensus.log(domain, limit=limit)
            return [entry.model_dump(mode="json") for entry in entries]

    found = run(main)
    if not render.document(shared, found):
        render.table(_LOG, found, empty="The log is empty.")


@with_shared
def leases(
    shared: Shared,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Only leader, lock, election or semaphore."),
    ] = None,
) -> None:
    """List locks, elections and semaphores with holder, token and age.

    A holder that died is shown until another takes over; see when it was last renewed.

    Example: foundation lease list --kind lock
    """
    if kind is not None and kind not in _KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(_KINDS)}")

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            found = await cluster.leases.list()
            return [
                lease.model_dump(mode="json")
                for lease in found
                if kind is None or lease.kind == kind
            ]

    found = run(main)
    if not render.document(shared, found):
        render.table(_LEASES, found, empty="No locks, elections or semaphores.")


def register(app: typer.Typer) -> None:
    """Add the groups to *app*."""
    domains = typer.Typer(
        name="consensus",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    domains.command("list")(list_)
    domains.command()(show)
    domains.command()(log)
    app.add_typer(domains)
    held = typer.Typer(
        name="lease",
        help=_LEASE_HELP,
        callback=group_callback(_LEASE_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    held.command("list")(leases)
    app.add_typer(held)
