"""Measurements of foundation_nats and of the floor it stands on.

`benchmarks.floor` is raw nats-py without foundation_nats: every ratio we
publish is one of our figures divided by one of those, taken in the same run
on the same machine.
"""
