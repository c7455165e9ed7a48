"""Know what alignment cost: metrics that remember their items, and reports with intervals."""

from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval, holm, jackknife
from lifecycle_hf.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)
from lifecycle_hf.evaluation.checkpoints import Evaluation, measure_tax
from lifecycle_hf.evaluation.diversity import distinct_n, self_bleu, token_entropy
from lifecycle_hf.evaluation.instructions import TaskScores, evaluate_tasks, main_score
from lifecycle_hf.evaluation.metrics import exact_match, kl_to_reference, multiple_choice, perplexity
from lifecycle_hf.evaluation.pareto import capability_at, hypervolume, pareto_front
from lifecycle_hf.evaluation.pictures import plot_history, plot_overoptimization, plot_pareto, plot_reliability
from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.evaluation.text import rouge_l

__all__ = [
    "Evaluation",
    "Measurement",
    "TaskScores",
    "TaxReport",
    "bootstrap_interval",
    "brier_score",
    "capability_at",
    "distinct_n",
    "evaluate_tasks",
    "exact_match",
    "expected_calibration_error",
    "holm",
    "hypervolume",
    "jackknife",
    "kl_to_reference",
    "main_score",
    "measure_tax",
    "multiple_choice",
    "negative_log_likelihood",
    "pareto_front",
    "perplexity",
    "plot_history",
    "plot_overoptimization",
    "plot_pareto",
    "plot_reliability",
    "reliability_bins",
    "rouge_l",
    "self_bleu",
    "token_entropy",
]
