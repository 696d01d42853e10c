"""Sensors: what turns something of the outside into durable signals of an agent. See docs/sensors.md."""

from foundation_nats.agent.sensors.bus import KvWatch, NatsStream, NatsSubject
from foundation_nats.agent.sensors.clocks import Cron, Timer
from foundation_nats.agent.sensors.files import FileWatch
from foundation_nats.agent.sensors.host import EXIT
from foundation_nats.agent.sensors.http import HttpPoll
from foundation_nats.agent.sensors.metrics import HostMetrics
from foundation_nats.agent.sensors.sensor import (
    KEEP,
    Clockwork,
    Emit,
    Event,
    Overflow,
    Sensor,
    SensorError,
    Surroundings,
    declared,
    has_sensors,
    sensor,
)
from foundation_nats.agent.sensors.webhook import Webhook

__all__ = [
    "EXIT",
    "KEEP",
    "Clockwork",
    "Cron",
    "Emit",
    "Event",
    "FileWatch",
    "HostMetrics",
    "HttpPoll",
    "KvWatch",
    "NatsStream",
    "NatsSubject",
    "Overflow",
    "Sensor",
    "SensorError",
    "Surroundings",
    "Timer",
    "Webhook",
    "declared",
    "has_sensors",
    "sensor",
]
