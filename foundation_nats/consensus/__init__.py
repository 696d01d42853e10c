"""Leases and elections by compare-and-set over JetStream, whose Raft is the consensus.

A lease without its term on every write protects nothing: two leaders for a
moment are possible, and harmless because all their writes are conditional.
"""
