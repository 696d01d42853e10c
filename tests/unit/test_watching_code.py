"""What `foundation up --reload` watches, and what it makes of saves."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from foundation_cli import reload


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package, a module elsewhere on the path, and a manifest of its own folder."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("raise RuntimeError('nobody imports me here')")
    (tmp_path / "shop" / "orders.py").write_text("")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stock.py").write_text("")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "agents.yaml").write_text(
        "version: 1\nagents:\n  - {name: a, run: 'shop.orders:Orders'}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    return tmp_path


def test_the_folders_of_the_code_are_found_without_running_it(project: Path) -> None:
    """Packages, modules on PYTHONPATH and the manifest; not the standard library's, not what is below."""
    manifest = project / "deploy" / "agents.yaml"
    runs = reload.runs_of(manifest, ["stock"])
    assert runs == ["shop.orders:Orders", "stock"]
    assert reload.directories([*runs, "nowhere"], manifest) == [
        project / "deploy",
        project / "lib",
        project / "shop",
    ]
    (project / "top.py").write_text("")
    assert reload.directories(["top", "shop.orders:Orders"], None) == [project]


def test_what_is_no_python_is_said_with_its_line(project: Path) -> None:
    """And what was removed meanwhile is no error."""
    bad = project / "shop" / "orders.py"
    bad.write_text("x = 1\n  def f(): pass\n")
    said = reload.broken([project / "gone.py", project / "shop" / "__init__.py", bad]) or ""
    assert said.startswith(f"shop{os.sep}orders.py:2: unexpected indent\n    def f(): pass")
    bad.write_bytes(b"x = 1\0")
    assert "null bytes" in (reload.broken([bad]) or "")
    bad.write_text("x = 1\n")
    assert reload.broken([bad]) is None
    assert reload.names([bad, bad, bad, bad]).endswith("and 1 more")


async def test_saves_that_come_together_are_one_batch(project: Path) -> None:
    """Code and the manifest count; tests, notes, compiled files and what is to be ignored do not."""
    manifest = project / "deploy" / "agents.yaml"
    data = project / "shop" / "data"
    data.mkdir()
    watcher = reload.Watcher([project / "shop", project / "deploy"], manifest, [data])
    async with watcher.open():
        for name in ("notes.txt", "test_orders.py", "conftest.py", "data/x.py", "a.py", "b.py"):
            (project / "shop" / name).write_text("")
        (project / "shop" / "__pycache__").mkdir()
        (project / "shop" / "__pycache__" / "c.py").write_text("")
        # As editors save: to another file, which then takes the place.
        (project / "shop" / "orders.py~").write_text("y = 1\n")
        (project / "shop" / "orders.py~").replace(project / "shop" / "orders.py")
        batch = await asyncio.wait_for(watcher.next(), 10)
        assert [path.name for path in batch.code] == ["a.py", "b.py", "orders.py"]
        assert not batch.is_manifest_changed
        manifest.write_text(manifest.read_text() + "# changed\n")
        batch = await asyncio.wait_for(watcher.next(), 10)
        assert (batch.code, batch.is_manifest_changed) == ((), True)
