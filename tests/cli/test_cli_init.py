"""`foundation init`: what it makes runs, and its own tests pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foundation_cli import init

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program in a folder, with nothing of this machine's settings."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("FOUNDATION_", "NATS_", "PYTEST"))
    }
    env |= {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_CONFIG_HOME": str(tmp_path / "config")}

    def run(
        *arguments: str, cwd: Path = tmp_path, module: str = "foundation_cli.main"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


@pytest.mark.parametrize("template", list(init.Template))
def test_the_tests_of_a_new_project_pass(run: Run, tmp_path: Path, template: init.Template) -> None:
    """Those without a server; one kind also on its two nodes, of which it kills one."""
    made = run("init", "demo", "-t", template, "-o", "json")
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    folder = tmp_path / "demo"
    written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert written == document["files"]
    assert {"agents.yaml", "pyproject.toml", "README.md", ".gitignore"} < set(written)
    assert document["next"][0] == "cd demo"
    assert "@NAME@" not in "".join((folder / name).read_text() for name in written)
    only = [] if template is init.Template.COUNTER else ["--ignore=tests/test_cluster.py"]
    tested = run("-q", "-p", "no:cacheprovider", *only, cwd=folder, module="pytest")
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout
    assert "warning" not in tested.stdout


def test_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    """One file in the way, and none is written."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "agents.yaml").write_text("mine")
    made = run("init", "demo")
    assert made.returncode == 1
    assert "demo has agents.yaml already; nothing was written" in made.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["agents.yaml"]
    (tmp_path / "demo" / "agents.yaml").rename(tmp_path / "demo" / "notes.txt")
    made = run("init", "demo")
    assert made.returncode == 0, made.stderr
    assert "foundation up agents.yaml" in made.stdout
    (tmp_path / "file").write_text("")
    assert "file is a file" in run("init", "file").stderr
    wrong = run("init", "other", "-t", "poem")
    assert wrong.returncode == 2
    assert "counter" in wrong.stderr
