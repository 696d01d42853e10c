"""The public test kit: real servers and real nodes in a fixture, and verbs of trouble."""

from foundation_nats.testing.cluster import NodeProcess, TestCluster
from foundation_nats.testing.harness import AgentHarness, CrashPoint, Dead, Emitted
from foundation_nats.testing.models import ScriptedModel, Use
from foundation_nats.testing.probes import eventually
from foundation_nats.testing.server import TestServer

__all__ = [
    "AgentHarness",
    "CrashPoint",
    "Dead",
    "Emitted",
    "NodeProcess",
    "ScriptedModel",
    "TestCluster",
    "TestServer",
    "Use",
    "eventually",
]
