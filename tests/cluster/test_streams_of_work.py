"""Pipelines and map-reduce jobs whose stages, mappers, nodes, drivers and broker are killed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.streams import StreamReader
from foundation_nats.coordination import map_jobs, map_reduce, pipeline, pipelines
from foundation_nats.coordination.map_reduce import MapProgress
from foundation_nats.coordination.pipeline import Result
from foundation_nats.errors import ConfigError, HandlerError, NotSettledError
from foundation_nats.signaling.envelope import BOX
from foundation_nats.testing import TestCluster, eventually
from tests.cluster.children import Child, Children
from tests.cluster.storm import broker_dies, crashed, node_dies, said, survived, worker_dies
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of this run; ``--seed`` repeats one."""
    given = request.config.getoption("--seed")
    found = random.randrange(2**32) if given is None else int(given)
    print(f"--seed {found}")
    return found


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """Two nodes that can run the stages."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as running:
        yield running


async def _start(cluster: Cluster, run: str, **configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        provides = [config.get("provides", "adds")] if run.endswith("Mapper") else []
        await cluster.agents.start(
            run, id=name, config=config, critical=True, capabilities=provides
        )


def _stages(*agents: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": f"at-{a}", "agent": a, "type": "step", **more} for a in agents]


async def _results(cluster: Cluster, name: str, *arguments: Any, **more: Any) -> list[Result]:
    async with pipeline(cluster, name, *arguments, **more) as run:
        found = [result async for result in run]
        assert run.progress.done == run.progress.total
        return found


async def _seen(cluster: Cluster, agent: str) -> dict[str, int]:
    return dict(await cluster.ask(agent, "seen", timeout=10))


async def _is_empty(cluster: Cluster, box: str) -> bool:
    stream = StreamReader(cluster.bus, cluster.subjects.signals_stream)
    return not await stream.subjects(cluster.subjects.mailbox(BOX + box))


# ---- pipelines ------------------------------------------------------------------------


async def test_items_pass_all_stages_and_come_in_order(nodes: TestCluster) -> None:
    """What a stage refuses fails there, with the reason; what it refuses once passes with a retry."""
    cluster = nodes.client
    await _start(
        cluster,
        "stages:Stage",
        a={},
        b0={},
        b1={},
        c={"refuse": ["7"]},
    )
    stages = [
        *_stages("a"),
        {"name": "both", "agents": ["b0", "b1"], "type": "step"},
        *_stages("c", retries=1),
    ]

    async def slowly() -> AsyncIterator[list[int]]:
        for number in range(40):
            await asyncio.sleep(0.001)
            yield [number]

    found = await _results(cluster, "first", stages, slowly(), in_flight=16)
    assert [result.item for result in found] == list(range(40))
    for result in found:
        if result.item == 7:
            assert result.stage == "at-c"
            assert str(result.error).startswith("agent.handler: RuntimeError: no 7 (")
            with pytest.raises(HandlerError, match="Item 7 failed at at-c") as failed:
                result.get()
            assert failed.value.details["stage"] == "at-c"
        else:
            assert result.get() == [result.item, "a", f"b{result.item % 2}", "c"]
    assert await _seen(cluster, "a") == {str(n): 1 for n in range(40)}
    assert await _seen(cluster, "b1") == {str(n): 1 for n in range(1, 40, 2)}
    record = (await pipelines(cluster))["first"]
    assert (record.is_over, record.cursor, record.failed, record.spans) == (True, 40, 1, [])
    assert await _is_empty(cluster, "pipeline-first")
    assert await _results(cluster, "first", stages, []) == []
    with pytest.raises(ConfigError, match="another run first, of the stages at-a"):
        await _results(cluster, "first", stages[:1], [])


async def test_a_stage_without_an_answer_in_time_fails_the_item(nodes: TestCluster) -> None:
    """And others pass; wrong stages are named before anything is sent."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={})
    stages = [*_stages("a"), *_stages("nobody", timeout_s=0.5)]
    (found,) = await _results(cluster, "r", stages, [[1]])
    assert (found.stage, found.error) == ("at-nobody", "no answer within 0.5 s")
    with pytest.raises(ConfigError, match="Stage 1 of the pipeline x: type: Field required"):
        pipeline(cluster, "x", [{"name": "a", "agent": "a"}], [])
    with pytest.raises(ConfigError, match="has undo; a stage has agent, agents"):
        pipeline(cluster, "x", [{"name": "a", "agent": "a", "type": "t", "undo": "u"}], [])


async def test_a_late_answer_is_an_attempt_where_that_is_wanted(nodes: TestCluster) -> None:
    """The same question is asked again under its id: each item takes effect once all the same."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", slow={"slow": 0.4})
    more = {"on_timeout": "retry", "timeout_s": 0.3}
    stages = [*_stages("slow", retries=50, **more), *_stages("later", retries=50, **more)]
    running = asyncio.create_task(_results(cluster, "r", stages, [[n] for n in range(3)]))
    await eventually(lambda: _seen_all(cluster, "slow", 3), timeout=20)
    await _start(cluster, "stages:Stage", later={})
    assert [r.get() for r in await running] == [[n, "slow", "later"] for n in range(3)]
    for agent in ("slow", "later"):
        assert await _seen(cluster, agent) == {str(n): 1 for n in range(3)}
    stages = _stages("nobody", retries=2, backoff_s=0.05, **more)
    (lost,) = await _results(cluster, "n", stages, [[1]])
    assert lost.error == "no answer within 0.3 s, 3 times"


async def _seen_all(cluster: Cluster, agent: str, count: int) -> bool:
    return len(await _seen(cluster, agent)) == count


async def test_refused_items_wait_before_they_are_asked_anew(nodes: TestCluster) -> None:
    """Longer each time; the others pass meanwhile. An agent itself tries each question four times."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={"refuse": ["1"], "times": 8})
    stages = _stages("a", retries=2, backoff_s=0.3)
    began = monotonic()
    found = await _results(cluster, "r", stages, [[n] for n in range(3)])
    assert [r.get() for r in found] == [[n, "a"] for n in range(3)]
    assert monotonic() - began >= 0.3 + 0.6
    assert await _seen(cluster, "a") == {str(n): 1 for n in range(3)}


async def test_stages_name_agents_by_what_they_are(nodes: TestCluster) -> None:
    """A capability, a deployment, any that runs: each item at one of them; who comes later gets later items."""
    cluster = nodes.client
    stages = [
        {"name": "c", "agent": "capability:adds", "type": "step"},
        {"name": "d", "agent": "deployment:d", "type": "step"},
        {"name": "a", "agent": "any:adds", "type": "step"},
    ]
    for agent in ("m0", "m1"):
        await cluster.agents.start("stages:Stage", id=agent, capabilities=["adds"])
    async with pipeline(cluster, "r", stages, ([n] for n in range(80)), in_flight=16) as run:
        await eventually(lambda: run.progress.waits == "d: there is no agent of deployment:d")
        await cluster.deployments.apply(
            "version: 1\nagents:\n  - {name: d, run: 'stages:Stage', replicas: 2}\n"
        )
        found = [await anext(run) for _ in range(20)]
        await cluster.agents.start("stages:Stage", id="m2", capabilities=["adds"])
        found += [result async for result in run]
        assert not run.progress.waits
    ways = [result.get() for result in found]
    assert [way[0] for way in ways] == list(range(80))
    assert {way[1] for way in ways} == {way[3] for way in ways} == {"m0", "m1", "m2"}
    assert {way[2] for way in ways} == {"d-0", "d-1"}
    assert "m2" not in {way[1] for way in ways[:16]}
    for name in (*(f"m{n}" for n in range(3)), "d-0", "d-1"):
        times = 2 if name.startswith("m") else 1
        assert all(count <= times for count in (await _seen(cluster, name)).values())


async def test_who_goes_on_gets_what_was_not_taken_care_of(nodes: TestCluster) -> None:
    """And nothing is done twice; another input under the same id is noticed."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={})
    items = [[n] for n in range(30)]
    async with pipeline(cluster, "r", _stages("a"), items, in_flight=8) as run:
        got = [await anext(run) for _ in range(5)]
    with pytest.raises(ConfigError, match="the items 4 to 5 are others than before"):
        await _results(cluster, "r", _stages("a"), [[-n] for n in range(30)], in_flight=8)
    rest = await _results(cluster, "r", _stages("a"), items, in_flight=8)
    assert [r.item for r in got] == list(range(5))
    assert [r.item for r in rest] == list(range(4, 30))
    assert await _seen(cluster, "a") == {str(n): 1 for n in range(30)}


def _blows(
    nodes: TestCluster, dice: random.Random, kills: int, *, node: bool
) -> dict[int, Callable[[], Awaitable[None]]]:
    """Besides the drivers: a worker at first, half-way the broker, perhaps a *node* at last."""
    blows = {0: worker_dies(nodes, dice), kills // 2: broker_dies(nodes.server)}
    if node:
        blows[kills - 1] = node_dies(nodes, dice)
    return blows


async def _storm_at_the_pipeline(
    nodes: TestCluster, seed: int, items: int, kills: int, *, node: bool = False
) -> None:
    """Drivers, a worker and the broker are killed, perhaps a node: each item once at each stage."""
    dice = random.Random(seed)
    cluster = nodes.client
    names = ["s1", "s2", "s3"]
    await _start(cluster, "stages:Stage", **{name: {"slow": 0.003} for name in names})
    arguments = json.dumps({"stages": _stages(*names), "in_flight": 32})
    got: dict[int, str] = {}
    with Children() as children:

        def start() -> Child:
            given = (nodes.server.url, cluster.name, "pipeline", "storm", str(items), arguments)
            return children.start("tests.cluster.streamer", *given)

        def read(child: Child) -> None:
            lines = child.lines()
            for line in lines:
                match line.split(" ", 2):
                    case ["result", item, value] if value.endswith("]"):
                        assert got.setdefault(int(item), value) == value
                    case ["result", *_]:
                        assert line == lines[-1], "only the kill may cut a line"

        blows = _blows(nodes, dice, kills, node=node)
        last = await survived(start, dice, kills=kills, blows=blows, within=0.3)
        await said(last, "over", timeout=90)
        for child in children.all:
            read(child)
    assert got == {n: json.dumps([n, *names]) for n in range(items)}
    for name in names:
        seen = await eventually(lambda n=name: _seen(cluster, n), timeout=30)
        assert seen == {str(n): 1 for n in range(items)}


async def test_a_pipeline_survives_driver_worker_and_broker(nodes: TestCluster, seed: int) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_pipeline(nodes, seed, 100, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(400)
async def test_pipelines_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer, with the death of a node."""
    await _storm_at_the_pipeline(nodes, seed, 2000, 12, node=True)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_who_goes_on_late_finds_what_was_asked_by_its_traces(seed: int) -> None:
    """The stream has forgotten every id when the driver is killed, again and again."""
    dice = random.Random(seed)
    mailbox = {"duplicate_window_s": 4, "full_patience_s": 1}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings={"mailbox": mailbox}) as running:
        cluster = running.client
        names = ["s1", "s2"]
        await _start(cluster, "stages:Stage", **{name: {"slow": 0.05} for name in names})
        items = [[n] for n in range(150)]
        for _ in range(4):
            driving = asyncio.create_task(
                _results(cluster, "late", _stages(*names), items, in_flight=100)
            )
            await asyncio.sleep(dice.uniform(0.5, 2.0))
            driving.cancel()
            await asyncio.wait([driving])
            await asyncio.sleep(4.5)  # longer than the window
        rest = await _results(cluster, "late", _stages(*names), items, in_flight=100)
        assert rest[-1].get() == [149, *names]
        for name in names:
            assert await _seen(cluster, name) == {str(n): 1 for n in range(150)}


# ---- map-reduce -----------------------------------------------------------------------


def _expected(items: int, chunk: int) -> dict[str, Any]:
    return {
        "sum": sum(range(items)),
        "count": items,
        "firsts": list(range(0, items, chunk)),
    }


async def test_chunks_are_counted_once_and_in_order(nodes: TestCluster) -> None:
    """With a fold that does not commute; progress has the partial results; again: the same."""
    cluster = nodes.client
    await _start(cluster, "stages:Mapper", m0={}, m1={"slow": 0.02}, m2={})
    heard: list[MapProgress] = []
    given = (cluster, "job", range(1050), "adds", "merge")
    found = await map_reduce(*given, chunk=50, on_progress=heard.append, timeout=30)
    assert found == _expected(1050, 50)
    assert heard[-1].items == heard[-1].total == 1050
    assert [p.items for p in heard] == sorted(p.items for p in heard)
    assert await _is_empty(cluster, "map-job")
    assert await map_reduce(*given) == found
    assert (await map_jobs(cluster))["job"].value == found
    with pytest.raises(ConfigError, match="another job job: its fold is 'merge'"):
        await map_reduce(cluster, "job", [], "adds", "sum")
    assert await map_reduce(cluster, "none", [], "adds", "sum", initial=0, timeout=10) == 0
    with pytest.raises(NotSettledError, match="0 agents that run provide nothing"):
        await map_reduce(cluster, "nobody", [1], "nothing", "sum", timeout=0.5)


async def test_a_straggler_and_a_refusal_are_overcome(nodes: TestCluster) -> None:
    """A slow mapper's chunk is done by another; one that none can do is an error until repaired."""
    cluster = nodes.client
    await _start(cluster, "stages:Mapper", fast={}, slow={"slow": 4})
    heard: list[MapProgress] = []
    found = await map_reduce(
        cluster, "s", range(100), "adds", "merge",
        chunk=10, straggler_s=0.5, on_progress=heard.append, timeout=30,
    )  # fmt: skip
    assert found == _expected(100, 10)
    assert heard[-1].reissued >= 1
    await _start(cluster, "stages:Mapper", picky={"refuse": 13, "provides": "picks"})
    given = (cluster, "p", range(30), "picks", "merge")
    with pytest.raises(HandlerError, match=r"chunk 1: agent\.handler: RuntimeError: no 13"):
        await map_reduce(*given, chunk=10, retries=1)
    await cluster.agents.stop("picky")
    await _start(cluster, "stages:Mapper", good={"provides": "picks"})
    assert await map_reduce(*given, chunk=10, timeout=30) == _expected(30, 10)


async def test_an_agent_reduces_each_chunk_once(nodes: TestCluster) -> None:
    """Its state is the result; the answers are partial results."""
    cluster = nodes.client
    await _start(cluster, "stages:Mapper", m0={}, m1={})
    await _start(cluster, "stages:Reducer", r={})
    found = await map_reduce(cluster, "j", range(200), "adds", "agent:r", chunk=10, timeout=30)
    assert found == {"total": sum(range(200)), "chunks": 20}
    assert await cluster.ask("r", "chunks") == list(range(20))
    await _start(cluster, "stages:Reducer", few={})
    given = (cluster, "k", range(200), "adds", "agent:few")
    found = await map_reduce(*given, combine="merge", combined=6, chunk=10, timeout=30)
    assert found == {"total": sum(range(200)), "chunks": 4}
    assert await cluster.ask("few", "chunks") == [0, 6, 12, 18]
    with pytest.raises(ConfigError, match="its combine is 'merge of 6'"):
        await map_reduce(*given, combine="merge", chunk=10)
    with pytest.raises(ConfigError, match="`combine` is for a reducer that is an agent"):
        await map_reduce(cluster, "l", [1], "adds", "sum", combine="sum")


async def test_of_a_large_input_only_what_is_in_flight_is_held(nodes: TestCluster) -> None:
    """100,000 items from a generator that notes how far it was read."""
    cluster = nodes.client
    await _start(cluster, "stages:Mapper", m0={}, m1={})
    read, ahead = 0, 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for read in range(1, 100_001):  # noqa: B007  seen by `note`
            yield 1

    def note(progress: MapProgress) -> None:
        nonlocal ahead
        ahead = max(ahead, read - progress.items)

    found = await map_reduce(
        cluster, "large", numbers(), "adds", lambda a, b: {"sum": a["sum"] + b["sum"]},
        chunk=500, in_flight=8, on_progress=note, timeout=60,
    )  # fmt: skip
    assert found["sum"] == 100_000
    assert ahead <= 9 * 500


async def test_agents_run_them_from_their_handlers(nodes: TestCluster) -> None:
    """By `self.ctx`."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={})
    await _start(cluster, "stages:Mapper", m={})
    await _start(cluster, "stages:Boss", boss={})
    assert await cluster.ask("boss", "run", [[1], [2]], timeout=20) == [[1, "a"], [2, "a"]]
    assert (await cluster.ask("boss", "job", [1, 2, 3], timeout=20))["sum"] == 6


async def test_two_who_drive_do_no_harm(nodes: TestCluster) -> None:
    """Each item once at each stage, each chunk counted once; together they hand out every result."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={}, b={})
    await _start(cluster, "stages:Mapper", m0={}, m1={})
    await _start(cluster, "stages:Reducer", r={})
    async with Cluster.connect(nodes.server.url, cluster=cluster.name) as other:
        both = (cluster, other)
        items = [[n] for n in range(100)]
        stages = _stages("a", "b")
        parts = await asyncio.gather(
            *(_results(one, "r", stages, items, in_flight=16) for one in both)
        )
        given = ("j", range(300), "adds", "agent:r")
        jobs = await asyncio.gather(*(map_reduce(one, *given, chunk=10) for one in both))
    assert {r.item for part in parts for r in part} == set(range(100))
    for agent in ("a", "b"):
        assert await _seen(cluster, agent) == {str(n): 1 for n in range(100)}
    assert jobs[0] == jobs[1] == {"total": sum(range(300)), "chunks": 30}
    assert await cluster.ask("r", "chunks") == list(range(30))


async def _storm_at_the_job(
    nodes: TestCluster, seed: int, items: int, kills: int, *, node: bool = False
) -> None:
    """Drivers, mappers and the broker are killed, perhaps a node: each chunk is counted once."""
    dice = random.Random(seed)
    cluster = nodes.client
    await _start(cluster, "stages:Mapper", **{f"m{n}": {"slow": 0.03} for n in range(4)})
    await _start(cluster, "stages:Reducer", r={}, few={})
    jobs = {"folded": "merge", "reduced": "agent:r", "combined": "agent:few"}
    with Children() as children:

        def start(name: str) -> Child:
            more: dict[str, Any] = {"mapper": "adds", "fold": jobs[name]}
            more |= {"chunk": 10, "straggler_s": 2}
            if name == "combined":
                more |= {"combine": "merge", "combined": 3}
            given = (nodes.server.url, cluster.name, "map", name, str(items), json.dumps(more))
            return children.start("tests.cluster.streamer", *given)

        blows = _blows(nodes, dice, kills, node=node)
        both = await asyncio.gather(
            survived(lambda: start("folded"), dice, kills=kills, blows=blows, within=0.4),
            survived(lambda: start("reduced"), dice, kills=kills, within=0.4),
            survived(lambda: start("combined"), dice, kills=kills, within=0.4),
        )
        last = dict(zip(jobs, both, strict=True))
        for child in both:
            await said(child, "over", timeout=90)
        found = {n: json.loads(c.said("result")[0].split(" ", 1)[1]) for n, c in last.items()}
    assert found["folded"] == _expected(items, 10)
    assert found["reduced"] == {"total": sum(range(items)), "chunks": items // 10}
    assert found["combined"]["total"] == sum(range(items))
    groups = await eventually(lambda: cluster.ask("few", "chunks", timeout=5), timeout=30)
    assert groups == list(range(0, items // 10, 3))
    chunks = await eventually(lambda: cluster.ask("r", "chunks", timeout=5), timeout=30)
    assert chunks == list(range(items // 10))


async def test_a_job_survives_driver_mapper_and_broker(nodes: TestCluster, seed: int) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_job(nodes, seed, 400, 2)


@pytest.mark.parametrize("point", ["pipeline.before_handed_out", "map.before_counted"])
async def test_a_driver_that_dies_at_a_point_is_succeeded(
    nodes: TestCluster, seed: int, point: str
) -> None:
    """Results have been read and are not written down as such; chunks are answered and not counted."""
    cluster = nodes.client
    await _start(cluster, "stages:Stage", a={})
    await _start(cluster, "stages:Mapper", m0={}, m1={})
    if point.startswith("pipeline"):
        more: dict[str, Any] = {"stages": _stages("a"), "in_flight": 16}
        given = ("pipeline", "r", "40")
    else:
        more = {"mapper": "adds", "fold": "merge", "chunk": 10, "in_flight": 4}
        given = ("map", "j", "200")
    with Children() as children:

        def start(failpoints: str) -> Child:
            arguments = (nodes.server.url, cluster.name, *given, json.dumps(more))
            return children.start("tests.cluster.streamer", *arguments, failpoints=failpoints)

        for passes in (1, 1 + seed % 3):
            await crashed(start(f"{point}=after({passes},kill)"))
        last = start("")
        await said(last, "over")
        results = {line for child in children.all for line in child.said("result")}
    if point.startswith("pipeline"):
        assert results == {f'result {n} [{n}, "a"]' for n in range(40)}
        assert await _seen(cluster, "a") == {str(n): 1 for n in range(40)}
    else:
        (found,) = results
        assert json.loads(found.split(" ", 1)[1]) == _expected(200, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(400)
async def test_jobs_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer, with the death of a node."""
    await _storm_at_the_job(nodes, seed, 6000, 12, node=True)
