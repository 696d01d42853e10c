"""Examples: small programs that show one thing each; run from the project directory."""
