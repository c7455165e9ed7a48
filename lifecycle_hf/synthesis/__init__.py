"""Data that a model writes: one interface of writers, and methods that ask them."""

from lifecycle_hf.synthesis.chains import write_chains
from lifecycle_hf.synthesis.constitution import Principle, label, load_constitution, revise
from lifecycle_hf.synthesis.evol_instruct import OPERATORS, evol_instruct
from lifecycle_hf.synthesis.self_instruct import self_instruct
from lifecycle_hf.synthesis.writers import Cut, LocalWriter, Recorded, ServerWriter, Writer

__all__ = [
    "OPERATORS",
    "Cut",
    "LocalWriter",
    "Principle",
    "Recorded",
    "ServerWriter",
    "Writer",
    "evol_instruct",
    "label",
    "load_constitution",
    "revise",
    "self_instruct",
    "write_chains",
]
