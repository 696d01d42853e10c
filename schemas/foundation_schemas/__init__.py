"""Every wire model, and the wire version."""

from foundation_schemas.agent import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    OnNodeLoss,
    OutboxEntry,
    PlacementPolicy,
    RecoveredFrom,
    StateRecord,
    Writer,
)
from foundation_schemas.base import WIRE_VERSION, WireModel, check_name, is_name
from foundation_schemas.control import (
    AgentReport,
    ClassInfo,
    ErrorBody,
    InspectReply,
    Pong,
    ProbeReply,
    ProbeRequest,
    StartRequest,
    StopRequest,
    ValidateReply,
    ValidateRequest,
    WorkerReport,
)
from foundation_schemas.coordination import LockRecord
from foundation_schemas.deployment import (
    Autoscale,
    Deployment,
    DeploymentStatus,
    Revision,
    RevisionOutcome,
    UpdatePolicy,
)
from foundation_schemas.event import ClusterEvent
from foundation_schemas.lease import LeaseRecord
from foundation_schemas.node import Echo, Heartbeat, Load, NodeRecord, NodeStatus
from foundation_schemas.signal import DeadLetter, Envelope, Receipt, Target, TargetKind

__all__ = [
    "WIRE_VERSION",
    "AgentRecord",
    "AgentReport",
    "AgentSpec",
    "AgentStatus",
    "Autoscale",
    "ClassInfo",
    "ClusterEvent",
    "DeadLetter",
    "Deployment",
    "DeploymentStatus",
    "Echo",
    "Envelope",
    "ErrorBody",
    "Heartbeat",
    "InspectReply",
    "LeaseRecord",
    "Load",
    "LockRecord",
    "NodeRecord",
    "NodeStatus",
    "OnNodeLoss",
    "OutboxEntry",
    "PlacementPolicy",
    "Pong",
    "ProbeReply",
    "ProbeRequest",
    "Receipt",
    "RecoveredFrom",
    "Revision",
    "RevisionOutcome",
    "StartRequest",
    "StateRecord",
    "StopRequest",
    "Target",
    "TargetKind",
    "UpdatePolicy",
    "ValidateReply",
    "ValidateRequest",
    "WireModel",
    "WorkerReport",
    "Writer",
    "check_name",
    "is_name",
]
