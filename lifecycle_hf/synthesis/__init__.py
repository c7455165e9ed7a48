"""Data that a model writes: one interface of writers, and methods that ask them."""

from lifecycle_hf.synthesis.constitution import Principle, label, load_constitution, revise
from lifecycle_hf.synthesis.writers import Cut, LocalWriter, Recorded, ServerWriter, Writer

__all__ = [
    "Cut",
    "LocalWriter",
    "Principle",
    "Recorded",
    "ServerWriter",
    "Writer",
    "label",
    "load_constitution",
    "revise",
]
