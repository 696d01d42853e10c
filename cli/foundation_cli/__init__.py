"""The `foundation` command."""
