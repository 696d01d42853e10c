"""Messages to agents: making, storing, expanding and giving up on them."""
