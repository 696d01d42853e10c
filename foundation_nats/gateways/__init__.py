"""Doors for other protocols: a cluster's agents to those that speak the Synadia Agent Protocol, A2A or MCP."""
