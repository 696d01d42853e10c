"""`foundation bench`: what a cluster does on this machine, beside the same work by hand on nats-py."""
