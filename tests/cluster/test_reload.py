"""New code without losing anything: `foundation up --reload`, and the control verb behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from foundation_nats import Cluster
from foundation_nats.bus import rpc
from foundation_nats.errors import AgentUnavailableError, ConfigError, FoundationError
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import ReloadReply, ReloadRequest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_MODULE = """
import asyncio
import time

from foundation_nats import Agent, Signal, State, on

from words import WORD


class Counter(Agent):
    class State(State):
        total: int = 0
        log: list[str] = []

    @on("add")
    async def add(self, signal: Signal[int]) -> str:
        self.state.total += signal.data
        return f"{WORD} VERSION {self.state.total}"

    @on("wait")
    async def wait(self, signal: Signal) -> None:
        self.state.log.append("VERSION")
        if "VERSION" == "one":
            await asyncio.sleep(1000)

    @on("hang")
    async def hang(self, signal: Signal) -> None:
        self.state.log.append(f"VERSION {signal.attempt}")
        if "VERSION" == "one":
            time.sleep(1000)

    @on("log")
    async def log(self, signal: Signal) -> list[str]:
        return self.state.log

    async def on_stop(self, reason: str) -> None:
        self.state.log.append(f"stopped: {reason}")
"""


def write(folder: Path, version: str, word: str = "hello") -> None:
    """The code of one version."""
    (folder / "words.py").write_text(f"WORD = {word!r}\n")
    (folder / "reloaded.py").write_text(_MODULE.replace("VERSION", version))


async def reload(cluster: Cluster, node: str = "n1", **request: Any) -> ReloadReply:
    """Tell a node to."""
    return await rpc.call(
        cluster.bus,
        cluster.subjects.control_node(node, "reload"),
        ReloadRequest(**request),
        ReloadReply,
        timeout=30,
    )


@contextlib.asynccontextmanager
async def nodes_with(folder: Path, **options: Any) -> Any:
    """A cluster whose nodes import from *folder*, and don't trust compiled files."""
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    async with TestCluster(path=[str(folder)], environment=environment, **options) as nodes:
        yield nodes


@pytest.mark.parametrize("kills", [False, True], ids=["in peace", "workers are killed"])
async def test_no_signal_is_lost_or_repeated_while_code_is_reloaded(
    request: pytest.FixtureRequest, tmp_path: Path, kills: bool
) -> None:
    """Two reloads in the midst of signals to twelve agents: each is counted once."""
    if kills and not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    write(tmp_path, "one")
    settings = {"worker": {"restarts_max": 1000}}
    async with nodes_with(tmp_path, nodes=1, workers=2, settings=settings) as nodes:
        cluster = nodes.client
        text = """
version: 1
agents: [{name: c, run: "reloaded:Counter", replicas: 12}]
"""
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["c"], timeout=20)
        managers = {name: node.process.pid for name, node in nodes.nodes.items()}
        sent = 0
        going = True

        async def flood() -> None:
            nonlocal sent
            while going:
                for agent in range(12):
                    await cluster.send(f"c-{agent}", "add", 1)
                sent += 1
                await asyncio.sleep(0.01)

        flooding = asyncio.create_task(flood())
        for version in ("two", "three"):
            write(tmp_path, version)
            reloading = asyncio.create_task(reload(cluster))
            if kills:
                for _ in range(3):
                    await asyncio.sleep(random.uniform(0.05, 0.4))
                    worker = random.choice(nodes.nodes["n1"].workers())
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                with contextlib.suppress(ConfigError):  # a new worker was killed as it imported
                    await reloading
                continue
            reply = await reloading
            assert (reply.agents, reply.forced) == (12, [])
        if kills:
            await reload(cluster)
        going = False
        await flooding

        async def all_counted() -> bool:
            for agent in range(12):
                with contextlib.suppress(AgentUnavailableError):
                    answer = await cluster.ask(f"c-{agent}", "add", 0, timeout=5)
                    assert answer == f"hello three {sent}", (agent, answer, sent)
                    continue
                return False
            return True

        await eventually(all_counted, timeout=20, message="every agent answers")
        assert sent > 3
        if kills:
            return
        infos = await cluster.agents.list()
        assert {info.recovered_from.reason for info in infos} == {"reloaded"}
        assert {info.epoch for info in infos} == {3}
        assert {name: node.process.pid for name, node in nodes.nodes.items()} == managers
        events = [e.what for e in await cluster.events.list(topic="worker", limit=1000)]
        assert "died" not in events
        assert events.count("reloaded") == 2 * 2
        log = await cluster.ask("c-0", "log")
        assert log == ["stopped: reloaded"] * 2


async def test_code_that_cannot_be_imported_changes_nothing(tmp_path: Path) -> None:
    """The new workers find it; the old ones never stop, and the error names the line."""
    write(tmp_path, "one")
    async with nodes_with(tmp_path, nodes=1) as nodes:
        cluster = nodes.client
        await cluster.agents.start("reloaded:Counter", id="c")
        (worker,) = nodes.nodes["n1"].workers()
        assert await cluster.ask("c", "add", 1) == "hello one 1"
        for bad, says in [
            ("def f(:\n", r"SyntaxError: invalid syntax \(.*words\.py:1\)"),
            (
                "WORD = 1 / 0\n",
                r"ZeroDivisionError: division by zero \(.*words\.py:1 in <module>\)",
            ),
            ("import os\nos._exit(3)\n", r"ended the worker process \(code 3\)"),
            ("raise SystemExit('no')\n", r"SystemExit: no"),
            ("WORD = 'fine'\n", r"module 'reloaded' has no class 'Nobody'"),
        ]:
            (tmp_path / "words.py").write_text(bad)
            with pytest.raises(ConfigError, match=says):
                await reload(cluster, runs=["reloaded:Counter", "reloaded:Nobody"])
            assert nodes.nodes["n1"].workers() == [worker]
        assert await cluster.ask("c", "add", 1) == "hello one 2"
        write(tmp_path, "two", "hi")
        assert (await reload(cluster)).agents == 1

        async def new() -> bool:
            with contextlib.suppress(FoundationError):
                return bool(await cluster.ask("c", "add", 1) == "hi two 3")
            return False

        await eventually(new, message="the new code answers")
        assert not worker.is_running()


@pytest.mark.parametrize("type_", ["wait", "hang"])
async def test_a_handler_that_goes_on_is_ended_and_its_signal_handled_by_the_new_code(
    tmp_path: Path, type_: str
) -> None:
    """Whether it waits or blocks its worker; and it is not held against the signal."""
    write(tmp_path, "one")
    settings = {"mailbox": {"attempts_max": 1}}
    async with nodes_with(tmp_path, nodes=1, settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("reloaded:Counter", id="c")
        await cluster.send("c", type_)
        await asyncio.sleep(0.3)
        write(tmp_path, "two")
        began = time.monotonic()
        assert (await reload(cluster, patience_s=0.5)).forced == ["c"]
        assert time.monotonic() - began < 10

        async def handled() -> list[str]:
            with contextlib.suppress(FoundationError):
                return list(await cluster.ask("c", "log"))
            return []

        log = await eventually(handled, timeout=15, message="handled by the new code")
        assert log == (["two"] if type_ == "wait" else ["two 1"])
        assert not await cluster.dead.list()


# ---- the command ----------------------------------------------------------------------


class Up:
    """A `foundation up --reload -o json` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("FOUNDATION_", "NATS_"))
        }
        self.env |= {
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "TMPDIR": str(folder / "tmp"),
        }
        command = [sys.executable, "-m", "foundation_cli.main", "up", "agents.yaml", "--reload"]
        command += ["--workers", "1", "-o", "json"]
        with (folder / "err").open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env=self.env, stdout=subprocess.PIPE, stderr=err, text=True
            )
        self.hello = self.line()

    def line(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "err").read_text()
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, agent: str, type_: str, data: object = None) -> Any:
        """Ask until it is answered."""

        async def main() -> Any:
            async with Cluster.connect(self.hello["url"]) as cluster:

                async def answer() -> tuple[Any] | None:
                    with contextlib.suppress(FoundationError):
                        return (await cluster.ask(agent, type_, data, timeout=5),)
                    return None

                return await eventually(answer, timeout=20, message=f"{agent} answers")

        return asyncio.run(main())[0]

    def pids(self) -> dict[int, list[int]]:
        """Its nodes and their workers, and the server, which has no children."""
        found = psutil.Process(self.process.pid).children()
        return {child.pid: [item.pid for item in child.children()] for child in found}

    def end(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, (out, (self.folder / "err").read_text())


@contextlib.contextmanager
def up(folder: Path) -> Iterator[Up]:
    """One that is ready, of the project in *folder*."""
    running = Up(folder)
    try:
        yield running
        running.end()
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.communicate()


def test_up_reloads_changed_code_and_keeps_the_state(tmp_path: Path) -> None:
    """Only workers are new; several saves are one reload; what is broken is said and changes nothing."""
    write(tmp_path, "one")
    manifest = tmp_path / "agents.yaml"
    manifest.write_text('version: 1\nagents: [{name: visits, run: "reloaded:Counter"}]\n')
    with up(tmp_path) as running:
        assert running.hello["watched"] == [str(tmp_path)]
        assert running.ask("visits", "add", 1) == "hello one 1"
        before = running.pids()
        write(tmp_path, "two")
        write(tmp_path, "three", "hi")
        said = running.line()
        assert said["ok"], said
        assert {Path(name).name for name in said["files"]} == {"reloaded.py", "words.py"}
        assert said["agents"] == 1
        assert said["seconds"] < 10  # about half a second on a machine with nothing else to do
        assert running.ask("visits", "add", 1) == "hi three 2"
        after = running.pids()
        assert after.keys() == before.keys()
        assert all(not set(after[pid]) & set(before[pid]) for pid in after)

        (tmp_path / "words.py").write_text("WORD = (\n")
        said = running.line()
        assert not said["ok"]
        assert "words.py:1: '(' was never closed" in said["error"]
        (tmp_path / "words.py").write_text("from nowhere import WORD\n")
        said = running.line()
        assert not said["ok"]
        assert "No module named 'nowhere' (words.py:1 in <module>)" in said["error"]
        assert running.pids() == after
        assert running.ask("visits", "add", 1) == "hi three 3"

        # Tests, and what is no code, are none of its business; a new agent of the manifest is.
        (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
        (tmp_path / "notes.txt").write_text("no code")
        write(tmp_path, "four")
        said = running.line()
        assert said["ok"], said
        assert [Path(name).name for name in said["files"]] == ["reloaded.py", "words.py"]
        assert running.ask("visits", "add", 1) == "hello four 4"
        manifest.write_text(
            'version: 1\nagents: [{name: visits, run: "reloaded:Counter"}, '
            '{name: more, run: "reloaded:Counter"}]\n'
        )
        assert running.ask("more", "add", 7) == "hello four 7"
