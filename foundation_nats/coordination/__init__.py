"""Patterns among agents and clients, each crash-safe and with a stated guarantee."""

from foundation_nats.coordination.auction import auction
from foundation_nats.coordination.barrier import Barrier, barrier
from foundation_nats.coordination.counter import Counter, counter
from foundation_nats.coordination.election import Election, election
from foundation_nats.coordination.leader_follower import Group, leader_follower
from foundation_nats.coordination.lock import Lock, lock
from foundation_nats.coordination.map_reduce import map_jobs, map_reduce
from foundation_nats.coordination.pipeline import Pipeline, pipeline, pipelines
from foundation_nats.coordination.saga import saga, sagas
from foundation_nats.coordination.semaphore import Semaphore, semaphore
from foundation_nats.coordination.vote import cast, vote, vote_result
from foundation_nats.coordination.workqueue import WorkQueue, workqueue

__all__ = [
    "Barrier",
    "Counter",
    "Election",
    "Group",
    "Lock",
    "Pipeline",
    "Semaphore",
    "WorkQueue",
    "auction",
    "barrier",
    "cast",
    "counter",
    "election",
    "leader_follower",
    "lock",
    "map_jobs",
    "map_reduce",
    "pipeline",
    "pipelines",
    "saga",
    "sagas",
    "semaphore",
    "vote",
    "vote_result",
    "workqueue",
]
