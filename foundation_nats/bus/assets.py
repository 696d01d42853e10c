"""The declared streams and buckets of a cluster; ensure them idempotently and name every drift.

One place says what the server must hold. `ensure` creates what is missing and
leaves what exists as it is; `drift` lists where an existing stream differs, for
`foundation doctor`.

Facts verified on nats-server 2.15.1: creating a stream with an equal
configuration succeeds, with a different one fails with 10058; ``max_bytes`` of
a file stream is reserved, and refused with 10047 where the store is smaller;
``max_consumers`` must be positive to exceed the default of 1,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import api
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import Config
from foundation_nats.errors import BusRefusedError, BusUnavailableError, NotFoundError, ServerError

MIN_SERVER = (2, 14, 0)
BUCKETS = ("nodes", "agents", "state", "desired", "leases", "settings", "coordination")
EXPANDER = "expander"
"""The durable consumer of ROUTES that every node serves."""
ROUTE_ACK_WAIT_S = 10.0
"""After so long without a word from whoever expands it, a signal for many goes to another."""

_MARKED = ("nodes", "leases")  # buckets whose keys expire, visibly
_IN_USE_DIFFERENT = 10058
_NO_STORAGE = 10047
_GIB = 1024**3
_MIB = 1024**2
_SIGNALS_BYTES_DEFAULT = 16 * _GIB
_SIGNALS_BYTES_MIN = 16 * _MIB
_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Drift:
    """One setting of an existing stream that is not as declared."""

    stream: str
    setting: str
    declared: Any
    actual: Any


def check_server(facts: dict[str, Any]) -> None:
    """Refuse a server that can't carry a cluster.

    Raises:
        ServerError: it is too old, or JetStream is off; says what to do.
    """
    version = str(facts.get("version", "0"))
    numbers = tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())
    needed = ".".join(str(part) for part in MIN_SERVER)
    if numbers < MIN_SERVER:
        raise ServerError(
            f"The NATS server is version {version}; {needed} or newer is needed.",
            hint="Upgrade nats-server, or run `foundation up` for the embedded one.",
        )
    if not facts.get("jetstream", False):
        raise ServerError(
            "The NATS server runs without JetStream.",
            hint="Start it with `nats-server -js`, or run `foundation up` for the embedded one.",
        )


def declared_streams(config: Config, signals_max_bytes: int) -> list[dict[str, Any]]:
    """Every stream of the cluster, buckets included, as the server wants to hear it."""
    names = Subjects(config.cluster)
    window = int(config.mailbox.duplicate_window_s * _SECOND)
    common: dict[str, Any] = {
        "storage": "file",
        "num_replicas": config.replicas,
        "allow_direct": True,
        "duplicate_window": window,
    }
    streams: list[dict[str, Any]] = [
        {
            **common,
            "name": names.signals_stream,
            "subjects": [names.mailboxes()],
            "retention": "limits",
            "discard": "new",
            "discard_new_per_subject": True,
            "max_msgs_per_subject": config.mailbox.mailbox_max,
            "max_bytes": signals_max_bytes,
            "max_consumers": 1000,
            "republish": {"src": names.mailboxes(), "dest": names.republish_destination()},
        },
        {
            **common,
            "name": names.routes_stream,
            "subjects": [names.routes()],
            "retention": "workqueue",
            "discard": "new",
            "max_bytes": min(256 * _MIB, signals_max_bytes),
            "max_consumers": 16,
        },
        {
            **common,
            "name": names.events_stream,
            "subjects": [names.events()],
            "retention": "limits",
            "discard": "old",
            "max_bytes": min(64 * _MIB, signals_max_bytes),
            "max_age": 7 * 24 * 3600 * _SECOND,
            "max_consumers": 1000,
        },
        {
            **common,
            "name": names.dead_stream,
            "subjects": [names.dead_all()],
            "retention": "limits",
            "discard": "new",
            "max_bytes": min(256 * _MIB, signals_max_bytes),
            "max_consumers": 1000,
        },
    ]
    for kind in BUCKETS:
        bucket: dict[str, Any] = {
            **common,
            "name": names.bucket_stream(kind),
            "subjects": [names.bucket_key(kind, ">")],
            "retention": "limits",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "allow_msg_ttl": True,
            "max_consumers": 100_000,
        }
        if kind in _MARKED:
            bucket["subject_delete_marker_ttl"] = 600 * _SECOND
        streams.append(bucket)
    return streams


async def ensure(bus: Bus, config: Config) -> None:
    """Create what is missing of the cluster's streams, buckets and consumers.

    Raises:
        ServerError: the server is too old, has no JetStream, or has no room.
        BusTimeoutError, BusUnavailableError: the server does not answer.
    """
    check_server(bus.server_facts)
    for stream in declared_streams(config, await _signals_bytes(bus, config)):
        await _ensure_stream(bus, stream)
    names = Subjects(config.cluster)
    await api(
        bus,
        "CONSUMER.CREATE",
        f"{names.routes_stream}.{EXPANDER}",
        {
            "stream_name": names.routes_stream,
            "config": {
                "name": EXPANDER,
                "durable_name": EXPANDER,
                "ack_policy": "explicit",
                "ack_wait": int(ROUTE_ACK_WAIT_S * _SECOND),
                "max_deliver": -1,
                "max_ack_pending": 256,
                "deliver_policy": "all",
                "replay_policy": "instant",
                "filter_subject": names.routes(),
            },
        },
    )


async def _signals_bytes(bus: Bus, config: Config) -> int:
    if config.mailbox.signals_max_bytes is not None:
        return config.mailbox.signals_max_bytes
    try:
        account = await api(bus, "INFO")
    except (BusUnavailableError, NotFoundError) as error:
        raise ServerError(
            "JetStream does not answer for this account.",
            hint="Enable it for the account, or check that a meta leader is elected.",
        ) from error
    limit = int(account.get("limits", {}).get("max_storage", -1))
    return int(limit * 0.6) if limit > 0 else _SIGNALS_BYTES_DEFAULT


async def _ensure_stream(bus: Bus, stream: dict[str, Any]) -> None:
    wanted = dict(stream)
    while True:
        try:
            await api(bus, "STREAM.CREATE", wanted["name"], wanted)
            return
        except BusRefusedError as error:
            code = error.details.get("err_code")
            if code == _IN_USE_DIFFERENT:
                get_logger("assets").debug("stream kept as it is", stream=wanted["name"])
                return
            size = int(wanted.get("max_bytes", 0))
            if code == _NO_STORAGE and size // 2 >= _SIGNALS_BYTES_MIN:
                wanted["max_bytes"] = size // 2
                continue
            raise ServerError(
                f"The server refused the stream {wanted['name']}: {error.message}",
                hint="Give JetStream more room (max_file), or check the account's limits.",
            ) from error


async def drift(bus: Bus, config: Config) -> list[Drift]:
    """Where existing streams differ from what is declared; a missing one counts as `missing`."""
    found: list[Drift] = []
    for stream in declared_streams(config, _SIGNALS_BYTES_DEFAULT):
        name = stream["name"]
        try:
            actual = (await api(bus, "STREAM.INFO", name))["config"]
        except NotFoundError:
            found.append(Drift(name, "exists", True, False))
            continue
        for setting, declared in stream.items():
            if setting == "max_bytes":
                continue  # chosen by the room there was
            if actual.get(setting) != declared:
                found.append(Drift(name, setting, declared, actual.get(setting)))
    return found
