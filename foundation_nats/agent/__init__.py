"""What users write, and what runs it."""
