"""Nothing is left behind: processes, temporary directories and sockets, before and after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from foundation_nats import Cluster
from foundation_nats.base.process import die_with_parent
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import api
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


def listening(directory: Path) -> set[int]:
    """Ports on which a process listens that has *directory* in its environment."""
    found: set[int] = set()
    for pid in with_environment(directory):
        try:
            connections = psutil.Process(pid).net_connections("inet")
        except psutil.Error:
            continue
        found |= {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}
    return found


def with_environment(directory: Path) -> set[int]:
    """The living processes whose TMPDIR is *directory*: what was started from there, all of it."""
    found: set[int] = set()
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("TMPDIR") == str(directory)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_up_leaves_nothing_however_it_ends(how: signal.Signals, tmp_path: Path) -> None:
    """Processes and ports are gone at once; the store that SIGKILL leaves, the next start removes.

    The logs of one that was killed stay, to be read.
    """
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PYTHONPATH": os.pathsep.join([str(AGENTS), os.environ.get("PYTHONPATH", "")]),
    }

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "foundation_cli.main", "up", "--workers", "1"]
        return subprocess.Popen(
            [*command, "--nodes", "2", "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            preexec_fn=die_with_parent(os.getpid()),
        )

    up = start()
    first = up.pid
    try:
        assert up.stdout is not None
        assert up.stdout.readline(), "up has ended"
        # up, nats-server, two managers, two workers
        assert len(with_environment(temporary)) >= 6
        assert listening(temporary)
        assert list(temporary.iterdir())
        up.send_signal(how)
        up.wait(timeout=30)
    finally:
        up.kill()
        up.communicate()
    await eventually(lambda: not with_environment(temporary), message="no process is left")
    assert not listening(temporary)
    if how is signal.SIGKILL:
        # Nobody was there to tidy up; the directories are private, and taken away by the next.
        left = {path.name for path in temporary.iterdir()}
        up = start()
        try:
            assert up.stdout is not None
            assert up.stdout.readline(), "up has ended"
            assert not left & {path.name for path in temporary.iterdir()}
        finally:
            up.send_signal(signal.SIGINT)
            up.communicate(timeout=30)
        await eventually(lambda: not with_environment(temporary), message="no process is left")
    assert list(temporary.iterdir()) == []
    runtime = tmp_path / "run"
    left = {path.parent.name for path in runtime.rglob("*") if path.is_file()}
    assert left <= ({f"default-{first}"} if how is signal.SIGKILL else set())


async def test_a_cluster_under_test_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and frozen nodes, a client, a server: after the `async with` there is nothing."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    try:
        async with (
            TestServer() as server,
            TestCluster(nodes=3, path=[str(AGENTS)], server=server) as nodes,
            Cluster.connect(config=nodes.config) as client,
        ):
            await client.agents.start("fleet:Counter", id="c")
            victims = list(nodes.nodes.values())
            victims[0].kill_all()
            victims[1].kill()
            victims[2].pause()
            assert list(tmp_path.iterdir())
        await eventually(lambda: not with_environment(tmp_path), message="no process is left")
        assert list(tmp_path.iterdir()) == []
    finally:
        monkeypatch.undo()


async def test_what_is_deleted_leaves_no_keys(server: TestServer) -> None:
    """Agents that come and go: no record, no wish, no consumer and no subscription stays."""
    async with TestCluster(nodes=1, path=[str(AGENTS)], server=server) as nodes:
        cluster = nodes.client

        async def measured() -> dict[str, int]:
            found = {}
            for bucket in ("agents", "desired", "leases", "coordination"):
                stream = cluster.subjects.bucket_stream(bucket)
                entries = await Bucket(cluster.bus, cluster.subjects, bucket).read_all()
                found[bucket] = sum(entry.value is not None for entry in entries.values())
                info = await api(cluster.bus, "STREAM.INFO", stream)
                found[f"{bucket} consumers"] = int(info["state"]["consumer_count"])
            info = await api(cluster.bus, "STREAM.INFO", cluster.subjects.signals_stream)
            found["signals consumers"] = int(info["state"]["consumer_count"])
            return found

        async def come_and_go() -> None:
            text = 'version: 1\nagents: [{name: c, run: "fleet:Counter", replicas: 20}]'
            await cluster.deployments.apply(text)
            await cluster.deployments.wait_settled(["c"], timeout=20)
            await cluster.agents.start("fleet:Counter", id="single")
            await cluster.send("deployment:c", "counter.add", {"amount": 1})
            await cluster.deployments.delete("c")
            await cluster.agents.stop("single")
            await eventually(quiet, timeout=20, message="they are gone")

        async def quiet() -> bool:
            return await cluster.agents.list() == []

        await come_and_go()  # what the client opens at its first use stays open
        before = await measured()
        for _ in range(3):
            await come_and_go()

        async def as_before() -> bool:
            assert await measured() == before
            return True

        await eventually(as_before, message="as before")
