"""The command line from outside: help, usage errors, exit codes, lazy imports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def _run(
    *arguments: str, env: dict[str, str] | None = None, **options: object
) -> tuple[int, str, str]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("FOUNDATION_") and key != "NATS_CONTEXT"
    }
    done = subprocess.run(
        [sys.executable, "-m", "foundation_cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | (env or {}),
        **options,  # type: ignore[call-overload]
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def silent_url() -> str:
    """A URL where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"nats://127.0.0.1:{probe.getsockname()[1]}"


def test_importing_the_command_imports_nothing_heavy() -> None:
    """No NATS, pydantic, rich, asyncio or YAML until a command needs it."""
    program = (
        "import sys, foundation_cli.main\n"
        "heavy = {'nats', 'pydantic', 'rich', 'asyncio', 'ruamel', 'structlog', 'uvloop'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy_either() -> None:
    """What people wait for is the help itself."""
    program = (
        "import sys\nfrom foundation_cli.main import run\ncode = run(['--help'])\n"
        "heavy = {'nats', 'pydantic', 'rich', 'asyncio', 'ruamel', 'structlog'}\n"
        "print(code, sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


_COMMANDS = [
    "up",
    "node start",
    "deploy",
    "plan",
    "scale",
    "delete",
    "rollout status",
    "rollout pause",
    "rollout resume",
    "rollout undo",
    "rollout history",
    "rebalance",
    "drain",
    "cordon",
    "uncordon",
    "status",
    "nodes",
    "agents",
    "agent",
    "deployments",
    "leader",
    "failover",
    "topology",
    "resources",
    "resources check",
    "resources reserve",
    "resources confirm",
    "resources release",
    "send",
    "ask",
    "tap",
    "events",
    "dead list",
    "dead show",
    "dead replay",
    "dead discard",
    "consensus list",
    "consensus show",
    "consensus log",
    "lease list",
    "doctor",
    "chaos",
    "discovery resolve",
    "discovery announce",
]


def test_every_command_has_help_with_an_example_and_the_shared_options() -> None:
    """In one process, for speed."""
    program = (
        "import contextlib, io, sys\nfrom foundation_cli.main import run\n"
        "for line in sys.stdin:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        code = run([*line.split(), '--help'])\n"
        "    text = out.getvalue()\n"
        "    assert code == 0, line\n"
        "    assert 'Example: foundation ' + line.strip() in text, text\n"
        "    for option in ('--server', '--cluster', '--creds', '--context', '--output'):\n"
        "        assert option in text, (line, option)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(_COMMANDS) + "\n",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stats"], "Did you mean 'status'"),
        (["nodes", "drain", "n1"], "Did you mean `foundation drain`?"),
        (["undo", "x"], "Did you mean `foundation rollout undo`?"),
        (["scale", "x"], "'N'"),
        (["scale", "x", "-1"], "-1"),
        (["deploy", "no-such-file.yaml"], "no-such-file.yaml"),
        (["send", "x", "t", "{a:1}"], "line 1, column 2"),
        (["send", "a.b", "t"], "a.b"),
        (["send", "x", "a b"], "a b"),
        (["ask", "x", "t", "--timeout", "3q"], "3q"),
        (["agents", "--status", "runing"], "runing"),
        (["lease", "list", "--kind", "locks"], "locks"),
        (["node", "start", "--label", "zone"], "zone"),
        (["node", "start", "--capacity", "slots=many"], "many"),
        (["up", "-s", "nats://127.0.0.1:1"], "node start"),
        (["up", "--cluster", "a.b"], "a.b"),
        (["dead", "show", "x"], "NUMBER"),
        (["-o", "xml", "status"], "xml"),
        ([], "Usage"),
        (["dead"], "Usage"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what(arguments: list[str], said: str) -> None:
    """On stderr; stdout stays empty."""
    code, out, err = _run(*arguments)
    assert code == 2
    assert said in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_usage_error_is_json_with_o_json(place: str) -> None:
    """Even when the arguments could not be parsed to their end."""
    arguments = ["scale", "x"]
    arguments = ["-o", "json", *arguments] if place == "before" else [*arguments, "--output=json"]
    code, _, err = _run(*arguments)
    assert code == 2
    assert json.loads(err)["error"]["code"] == "usage"


def test_nobody_listening_is_exit_code_3(silent_url: str) -> None:
    """Options count before and after the command; the last one wins."""
    for arguments in (
        ["-s", silent_url, "status"],
        ["status", "-s", silent_url],
        ["-s", "nats://127.0.0.1:1", "agents", "-s", silent_url],
        ["dead", "-s", silent_url, "list"],
    ):
        code, out, err = _run(*arguments, "--timeout", "1s")
        assert (code, out) == (3, "")
        assert silent_url in err
        assert "foundation up" in err
        assert len(err.splitlines()) == 1


def test_an_unreachable_cluster_is_json_with_o_json(silent_url: str) -> None:
    """The four fields of the contract."""
    env = {"FOUNDATION_SERVER": silent_url}
    code, out, err = _run("nodes", "-o", "json", "--timeout", "500ms", env=env)
    assert (code, out) == (3, "")
    error = json.loads(err)["error"]
    assert set(error) == {"code", "message", "hint", "details"}
    assert error["code"] == "bus.unavailable"


def test_completion_is_silent_when_nothing_answers(silent_url: str, tmp_path: Path) -> None:
    """A shell's prompt is no place for an error."""
    env = {
        "_FOUNDATION_COMPLETE": "complete_bash",
        "COMP_WORDS": f"foundation -s {silent_url} agent vi",
        "COMP_CWORD": "4",
    }
    code, out, err = _run(env=env)
    assert (code, out.strip(), err) == (0, "", "")


def test_commands_complete(silent_url: str) -> None:
    """Typer's own completion knows our commands."""
    env = {
        "_FOUNDATION_COMPLETE": "complete_bash",
        "COMP_WORDS": "foundation stat",
        "COMP_CWORD": "1",
    }
    code, out, _ = _run(env=env)
    assert (code, out.split()) == (0, ["status"])


def test_the_version_is_shown() -> None:
    """As the package says it."""
    code, out, _ = _run("--version")
    assert code == 0
    assert out.startswith("foundation ")
