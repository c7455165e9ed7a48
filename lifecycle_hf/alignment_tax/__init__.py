"""Paying less alignment tax, and knowing what was paid."""
