"""Trainers that learn from given completions: pairs (DPO, IPO, ORPO) and labelled answers (KTO)."""
