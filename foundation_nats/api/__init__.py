"""The objects users hold, and the composition root: node meets agent here."""
