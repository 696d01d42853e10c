"""Frozen settings grouped by component; from keyword and environment, validated once.

`Config.load` is the only reader of the environment (``FOUNDATION_*``, nested
with ``__``: ``FOUNDATION_LIVENESS__DOWN_AFTER_S=3``; ``none`` is None). A component receives its
own section, never the whole. Times are seconds; reliability of the defaults
is argued in docs/reliability.md.
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foundation_nats.errors import ConfigError
from foundation_schemas.base import Name

ENV_PREFIX = "FOUNDATION_"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BusConfig(_Section):
    """The connection to NATS."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    """NATS URLs, or locators that are looked up: see docs/discovery.md."""
    creds: str | None = None
    """Path of a ``.creds`` file."""
    user: str | None = None
    password: str | None = None
    token: str | None = None
    nkey: str | None = None
    """Path of a file with the seed of an nkey user."""
    user_jwt: str | None = None
    """The JWT of the user whose seed `nkey` has; a ``.creds`` file has both."""
    ca: str | None = None
    """Path of the certificates (PEM) that may vouch for a server; None: those the system trusts."""
    cert: str | None = None
    """Path of this client's own certificate (PEM) …"""
    key: str | None = None
    """… and of its private key; None: it stands in the same file."""
    tls_first: bool = False
    """Encrypt before the server has said anything, as servers with ``handshake_first`` want it."""
    inbox_prefix: str = "_INBOX"
    """What subjects of replies begin with, for users that may only listen to their own."""
    connect_timeout_s: float = 5.0
    request_timeout_s: float = 5.0
    """For one request to JetStream or to a peer."""
    ping_interval_s: float = 2.0
    """With two outstanding pings a half-open connection is found in 6 s."""
    in_flight_max: int = 4096
    """Publishes awaiting their acknowledgement on one connection; more wait."""

    @model_validator(mode="after")
    def _relations(self) -> BusConfig:
        if self.creds and (self.nkey or self.user_jwt):
            raise ValueError("creds and nkey both say who connects: give one of them")
        if self.user_jwt and not self.nkey:
            raise ValueError("user_jwt needs nkey, the file with the seed of the user")
        if self.key and not self.cert:
            raise ValueError("key needs cert, the certificate that it belongs to")
        parts = self.inbox_prefix.split(".")
        if parts[0] != "_INBOX" or any(not part or set(part) & set("*> \t\r\n") for part in parts):
            raise ValueError(
                f"inbox_prefix {self.inbox_prefix!r} is neither _INBOX nor begins with _INBOX. and "
                "names: agents answer nowhere else"
            )
        return self


class MailboxConfig(_Section):
    """The streams and the intake of agents."""

    mailbox_max: int = Field(default=100_000, ge=1)
    """Signals stored per mailbox, consumed ones included until trimmed; beyond: `MailboxFullError`."""
    in_memory_max: int = Field(default=512, ge=2)
    """Signals of one agent held in a worker's memory; beyond, it reads on from the stream."""
    duplicate_window_s: float = 120.0
    signals_max_bytes: int | None = None
    """None: 60 % of what the account allows, so that mailboxes can't starve state commits (F8)."""
    state_max_bytes: int = 512 * 1024
    """Of one agent's state; with its outbox it must fit the server's ``max_payload`` of 1 MiB."""
    steps_max_bytes: int = 128 * 1024
    """Of the results of one agent's steps (`ctx.once`) that are remembered."""
    emit_max_bytes: int = 256 * 1024
    """Of what one handling emits; three quarters of it may wait in the outbox before the next."""
    attempts_max: int = Field(default=4, ge=1)
    """Tries of a handler that raises, before the signal is a dead letter."""
    retry_first_s: float = 0.1
    """Back-off before the second try; doubles."""
    sweep_every_s: float = 5.0
    """How often a worker asks the stream for signals whose live copy it may have missed."""
    full_patience_s: float = 30.0
    """How long a full mailbox is waited for by what is already stored elsewhere: an emitted
    signal in an outbox, a copy of a signal for many. Then it becomes a dead letter. Must stay
    below the duplicate window."""
    trim_every_s: float = 2.0
    trim_min_age_s: float = 60.0
    """A consumed signal stays this long as evidence against late repeats, space permitting."""
    history: int = Field(default=0, ge=0)
    """Handled signals of an agent that stay in its mailbox, for `foundation history` and `replay`; at
    most a quarter of `mailbox_max`. A class may say another number."""
    outbox_max: int = 1024
    """Emitted, unpublished signals of one agent; beyond, it handles nothing new."""

    @model_validator(mode="after")
    def _relations(self) -> MailboxConfig:
        if self.full_patience_s > self.duplicate_window_s / 2:
            raise ValueError(
                f"full_patience_s ({self.full_patience_s:g}) must be at most half of "
                f"duplicate_window_s ({self.duplicate_window_s:g})"
            )
        return self


class LivenessConfig(_Section):
    """Heartbeats and the failure detector."""

    heartbeat_interval_s: float = 0.5
    suspect_after_s: float = 1.5
    down_after_s: float = 5.0
    confirm_timeout_s: float = 0.3
    probe_interval_s: float = 0.2
    """Pause between probes for *no responders*; three misses are a verdict."""
    bus_grace_s: float = 12.0
    storm_fraction: float = 0.4
    storm_hold_s: float = 30.0
    fence_after_s: float | None = None
    """How long an activation may answer after its proof of life; None: `down_after_s` − 1."""

    @model_validator(mode="after")
    def _relations(self) -> LivenessConfig:
        if not self.heartbeat_interval_s * 2 <= self.suspect_after_s < self.down_after_s:
            raise ValueError(
                "2 × heartbeat_interval_s <= suspect_after_s < down_after_s must hold, got "
                f"{self.heartbeat_interval_s}, {self.suspect_after_s}, {self.down_after_s}"
            )
        if self.fence_s >= self.down_after_s:
            raise ValueError(
                f"fence_after_s ({self.fence_s}) must be below down_after_s ({self.down_after_s})"
            )
        return self

    @property
    def fence_s(self) -> float:
        """`fence_after_s`, derived where it is not given."""
        if self.fence_after_s is not None:
            return self.fence_after_s
        return max(self.down_after_s - 1.0, self.down_after_s * 0.6)


class LeaseConfig(_Section):
    """The leader's lease."""

    ttl_s: float = 15.0
    """Longer than a broker election (4 to 9 s), or leadership falls with every broker failover."""
    renew_every_s: float = 3.0
    stop_after_s: float = 10.0

    @model_validator(mode="after")
    def _relations(self) -> LeaseConfig:
        if not 3 * self.renew_every_s <= self.ttl_s:
            raise ValueError(f"ttl_s ({self.ttl_s}) must be >= 3 × renew_every_s")
        if not self.renew_every_s < self.stop_after_s < self.ttl_s:
            raise ValueError("renew_every_s < stop_after_s < ttl_s must hold")
        return self


class ControlConfig(_Section):
    """The reconciler."""

    resync_every_s: float = 5.0
    """A full pass at least this often; changes trigger one at once."""
    start_timeout_s: float = 30.0
    """An agent that is `starting` longer is placed anew."""
    unavailable_grace_s: float = 30.0
    """How long a non-critical agent waits for its lost node before it is placed elsewhere."""
    autoscale_every_s: float = Field(default=3.0, gt=0)
    """How often deployments that scale themselves are measured."""
    quarantine_after: int = Field(default=10, ge=1)
    """An agent that failed to start so often in a row is not tried again by itself."""
    flapping_after: int = Field(default=3, ge=1)
    """A node with so many short lives in a row gets agents only if no other can take them …"""
    stable_after_s: float = 60.0
    """… until it has lived for so long; a shorter life is a short one."""
    pace_for_s: float = Field(default=60.0, ge=0)
    """So long after many nodes were lost at once agents are given out slowly, the critical first …"""
    pace_every_s: float = Field(default=0.5, gt=0)
    """… so often …"""
    pace_per_node: int = Field(default=500, ge=1)
    """… and so many for each node that is left."""
    moves_max: int = Field(default=32, ge=1)
    """How many agents may be on their way from one node to another at a time …"""
    moves_per_node_max: int = Field(default=16, ge=1)
    """… and how many of one source, and to one target."""
    rebalance_on_join: bool = False
    """Rebalance by itself once a new node has been up for a while; else only say that it would pay."""
    rebalance_after_s: float = Field(default=30.0, gt=0)
    """How long is a while."""
    rebalance_strategy: str = "even_distribution"
    """What such a rebalance makes better: see `foundation rebalance` …"""
    rebalance_budget: int = Field(default=1000, ge=1)
    """… and how many agents it moves at most."""
    failed_backoff_s: float = 1.0
    failed_backoff_max_s: float = 60.0

    def retry_s(self, failures: int) -> float | None:
        """How long an agent rests that failed so often in a row; None: until it is released."""
        if failures >= self.quarantine_after:
            return None
        return min(self.failed_backoff_s * 2.0 ** min(failures, 30), self.failed_backoff_max_s)


class WorkerConfig(_Section):
    """Worker processes and their restarts."""

    restarts_max: int = 5
    restart_window_s: float = 30.0
    stop_timeout_s: float = 10.0
    drain_timeout_s: float = Field(default=20.0, ge=0)
    """How long a node that is told to end takes to move its agents away before it stops the rest."""
    threads_max: int = Field(default=32, ge=1)
    """Calls of `ctx.run_blocking` that one worker runs at a time; more wait."""
    processes_max: int | None = Field(default=None, ge=1)
    """Processes of one worker for `ctx.run_process`; None: one per core."""
    hibernate_after_s: float | None = Field(default=None, gt=0)
    """Seconds without a signal after which an agent sleeps whose class doesn't say it; None: never."""
    handler_timeout_s: float | None = None
    """A handler that takes longer is cancelled and counts as failed; None: no limit."""
    ready_timeout_s: float = 20.0
    """How long an agent may take from `on_start` to `ready`; below `control.start_timeout_s`."""
    block_warn_s: float | None = Field(default=0.5, gt=0)
    """A handler that keeps the event loop for this long is named, with what it is doing; None: never."""
    hang_after_s: float | None = Field(default=10.0, gt=0)
    """A worker whose event loop answers no ping for this long is killed and restarted; None: never."""


class LauncherConfig(_Section):
    """How `foundation nodes add` and `remove` start and end nodes."""

    kind: str = "local"
    """``local``: processes on this machine; ``command``: templates; or one of an installed package."""
    add: str | None = None
    """The command that starts a node, such as ``docker run -d --name {name} image {command}``."""
    remove: str | None = None
    """The command that clears away what is left of a node once it has been drained."""
    timeout_s: float = Field(default=60.0, gt=0)
    """How long such a command may take."""


class TelemetryConfig(_Section):
    """Who is told of what happens to the cluster, in the processes of nodes."""

    handlers: tuple[str, ...] = ()
    """``module:function`` each: called by a node's manager with every event of `base.telemetry`."""


class Config(_Section):
    """All settings of one process."""

    cluster: Name = "default"
    replicas: int = Field(default=1, ge=1, le=5)
    """Copies of every stream and bucket; 3 on a NATS cluster of three servers."""
    bus: BusConfig = BusConfig()
    mailbox: MailboxConfig = MailboxConfig()
    liveness: LivenessConfig = LivenessConfig()
    lease: LeaseConfig = LeaseConfig()
    control: ControlConfig = ControlConfig()
    worker: WorkerConfig = WorkerConfig()
    launcher: LauncherConfig = LauncherConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @classmethod
    def load(cls, **overrides: Any) -> Config:
        """Settings from the environment, then *overrides* (nested dicts merge).

        Raises:
            ConfigError: a value is wrong; names the setting and the reason.
        """
        values: dict[str, Any] = {}
        for key, text in os.environ.items():
            if not key.startswith(ENV_PREFIX):
                continue
            path = key[len(ENV_PREFIX) :].lower().split("__")
            if path[0] in _ENV_ALIASES and len(path) == 1:
                path = list(_ENV_ALIASES[path[0]])
            if path[0] not in cls.model_fields:
                continue
            here = values
            for part in path[:-1]:
                here = here.setdefault(part, {})
            found: object = tuple(text.split(",")) if path[-1] == "servers" else text
            if path == ["telemetry", "handlers"]:
                found = tuple(part.strip() for part in text.split(",") if part.strip())
            here[path[-1]] = None if text.lower() == "none" else found
        _merge(values, overrides)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"setting {where or 'relation'}: {first['msg']}") from error

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process load the same settings."""
        found: dict[str, str] = {}
        for key, value in self.model_dump(exclude_unset=True).items():
            if isinstance(value, dict):
                for inner, item in value.items():
                    text = ",".join(item) if isinstance(item, tuple) else str(item)
                    found[f"{ENV_PREFIX}{key.upper()}__{inner.upper()}"] = text
            else:
                found[f"{ENV_PREFIX}{key.upper()}"] = str(value)
        return found


_ENV_ALIASES: dict[str, tuple[str, str]] = {
    "server": ("bus", "servers"),
    "creds": ("bus", "creds"),
    "user": ("bus", "user"),
    "password": ("bus", "password"),
    "token": ("bus", "token"),
}


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if value is None:
            continue
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
