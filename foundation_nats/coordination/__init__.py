"""Patterns among agents and clients, each crash-safe and with a stated guarantee."""

from foundation_nats.coordination.lock import Lock, lock

__all__ = ["Lock", "lock"]
