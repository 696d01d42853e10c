"""Time, tasks, telemetry: nothing about NATS, nothing about agents."""
