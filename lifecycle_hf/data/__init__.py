"""Rows to ids and masks: schemas, tokenisation, collation."""
