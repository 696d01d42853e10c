"""A NATS micro service's face: ``nats micro ls``, ``info`` and ``stats`` see each node for free (ADR-32).

Answers ``$SRV.{PING,INFO,STATS}``, with the service's name and with its id
appended, in the types that the NATS CLI expects. It serves no endpoint of its
own: the endpoints it names are the control subjects that are served anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import REPLY_PREFIX
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import BusError

_TYPE = "io.nats.micro.v1.{}_response"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A subject that the service answers."""

    name: str
    subject: str


class MicroService:
    """One instance of a service, announced until `close`."""

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
        self._bus = bus
        self._started = utc_text()
        self._base = {"name": name, "id": id, "version": version, "metadata": dict(metadata)}
        self._description = description
        self._endpoints = list(endpoints)
        self._routes: list[Route] = []
        for verb in ("PING", "INFO", "STATS"):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{id}"):
                self._routes.append(bus.subscribe(subject, self._on_message))

    def _on_message(self, message: Message) -> None:
        if not message.reply.startswith(REPLY_PREFIX):
            return
        verb = message.subject.split(".")[1].lower()
        body: dict[str, Any] = {**self._base, "type": _TYPE.format(verb)}
        if verb == "info":
            body["description"] = self._description
            body["endpoints"] = [
                {"name": point.name, "subject": point.subject, "queue_group": "", "metadata": {}}
                for point in self._endpoints
            ]
        elif verb == "stats":
            body["started"] = self._started
            body["endpoints"] = [
                {
                    "name": point.name,
                    "subject": point.subject,
                    "queue_group": "",
                    "num_requests": 0,
                    "num_errors": 0,
                    "last_error": "",
                    "processing_time": 0,
                    "average_processing_time": 0,
                }
                for point in self._endpoints
            ]
        try:
            self._bus.publish(message.reply, orjson.dumps(body))
        except BusError:
            return  # whoever asked will ask again

    def close(self) -> None:
        """Announce it no more."""
        for route in self._routes:
            self._bus.unsubscribe(route)
        self._routes.clear()
