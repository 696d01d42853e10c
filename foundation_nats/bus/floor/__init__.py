"""The floor: the platform's work written by hand on nats-py, to measure against.

It uses nothing of `foundation_nats` but where to log in, so that a ratio says what the platform costs.
It lies on this floor because only the bus may speak to NATS; nothing at run time imports it. Streams,
buckets and subjects that it makes on a server begin with ``fnd-floor``, and are deleted in the end.
"""
