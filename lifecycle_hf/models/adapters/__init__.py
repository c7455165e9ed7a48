"""Adapters, the parts of a model that PEFT trains, and the names of their parameters."""
