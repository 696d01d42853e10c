"""What is published works: wheel and sdist, installed into an empty environment outside the repository."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import orjson
import pytest

from foundation_nats.testing import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[2]

AGENT = """
from foundation_nats import Agent, Signal, State, on

class Greeter(Agent):
    class State(State):
        greeted: int = 0

    @on("hello")
    async def hello(self, signal: Signal) -> str:
        self.state.greeted += 1
        return f"hello number {self.state.greeted}"
"""

MANIFEST = """
version: 1
agents:
  - name: greeter
    run: greeter:Greeter
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel and sdist."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target)]
    done = subprocess.run(
        [*command, str(REPOSITORY)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_wheel_and_sdist_hold_what_they_should(dist: Path) -> None:
    """Three packages with their type markers, the entry point, and no tests; the sdist has all."""
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("foundation_nats", "foundation_schemas", "foundation_cli"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "foundation_cli/templates/counter/tests/test_counter.py.in" in names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "schemas/"))]
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "Makefile", "tests/conftest.py"} <= members


async def test_the_wheel_runs_a_cluster_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    """pip install the wheel, `foundation up` with an agent of one's own, ask it, Ctrl-C."""
    (wheel,) = dist.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_RUNTIME_DIR": str(tmp_path / "runtime"),
    }
    (tmp_path / "runtime").mkdir(mode=0o700)
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", str(wheel)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    work.mkdir()
    (work / "greeter.py").write_text(AGENT)
    (work / "agents.yaml").write_text(MANIFEST)
    foundation = str(home / "bin" / "foundation")
    log = tmp_path / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(
            [foundation, "--cluster", "wheel", "up", "agents.yaml", "--store", str(tmp_path / "s")],
            cwd=work,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:

        def answer() -> str | None:
            assert up.poll() is None, log.read_text()
            asked = subprocess.run(
                [foundation, "--cluster", "wheel", "ask", "greeter", "hello", "-o", "json"],
                capture_output=True,
                text=True,
                cwd=work,
                env=environment,
                timeout=20,
                check=False,
            )
            return asked.stdout if asked.returncode == 0 else None

        text = await eventually(answer, timeout=40, every=0.3, message="the agent answers")
        assert text is not None
        assert "hello number" in orjson.loads(text)
    finally:
        up.send_signal(signal.SIGINT)
        code = up.wait(timeout=30)
    assert code == 0, log.read_text()
