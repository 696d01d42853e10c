"""Templates of launcher commands, and the memory of what was started."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from foundation_nats.base.process import process_start
from foundation_nats.config import Config
from foundation_nats.errors import AlreadyExistsError, ConfigError, LaunchError, NodeNotFoundError
from foundation_nats.launch import registry
from foundation_nats.launch.command import CommandLauncher
from foundation_nats.launch.launcher import Ending, LaunchOptions
from foundation_nats.launch.ledger import Ledger
from foundation_nats.launch.local import LocalLauncher
from foundation_nats.launch.template import render

VALUES = {"name": ["n1"], "labels": ["--label", "a=b c"], "imports": [], "servers": ["nats://h:1"]}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("run {name} {labels} {imports} end", ["run", "n1", "--label", "a=b c", "end"]),
        ("run --name={name}", ["run", "--name=n1"]),
        ("sh -c 'x {name} {labels:q}'", ["sh", "-c", "x n1 --label 'a=b c'"]),
        ("ssh h {labels:q}", ["ssh", "h", "--label 'a=b c'"]),
        ("ssh h {servers} {name}", ["ssh", "h", "nats://h:1", "n1"]),
        (
            'k run --overrides=\'{"a":{"b":"{name}"}}\'',
            ["k", "run", '--overrides={"a":{"b":"n1"}}'],
        ),
        ("d ps --format '{{.Names}}' ; rm", ["d", "ps", "--format", "{{.Names}}", ";", "rm"]),
    ],
)
def test_a_template_becomes_arguments_without_a_shell(template: str, expected: list[str]) -> None:
    """A value is never split, and never becomes a command of its own."""
    assert render(template, VALUES) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "empty"),
        ("run 'open", "No closing quotation"),
        ("run {nane}", r"Did you mean \{name\}"),
        ("run {whatever_else}", r"Known: \{imports\}"),
        ("ssh h {labels}", r"\{labels:q\}"),
        ("/usr/bin/ssh h x={labels}", r"\{labels:q\}"),
    ],
)
def test_a_wrong_template_is_refused(template: str, message: str) -> None:
    """What is wrong, and what would be right."""
    with pytest.raises(ConfigError) as caught:
        render(template, VALUES)
    caught.match(message)


def test_a_name_is_given_once_as_long_as_its_process_may_live(state: Path) -> None:
    """A dead one, a reused pid and a broken file free it; a live one and a foreign one don't."""
    ledger = Ledger("c")
    claim = ledger.claim("n1", "local")
    with pytest.raises(AlreadyExistsError, match="n1"):
        ledger.claim("n1", "local")
    own = ledger.record(claim, os.getpid())
    assert own.has_process is True
    assert replace(own, started="1").has_process is False
    assert Ledger("other").get("n1") is None
    (state / "foundation/nodes/c/n1.json").write_text("{broken")
    assert ledger.all() == []
    away = ledger.record(ledger.claim("n1", "command"), 0)
    assert away.has_process is None
    with pytest.raises(AlreadyExistsError):
        ledger.claim("n1", "command")
    ledger.forget(own)  # not the present entry
    assert ledger.get("n1") == away
    ledger.forget(away)
    assert ledger.get("n1") is None


async def test_a_reused_pid_is_never_signalled() -> None:
    """The pid is ours, but the process that was started had another start time."""
    launcher, ledger = LocalLauncher(Config(cluster="c")), Ledger("c")
    entry = ledger.record(ledger.claim("n1", "local"), os.getpid())
    assert entry.started == process_start(os.getpid())
    ledger._write(replace(entry, started="1"))
    assert [item.is_running for item in await launcher.list()] == [False]
    assert await launcher.stop("n1", timeout=1.0) is Ending.GONE
    with pytest.raises(NodeNotFoundError):
        await launcher.stop("n1", timeout=1.0)


async def test_a_state_directory_that_cannot_be_written_is_told(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is started."""
    (state / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(state / "file"))
    with pytest.raises(LaunchError, match="XDG_STATE_HOME"):
        await LocalLauncher(Config(cluster="c")).start("n1", LaunchOptions())


async def test_a_command_launcher_without_a_command_says_how_to_give_one() -> None:
    """For adding; without one for removing, the node is only forgotten."""
    launcher = CommandLauncher(Config(cluster="c"))
    with pytest.raises(ConfigError, match="FOUNDATION_LAUNCHER__ADD"):
        await launcher.start("n1", LaunchOptions())
    with pytest.raises(NodeNotFoundError):
        await launcher.stop("n1", timeout=1.0)


def test_the_whole_command_of_a_node_is_offered_to_templates() -> None:
    """With where to connect, because the environment does not travel."""
    config = Config.load(cluster="c", bus={"servers": ("nats://h:1", "nats://h:2"), "creds": "/k"})
    options = LaunchOptions(workers=2, imports=("m",), labels={"z": "1"}, capacity={"slots": 5})
    values = CommandLauncher(config).values("n1", options)
    assert values["command"] == [
        *("foundation", "node", "start", "--name", "n1", "--workers", "2", "--import", "m"),
        *("--label", "z=1", "--capacity", "slots=5"),
        *("--server", "nats://h:1,nats://h:2", "--cluster", "c", "--creds", "/k"),
    ]


def test_packages_add_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By entry points; one that can't be loaded and one that there is not are told."""
    found = [
        EntryPoint("mine", "foundation_nats.launch.local:LocalLauncher", registry.GROUP),
        EntryPoint("broken", "no_such_module:X", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    config = Config(cluster="c")
    assert isinstance(registry.launcher_of("mine", config), LocalLauncher)
    assert registry.names() == ["broken", "command", "local", "mine"]
    with pytest.raises(ConfigError, match="no_such_module"):
        registry.launcher_of("broken", config)
    with pytest.raises(ConfigError, match="mine"):
        registry.launcher_of("nobody", config)


def test_the_launcher_is_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FOUNDATION_LAUNCHER__…`, as every section; an unknown key is an error."""
    monkeypatch.setenv("FOUNDATION_LAUNCHER__KIND", "command")
    monkeypatch.setenv("FOUNDATION_LAUNCHER__ADD", "run {name}")
    monkeypatch.setenv("FOUNDATION_LAUNCHER__TIMEOUT_S", "5")
    config = Config.load()
    assert (config.launcher.kind, config.launcher.add) == ("command", "run {name}")
    assert config.launcher.timeout_s == 5.0
    monkeypatch.setenv("FOUNDATION_LAUNCHER__ADDD", "x")
    with pytest.raises(ConfigError, match="addd"):
        Config.load()
