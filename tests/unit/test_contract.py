"""The description of the wire: it is as the code is, whole, and what it says of manifests holds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from foundation_cli.main import run
from foundation_nats.api.contract import asyncapi, channels, documents, wire_schemas
from foundation_nats.bus.subjects import Subjects
from foundation_nats.control import manifest
from foundation_nats.control.manifest_schema import manifest_schema
from foundation_nats.errors import ManifestError
from foundation_nats.signaling.envelope import encode_envelope
from foundation_schemas import Target

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "schemas"
FULL = """
version: 1
name: shop
cluster: {min_nodes: 3}
agents:
  - name: counter
    run: pack.module:Counter
    replicas: 4
    tier: core
    critical: true
    durable: true
    capabilities: [counting]
    resources: {slots: 1, gpu: 0.5}
    placement:
      strategy: spread
      require: [gpu]
      prefer: [fast]
      spread: {label: zone, max_skew: 2, when_unsatisfiable: anyway}
      labels: {zone: a}
      expressions: ["zone in (a, b)"]
      anti_affinity: zone
      max_per_node: 3
    on_node_loss: restart
    config: {deep: [1, {a: null}]}
    restart: transient
    restart_limit: {max_restarts: 5, within_s: 10}
    rate: {per_s: 20, burst: 5, per_sender: 2}
    labels: {tier: gold}
    subscribe: [orders.>, {topic: prices, mode: one-of-group, group: g}]
    update: {max_unavailable: 10%, progress_deadline_s: 5, rollback: false}
    autoscale: {min: 1, max: 9, backlog: 100}
"""


def test_what_is_committed_is_what_the_code_says() -> None:
    """After a change of a model or subject: `foundation schema export schemas`."""
    wanted = documents()
    there = {
        path.relative_to(FOLDER).as_posix(): path.read_text()
        for path in [*FOLDER.glob("*.json"), *FOLDER.glob("*.yaml"), *FOLDER.glob("json/*")]
    }
    assert sorted(there) == sorted(wanted)
    stale = [name for name, text in wanted.items() if there[name] != text]
    assert stale == [], "run `foundation schema export schemas`"


def test_every_schema_is_one() -> None:
    for schema in [*wire_schemas().values(), manifest_schema()]:
        Draft202012Validator.check_schema(schema)


def test_a_signal_on_the_wire_fits_its_schema() -> None:
    """And a wrong one does not: the schema says something."""
    validator = Draft202012Validator(wire_schemas()["Envelope"])
    body = json.loads(
        encode_envelope(id="1", source="client:x", type="a.b", target="agent:y", data={"a": 1})
    )
    assert validator.is_valid(body)
    assert not validator.is_valid({**body, "id": ""})
    assert not validator.is_valid({key: body[key] for key in body if key != "source"})


def test_every_subject_is_described() -> None:
    """A new subject without a channel fails here."""
    described = {channel.address for channel in channels()}
    patterns = ("*", ">", "{{wildcard")
    names = Subjects("{cluster}")
    missing = []
    for name, member in inspect.getmembers(Subjects, inspect.isfunction):
        parameters = list(inspect.signature(member).parameters)[1:]
        if name.startswith("_") or name in ("web", "route", "control_node", "control_worker"):
            continue  # of these the channels are single verbs and kinds
        address = member(names, *(f"{{{parameter}}}" for parameter in parameters))
        if not address.startswith("fnd.") or any(word in address for word in patterns):
            continue
        if address not in described and not name.startswith("domain_"):
            missing.append(name)
    assert missing == []
    route = names.route(Target.parse("capability:x")).replace("capability.x", "{kind}.{name}")
    assert route in described
    assert any(address.startswith("fnd.{cluster}.web.{port}.") for address in described)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi()
    found = set(_references(document))
    assert len(found) > 40
    for reference in found:
        here: Any = document
        for part in reference.removeprefix("#/").split("/"):
            here = here[part]


def _accepts(text: str) -> tuple[bool, bool]:
    """Whether the schema and whether the parser takes a manifest."""
    try:
        manifest.parse(text)
        parsed = True
    except ManifestError:
        parsed = False
    value = YAML(typ="safe").load(text)
    return Draft202012Validator(manifest_schema()).is_valid(value), parsed


def test_a_manifest_with_every_key_passes() -> None:
    """Every key that the parser knows is in it, so a key added there has to be added here."""
    whole = YAML(typ="safe").load(FULL)
    agent = whole["agents"][0]
    assert set(whole) == set(manifest.TOP_KEYS)
    assert set(agent) == {*manifest.AGENT_KEYS, *manifest.SECTIONS}
    assert set(agent["placement"]) == set(manifest.PLACEMENT_KEYS)
    assert _accepts(FULL) == (True, True)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("version: 1", "version: 2"),
        ("name: shop", "name: 7"),
        ("min_nodes: 3", "min_nodes: 0"),
        ("min_nodes: 3", "min_node: 3"),
        ("tier: core", "tier: crore"),
        ("name: counter", "nmae: counter"),
        ("name: counter", "name: a.b"),
        ("run: pack.module:Counter", "run: pack.module.Counter"),
        ("strategy: spread", "strategie: spread"),
        ("max_skew: 2", "max_skew: 0"),
        ("restart: transient", "restart: sometimes"),
        ("on_node_loss: restart", "on_node_loss: panic"),
        ("critical: true", "critical: 'yes'"),
        ("replicas: 4", "replicas: -1"),
        ("rollback: false", "rollbak: false"),
        ("group: g", "grup: g"),
        ("max_restarts: 5", "max_restart: 5"),
    ],
)
def test_what_the_parser_refuses_the_schema_marks(right: str, wrong: str) -> None:
    assert FULL.count(right) >= 1
    assert _accepts(FULL.replace(right, wrong, 1)) == (False, False)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/manifest.yaml")), ids=str)
def test_the_examples_fit(path: Path) -> None:
    assert _accepts(path.read_text()) == (True, True)


def test_export_writes_checks_and_describes_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    folder = str(tmp_path / "out")
    arguments = ["schema", "export", folder, "--import", "examples.census.agents", "-o", "json"]
    assert run([*arguments, "--check"]) == 6
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert "examples.census.agents:Analyser" in told["agents"]
    assert told["changed"] == told["files"]
    said = json.loads((tmp_path / "out/agents/examples.census.agents.Analyser.json").read_text())
    assert set(said["signals"]["census.analyse"]["payload"]["properties"]) == {"root", "path"}
    assert set(said["state"]["properties"]) == {"files"}
    document = YAML(typ="safe").load((tmp_path / "out/asyncapi.yaml").read_text())
    message = "examples_census_agents_Analyser_census_analyse"
    assert message in document["channels"]["ask"]["messages"]
    assert document["components"]["messages"][message]["name"] == "census.analyse"


def test_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "export", "--check", "--import", "no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().err
