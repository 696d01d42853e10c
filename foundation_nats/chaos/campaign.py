"""Rounds of workload, nemesis and checkers: what one seed does, and what many add up to.

A round: open a lab, deploy, let the workloads run while the nemesis carries out
the seed's plan, heal, wait until everything has arrived and every agent runs
once, judge. Its report is data; `report.py` makes text of it.

A round is void if it did too little to mean anything: too few operations, no
fault that did anything, or no operation that overlapped a fault. Void is not
passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import psutil

from foundation_nats import Cluster, __version__
from foundation_nats.api.refs import AgentInfo
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.streams import api
from foundation_nats.chaos import faults
from foundation_nats.chaos.attached import Attached, chosen_kinds
from foundation_nats.chaos.checkers import ExitSeen, Gain, Judgement, count_exits, worst_gains
from foundation_nats.chaos.gauges import ALLOWED, Gauges
from foundation_nats.chaos.history import History
from foundation_nats.chaos.judging import Kept, judge, plain, why_void
from foundation_nats.chaos.lab import Lab
from foundation_nats.chaos.nemesis import Done, Nemesis
from foundation_nats.chaos.observer import Observer, Seen
from foundation_nats.chaos.plans import Plan, ddmin, signature
from foundation_nats.chaos.workloads import WORKLOADS, Workload
from foundation_nats.chaos.workloads.base import manifest_text
from foundation_nats.config import Config
from foundation_nats.errors import ConfigError, FoundationError
from foundation_schemas import Deployment, InspectReply

_UP_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_QUIET_BEFORE_S = 0.5
_SAMPLES = 300
"""Of each gauge in a soak."""
_MOVING = ("node.kill", "manager.kill", "node.freeze", "leader.kill", "leader.freeze", "link.hold")
"""Faults that take a node's agents away, for the failover figures."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What a round is made of."""

    seconds: float = 20.0
    nodes: int = 3
    workers: int = 1
    brokers: int = 1
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    kinds: tuple[str, ...] | None = None
    """The sorts of faults; None: each seed draws its own."""
    plan: tuple[faults.Fault, ...] | None = None
    """The faults, instead of those that the seed draws."""
    edition: int = faults.EDITION
    """Of the sorts that a seed draws from: an old seed does what it did then."""
    rate: float = 1.0
    settle_s: float = 90.0
    """How long everything may take to arrive after the last fault."""
    operations_min: int = 300
    """Fewer operations that ended well, and the round is void."""
    pause_s: tuple[float, float] = (0.3, 2.0)
    """Between two faults."""
    soak: bool = False
    """Also look for drift: of memory, descriptors, threads, tasks and sizes of streams."""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attach: Config | None = None
    """A running cluster to break instead of one of our own."""
    start: str | None = None
    """The command that starts node ``{node}`` of an attached cluster."""
    keep: Path | None = None
    """Where histories and logs of rounds that did not pass are kept."""
    keep_all: bool = False
    """Keep those of rounds that passed, too."""


@dataclass(slots=True)
class Round:
    """The report of one round."""

    seed: int
    options: Options
    plan: list[faults.Fault]
    faults: list[Done] = field(default_factory=list)
    exits: list[ExitSeen] = field(default_factory=list)
    """Nodes that ended though no fault ended them; each was started again."""
    judgements: list[Judgement] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    """Outcome to how many."""
    errors: Counter[str] = field(default_factory=Counter)
    receipts: int = 0
    void: str = ""
    failure: str = ""
    """What went wrong outside the checkers: it never settled, or an exception."""
    settled_s: float = 0.0
    """From the end of the trouble until everything had arrived and every agent ran once."""
    failovers: list[tuple[str, float, int]] = field(default_factory=list)
    """(fault, seconds until the last of its agents ran again, how many agents)."""
    false_downs: int = 0
    seconds: float = 0.0
    memory_mb: dict[str, float] = field(default_factory=dict)
    gains: list[Gain] = field(default_factory=list)
    """Of a soak: by unit, how near to a drift it was."""

    @property
    def violations(self) -> list[str]:
        """Everything that is wrong, by checker."""
        return [f"{item.checker}: {text}" for item in self.judgements for text in item.violations]

    @property
    def undecided(self) -> list[str]:
        """What no checker could decide."""
        return [f"{item.checker}: {text}" for item in self.judgements for text in item.undecided]

    @property
    def verdict(self) -> str:
        """``passed``, ``violated``, ``failed``, ``undecided`` or ``void``."""
        if any(item.violations_count for item in self.judgements):
            return "violated"
        if self.failure:
            return "failed"
        if self.void:
            return "void"
        return "undecided" if self.undecided else "passed"

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "seed": self.seed,
            "verdict": self.verdict,
            "violations": self.violations,
            "undecided": self.undecided,
            "void": self.void,
            "failure": self.failure,
            "operations": dict(self.operations),
            "receipts": self.receipts,
            "errors": dict(self.errors),
            "faults": [item.to_json() for item in self.faults],
            "exits": [asdict(item) for item in self.exits],
            "checked": {
                f"{item.checker}": item.looked_at for item in self.judgements if item.looked_at
            },
            "settled_s": round(self.settled_s, 3),
            "failovers": [
                {"fault": kind, "seconds": round(seconds, 3), "agents": agents}
                for kind, seconds, agents in self.failovers
            ],
            "seconds": round(self.seconds, 1),
            "memory_mb": self.memory_mb,
            "gains": [asdict(item) for item in self.gains],
            "nodes": self.options.nodes,
            "brokers": self.options.brokers,
            "workloads": list(self.options.workloads),
        }


async def run_round(seed: int, options: Options, say: Say = lambda _: None) -> Round:
    """One seed; never raises for what goes wrong inside, but reports it."""
    plan = plan_of(seed, options)
    report = Round(seed, options, plan)
    begun = monotonic()
    lab: Lab | Attached = (
        _own_lab(seed, options, plan)
        if options.attach is None
        else Attached(options.attach, start=options.start)
    )
    history = History()
    try:
        async with lab:
            await _under_trouble(lab, report, history, say)
            if isinstance(lab, Attached):
                await lab.remove(
                    [entry["name"] for entry in _entries(report)]
                    + [name for kind in WORKLOADS.values() for name in kind.deployments()]
                )
    except Exception as error:  # whatever it is, the report must tell it
        report.failure = "; ".join(f"{type(one).__name__}: {one}" for one in _leaves(error))
    report.exits = list(lab.exits)
    report.seconds = monotonic() - begun
    return report


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors that a group is made of."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


def plan_of(seed: int, options: Options) -> list[faults.Fault]:
    """What the seed does in a round of these options.

    Raises:
        ValueError: an unknown kind of fault, or none that is possible.
        ConfigError: one that can't be done to a cluster that runs already.
    """
    if options.plan is not None:
        return list(options.plan)
    kinds = options.kinds
    if options.attach is not None:
        kinds = chosen_kinds(kinds, start=options.start)
    return faults.plan(
        seed,
        options.seconds,
        kinds=kinds,
        brokers=options.brokers,
        pause_s=options.pause_s,
        edition=options.edition,
    )


def _own_lab(seed: int, options: Options, plan: Sequence[faults.Fault]) -> Lab:
    return Lab(
        seed=seed,
        nodes=options.nodes,
        workers=options.workers,
        brokers=options.brokers,
        environment=options.environment,
        settings=options.settings,
        disks=any(fault.kind.startswith("disk.") for fault in plan),
    )


def _workloads(report: Round) -> list[Workload]:
    options = report.options
    return [WORKLOADS[name](report.seed, rate=options.rate) for name in options.workloads]


def _saboteurs(report: Round) -> list[str]:
    return [f"saboteur-{number}" for number in range(report.options.nodes)]


def _entries(report: Round) -> list[dict[str, Any]]:
    """What is deployed for the round."""
    entries = [entry for workload in _workloads(report) for entry in workload.manifest()]
    saboteurs = {
        "name": "saboteur",
        "run": "foundation_nats.chaos.agents:Saboteur",
        "replicas": len(_saboteurs(report)),
    }
    return [*entries, saboteurs]


async def _under_trouble(lab: Lab | Attached, report: Round, history: History, say: Say) -> None:
    options = report.options
    workloads = _workloads(report)
    entries = _entries(report)
    eye = lab.eye
    await eye.deployments.apply(manifest_text(entries))
    await eye.deployments.wait_settled([entry["name"] for entry in entries], timeout=60)
    scope = TaskScope("observer")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(scope.close)
        observer = Observer(eye, watch_state=options.rate <= 1.0)
        await observer.open(scope)
        stopping = asyncio.Event()
        working = [
            asyncio.create_task(workload.run(lab.clients, history, stopping), name=workload.name)
            for workload in workloads
        ]
        gauges = Gauges(lab, every_s=max(0.5, options.seconds / _SAMPLES))
        if options.soak:
            scope.start(gauges.run(), "gauges")
        nemesis = Nemesis(lab, report.plan, _saboteurs(report))
        before: dict[int, dict[str, int]] = {}
        try:
            await asyncio.sleep(_QUIET_BEFORE_S)
            homes = asyncio.create_task(_note_homes(nemesis, observer, before))
            await nemesis.run()
            homes.cancel()
            await asyncio.wait([homes])
        finally:
            report.faults = nemesis.done
            healed = monotonic()
            await lab.heal()
            stopping.set()
            done, late = await asyncio.wait(working, timeout=_STOP_TIMEOUT_S)
            for task in late:
                task.cancel()
        for task in done:
            task.result()
        if late:
            names = ", ".join(task.get_name() for task in late)
            report.failure = f"clients did not end within {_STOP_TIMEOUT_S:g} s: {names}"
        _count(report, history)
        say(f"healed; {report.receipts:,} receipts, {len(report.faults)} faults")
        await _settle(lab, report, workloads, history)
        report.settled_s = monotonic() - healed
        report.failovers = _failovers(nemesis.done, before, observer)
        report.memory_mb = _memory(lab)
        report.exits = list(lab.exits)
        kept = await _collect(lab, report, workloads, gauges)
        _judge(report, kept, workloads, history, observer)
        if options.keep is not None and (options.keep_all or report.verdict != "passed"):
            await _keep(options.keep, lab, report, kept, history, observer)


async def _note_homes(
    nemesis: Nemesis, observer: Observer, before: dict[int, dict[str, int]]
) -> None:
    """Write down what each victim hosted when its fault began."""
    seen = 0
    while True:
        while seen < len(nemesis.done):
            done = nemesis.done[seen]
            if done.fault.kind in _MOVING and not done.victim:
                break  # not chosen yet
            before[seen] = observer.hosted_by(done.victim)
            seen += 1
        await asyncio.sleep(0.005)


def _count(report: Round, history: History) -> None:
    for operation in history.operations:
        report.operations[operation.outcome] += 1
        if operation.error is not None and operation.outcome != "ok":
            report.errors[operation.error] += 1
        if operation.f == "send" and operation.outcome == "ok":
            report.receipts += 1


async def _settle(
    lab: Lab | Attached, report: Round, workloads: Sequence[Workload], history: History
) -> None:
    """Wait until everything has arrived and every agent runs once."""
    deadline = monotonic() + report.options.settle_s
    why = ""
    try:
        await lab.wait_up(_UP_TIMEOUT_S)
    except AssertionError as error:
        report.failure = f"nodes did not come back: {error}"
        return
    while monotonic() < deadline:
        try:
            found = None
            for workload in workloads:
                found = found or await workload.missing(lab.eye, history)
            found = found or await not_once(lab.eye)
        except FoundationError as error:
            found = f"{type(error).__name__}: {error}"
        if found is None:
            return
        why = found
        await asyncio.sleep(0.1)
    # The checkers tell what is missing more precisely, where it concerns them.
    report.failure = f"not settled {report.options.settle_s:g} s after the last fault: {why}"


async def not_once(eye: Cluster) -> str | None:
    """Which agent does not run exactly once, and has no reason not to; None: all do (invariant 6)."""
    infos = await eye.agents.list()
    wishes = await eye.deployments.wishes()
    hosted: Counter[tuple[str, int]] = Counter()
    for node in await eye.nodes.list():
        if node.status == "down":
            continue
        subject = eye.subjects.control_node(node.name, "inspect")
        reply = await rpc.call(eye.bus, subject, None, InspectReply, timeout=5)
        hosted.update(reply.agents.items())
    return who_is_not_once(infos, wishes.values(), hosted)


def who_is_not_once(
    infos: Collection[AgentInfo],
    wishes: Iterable[Deployment],
    hosted: Mapping[tuple[str, int], int],
) -> str | None:
    """Compare the registry, the wishes and what is in memory; pure.

    Args:
        hosted: (agent, epoch) to how many workers have it, awake or asleep.
    """
    wanted = {agent for wish in wishes for agent in wish.agent_ids()}
    known = {info.id for info in infos}
    if wanted != known:
        return f"registered but not wanted, or the reverse: {sorted(wanted ^ known)[:5]}"
    expected: Counter[tuple[str, int]] = Counter()
    for info in infos:
        if info.is_running:
            expected[info.id, info.epoch] = 1
        elif info.status not in ("pending", "failed") or not info.reason:
            return f"{info.id} is {info.status} ({info.reason})"
    found = Counter(hosted)
    if found != expected:
        return f"in memory {dict(found - expected)}, but not {dict(expected - found)}"
    return None


def _failovers(
    done: Sequence[Done], before: Mapping[int, Mapping[str, int]], observer: Observer
) -> list[tuple[str, float, int]]:
    found = []
    for index, item in enumerate(done):
        if item.fault.kind not in _MOVING or item.skipped:
            continue
        agents = before.get(index, {})
        times = [
            (back - item.begin_ns) / 1e9
            for agent, epoch in agents.items()
            if (back := observer.back_after(agent, epoch, item.begin_ns)) is not None
        ]
        # A short freeze moves nobody; half-moved ones are told by the checkers.
        if agents and len(times) == len(agents):
            found.append((item.fault.kind, max(times), len(agents)))
    return found


def _memory(lab: Lab | Attached) -> dict[str, float]:
    found = {}
    for name in lab.names:
        family = lab.node(name).family()
        total = 0
        for member in family:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        found[name] = round(total / 1e6, 1)
    return found


async def _collect(
    lab: Lab | Attached, report: Round, workloads: Sequence[Workload], gauges: Gauges
) -> Kept:
    options = report.options
    return Kept(
        report.seed,
        list(options.workloads),
        options.rate,
        options.operations_min,
        report.faults,
        report.exits,
        plain({workload.name: await workload.collect(lab.eye) for workload in workloads}),
        gauges.series() if options.soak else None,
        report.failure,
        report.settled_s,
    )


def _judge(
    report: Round, kept: Kept, workloads: Sequence[Workload], history: History, seen: Seen
) -> None:
    report.judgements = judge(kept, workloads, history, seen)
    report.gains = worst_gains(kept.series or (), ALLOWED)
    report.false_downs = sum(
        item.violations_count for item in report.judgements if item.checker == "false downs"
    )
    report.void = why_void(kept, workloads, history, report.judgements)


def rejudge(directory: Path) -> Round:
    """Judge a kept round again, by the checkers of this version; nothing is started.

    Raises:
        ConfigError: *directory* holds none that this version can read.
    """
    kept, history, seen = Kept.load(directory)
    options = Options(
        workloads=tuple(kept.workloads), rate=kept.rate, operations_min=kept.operations_min
    )
    report = Round(kept.seed, options, [item.fault for item in kept.faults])
    report.faults, report.failure, report.settled_s = kept.faults, kept.failure, kept.settled_s
    report.exits = kept.exits
    _count(report, history)
    _judge(report, kept, kept.works(), history, seen)
    return report


async def _keep(
    directory: Path,
    lab: Lab | Attached,
    report: Round,
    kept: Kept,
    history: History,
    seen: Seen,
) -> None:
    target = directory / f"seed-{report.seed}"
    target.mkdir(parents=True, exist_ok=True)
    kept.save(target, history, seen)
    (target / "plan.txt").write_text(faults.describe(report.plan) + "\n")
    for name in lab.names:
        (target / f"{name}.log").write_bytes(lab.node(name).log.read_bytes())
    evidence: dict[str, Any] = {}
    with contextlib.suppress(FoundationError):
        evidence["agents"] = [info.model_dump() for info in await lab.eye.agents.list()]
        evidence["nodes"] = [info.model_dump() for info in await lab.eye.nodes.list()]
        evidence["events"] = [event.model_dump() for event in await lab.eye.events.list()]
        evidence["dead"] = [entry.model_dump() for entry in await lab.eye.dead.list()]
        evidence["records"] = {
            info["id"]: {**stored, "state": None, "outbox": len(stored["outbox"])}
            for info in evidence["agents"]
            if (stored := await lab.eye.agents.state(info["id"])) is not None
        }
        for name in ("signals_stream", "routes_stream"):
            stream = getattr(lab.eye.subjects, name)
            evidence[name] = (await api(lab.eye.bus, "STREAM.INFO", stream))["state"]
    (target / "evidence.json").write_bytes(
        orjson.dumps(evidence, default=str, option=orjson.OPT_INDENT_2)
    )
    (target / "report.txt").write_text(
        "\n".join([report.verdict, report.failure, *report.violations])
    )


# ---- cutting a plan down ----------------------------------------------------------


async def minimise(
    seed: int, options: Options, *, repetitions: int = 3, say: Say = lambda _: None
) -> tuple[Plan, str]:
    """The fewest faults of the seed's (or the given) plan that still show what it showed, and what.

    Each candidate is run up to *repetitions* times, until a round fails in the same way: by
    the same checker, or outside the checkers. So is the whole plan at first.

    Raises:
        ConfigError: the whole plan never failed.
    """
    wanted = ""
    why = ""

    async def fails(candidate: Sequence[faults.Fault]) -> bool:
        nonlocal wanted, why
        for _ in range(repetitions):
            # Fewer faults take less time, and what is too quiet may fail all the same.
            found = await run_round(
                seed, replace(options, plan=tuple(candidate), operations_min=0, keep=None)
            )
            shown = signature(found.violations, found.failure)
            if shown and shown == (wanted or shown):
                wanted, why = shown, (found.violations or [found.failure])[0]
                say(f"{len(candidate)} faults fail: {why}")
                return True
        say(f"{len(candidate)} faults: passed {repetitions} times")
        return False

    whole = plan_of(seed, options)
    if not await fails(whole):
        raise ConfigError(
            f"The plan of seed {seed} did not fail in {repetitions} rounds.",
            hint="Repeat it more often with --repetitions.",
        )
    left = await ddmin(whole, fails)
    return (
        Plan(
            tuple(left),
            seed,
            options.seconds,
            options.nodes,
            options.brokers,
            options.workloads,
            options.rate,
            why,
            os.environ.get("FOUNDATION_TEST_BUG", ""),
        ),
        wanted,
    )


# ---- many rounds ------------------------------------------------------------------


@dataclass(slots=True)
class Campaign:
    """Many rounds, and what they add up to."""

    rounds: list[Round] = field(default_factory=list)

    def next_seed(self, chance: random.Random, options: Options) -> int:
        """A seed for the next round, with trouble that there has not been yet."""
        return faults.next_seed(
            lambda: chance.randrange(1 << 32),
            self._happened(),
            lambda seed: plan_of(seed, options),
        )

    def _happened(self) -> list[str]:
        return [item.fault.kind for r in self.rounds for item in r.faults if not item.skipped]

    @property
    def is_passed(self) -> bool:
        """Every round passed."""
        return bool(self.rounds) and all(item.verdict == "passed" for item in self.rounds)

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        done = [item for r in self.rounds for item in r.faults if not item.skipped]
        by_fault: dict[str, list[float]] = {}
        for item in self.rounds:
            for kind, seconds, _ in item.failovers:
                by_fault.setdefault(kind, []).append(seconds)
        return {
            "version": __version__,
            "commit": commit(),
            "at": time.strftime("%Y-%m-%d", time.gmtime()),
            "cores": os.cpu_count(),
            "rounds": len(self.rounds),
            "verdicts": dict(Counter(item.verdict for item in self.rounds)),
            "receipts": sum(item.receipts for item in self.rounds),
            "operations": dict(sum((item.operations for item in self.rounds), Counter())),
            "faults": len(done),
            "faults_by_kind": dict(Counter(item.fault.kind for item in done)),
            "kinds_missing": sorted(self._could_happen() - {item.fault.kind for item in done}),
            "exits": count_exits(item for r in self.rounds for item in r.exits),
            "exits_told": [
                f"seed {r.seed}: {item}"
                for r in self.rounds
                for item in r.exits
                if item.sort != "crash point"
            ],
            "lost": self._sort("lost"),
            "repeated": self._sort("repeated"),
            "violations": sum(item.violations_count for r in self.rounds for item in r.judgements),
            "false_downs": sum(item.false_downs for item in self.rounds),
            "settled_s": _percentiles([item.settled_s for item in self.rounds]),
            "failover_s": {kind: _percentiles(values) for kind, values in sorted(by_fault.items())},
            "checked": dict(
                sum(
                    (
                        Counter({item.checker: item.looked_at})
                        for r in self.rounds
                        for item in r.judgements
                    ),
                    Counter(),
                )
            ),
            "seconds": round(sum(item.seconds for item in self.rounds), 1),
            "seeds": [item.seed for item in self.rounds],
            "runs": [item.to_json() for item in self.rounds if item.verdict != "passed"],
        }

    def _could_happen(self) -> set[str]:
        """Every kind that any round could have drawn."""
        found: set[str] = set()
        for item in self.rounds:
            kinds = item.options.kinds
            if item.options.attach is not None:
                kinds = chosen_kinds(kinds, start=item.options.start)
            allowed = faults.possible(
                kinds, brokers=item.options.brokers, edition=item.options.edition
            )
            found |= {kind.name for kind in allowed}
        return found

    def _sort(self, sort: str) -> int:
        return sum(item.sorts[sort] for r in self.rounds for item in r.judgements)


async def run_campaign(
    seed: int,
    options: Options,
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    say: Say = lambda _: None,
) -> Campaign:
    """Rounds one after the other, until *rounds* are done or *seconds* have passed."""
    campaign = Campaign()
    chance = random.Random(seed)
    deadline = None if seconds is None else monotonic() + seconds
    while True:
        # One round: exactly the seed that was given, so that it can be repeated.
        number = seed if rounds == 1 else campaign.next_seed(chance, options)
        found = await run_round(number, options, partial(_indented, say))
        campaign.rounds.append(found)
        say(
            f"seed {number}: {found.verdict}; {found.receipts:,} receipts, "
            f"{len(found.faults)} faults, settled in {found.settled_s:.1f} s"
        )
        for text in [
            *(str(item) for item in found.exits),
            *found.violations,
            *found.undecided,
            found.failure,
            found.void,
        ]:
            if text:
                say(f"  {text}")
        if rounds is not None and len(campaign.rounds) >= rounds:
            return campaign
        if deadline is not None and monotonic() >= deadline:
            return campaign


def _indented(say: Say, text: str) -> None:
    say(f"  {text}")


def _percentiles(values: Collection[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "max": round(ordered[-1], 3),
    }


def commit() -> str:
    """The commit of this checkout; empty: it is none."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except OSError:
        return ""
    return found.stdout.strip()


__all__ = [
    "Campaign",
    "Options",
    "Round",
    "commit",
    "minimise",
    "not_once",
    "rejudge",
    "run_campaign",
    "run_round",
]
