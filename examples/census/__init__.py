"""A census of a Python source tree, taken by a cluster of agents that loses a node half-way.

Read in this order: `census` (the work itself, pure), `show` (how it looks).
"""
