"""Losses as pure functions: tensors in, per-example (or per-token) tensors out."""
