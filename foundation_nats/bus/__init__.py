"""The thin seam over nats-py; the only importer of `nats`."""
