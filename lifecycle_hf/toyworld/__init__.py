"""The embedded default: a tiny world whose truth is known.

Facts and sums are its capability, courtesy and refusals of forbidden requests its alignment. It is data and a gold
judge only: every trainer runs on it through the same public interface as on a real model.
"""

from .data import dataset
from .gold import gold_reward
from .measure import measure
from .model import build_model, build_tokenizer
from .stages import stage_checkpoint

__all__ = ["build_model", "build_tokenizer", "dataset", "gold_reward", "measure", "stage_checkpoint"]
