"""The whole command line against a real `foundation up`: server, nodes, agents."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML

from foundation_nats.testing.brokers import free_ports

pytestmark = pytest.mark.cluster

_MODULE = '''
from pydantic import BaseModel
from foundation_nats import Agent, Signal, State, on


class Add(BaseModel):
    amount: int


class Counter(Agent):
    """Counts what it is told about."""

    class State(State):
        total: int = 0

    @on("counter.add")
    async def add(self, signal: Signal[Add]) -> int:
        self.state.total += signal.data.amount
        return self.state.total

    async def on_start(self, recovered_from=None):
        if self.config.get("broken"):
            raise RuntimeError("this version is broken")

    @on("counter.fail")
    async def fail(self, signal: Signal) -> None:
        raise RuntimeError("this handler [b]always[/b] fails")
'''

_MANIFEST = """\
version: 1
agents:
  - name: visits
    run: cli_agents:Counter
    critical: true
    capabilities: [count]
  - name: counters
    run: cli_agents:Counter
    replicas: 3
"""


@dataclass(slots=True)
class Place:
    """A folder with agents and a manifest, and a clean environment for commands."""

    folder: Path
    env: dict[str, str]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command and return at once."""
        return subprocess.Popen(
            [sys.executable, "-m", "foundation_cli.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.env,
            **options,
        )

    def run(self, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        """Run a command to its end."""
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(stdin, timeout=60)
            except BaseException:
                process.kill()
                raise
        return process.returncode, out, err

    def json(self, *arguments: str) -> Any:
        """Run a command that must succeed; its one JSON document."""
        code, out, err = self.run(*arguments, "-o", "json")
        assert code == 0, err
        return json.loads(out)


@dataclass(slots=True)
class Running:
    """A `foundation up` that is ready."""

    place: Place
    process: subprocess.Popen[str]
    hello: dict[str, Any]

    def family(self) -> list[psutil.Process]:
        """Every process it has started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)


def _place(folder: Path) -> Place:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cli_agents.py").write_text(_MODULE)
    (folder / "agents.yaml").write_text(_MANIFEST)
    (folder / "tmp").mkdir()
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("FOUNDATION_") and key not in ("NATS_CONTEXT", "FORCE_COLOR")
    }
    env |= {
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "TMPDIR": str(folder / "tmp"),
    }
    return Place(folder, env)


@contextlib.contextmanager
def _up(place: Place, *arguments: str) -> Iterator[Running]:
    process = place.start("up", "--workers", "1", "-o", "json", *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, err = process.communicate(timeout=30)
            pytest.fail(f"up ended with {process.returncode}: {err}")
        yield Running(place, process, json.loads(line))
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=30)
    except (subprocess.TimeoutExpired, ValueError):
        process.kill()
        process.wait()
        raise


def _eventually(condition: Callable[[], Any], what: str, timeout: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {timeout} s: {what}")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One cluster for the tests that don't break it."""
    place = _place(tmp_path_factory.mktemp("up") / "home")
    with _up(place, "agents.yaml", "--nodes", "2") as running:
        yield running


def test_up_deploys_and_the_others_find_it_without_options(up: Running) -> None:
    """The shapes of `status`, `nodes` and `agents` that scripts rely on."""
    status = up.place.json("status")
    assert {"cluster", "server", "leader", "nodes", "agents", "deployments"} <= set(status)
    assert status["server"] == up.hello["url"]
    assert status["leader"] in up.hello["nodes"]
    assert status["nodes"]["up"] == 2
    nodes = up.place.json("nodes")
    assert [node["name"] for node in nodes] == ["node-1", "node-2"]
    for node in nodes:
        wanted = {"name", "status", "incarnation", "agents", "load", "capacity", "labels"}
        assert wanted <= set(node)
    agents = up.place.json("agents", "--deployment", "counters")
    assert [agent["id"] for agent in agents] == ["counters-0", "counters-1", "counters-2"]
    for agent in agents:
        wanted = {"id", "node", "status", "epoch", "deployment", "capabilities"}
        assert wanted <= set(agent)
        assert agent["status"] == "running"
    assert [agent["id"] for agent in up.place.json("agents", "--capability", "count")] == ["visits"]


def test_tables_and_yaml_show_the_same(up: Running) -> None:
    """People see what scripts read."""
    code, out, _ = up.place.run("agents")
    assert code == 0
    assert "visits" in out
    assert "\x1b" not in out
    code, out, _ = up.place.run("agents", "-o", "yaml")
    assert YAML(typ="safe").load(out) == up.place.json("agents")
    code, out, _ = up.place.run("status")
    assert (code, "visits" in out) == (0, True)
    code, out, _ = up.place.run("nodes")
    assert (code, "node-2" in out) == (0, True)


def test_send_and_ask_take_effect_once(up: Running) -> None:
    """A repeated id adds nothing; JSON may come from stdin."""
    before = up.place.json("ask", "visits", "counter.add", '{"amount": 0}')
    first = up.place.json("send", "visits", "counter.add", '{"amount": 3}', "--id", "one")
    again = up.place.json("send", "visits", "counter.add", '{"amount": 3}', "--id", "one")
    assert (first["duplicate"], again["duplicate"]) == (False, True)
    code, _, err = up.place.run("send", "agent:visits", "counter.add", "-", stdin='{"amount": 1}')
    assert code == 0, err
    wanted = before + 4
    _eventually(
        lambda: up.place.json("ask", "visits", "counter.add", '{"amount": 0}') == wanted,
        "both signals have taken effect",
    )
    shown = up.place.json("agent", "visits")
    assert shown["stored"]["state"]["total"] == wanted
    code, out, _ = up.place.run("agent", "visits")
    assert (code, f'"total":{wanted}' in out) == (0, True)


def test_an_unknown_agent_is_exit_4_with_a_suggestion(up: Running) -> None:
    """For `agent`, `send` and `ask`; `--queue` stores the signal all the same."""
    for arguments in (["agent", "visit"], ["send", "visit", "x"], ["ask", "visit", "x"]):
        code, out, err = up.place.run(*arguments)
        assert (code, out) == (4, ""), err
        assert "Did you mean 'visits'" in err
    assert up.place.json("send", "later", "x", "--queue")["sequence"] > 0


def test_errors_of_the_agent_reach_the_asker(up: Running) -> None:
    """A handler that raises, a payload that does not fit, a type nobody handles: exit 1."""
    for type, data, code in (
        ("counter.fail", "null", "agent.handler"),
        ("counter.add", '{"amount": "x"}', "agent.payload_invalid"),
        ("counter.nothing", "null", "agent.unhandled_signal"),
    ):
        ended, _, err = up.place.run("ask", "visits", type, data, "-o", "json")
        assert ended == 1, err
        assert json.loads(err)["error"]["code"] == code


def test_dead_letters_are_listed_shown_replayed_and_discarded(up: Running) -> None:
    """A replayed letter fails again and is a new letter; a discarded one is gone."""
    up.place.json("send", "counters-0", "counter.fail", "-o", "json")

    def letters() -> Any:
        return up.place.json("dead", "list", "--agent", "counters-0")

    (first,) = _eventually(letters, "the signal is a dead letter")
    number = str(first["number"])
    shown = up.place.json("dead", "show", number)
    assert shown["letter"]["agent"] == "counters-0"
    assert "always" in shown["letter"]["reason"]
    code, out, _ = up.place.run("dead", "show", number)
    assert code == 0
    assert "[b]always[/b]" in out
    code, out, _ = up.place.run("doctor", "-o", "json")
    assert code == 1
    checks = {item["check"]: item["level"] for item in json.loads(out)["findings"]}
    assert checks["dead letters"] == "warning"
    assert up.place.json("dead", "replay", number)[0]["receipt"]["sequence"] > 0
    (second,) = _eventually(letters, "it failed again")
    assert second["number"] > first["number"]
    assert up.place.run("dead", "replay", number)[0] == 4
    assert up.place.json("dead", "discard", str(second["number"]))[0]["discarded"]
    assert letters() == []


def test_doctor_finds_a_healthy_cluster_healthy(up: Running) -> None:
    """Exit 0, every check made."""
    code, out, _ = up.place.run("doctor", "-o", "json")
    found = json.loads(out)
    bad = [item for item in found["findings"] if item["level"] != "ok"]
    assert (code, bad) == (0, [])
    checks = {item["check"] for item in found["findings"]}
    assert {"server", "storage", "streams", "round trip", "nodes", "leader", "agents"} <= checks


def test_plan_deploy_scale_and_delete_tell_the_truth(up: Running) -> None:
    """Exit 6 for differences, 0 for none, 5 for not in time, 4 for unknown names."""
    place = up.place
    assert place.run("plan", "agents.yaml", "--exit-code")[0] == 0
    extra = place.folder / "extra.yaml"
    extra.write_text(
        "version: 1\nagents:\n  - {name: extra, run: cli_agents:Counter, replicas: 2}\n"
    )
    code, out, _ = place.run("plan", "extra.yaml", "--exit-code")
    assert (code, "extra" in out) == (6, True)
    assert place.run("deploy", "extra.yaml", "--plan")[0] == 0
    plan = place.json("plan", "extra.yaml")
    assert plan["differences"] is True
    assert set(plan["placements"]) == {"extra-0", "extra-1"}
    assert place.json("agents", "--deployment", "extra") == []
    found = place.json("deploy", "extra.yaml")
    (status,) = found["deployments"]
    assert (status["running"], status["settled"]) == (2, True)
    phases = [(phase["name"], phase["state"]) for phase in found["phases"]]
    assert phases == [(name, "passed") for name in ("cluster", "services", "agents", "health")]
    assert all(phase["ms"] >= 0 for phase in found["phases"])
    assert place.run("plan", "extra.yaml", "--exit-code")[0] == 0
    (status,) = place.json("scale", "extra", "4")
    assert (status["running"], status["settled"]) == (4, True)
    assert len(place.json("agents", "--deployment", "extra", "--status", "running")) == 4
    (status,) = place.json("scale", "extra", "1")
    assert [a["id"] for a in place.json("agents", "--deployment", "extra")] == ["extra-0"]
    assert place.run("delete", "extra", "--purge", "--wait", "0s")[0] == 2
    gone = place.json("delete", "extra", "--purge")
    assert (gone["name"], gone["deleted"]) == ("extra", True)
    assert gone["purged"] == [f"extra-{number}" for number in range(4)]
    assert place.json("agents", "--deployment", "extra") == []
    for arguments in (["scale", "extrem", "1"], ["delete", "counter"]):
        assert place.run(*arguments)[0] == 4
    assert "Did you mean 'counters'" in place.run("delete", "counter")[2]


def test_a_spec_that_fails_is_rolled_back_and_deploy_says_so(up: Running) -> None:
    """Exit 1 and the reason; `rollout` shows, undoes and remembers."""
    place = up.place

    def manifest(text: str) -> None:
        (place.folder / "rolling.yaml").write_text(
            "version: 1\nagents:\n  - name: rolling\n    run: cli_agents:Counter\n"
            f"    replicas: 2\n    config: {{{text}}}\n"
        )

    try:
        manifest("v: 1")
        assert place.run("deploy", "rolling.yaml")[0] == 0
        assert place.json("rollout", "history", "rolling") == []
        assert place.run("rollout", "undo", "rolling")[0] == 2
        manifest("v: 2, broken: true")
        code, _, err = place.run("deploy", "rolling.yaml", "--wait", "60s")
        assert code == 1
        assert "rolled back" in err
        assert "this version is broken" in err
        failed = place.json("rollout", "history", "rolling")[-1]
        assert (failed["outcome"], failed["spec"]["config"]["v"]) == ("failed", 2)
        manifest("v: 3")
        assert place.run("deploy", "rolling.yaml")[0] == 0
        found = place.json("rollout", "status", "rolling", "--wait", "30s")
        assert (found["phase"], found["updated"], found["rolled_back"]) == ("complete", 2, None)
        assert place.json("rollout", "undo", "rolling")["phase"] == "complete"
        assert place.run("rollout", "status", "rollin")[0] == 4
    finally:
        place.run("delete", "rolling")


def test_not_settled_in_time_is_exit_5_with_the_reason(up: Running) -> None:
    """The wish stands; the reason says which node lacks what."""
    place = up.place
    (place.folder / "gpu.yaml").write_text(
        "version: 1\nagents:\n  - name: needy\n    run: cli_agents:Counter\n"
        "    placement: {require: [gpu]}\n"
    )
    try:
        code, _, err = place.run("deploy", "gpu.yaml", "--wait", "1s")
        assert code == 5
        assert "needy" in err
        assert "gpu" in err
        code, _, err = place.run("deploy", "gpu.yaml", "--wait", "300ms", "-o", "json")
        assert code == 5
        assert json.loads(err)["error"]["code"] == "not_settled"
        (agent,) = place.json("agents", "--status", "pending")
        assert agent["id"] == "needy"
    finally:
        place.run("delete", "needy")


def test_a_wrong_manifest_is_exit_2_and_names_the_line(up: Running) -> None:
    """Nothing is written."""
    (up.place.folder / "wrong.yaml").write_text(
        "version: 1\nagents:\n  - name: a\n    run: cli_agents:Counter\n    replica: 2\n"
    )
    code, _, err = up.place.run("deploy", "wrong.yaml")
    assert code == 2
    assert "replica" in err
    assert "replicas" in err
    assert "5" in err


def test_tap_shows_signals_as_lines_of_json_until_ctrl_c(up: Running) -> None:
    """Live, filtered, and 130 at the end."""
    process = up.place.start("tap", "--agent", "counters-1", "-o", "json")
    try:
        assert process.stdout is not None
        # The tap is open once it shows what is sent; send until it does.
        os.set_blocking(process.stdout.fileno(), False)
        seen = ""

        def line() -> str | None:
            nonlocal seen
            up.place.json("send", "counters-1", "counter.add", '{"amount": 1}')
            with contextlib.suppress(TypeError):
                seen += process.stdout.read() or ""  # type: ignore[union-attr]
            return seen if "\n" in seen else None

        found = json.loads(_eventually(line, "the tap shows a signal").splitlines()[0])
        assert found["agent"] == "counters-1"
        assert found["kind"] == "signal"
        assert found["body"]["type"] == "counter.add"
    finally:
        os.set_blocking(process.stdout.fileno(), True)  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")


def test_a_tap_replays_the_past_and_ends_with_its_reader(up: Running) -> None:
    """`foundation tap --replay 10m | head -1` ends by itself."""
    up.place.json("send", "counters-2", "counter.add", '{"amount": 1}')
    command = [sys.executable, "-m", "foundation_cli.main", "tap", "--type", "counter.add"]
    with subprocess.Popen(
        [*command, "--agent", "counters-2", "--replay", "10m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=up.place.folder,
        env=up.place.env,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "counter.add" in process.stdout.readline()
        process.stdout.close()
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            up.place.json("send", "counters-2", "counter.add", '{"amount": 1}')
        if process.poll() is None:
            process.kill()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_events_tell_what_happened(up: Running) -> None:
    """Stored ones by topic, oldest first."""
    events = up.place.json("events", "--since", "10m", "--topic", "node")
    joined = {event["data"].get("node") or event["source"] for event in events}
    assert {event["topic"] for event in events} == {"node"}
    assert joined
    code, out, _ = up.place.run("events", "--limit", "3")
    assert (code, len(out.splitlines())) == (0, 3)


def test_agent_ids_complete_from_the_live_cluster(up: Running) -> None:
    """For `agent`, `send` and `ask`."""
    for command in ("agent", "send", "ask"):
        env = {
            "_FOUNDATION_COMPLETE": "complete_bash",
            "COMP_WORDS": f"foundation {command} counters-",
            "COMP_CWORD": "2",
        }
        place = Place(up.place.folder, up.place.env | env)

        def ids(place: Place = place) -> bool:
            return place.run()[1].split() == ["counters-0", "counters-1", "counters-2"]

        # It gives up silently after 200 ms, which a busy machine may need.
        _eventually(ids, "the ids are completed")


# ---- the life of `up` -------------------------------------------------------------------


def _nothing_left(place: Place, family: list[psutil.Process]) -> None:
    _eventually(
        lambda: not any(p.is_running() and p.status() != "zombie" for p in family),
        "every process has ended",
    )
    assert list((place.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_everything_with_0_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    """No process, no temporary directory, no runtime file, no log."""
    place = _place(tmp_path / "home")
    with _up(place, "agents.yaml", "--nodes", "2") as running:
        family = running.family()
        assert len(family) >= 5  # the server, two nodes, a worker each
        began = time.monotonic()
        running.process.send_signal(number)
        _, err = running.process.communicate(timeout=30)
        assert (running.process.returncode, err) == (0, "")
        assert time.monotonic() - began < 10
    _nothing_left(place, family)
    assert [p for p in (tmp_path / "home" / "run").rglob("*") if p.is_file()] == []
    assert place.run("status", "-s", running.hello["url"], "--timeout", "1s")[0] == 3


def test_people_are_told_where_it_is_and_what_to_try(tmp_path: Path) -> None:
    """The commands it prints work as they stand."""
    place = _place(tmp_path / "home")
    process = place.start("up", "--workers", "1", "--nodes", "1", "-c", "demo")
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("Ctrl-C"):
            line = process.stdout.readline()
            assert line, process.communicate()
            lines.append(line)
        text = "".join(lines)
        assert re.search(r"Cluster demo is up at nats://127\.0\.0\.1:\d+", text)
        assert "node-1" in text
        commands = [line.split()[1:] for line in lines if line.startswith("  foundation ")]
        assert len(commands) == 3
        code, out, err = place.run(*commands[0], "-o", "json")
        assert code == 0, err
        assert json.loads(out)["cluster"] == "demo"
    finally:
        _end(process)
    assert process.returncode == 0


def test_state_survives_with_a_store_that_only_one_may_use(tmp_path: Path) -> None:
    """A second `up` on the store is refused; the next one finds what was stored."""
    place = _place(tmp_path / "home")
    store = str(tmp_path / "data")
    with _up(place, "agents.yaml", "--nodes", "1", "--store", store) as running:
        assert place.json("ask", "visits", "counter.add", '{"amount": 5}') == 5
        code, _, err = place.run("up", "--nodes", "1", "--store", store)
        assert code == 1
        assert f"is in use by process {running.process.pid}" in err
        assert place.json("ask", "visits", "counter.add", '{"amount": 0}') == 5
    with _up(place, "--nodes", "1", "--store", store):
        _eventually(
            lambda: place.run("ask", "visits", "counter.add", '{"amount": 0}')[1].strip() == "5",
            "the agent has its state back",
        )
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


def test_a_killed_up_takes_everything_with_it(tmp_path: Path) -> None:
    """SIGKILL: the kernel ends server, nodes and workers; the stale file is ignored."""
    place = _place(tmp_path / "home")
    with _up(place, "--nodes", "1") as running:
        family = running.family()
        running.process.kill()
        running.process.wait()
        _eventually(
            lambda: not any(p.is_running() and p.status() != "zombie" for p in family),
            "every process has ended",
        )
    assert place.run("status", "-s", running.hello["url"], "--timeout", "1s")[0] == 3


def test_a_dead_node_is_reported_and_its_agents_move(tmp_path: Path) -> None:
    """`up` goes on without it: the cluster heals itself."""
    place = _place(tmp_path / "home")
    with _up(place, "agents.yaml", "--nodes", "2") as running:
        victim = place.json("agent", "visits")["node"]
        pid = next(node["pid"] for node in place.json("nodes") if node["name"] == victim)
        os.kill(pid, signal.SIGKILL)

        def moved() -> bool:
            agent = place.json("agent", "visits")
            return bool(agent["status"] == "running" and agent["node"] != victim)

        _eventually(moved, "the critical agent runs on the other node")
        running.process.send_signal(signal.SIGINT)
        _, err = running.process.communicate(timeout=30)
        assert running.process.returncode == 0
        assert victim in json.loads(err.splitlines()[0])["warning"]["message"]


def test_respawn_starts_a_dead_node_again(tmp_path: Path) -> None:
    """Under its name, as a new incarnation."""
    place = _place(tmp_path / "home")
    with _up(place, "--nodes", "1", "--respawn"):
        (before,) = place.json("nodes")
        os.kill(before["pid"], signal.SIGKILL)

        def back() -> bool:
            found = place.json("nodes")
            return bool(
                found
                and found[0]["status"] == "up"
                and found[0]["incarnation"] > before["incarnation"]
            )

        _eventually(back, "the node is back", timeout=30)


def test_each_node_serves_its_metrics_and_up_says_where(tmp_path: Path) -> None:
    """From neighbouring ports; also the node that is started again in place of one that died."""
    place = _place(tmp_path / "home")
    port = free_ports(2)
    with _up(place, "agents.yaml", "--nodes", "2", "--metrics", str(port), "--respawn") as running:
        addresses = running.hello["metrics"]
        assert addresses == {
            "node-1": f"http://127.0.0.1:{port}/metrics",
            "node-2": f"http://127.0.0.1:{port + 1}/metrics",
        }

        def scrape(node: str) -> dict[str, float]:
            with urllib.request.urlopen(addresses[node], timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
            return {name: float(value) for name, _, value in values}

        def running_agents(node: str) -> float:
            name = f'foundation_agents{{node="{node}",status="running"}}'
            return scrape(node).get(name, 0.0)

        agents = place.json("agents")
        for node in addresses:
            _eventually(
                lambda node=node: (
                    running_agents(node) == sum(agent["node"] == node for agent in agents)
                ),
                f"{node} counts its agents",
            )
        home = next(agent["node"] for agent in agents if agent["id"] == "visits")
        place.json("ask", "visits", "counter.add", '{"amount": 1}')
        answered = f'foundation_asks_answered_total{{node="{home}",worker="{home}-w0"}}'
        _eventually(lambda: scrape(home).get(answered) == 1, "its answer is counted")
        leading = [scrape(node)[f'foundation_leader{{node="{node}"}}'] for node in addresses]
        assert sorted(leading) == [0, 1]

        (before,) = (node for node in place.json("nodes") if node["name"] == home)
        os.kill(before["pid"], signal.SIGKILL)

        def again() -> bool:
            with contextlib.suppress(OSError):
                return scrape(home).get(answered, 0) == 0
            return False

        _eventually(again, "the next life serves at the same port, and counts anew", timeout=30)


def test_a_node_that_cannot_start_ends_up_with_its_reason(tmp_path: Path) -> None:
    """A module that does not exist; nothing is left."""
    place = _place(tmp_path / "home")
    code, out, err = place.run("up", "--nodes", "1", "--workers", "1", "--import", "no_such_module")
    assert (code, out) == (1, "")
    assert "no_such_module" in err
    assert list((place.folder / "tmp").iterdir()) == []


def test_a_port_that_is_taken_is_refused_when_asked_for(up: Running, tmp_path: Path) -> None:
    """--port means exactly this one."""
    place = _place(tmp_path / "home")
    port = up.hello["url"].rpartition(":")[2]
    code, _, err = place.run("up", "--nodes", "1", "--port", port)
    assert code == 1
    assert "taken" in err


def test_node_start_joins_and_leaves_in_good_order(up: Running) -> None:
    """With labels, capacity and capabilities; SIGTERM drains and ends with 0."""
    process = up.place.start(
        *("node", "start", "--name", "extra", "--workers", "1", "--label", "zone=b"),
        *("--capacity", "slots=5", "--capability", "gpu", "--log-json"),
    )
    try:

        def joined() -> Any:
            found = [node for node in up.place.json("nodes") if node["name"] == "extra"]
            return found and found[0]["status"] == "up" and found[0]

        node = _eventually(joined, "the node is up")
        assert node["labels"] == {"zone": "b"}
        assert node["capacity"]["slots"] == 5
        assert node["capabilities"] == ["gpu"]
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    for line in err.splitlines():
        json.loads(line)
    assert "extra" not in [node["name"] for node in up.place.json("nodes")]
