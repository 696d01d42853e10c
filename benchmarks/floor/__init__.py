"""The floor: the same work written by hand on nats-py, uvloop and orjson alone.

Each module answers one question and has ``async def run(url) -> dict[str, float]``;
``python -m`` of it starts a server of its own, runs it and prints JSON with the median of the
runs. Two of them are in the package, for `foundation bench`:

- `foundation_nats.bus.floor.mailbox`: durable signals with persisted exactly-once effects, signals/s
- `foundation_nats.bus.floor.latency`: publish to live handler, ask, and asks/s with 100 callers
- `create`: 1,000 agents until each has answered
- `failover`: kill -9 of a worker with 1,000 agents until all answer elsewhere
- `memory`: bytes of an idle agent

The floor is fast because it leaves out what a platform must have: there is no
placement, no supervision, no lease, no fencing by silence and no retry. It is a
lower bound for the price of the work, not a design.
"""
