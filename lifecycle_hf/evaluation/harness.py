"""Tasks of lm-evaluation-harness (extra `eval`), by name or local YAML, with the items behind each number."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.evaluation.bootstrap import Measurement, exp_ratio

WEIGHTED = {
    "word_perplexity": exp_ratio,
    "byte_perplexity": exp_ratio,
    "bits_per_byte": lambda means: means[..., 0] / means[..., 1] / np.log(2),
}
"""Metrics over (−log-likelihood, words or bytes) of each document."""


def lm_eval_tasks(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    **options,
) -> tuple[dict[str, float], dict[str, bool]]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: path, Hub name, or a causal LM in memory.
        tasks: names, or paths of YAML files.
        limit: documents per task; all by default.
        options: others of `lm_eval.simple_evaluate`, such as `num_fewshot` or `apply_chat_template`.

    Returns:
        {"task/metric": value} and whether higher is better. A value that the harness takes from one number per
        document is a `Measurement`; others, such as those of a group of tasks, are plain numbers.

    Raises:
        ValueError: lm-eval is not installed, or a task is not known to it.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm_eval needs the extra `eval`: pip install 'lifecycle_hf[eval]' ({error}).") from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"lm_eval: there is no task file {', '.join(missing)} (looked from {Path.cwd()}).")
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(
        include_path=[str(folder) for folder in {file.resolve().parent for file in files}] or None,
        include_defaults=len(files) < len(tasks),
    )
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"lm_eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them.")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # that of a model given by name
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device=device, batch_size=batch_size)
    found = simple_evaluate(
        wrapped, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    values, higher = {}, {}
    for task, numbers in found["results"].items():
        for key, value in numbers.items():
            metric, _, choice = key.partition(",")
            if choice and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                name = f"{task}/{metric}" if choice == "none" else f"{task}/{metric} ({choice})"
                values[name] = _with_items(float(value), found["samples"].get(task, []), metric, choice)
                higher[name] = bool(found["higher_is_better"].get(task, {}).get(metric, True))
    return values, higher


def _task_name(file):
    class Loader(yaml.SafeLoader):
        """Reads past the harness's own tags, such as !function."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return yaml.load(file.read_text(), Loader)["task"]


def _with_items(value: float, samples: list[dict], metric: str, choice: str) -> float:
    """`value` with the documents' own numbers, where these make up that value."""
    items = [sample[metric] for sample in samples if sample.get("filter") == choice and metric in sample]
    try:
        columns = np.asarray(items, dtype=float)
        if metric in WEIGHTED:
            measured = Measurement(columns * (-1, 1), WEIGHTED[metric])
        else:
            measured = Measurement(columns)
    except (TypeError, ValueError):
        return value
    return measured if np.isclose(measured, value, rtol=1e-9, atol=1e-12) else value
