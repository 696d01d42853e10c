"""The declared streams and buckets of a cluster; ensure them idempotently and name every drift.

One place says what the server must hold. `ensure` declares a cluster where there is
none, and leaves what exists as it is; `drift` lists where an existing stream differs, for
`foundation doctor`.

A stream that a cluster has *lost* (deleted, or gone with a disk) is not made anew
behind its back: an empty one would answer as if nothing had ever been in it. Lost is what
is missing while another of the cluster's streams has ever held a message, because nobody
writes before all are declared. What is missing while none was ever written to belongs to a
declaration that has begun and not ended, and is completed. A stream that a later release
adds counts as lost in a cluster from before, and takes one ``doctor --repair``. Not recognised: the loss of
the only stream that was ever written to, and the loss of all of them together, which looks
like an empty account.

Facts verified on nats-server 2.15.1: creating a stream with an equal
configuration succeeds, with a different one fails with 10058; ``max_bytes`` of
a file stream is reserved, and refused with 10047 where the store is smaller;
``max_consumers`` must be positive to exceed the default of 1,000.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import api
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import Config
from foundation_nats.errors import (
    BusRefusedError,
    BusTimeoutError,
    BusUnavailableError,
    NotFoundError,
    ServerError,
)

MIN_SERVER = (2, 14, 0)
BUCKETS = ("nodes", "agents", "state", "desired", "leases", "settings", "coordination")
EXPANDER = "expander"
"""The durable consumer of ROUTES that every node serves."""
TIMEKEEPER = "timekeeper"
"""The durable consumer of TIMERS that every node serves."""
TIMER_ACK_WAIT_S = 5.0
"""After so long without a word from whoever fires it, a timer that is due goes to another."""
ROUTE_ACK_WAIT_S = 10.0
"""After so long without a word from whoever expands it, a signal for many goes to another."""

_MARKED = ("nodes", "leases")  # buckets whose keys expire, visibly
_IN_USE_DIFFERENT = 10058
_NO_STORAGE = 10047
_NO_PEERS = 10005
_PEERS_WAIT_S = 15.0
"""Servers that start together know each other's room only some seconds after they elect a
leader; until then there are *no suitable peers for placement*."""
_GIB = 1024**3
_MIB = 1024**2
_SIGNALS_BYTES_DEFAULT = 16 * _GIB
_BYTES_MIN = 16 * _MIB
_LEFT_FREE = 4
"""Of room that had to be found out by trial, one part in so many is left for the rest."""
_SECOND = 1_000_000_000


Missing = Literal["refuse", "make", "leave"]
"""What to do about streams that an existing cluster has lost."""


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

    def beside(most: int, part: int) -> int:
        """The limit of a stream beside SIGNALS: in a small store a *part* of that one's."""
        return min(most, max(signals_max_bytes // part, min(4 * _MIB, signals_max_bytes)))

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
            "max_bytes": beside(256 * _MIB, 8),
            "max_consumers": 16,
        },
        {
            # Schedules exclude `discard: new`, and a limit would drop the oldest: there is none.
            **common,
            "name": names.timers_stream,
            "subjects": [names.timers(), names.cancelled("*", "*"), names.due()],
            "retention": "limits",
            "discard": "old",
            "allow_msg_schedules": True,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "max_consumers": 16,
        },
        {
            **common,
            "name": names.events_stream,
            "subjects": [names.events()],
            "retention": "limits",
            "discard": "old",
            "max_bytes": beside(64 * _MIB, 16),
            "max_age": 7 * 24 * 3600 * _SECOND,
            "max_consumers": 1000,
        },
        {
            **common,
            "name": names.dead_stream,
            "subjects": [names.dead_all()],
            "retention": "limits",
            "discard": "new",
            "max_bytes": beside(256 * _MIB, 8),
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


async def ensure(bus: Bus, config: Config, *, missing: Missing = "refuse") -> None:
    """Declare the cluster's streams, buckets and consumers, unless it exists.

    Args:
        missing: what to do if an existing cluster has lost some: refuse, make them anew
            (empty), or leave it so.

    Raises:
        ServerError: the server is too old, has no JetStream, or has no room.
        ServerError: streams of an existing cluster are gone; `details["missing"]` names them.
        BusTimeoutError, BusUnavailableError: the server does not answer.
    """
    check_server(bus.server_facts)
    size = await _signals_bytes(bus, config)
    declared = declared_streams(config, size)
    there = await _stream_names(bus)
    absent = [stream["name"] for stream in declared if stream["name"] not in there]
    if absent and len(absent) < len(declared) and missing != "make":
        lost = await _lost(bus, [stream["name"] for stream in declared], absent)
        if lost and missing == "leave":
            return
        if lost:
            raise ServerError(
                f"The cluster {config.cluster} has lost {', '.join(lost)}: the server does not "
                "have them any more, but others of the cluster, which were in use.",
                hint="Restore them from a backup (`nats stream restore`), or accept that what "
                "they held is lost: `foundation doctor --repair` makes them anew, empty.",
                missing=lost,
            )
    if absent:
        await _declare(bus, config, size, absent)
    names = Subjects(config.cluster)
    await _ensure_consumer(bus, names.routes_stream, EXPANDER, names.routes(), ROUTE_ACK_WAIT_S)
    await _ensure_consumer(bus, names.timers_stream, TIMEKEEPER, names.due(), TIMER_ACK_WAIT_S)


async def _ensure_consumer(
    bus: Bus, stream: str, name: str, subject: str, ack_wait_s: float
) -> None:
    await api(
        bus,
        "CONSUMER.CREATE",
        f"{stream}.{name}",
        {
            "stream_name": stream,
            "config": {
                "name": name,
                "durable_name": name,
                "ack_policy": "explicit",
                "ack_wait": int(ack_wait_s * _SECOND),
                "max_deliver": -1,
                "max_ack_pending": 256,
                "deliver_policy": "all",
                "replay_policy": "instant",
                "filter_subject": subject,
            },
        },
    )


async def _stream_names(bus: Bus) -> set[str]:
    """Every stream of the account, as the server that leads them all knows it."""
    found: set[str] = set()
    while True:
        page = await api(bus, "STREAM.NAMES", "", {"offset": len(found)})
        names = page.get("streams") or []
        found.update(names)
        if not names or len(found) >= int(page.get("total", 0)):
            return found


async def _lost(bus: Bus, declared: list[str], absent: list[str]) -> list[str]:
    """Which of *absent* a cluster in use has lost; none if nobody has written to it yet."""
    for name in declared:
        if name in absent:
            continue
        try:
            info = await api(bus, "STREAM.INFO", name)
        except NotFoundError:
            continue
        if int(info["state"]["last_seq"]) > 0:
            # It is complete by now, also if it was still being declared at the first look.
            there = await _stream_names(bus)
            return [name for name in declared if name not in there]
    return []


async def _declare(bus: Bus, config: Config, size: int, absent: list[str]) -> None:
    """Create the streams named *absent*; those beside SIGNALS fit the room it was given."""
    signals = Subjects(config.cluster).signals_stream
    if signals in absent:
        (wanted, *_) = declared_streams(config, size)
        size = await _ensure_stream(bus, wanted)
    else:
        held = int((await api(bus, "STREAM.INFO", signals))["config"].get("max_bytes", 0))
        size = held if held > 0 else size
    for stream in declared_streams(config, size):
        if stream["name"] in absent and stream["name"] != signals:
            await _ensure_stream(bus, stream)


async def ensure_domain(bus: Bus, names: Subjects, name: str, *, replicas: int) -> None:
    """Create the stream of the domain *name* if it is missing.

    Entries are removed by the compaction alone; the stream has no limit of its own,
    because a full one could not take the snapshot that would make room.

    Raises:
        ServerError: the server has no room.
        BusTimeoutError, BusUnavailableError: the server does not answer.
    """
    await _ensure_stream(
        bus,
        {
            "name": names.domain_stream(name),
            "subjects": [names.domain(name), names.domain_snapshot(name), names.domain_mark(name)],
            "storage": "file",
            "num_replicas": replicas,
            "allow_direct": True,
            "duplicate_window": 120 * _SECOND,
            "retention": "limits",
            "discard": "new",
            "allow_rollup_hdrs": True,
            "deny_delete": True,
            "max_consumers": 1000,
            "republish": {"src": names.domain(name), "dest": names.domain_live(name)},
        },
    )


async def ensure_queue(
    bus: Bus,
    names: Subjects,
    name: str,
    *,
    replicas: int | None,
    parts: int,
    items_max: int,
    ack_wait_s: float,
    attempts: int,
) -> dict[str, str]:
    """Create the stream of the work queue *name* if it is missing; returns how it is set up.

    Without *replicas* it has as many as SIGNALS. Each part has one consumer; of a part with
    keys one item at a time is handed out, which is what keeps the order of a key.

    Raises:
        ServerError: the server has no room.
        BusTimeoutError, BusUnavailableError: the server does not answer.
    """
    stream = names.queue_stream(name)
    try:
        found = (await api(bus, "STREAM.INFO", stream))["config"]
    except NotFoundError:
        if replicas is None:
            signals = await api(bus, "STREAM.INFO", names.signals_stream)
            replicas = int(signals["config"].get("num_replicas", 1))
        await _ensure_stream(
            bus,
            {
                "name": stream,
                "subjects": [names.queue(name, ">")],
                "storage": "file",
                "num_replicas": replicas,
                "allow_direct": True,
                "duplicate_window": 120 * _SECOND,
                "retention": "workqueue",
                "discard": "new",
                "max_msgs": items_max,
                "max_consumers": 1000,
                "metadata": {
                    "fnd.parts": str(parts),
                    "fnd.ack_wait_s": f"{ack_wait_s:g}",
                    "fnd.attempts": str(attempts),
                },
            },
        )
        found = (await api(bus, "STREAM.INFO", stream))["config"]
    return dict(found.get("metadata") or {})


async def ensure_queue_consumers(
    bus: Bus, names: Subjects, name: str, *, parts: int, ack_wait_s: float
) -> None:
    """Create the consumers of a work queue that are missing."""
    stream = names.queue_stream(name)

    async def one(part: str, pending: int) -> None:
        config = {
            "name": part,
            "durable_name": part,
            "ack_policy": "explicit",
            "ack_wait": int(ack_wait_s * _SECOND),
            "max_deliver": -1,
            "max_ack_pending": pending,
            "deliver_policy": "all",
            "replay_policy": "instant",
            "filter_subject": names.queue(name, part),
        }
        body = {"stream_name": stream, "config": config}
        await api(bus, "CONSUMER.CREATE", f"{stream}.{part}.{config['filter_subject']}", body)

    await asyncio.gather(*(one(f"p{number}", 1) for number in range(parts)), one("free", 1000))


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


async def _ensure_stream(bus: Bus, stream: dict[str, Any]) -> int:
    """Create it if it is missing, smaller if there is no room; returns its ``max_bytes``."""
    wanted = dict(stream)
    deadline = monotonic() + _PEERS_WAIT_S
    while True:
        try:
            await api(bus, "STREAM.CREATE", wanted["name"], wanted)
            size = int(wanted.get("max_bytes", 0))
            if size < int(stream.get("max_bytes", 0)):
                # It fits, but perhaps to the last byte.
                wanted["max_bytes"] = size = size - size // _LEFT_FREE
                await api(bus, "STREAM.UPDATE", wanted["name"], wanted)
            return size
        except BusTimeoutError:
            # To create what is there, and just so, is answered as if it were new.
            if monotonic() >= deadline:
                raise
        except BusRefusedError as error:
            code = error.details.get("err_code")
            if code == _IN_USE_DIFFERENT:
                get_logger("assets").debug("stream kept as it is", stream=wanted["name"])
                return int(stream.get("max_bytes", 0))
            size = int(wanted.get("max_bytes", 0))
            if code == _NO_STORAGE and size // 2 >= _BYTES_MIN:
                wanted["max_bytes"] = size // 2
                continue
            if code == _NO_PEERS and monotonic() < deadline:
                await asyncio.sleep(0.25)
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
