"""Patterns among agents and clients, each crash-safe and with a stated guarantee."""

from foundation_nats.coordination.counter import Counter, counter
from foundation_nats.coordination.election import Election, election
from foundation_nats.coordination.lock import Lock, lock
from foundation_nats.coordination.semaphore import Semaphore, semaphore

__all__ = [
    "Counter",
    "Election",
    "Lock",
    "Semaphore",
    "counter",
    "election",
    "lock",
    "semaphore",
]
