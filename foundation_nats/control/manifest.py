"""Reads a manifest (YAML, ``version: 1``) into deployments and writes deployments as one; errors name line and remedy.

Pure, except that `load` reads a file. Nothing is guessed: an unknown key, a
key given twice, a wrong type or a name that would collide is an error that
says where it is and what would be right. Values of ``config`` must be plain
JSON, because they travel to other machines and languages.

Besides agents a manifest may say what a deploy shall wait for (``cluster``): that is for the one
who deploys it and no wish, so it is stored nowhere, and several manifests never disagree on it.

A manifest says nothing about revisions and about how an agent was started, so
that `export` followed by `parse` keeps everything but `revision`,
`standalone` and `manifest`; what it said of the cluster is not in the deployments.

Its name tells apart the manifests of one cluster: what `deploy --prune` deletes is what the same
manifest had applied and doesn't name any more.
"""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from foundation_nats.control.collision import find_collision
from foundation_nats.errors import ManifestError
from foundation_nats.placement.strategies import STRATEGIES, known_strategies
from foundation_schemas import (
    AgentSpec,
    Autoscale,
    Deployment,
    NodeLoss,
    OnNodeLoss,
    PlacementPolicy,
    RateLimit,
    RestartLimit,
    Tier,
    UpdatePolicy,
    WhenUnsatisfiable,
)
from foundation_schemas.deployment import REPLICAS_MAX

VERSION = 1
TEXT_MAX = 8 * 1024 * 1024
_ITEMS_MAX = 200_000
_DEPTH_MAX = 32

TOP_KEYS = ("version", "name", "cluster", "agents")
CLUSTER_KEYS = ("min_nodes",)
PLACEMENT_KEYS = (
    "strategy",
    "require",
    "prefer",
    "spread",
    "labels",
    "expressions",
    "anti_affinity",
    "max_per_node",
)
SPREAD_KEYS = ("label", "max_skew", "when_unsatisfiable")
AGENT_KEYS = (
    "name",
    "run",
    "replicas",
    "tier",
    "critical",
    "durable",
    "capabilities",
    "resources",
    "placement",
    "on_node_loss",
    "config",
    "restart",
    "restart_limit",
    "rate",
    "labels",
    "subscribe",
)
SUBSCRIBE_KEYS = ("topic", "mode", "group")
SECTIONS: dict[str, type[BaseModel]] = {"update": UpdatePolicy, "autoscale": Autoscale}
"""Keys of an agent that say how its deployment changes, not what runs."""
RESTART_WORDS = ("permanent", "transient", "temporary")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says."""

    deployments: list[Deployment]
    """What shall run, in its order."""
    min_nodes: int = 0
    """A deploy waits until so many nodes are up."""
    name: str = ""
    """What tells it from other manifests; its deployments carry it, too."""

    @property
    def owners(self) -> frozenset[str]:
        """The manifests whose other deployments it replaces when it is told to prune."""
        return frozenset(item.manifest for item in self.deployments) or frozenset([self.name])


def load(path: str | Path) -> list[Deployment]:
    """The deployments of the manifest at *path*.

    Raises:
        ManifestError: see `load_manifest`.
    """
    return load_manifest(path).deployments


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest at *path*; one that says no name has that of the file, without its ending.

    Raises:
        ManifestError: it can't be read, or it is wrong; says what, where, and what would be right.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"There is no file {file}.", hint="Check the path.") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{file} is not UTF-8 text.") from error
    except OSError as error:
        raise ManifestError(f"{file} can't be read: {error.strerror}.") from error
    return parse_manifest(text, source=str(file), name=file.stem)


def parse(text: str, *, source: str = "manifest") -> list[Deployment]:
    """The deployments that a manifest asks for, in its order.

    Raises:
        ManifestError: says what is wrong, where, and what would be right; `details` has
            ``line`` and ``source``.
    """
    return parse_manifest(text, source=source).deployments


def parse_manifest(text: str, *, source: str = "manifest", name: str = "") -> Manifest:
    """All that a manifest says.

    Args:
        name: its name if it says none.

    Raises:
        ManifestError: see `parse`.
    """
    return _Parser(source, name).parse(text)


def check_collisions(deployments: Iterable[Deployment]) -> None:
    """Refuse wishes of which two stand for an agent of the same id.

    Raises:
        ManifestError: names both.
    """
    found = find_collision(deployments)
    if found is not None:
        agent, first, second = found
        raise ManifestError(
            f"{first!r} and {second!r} would both stand for an agent {agent!r}.",
            hint="Rename one of them.",
            agent=agent,
        )


class _Parser:
    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name
        self._items = 0

    def _fail(
        self, line: int | None, message: str, hint: str | None = None, **more: Any
    ) -> NoReturn:
        where = self._source if line is None else f"{self._source}, line {line}"
        raise ManifestError(
            f"{where}: {message}", hint=hint, line=line, source=self._source, **more
        )

    def parse(self, text: str) -> Manifest:
        if len(text) > TEXT_MAX:
            self._fail(None, f"is larger than {TEXT_MAX // 1024 // 1024} MiB.")
        root = self._read(text)
        if not isinstance(root, CommentedMap):
            what = "is empty" if root is None else f"starts with {_kind(root)}"
            self._fail(1, f"{what}, not with keys.", "Begin with `version: 1` and `agents:`.")
        self._check_keys(root, TOP_KEYS, "the manifest")
        if "version" not in root:
            self._fail(1, "the key 'version' is missing.", "Add `version: 1` as the first line.")
        version = root["version"]
        if isinstance(version, bool) or version != VERSION:
            self._fail(
                _line(root, "version"),
                f"version is {version!r}; this release reads {VERSION}.",
                f"Write `version: {VERSION}`.",
            )
        if "agents" not in root:
            self._fail(1, "the key 'agents' is missing.", "Add `agents:` with a list below it.")
        if root.get("name") is not None:
            self._name = self._text(root, "name")
        min_nodes = self._min_nodes(root)
        agents = root["agents"]
        if agents is None:
            return Manifest([], min_nodes, self._name)
        if not isinstance(agents, CommentedSeq):
            self._fail(
                _line(root, "agents"),
                f"'agents' is {_kind(agents)}, not a list.",
                "Begin each agent with `- name: …`.",
            )
        deployments: list[Deployment] = []
        lines: dict[str, int] = {}
        for index, item in enumerate(agents):
            line = agents.lc.item(index)[0] + 1
            deployment = self._agent(item, line)
            name_line = _line(item, "name")
            if deployment.name in lines:
                self._fail(
                    name_line,
                    f"the name {deployment.name!r} is taken by line {lines[deployment.name]}.",
                    "Give each agent its own name; for several of one kind use `replicas`.",
                )
            lines[deployment.name] = name_line
            deployments.append(deployment)
        collision = find_collision(deployments)
        if collision is not None:
            agent, first, second = collision
            self._fail(
                lines[second],
                f"the id {agent!r} is also that of a replica of {first!r} (line {lines[first]}).",
                "Rename one of them.",
                agent=agent,
            )
        return Manifest(deployments, min_nodes, self._name)

    def _min_nodes(self, root: CommentedMap) -> int:
        cluster = root.get("cluster")
        if cluster is None:
            return 0
        if not isinstance(cluster, CommentedMap):
            self._wrong(root, "cluster", "keys such as {min_nodes: 3}")
        self._check_keys(cluster, CLUSTER_KEYS, "'cluster'")
        if cluster.get("min_nodes") is None:
            return 0
        return self._positive(cluster, "min_nodes")

    def _read(self, text: str) -> Any:
        yaml = YAML(typ="rt")
        yaml.allow_duplicate_keys = False
        try:
            return yaml.load(text)
        except DuplicateKeyError as error:
            mark = error.problem_mark
            key = re.search(r'found duplicate key "?([^"\s]+)"?', str(error.problem or ""))
            self._fail(
                None if mark is None else mark.line + 1,
                f"the key {key[1] if key else '?'!r} is given twice.",
                "Remove one of them.",
            )
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._fail(
                None if mark is None else mark.line + 1,
                f"is not valid YAML: {error.problem or error.context}.",
                "Check the indentation and quotes there.",
            )
        except (YAMLError, ValueError, RecursionError) as error:
            self._fail(None, f"is not valid YAML: {str(error) or type(error).__name__}.")

    def _check_keys(self, found: CommentedMap, allowed: Sequence[str], what: str) -> None:
        for key in found:
            if key in allowed:
                continue
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Valid keys: {', '.join(allowed)}."
            self._fail(
                _line(found, key), f"unknown key {str(key)!r} in {what}.", hint, key=str(key)
            )

    def _agent(self, item: Any, line: int) -> Deployment:
        if not isinstance(item, CommentedMap):
            self._fail(
                line, f"an agent is {_kind(item)}, not keys and values.", "Write `- name: …`."
            )
        name = item.get("name")
        what = f"agent {name!r}" if isinstance(name, str) else "an agent"
        self._check_keys(item, (*AGENT_KEYS, *SECTIONS), what)
        for needed, example in (("name", "name: counter"), ("run", "run: my_module:MyAgent")):
            if item.get(needed) is None:
                self._fail(line, f"{what} has no {needed!r}.", f"Add `{example}`.")
        spec: dict[str, Any] = {"run": self._text(item, "run")}
        for key in ("critical", "durable"):
            if item.get(key) is not None:
                spec[key] = self._flag(item, key)
        if item.get("capabilities") is not None:
            spec["capabilities"] = self._texts(item, "capabilities")
        if item.get("resources") is not None:
            spec["resources"] = self._resources(item)
        if item.get("placement") is not None:
            spec["placement"] = self._placement(item, what)
        if item.get("on_node_loss") is not None:
            spec["on_node_loss"] = self._on_node_loss(item, what)
        if item.get("restart") is not None:
            spec["restart"] = self._choice(item, "restart", RESTART_WORDS)
        if item.get("restart_limit") is not None:
            spec["restart_limit"] = self._section(item, "restart_limit", RestartLimit)
        if item.get("rate") is not None:
            spec["rate"] = self._section(item, "rate", RateLimit)
        if item.get("config") is not None:
            spec["config"] = self._config(item)
        if item.get("labels") is not None:
            spec["labels"] = self._labels(item)
        if item.get("subscribe") is not None:
            spec["subscribe"] = self._subscribe(item)
        values: dict[str, Any] = {"name": self._text(item, "name"), "spec": spec}
        values["manifest"] = self._name
        if item.get("replicas") is not None:
            values["replicas"] = self._replicas(item)
        if item.get("tier") is not None:
            values["tier"] = self._choice(item, "tier", [tier.value for tier in Tier])
        for key, kind in SECTIONS.items():
            if item.get(key) is not None:
                values[key] = self._section(item, key, kind)
        try:
            return Deployment.model_validate(values)
        except ValidationError as error:
            self._refused(error, item, line, what)

    def _labels(self, found: CommentedMap) -> dict[str, str]:
        labels = found["labels"]
        if not isinstance(labels, CommentedMap):
            self._wrong(found, "labels", "keys and texts such as {zone: a}")
        return {str(key): self._text(labels, key) for key in labels}

    def _on_node_loss(self, item: CommentedMap, what: str) -> str | dict[str, Any]:
        """A word, or the word and how long the agent waits for its node first."""
        words = [policy.value for policy in OnNodeLoss]
        found = item["on_node_loss"]
        if not isinstance(found, CommentedMap):
            return self._choice(item, "on_node_loss", words)
        self._check_keys(found, tuple(NodeLoss.model_fields), f"'on_node_loss' of {what}")
        if found.get("policy") is None:
            self._fail(
                _line(item, "on_node_loss"),
                "'on_node_loss' has no 'policy'.",
                f"Add `policy: …`, one of {', '.join(words)}.",
                key="on_node_loss.policy",
            )
        policy = self._choice(found, "policy", words)
        grace = found.get("grace_s")
        if grace is None:
            return policy
        if isinstance(grace, bool) or not isinstance(grace, int | float):
            self._wrong(found, "grace_s", "a number of seconds")
        if not (math.isfinite(grace) and grace > 0):
            self._fail(
                _line(found, "grace_s"),
                f"'grace_s' is {grace}, not more than 0.",
                "Leave it out to wait no time (`unavailable`: for ever).",
                key="on_node_loss.grace_s",
            )
        return {"policy": policy, "grace_s": float(grace)}

    def _subscribe(self, item: CommentedMap) -> list[Any]:
        """Topics: texts, or keys and values; what they say is checked with the whole."""
        found = item["subscribe"]
        if not isinstance(found, CommentedSeq):
            self._wrong(item, "subscribe", "a list of topics")
        topics: list[Any] = []
        for topic in found:
            if isinstance(topic, CommentedMap):
                self._check_keys(topic, SUBSCRIBE_KEYS, "'subscribe'")
                topics.append({str(name): value for name, value in topic.items()})
            else:
                topics.append(topic)
        return topics

    def _section(self, item: CommentedMap, key: str, kind: type[BaseModel]) -> dict[str, Any]:
        """A mapping whose keys are the fields of *kind*; the values are checked with the whole."""
        found = item[key]
        if not isinstance(found, CommentedMap):
            self._wrong(item, key, "keys and values")
        self._check_keys(found, tuple(kind.model_fields), f"{key!r}")
        return {str(name): value for name, value in found.items()}

    def _refused(
        self, error: ValidationError, item: CommentedMap, line: int, what: str
    ) -> NoReturn:
        first = error.errors()[0]
        path = [part for part in first["loc"] if part != "spec"]
        message = str(first["msg"]).removeprefix("Value error, ")
        here: Any = item
        for part in path:
            if isinstance(here, CommentedMap) and part in here:
                line = _line(here, part)
            elif isinstance(here, CommentedSeq) and isinstance(part, int) and part < len(here):
                line = here.lc.item(part)[0] + 1
            else:
                break
            here = here[part]
        key = ".".join(str(part) for part in path)
        hint = "Write it as `module:Class`." if key == "run" else None
        self._fail(line, f"{key or what}: {message}.", hint, key=key)

    # ---- typed values ---------------------------------------------------------------

    def _wrong(self, found: CommentedMap, key: str, wanted: str) -> NoReturn:
        self._fail(
            _line(found, key),
            f"{key!r} is {_kind(found[key])}, not {wanted}.",
            'Put it in quotes: `"…"`.' if wanted == "text" else None,
            key=key,
        )

    def _text(self, found: CommentedMap, key: str) -> str:
        if not isinstance(found[key], str):
            self._wrong(found, key, "text")
        return str(found[key])

    def _flag(self, found: CommentedMap, key: str) -> bool:
        # ruamel's own booleans are integers that know their line.
        if type(found[key]).__name__ not in ("bool", "ScalarBoolean"):
            self._wrong(found, key, "true or false")
        return bool(found[key])

    def _choice(self, found: CommentedMap, key: str, allowed: Sequence[str]) -> str:
        value = found[key]
        if value in allowed:
            return str(value)
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        self._fail(
            _line(found, key),
            f"{key!r} is {str(value)!r}, not one of {', '.join(allowed)}.",
            f"Did you mean {near[0]!r}?" if near else None,
            key=key,
        )

    def _texts(self, found: CommentedMap, key: str) -> list[str]:
        value = found[key]
        if not isinstance(value, CommentedSeq):
            self._wrong(found, key, "a list such as [a, b]")
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self._fail(
                    value.lc.item(index)[0] + 1,
                    f"{key!r} holds {_kind(item)}, not text.",
                    'Put it in quotes: `"…"`.',
                    key=key,
                )
        return [str(item) for item in value]

    def _replicas(self, found: CommentedMap) -> int:
        value = found["replicas"]
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(found, "replicas", "a whole number")
        if not 0 <= value <= REPLICAS_MAX:
            self._fail(
                _line(found, "replicas"),
                f"'replicas' is {int(value)}, not between 0 and {REPLICAS_MAX:,}.",
                key="replicas",
            )
        return int(value)

    def _resources(self, found: CommentedMap) -> dict[str, float]:
        value = found["resources"]
        if not isinstance(value, CommentedMap):
            self._wrong(found, "resources", "keys and numbers such as {cpu: 1}")
        amounts: dict[str, float] = {}
        for key, amount in value.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float):
                self._fail(
                    _line(value, key),
                    f"resource {str(key)!r} is {_kind(amount)}, not a number.",
                    key=f"resources.{key}",
                )
            if not math.isfinite(amount) or amount < 0:
                self._fail(
                    _line(value, key),
                    f"resource {str(key)!r} is {amount}, not a number of 0 or more.",
                    key=f"resources.{key}",
                )
            amounts[str(key)] = float(amount)
        return amounts

    def _placement(self, found: CommentedMap, what: str) -> dict[str, Any]:
        value = found["placement"]
        if not isinstance(value, CommentedMap):
            self._wrong(found, "placement", "keys such as {strategy: spread}")
        self._check_keys(value, PLACEMENT_KEYS, f"placement of {what}")
        policy: dict[str, Any] = {}
        if value.get("strategy") is not None:
            known = STRATEGIES if value["strategy"] in STRATEGIES else known_strategies()
            policy["strategy"] = self._choice(value, "strategy", known)
        for key in ("require", "prefer"):
            if value.get(key) is not None:
                policy[key] = self._texts(value, key)
        if value.get("spread") is not None:
            policy["spread"] = self._spread(value, what)
        if value.get("labels") is not None:
            policy["labels"] = self._labels(value)
        if value.get("expressions") is not None:
            policy["expressions"] = self._texts(value, "expressions")
        apart = value.get("anti_affinity")
        if apart is not None:
            if isinstance(apart, str):
                policy["anti_affinity"] = str(apart)
            elif type(apart).__name__ in ("bool", "ScalarBoolean"):
                policy["anti_affinity"] = bool(apart)
            else:
                self._wrong(value, "anti_affinity", "true, false or a label's name")
        if value.get("max_per_node") is not None:
            policy["max_per_node"] = self._positive(value, "max_per_node")
        return policy

    def _spread(self, found: CommentedMap, what: str) -> Any:
        value = found["spread"]
        if isinstance(value, str):
            return str(value)
        if not isinstance(value, CommentedMap):
            self._wrong(
                found, "spread", "a label's name or keys such as {label: zone, max_skew: 1}"
            )
        self._check_keys(value, SPREAD_KEYS, f"spread of {what}")
        if value.get("label") is None:
            self._fail(
                _line(found, "spread"),
                "'spread' has no 'label'.",
                "Add `label: zone`.",
                key="spread",
            )
        spread: dict[str, Any] = {"label": self._text(value, "label")}
        if value.get("max_skew") is not None:
            spread["max_skew"] = self._positive(value, "max_skew")
        if value.get("when_unsatisfiable") is not None:
            allowed = [choice.value for choice in WhenUnsatisfiable]
            spread["when_unsatisfiable"] = self._choice(value, "when_unsatisfiable", allowed)
        return spread

    def _positive(self, found: CommentedMap, key: str) -> int:
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(found, key, "a whole number")
        if value < 1:
            self._fail(_line(found, key), f"{key!r} is {int(value)}, not 1 or more.", key=key)
        return int(value)

    def _config(self, found: CommentedMap) -> dict[str, Any]:
        value = found["config"]
        if not isinstance(value, CommentedMap):
            self._wrong(found, "config", "keys and values")
        plain: dict[str, Any] = self._plain(value, _line(found, "config"), "config", 0)
        return plain

    def _plain(self, value: Any, line: int, path: str, depth: int) -> Any:
        """Plain JSON; aliases are followed, but neither for ever nor without measure."""
        self._items += 1
        if self._items > _ITEMS_MAX or depth > _DEPTH_MAX:
            self._fail(line, f"{path} is nested too deeply or holds too much.")
        if isinstance(value, CommentedMap):
            result: dict[str, Any] = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    self._fail(
                        _line(value, key),
                        f"the key {key!r} in {path} is {_kind(key)}, not text.",
                        'Put it in quotes: `"…"`.',
                    )
                result[str(key)] = self._plain(item, _line(value, key), f"{path}.{key}", depth + 1)
            return result
        if isinstance(value, CommentedSeq):
            return [
                self._plain(item, value.lc.item(index)[0] + 1, f"{path}.{index}", depth + 1)
                for index, item in enumerate(value)
            ]
        if value is None:
            return None
        if type(value).__name__ in ("bool", "ScalarBoolean"):
            return bool(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        if isinstance(value, str):
            return str(value)
        self._fail(
            line,
            f"{path} is {_kind(value)}, which JSON can't say.",
            'Put it in quotes: `"…"`.',
            key=path,
        )


def _line(found: CommentedMap, key: Any) -> int:
    try:
        return int(found.lc.key(key)[0]) + 1
    except (KeyError, TypeError, AttributeError):  # merged in by `<<`
        return int(found.lc.line or 0) + 1


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    if type(value).__name__ in ("bool", "ScalarBoolean"):
        return f"{'true' if value else 'false'}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {str(value)!r}"
    if isinstance(value, CommentedMap):
        return "keys and values"
    if isinstance(value, CommentedSeq):
        return "a list"
    return f"a {type(value).__name__.lower()}"


def export(deployments: Iterable[Deployment]) -> str:
    """Deployments as a manifest; what has its default value is left out."""
    agents: list[dict[str, Any]] = []
    for deployment in deployments:
        spec = deployment.spec
        item: dict[str, Any] = {"name": deployment.name, "run": spec.run}
        if deployment.replicas is not None:
            item["replicas"] = deployment.replicas
        if deployment.tier is not Tier.APP:
            item["tier"] = deployment.tier.value
        values = spec.model_dump(mode="json")
        blank = AgentSpec(run=spec.run).model_dump(mode="json")
        for key in AGENT_KEYS:
            if key in ("name", "run", "replicas", "tier") or values[key] == blank[key]:
                continue
            item[key] = _changed(spec.placement) if key == "placement" else values[key]
        for key in SECTIONS:
            section = getattr(deployment, key)
            if section is not None and section != Deployment.model_fields[key].default:
                item[key] = section.model_dump(mode="json", exclude_defaults=True)
        agents.append(item)
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump({"version": VERSION, "agents": agents}, out)
    return out.getvalue()


def _changed(policy: PlacementPolicy) -> Mapping[str, Any]:
    values, blank = policy.model_dump(mode="json"), PlacementPolicy().model_dump(mode="json")
    return {key: values[key] for key in PLACEMENT_KEYS if values[key] != blank[key]}
