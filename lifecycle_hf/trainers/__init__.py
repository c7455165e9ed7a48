"""One trainer per stage, each beside its config."""
