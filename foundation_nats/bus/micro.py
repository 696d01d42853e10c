"""A NATS micro service's face: ``nats micro ls``, ``info`` and ``stats`` see what we are for free (ADR-32).

Answers ``$SRV.{PING,INFO,STATS}``, with the service's name and with an instance's id
appended, in the types that the NATS CLI expects. It serves no endpoint of its
own: the endpoints it names are subjects that are served anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import REPLY_PREFIX
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import BusError

_TYPE = "io.nats.micro.v1.{}_response"


@dataclass(slots=True)
class Endpoint:
    """A subject that the service answers, and what it counts for ``stats``."""

    name: str
    subject: str
    queue: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    busy_ns: int = 0
    """Spent on requests, in total."""


@dataclass(slots=True)
class Instance:
    """One instance of a service."""

    id: str
    version: str
    description: str
    metadata: Mapping[str, str]
    endpoints: Sequence[Endpoint]
    started: str = field(default_factory=utc_text)

    def says(self, name: str, verb: str) -> bytes:
        """Its answer to *verb*, in lower case."""
        body: dict[str, Any] = {
            "name": name,
            "id": self.id,
            "version": self.version,
            "metadata": dict(self.metadata),
            "type": _TYPE.format(verb),
        }
        if verb == "info":
            body["description"] = self.description
            body["endpoints"] = [
                {
                    "name": point.name,
                    "subject": point.subject,
                    "queue_group": point.queue,
                    "metadata": dict(point.metadata),
                }
                for point in self.endpoints
            ]
        elif verb == "stats":
            body["started"] = self.started
            body["endpoints"] = [
                {
                    "name": point.name,
                    "subject": point.subject,
                    "queue_group": point.queue,
                    "num_requests": point.requests,
                    "num_errors": point.errors,
                    "last_error": point.last_error,
                    "processing_time": point.busy_ns,
                    "average_processing_time": point.busy_ns // max(1, point.requests),
                }
                for point in self.endpoints
            ]
        return orjson.dumps(body)


class MicroServices:
    """Any number of instances of one service, until `close`."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self._name = name
        self._instances: dict[str, tuple[Instance, list[Route]]] = {}
        self._routes = self._listen("", "." + name)

    def _listen(self, *suffixes: str) -> list[Route]:
        return [
            self._bus.subscribe(f"$SRV.{verb}{suffix}", self._on_message)
            for verb in ("PING", "INFO", "STATS")
            for suffix in suffixes
        ]

    def announce(self, instance: Instance) -> None:
        """From now on be seen as *instance*, too; one of the same id is replaced."""
        known = self._instances.get(instance.id)
        # Of its own, so that the server tells who asks for an instance that is gone.
        routes = self._listen(f".{self._name}.{instance.id}") if known is None else known[1]
        self._instances[instance.id] = instance, routes

    def withdraw(self, id: str) -> None:
        """Be seen as that instance no more. Idempotent."""
        _, routes = self._instances.pop(id, (None, []))
        for route in routes:
            self._bus.unsubscribe(route)

    def _on_message(self, message: Message) -> None:
        if not message.reply.startswith(REPLY_PREFIX):
            return
        _, verb, *rest = message.subject.split(".")
        wanted = rest[1:] or list(self._instances)
        for id in wanted:
            found = self._instances.get(id)
            try:
                if found is not None:
                    self._bus.publish(message.reply, found[0].says(self._name, verb.lower()))
            except BusError:
                return  # whoever asked will ask again

    def close(self) -> None:
        """Announce nothing any more. Idempotent."""
        for id in list(self._instances):
            self.withdraw(id)
        for route in self._routes:
            self._bus.unsubscribe(route)
        self._routes.clear()


class MicroService(MicroServices):
    """A service of one instance, announced until `close`."""

    def __init__(
        self,
        bus: Bus,
        *,
        name: str,
        id: str,
        version: str,
        description: str,
        metadata: Mapping[str, str],
        endpoints: Sequence[Endpoint],
    ) -> None:
        super().__init__(bus, name)
        self.announce(Instance(id, version, description, metadata, endpoints))
