"""Looking without touching."""
