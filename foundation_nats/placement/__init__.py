"""Where an agent may run and where it should."""
