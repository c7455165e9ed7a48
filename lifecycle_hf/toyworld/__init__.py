"""The built-in default data: a tiny world in which every correct answer is known.

Capability is measured by facts and sums, alignment by courtesy and by refusals of forbidden requests. The package
holds data and a gold judge only: every trainer uses it through the same public interface as for a real model.
"""

from lifecycle_hf.data.loading import SOURCES
from lifecycle_hf.evaluation.checkpoints import WORLDS, World
from lifecycle_hf.toyworld.data import dataset
from lifecycle_hf.toyworld.domains import planted_domains
from lifecycle_hf.toyworld.evaluation import HIGHER_IS_BETTER, measure, questions
from lifecycle_hf.toyworld.gold import gold_reward
from lifecycle_hf.toyworld.model import build_model, build_tokenizer
from lifecycle_hf.toyworld.stages import stage_checkpoint
from lifecycle_hf.toyworld.tasks import TASKS, task_dataset

__all__ = [
    "HIGHER_IS_BETTER",
    "build_model",
    "build_tokenizer",
    "dataset",
    "gold_reward",
    "measure",
    "planted_domains",
    "questions",
    "stage_checkpoint",
    "task_dataset",
]

SOURCES["toyworld"] = lambda stage: task_dataset(stage) if stage in TASKS else dataset(stage)
SOURCES["planted_domains"] = lambda stage: {"train": planted_domains()}
WORLDS["toyworld"] = World(
    measure, questions, {"perplexity": False} | HIGHER_IS_BETTER, alignment=("gold_reward", "refusal_rate")
)
