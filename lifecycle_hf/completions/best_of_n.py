"""Best-of-N: sample several completions of each prompt, score all, keep the best; nothing that was sampled is lost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import KeptScores, Samples
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.scorer import RewardScorer, reward_scorer
from lifecycle_hf.data.json_lines import append_samples, check_settings, read_samples
from lifecycle_hf.data.schemas import to_prompts
from lifecycle_hf.data.tokenize import tokenize_prompts

SAMPLES, SETTINGS = "samples_{rank}.jsonl", "settings_{rank}.json"


def expected_best(scores: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Estimate without bias what the best of n completions is worth, for each n up to the N that were sampled.

    E[value of the best of n] = Σ_i C(i−1, n−1) / C(N, n) · v_(i), where v_(i) is the value of the completion with the
    i-th lowest score: the mean over all subsets of n. Of equal scores the first completion is the best.

    Args:
        scores: [P, N], by which the best is chosen.
        values: [P, N], of which the mean is taken, such as a held-out score; the scores by default.

    Returns:
        [P, N], column n − 1 for the best of n.

    Reference: https://arxiv.org/abs/2112.09332, Appendix I (WebGPT).
    """
    size = scores.shape[1]
    lowest_first = scores.double().flip(1).argsort(dim=1, stable=True)  # the first of equal scores counts as higher
    ranked = (scores if values is None else values).double().flip(1).gather(1, lowest_first)
    weights = [[math.comb(i, n - 1) / math.comb(size, n) for n in range(1, size + 1)] for i in range(size)]
    return ranked @ torch.tensor(weights, dtype=torch.float64)


def kl_bound(n: int) -> float:
    """Return log n − (n − 1)/n, in nats: the KL of the best of n from the policy is at most this.

    Reference: https://arxiv.org/abs/2401.01879.
    """
    return math.log(n) - (n - 1) / n


@dataclass
class BestOfN:
    """Hold the samples of [`best_of_n`].

    Attributes:
        rows: one dict for each prompt, in the order of the dataset: "index", "prompt", "completions" (N texts),
            "ended" (whether each has its stop token), "scores" ({name: N scores}), "total" (N, Σ weights × scores,
            less the penalty for a missing stop token),
            "start" and "of" (first row and size of its batch).
        weights: weight of each score; one of weight 0 is held out: measured, and not chosen by.
    """

    rows: list[dict[str, Any]]
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> torch.Tensor:
        """Scores by which the best is chosen, [P, N]."""
        return torch.tensor([row["total"] for row in self.rows], dtype=torch.float64)

    @property
    def best(self) -> list[int]:
        """Index of the best completion of each prompt, the first of equal ones."""
        return self.total.argmax(1).tolist()

    def scores(self, name: str) -> torch.Tensor:
        """Return the scores `name`, [P, N]."""
        return torch.tensor([row["scores"][name] for row in self.rows], dtype=torch.float64)

    def curves(self) -> dict[str, torch.Tensor]:
        """Return {name: [P, N]}, [`expected_best`] of the total, and of each held-out score by the total."""
        held_out = [name for name, weight in self.weights.items() if weight == 0]
        own = {"score": expected_best(self.total)}
        return own | {name: expected_best(self.total, self.scores(name)) for name in held_out}

    def winners(self) -> Dataset:
        """Return the best completion of each prompt as prompt-completion rows, in the format of the prompt.

        Completions that were cut off before their stop token are left out: a model that learns them does not stop.
        """
        chosen = [(row, i) for row, i in zip(self.rows, self.best, strict=True) if row["ended"][i]]
        prompts = [row["prompt"] for row, _ in chosen]
        samples = Samples(prompts, [row["completions"][i] for row, i in chosen])
        return Dataset.from_dict({"prompt": prompts, "completion": samples.completions})


def best_of_n(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_funcs,
    *,
    output_dir: str | Path,
    n: int = 8,
    reward_weights: Sequence[float] | None = None,
    max_prompt_length: int | None = 512,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    missing_eos_penalty: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> BestOfN:
    """Sample `n` completions of each prompt, score them, and keep all of them with their scores in JSON lines.

    A call that was killed goes on where it stopped. The samples of a batch whose scoring fails are in the folder, too.

    Args:
        model: causal LM or PEFT model over one.
        dataset: prompts, chat or plain; reward callables receive the other columns.
        reward_funcs: one or a list of: a reward model, its name or path, or a callable, as in [`PPOTrainer`].
        output_dir: folder of the samples.
        reward_weights: weight of each reward function; 1 each by default. One of weight 0 is held out.
        missing_eos_penalty: subtracted from the total of a completion without a stop token, so that ended ones win.
        batch_size: prompts that are decoded together, each with its `n` completions.
        rank, world_size: this process and the number of processes, which share the prompts.

    Raises:
        ValueError: the folder has samples with other settings, `n` is below 1, or a reward function fails.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least one completion of each prompt is needed.")
    rows = tokenize_prompts(to_prompts(dataset, "dataset"), tokenizer, max_length=max_prompt_length, where="dataset")
    folder, device = Path(output_dir), next(model.parameters()).device
    unscored, stops = KeptScores(folder / f"_unscored_rank{rank}.jsonl"), stop_token_ids(model, tokenizer)
    scorer, weights = reward_scorer(reward_funcs, reward_weights, device, unscored)
    settings = {"n": n, "temperature": temperature, "max_completion_length": max_completion_length, "seed": seed}
    settings |= {"batch_size": batch_size, "world_size": world_size, "prompts": len(rows), "weights": weights}
    settings |= {"model": model.config._name_or_path, "missing_eos_penalty": missing_eos_penalty}
    check_settings(folder / SETTINGS.format(rank=rank), settings)
    found = read_samples(path := folder / SAMPLES.format(rank=rank))
    options = {"max_new_tokens": max_completion_length, "temperature": temperature, "stop_token_ids": stops}
    options |= {"pad_token_id": tokenizer.pad_token_id or 0, "num_generations": n}
    starts = range(rank * batch_size, len(rows), batch_size * world_size)
    with tqdm(total=sum(min(batch_size, len(rows) - s) for s in starts), desc="Best of N", unit="prompt") as bar:
        bar.update(len(found))
        for start in starts:
            if start not in {row["start"] for row in found}:
                part = rows.select(range(start, min(start + batch_size, len(rows))))
                ids = generate(model, list(part["prompt_ids"]), **options, generator_seed=seed * 1_000_003 + start)
                made = scored_rows(part, ids, n, tokenizer, scorer, weights, stops, missing_eos_penalty)
                parts = [{"index": start + i, "start": start, "of": len(made)} | row for i, row in enumerate(made)]
                found += append_samples(path, parts)
                bar.update(len(made))
    return BestOfN(found, weights)


def scored_rows(
    part: Dataset, ids, n: int, tokenizer, scorer: RewardScorer, weights, stops, penalty: float = 0.0
) -> list[dict]:
    """Return the rows of [`BestOfN`] for some prompts and their completions, `n` token lists in a row for each."""
    texts, each = tokenizer.batch_decode(ids, skip_special_tokens=True), [row for row in part for _ in range(n)]
    columns = {name: [row[name] for row in each] for name in part.column_names if name not in ("prompt", "prompt_ids")}
    scores = scorer(Samples([row["prompt"] for row in each], texts, columns), batch_size=n)
    ended = [row[-1] in stops for row in ids]
    total = sum(weights[name] * values.double() for name, values in scores.items())
    total = total - penalty * ~torch.tensor(ended)
    groups = [slice(i, i + n) for i in range(0, len(ids), n)]
    return [
        {
            "prompt": each[group.start]["prompt"],
            "completions": texts[group],
            "ended": ended[group],
            "scores": {name: values[group].tolist() for name, values in scores.items()},
            "total": total[group].tolist(),
        }
        for group in groups
    ]
