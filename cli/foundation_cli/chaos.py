"""`foundation chaos`: break a cluster on purpose, and prove that it kept its promises."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, load_config, resolve, run, with_shared

if TYPE_CHECKING:
    from foundation_nats.chaos.campaign import Options


@with_shared
def chaos(
    shared: Shared,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="How long each round makes trouble.")
    ] = 20.0,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How many rounds.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Rounds for so long, instead of --rounds.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Repeat the plan of this seed.")
    ] = None,
    edition: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --seed: of the kinds of faults, as they were when the seed was new.",
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=2, help="Nodes of the lab.")] = 3,
    brokers: Annotated[
        int, typer.Option(metavar="N", min=1, max=5, help="NATS servers; 3 or more replicate.")
    ] = 1,
    fault: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Only these faults; repeatable.")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these workloads; repeatable.")
    ] = None,
    rate: Annotated[float, typer.Option(metavar="X", min=0.01, help="How busy clients are.")] = 1.0,
    settle: Annotated[
        float,
        typer.Option(metavar="S", help="How long everything may take to arrive afterwards."),
    ] = 90.0,
    soak: Annotated[
        bool,
        typer.Option(
            "--soak",
            help="Also fail if memory, descriptors, tasks or streams keep growing; with --seconds 600 or more.",
        ),
    ] = False,
    attach: Annotated[
        bool,
        typer.Option(
            "--attach", help="Break the running cluster (see --server) instead of a lab of its own."
        ),
    ] = False,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="With --attach: starts node {node} again, so that nodes may be killed, too.",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep histories and logs of rounds that don't pass here."),
    ] = None,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="With --keep: those of rounds that pass, too.")
    ] = False,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Run the plan in FILE, with the lab and the work that it names."
        ),
    ] = None,
    minimise: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Cut the plan of a failing seed (or of --plan-file) down; writes seed-SEED.json.",
        ),
    ] = None,
    repetitions: Annotated[
        int,
        typer.Option(metavar="K", min=1, help="With --minimise: rounds per plan that must pass."),
    ] = 3,
    rejudge: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Judge a kept round (DIR/seed-N) again; nothing is started."
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what the seed would do, and do nothing.")
    ] = False,
    faults: Annotated[bool, typer.Option("--list", help="List the faults and workloads.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the whole report as JSON.")
    ] = None,
) -> None:
    """Break a cluster on purpose, and prove that it kept its promises.

    Starts servers and nodes of its own, lets clients work while processes are killed and
    frozen and links are cut, then checks every receipt, effect, order, lease and lock.
    Exit code 0: every promise was kept and enough happened to say so.

    Example: foundation chaos --seconds 20
    """
    from foundation_nats.chaos import faults as kinds
    from foundation_nats.chaos.attached import chosen_kinds
    from foundation_nats.chaos.campaign import Options, run_campaign
    from foundation_nats.chaos.plans import Plan
    from foundation_nats.chaos.report import summary
    from foundation_nats.chaos.workloads import WORKLOADS
    from foundation_nats.errors import ConfigError

    if faults:
        _list(shared)
        return
    if rejudge is not None:
        _rejudge(shared, rejudge)
        return
    unknown = set(workload or ()) - WORKLOADS.keys()
    if unknown:
        raise ConfigError(
            f"There is no workload {', '.join(sorted(unknown))}.",
            hint=f"There are: {', '.join(WORKLOADS)}.",
        )
    tied = [name for name in workload or () if WORKLOADS[name].needs_lab]
    if attach and tied:
        raise ConfigError(
            f"The workload {', '.join(tied)} would leave traces, or needs this machine's files.",
            hint="Leave it out, or leave out --attach.",
        )
    chosen = tuple(fault) if fault else None
    if attach:
        chosen = chosen_kinds(chosen, start=start)
    number = random.randrange(1 << 32) if seed is None else seed
    if attach and (plan_file is not None or minimise is not None):
        raise ConfigError(
            "A plan is run in a lab of its own, which it names.",
            hint="Leave out --attach, or --plan-file and --minimise.",
        )
    given = None if plan_file is None else Plan.load(plan_file)
    if given is not None:
        number = given.seed if seed is None else seed
        seconds, nodes, brokers = given.seconds, given.nodes, given.brokers
        rate, workload, rounds = given.rate, list(given.workloads), 1
    if minimise is not None:
        number = minimise
    try:
        planned = kinds.plan(
            number, seconds, kinds=chosen, brokers=brokers, edition=edition or kinds.EDITION
        )
    except ValueError as error:
        raise ConfigError(f"{error}.", hint="`foundation chaos --list` explains them.") from error
    if given is not None:
        planned = list(given.faults)
    if plan:
        if not render.document(shared, [item.to_json() for item in planned]):
            render.write(f"seed {number}\n{kinds.describe(planned)}")
        return
    options = Options(
        seconds=seconds,
        nodes=nodes,
        brokers=brokers,
        kinds=chosen,
        edition=edition or kinds.EDITION,
        workloads=tuple(
            workload
            or (name for name, kind in WORKLOADS.items() if not (attach and kind.needs_lab))
        ),
        rate=rate,
        settle_s=settle,
        soak=soak,
        attach=load_config(resolve(shared)) if attach else None,
        start=start,
        keep=keep,
        keep_all=keep_all,
        plan=None if given is None else given.faults,
    )
    if minimise is not None:
        _minimise(shared, number, options, repetitions)
        return

    async def main() -> dict[str, Any]:
        campaign = await run_campaign(
            number,
            options,
            rounds=None if minutes is not None else rounds,
            seconds=None if minutes is None else minutes * 60,
            say=render.talk,
        )
        return {**campaign.to_json(), "passed": campaign.is_passed, "seed": number}

    found = run(main)
    if report is not None:
        report.write_text(render.json_text(found, indent=2) + "\n")
    if not render.document(shared, found):
        render.write(summary(found))
    if not found["passed"]:
        raise typer.Exit(render.FAILED)


def _minimise(shared: Shared, seed: int, options: Options, repetitions: int) -> None:
    from foundation_nats.chaos import faults
    from foundation_nats.chaos.campaign import minimise
    from foundation_nats.chaos.plans import as_json

    found, wanted = run(lambda: minimise(seed, options, repetitions=repetitions, say=render.talk))
    path = (options.keep or Path()) / f"seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    whole = {"plan": as_json(found), "found_by": wanted, "file": str(path)}
    if not render.document(shared, whole):
        render.write(
            f"{found.why}\n{faults.describe(found.faults)}\n"
            f"run it again with: foundation chaos --plan-file {path}"
        )


def _rejudge(shared: Shared, directory: Path) -> None:
    from foundation_nats.chaos.campaign import rejudge

    found = rejudge(directory)
    if not render.document(shared, found.to_json()):
        render.write(
            "\n".join(
                [
                    f"seed {found.seed}: {found.verdict} {found.failure or found.void}".rstrip(),
                    *(f"  {text}" for text in [*found.violations, *found.undecided]),
                    *(
                        f"  {item.checker} looked at {item.looked_at:,}"
                        for item in found.judgements
                    ),
                ]
            )
        )
    if found.verdict != "passed":
        raise typer.Exit(render.FAILED)


def _list(shared: Shared) -> None:
    from foundation_nats.chaos.faults import KINDS
    from foundation_nats.chaos.workloads import WORKLOADS

    rows = [{"kind": kind.name, "what": kind.what} for kind in KINDS.values()]
    rows += [
        {"kind": f"workload {name}", "what": (kind.__doc__ or "").partition("\n")[0]}
        for name, kind in WORKLOADS.items()
    ]
    if not render.document(shared, rows):
        render.table(
            (
                render.Column("name", lambda row: row["kind"]),
                render.Column("what", lambda row: row["what"], free=True),
            ),
            rows,
        )


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(chaos)
