"""Facts: who is there, what runs where."""
