"""Preference optimisation on samples of the policy itself: online and iterative DPO, and SPIN."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lifecycle_hf.completions.judges import Judge, win_rates
from lifecycle_hf.completions.rewards import KeptScores, Samples
from lifecycle_hf.completions.sampling import stop_token_ids
from lifecycle_hf.completions.scorer import reward_scorer
from lifecycle_hf.data.schemas import to_targets
from lifecycle_hf.data.tokenize import tokenize_unpaired
from lifecycle_hf.models.loading import is_sharded
from lifecycle_hf.trainers.base.hacking import HackingAlarm, look_at_all
from lifecycle_hf.trainers.base.options import SamplingOptions, option
from lifecycle_hf.trainers.base.prompts import check_reward_columns, check_room, prepare_prompts
from lifecycle_hf.trainers.base.sampler import PolicySampler, show_samples
from lifecycle_hf.trainers.preference.base import each
from lifecycle_hf.trainers.preference.config import PreferenceConfig
from lifecycle_hf.trainers.preference.paired import PreferenceTrainer


@dataclass
class OnlineDPOConfig(SamplingOptions, PreferenceConfig):
    """Hold the options of online DPO: those of [`PreferenceConfig`], of sampling, and of rounds.

    `per_device_train_batch_size` counts prompts; each gives one pair.

    Attributes:
        fewest: completions of a prompt that a pair needs.
    """

    fewest = 2

    _VALID_DICT_FIELDS = [*PreferenceConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    refused = PreferenceConfig.refused | {
        "precompute_ref_log_probs": "can't be done for completions that are not sampled yet: leave it out.",
        "max_length": "has no effect: max_prompt_length and max_completion_length bound a pair; leave it out.",
        "train_sampling_strategy": "has no effect, since completions have no length yet: leave it out.",
    }

    num_generations: int = option(2, "Completions of each prompt; the best and the worst of them make a pair.")
    rounds: int = option(
        1, "Equal parts of the run; at the start of each but the first the reference becomes the present policy."
    )
    sample_from: str = option(
        "policy",
        "Sample from the present 'policy' (online), or from the 'reference', which is the policy at the start of the "
        "round (iterative DPO).",
        choices=("policy", "reference"),
    )

    def conflicts(self) -> list[tuple[bool, str]]:
        best = self.metric_for_best_model
        return [
            *super().conflicts(),
            *self.sampling_conflicts(),
            (
                self.num_generations < self.fewest,
                f"num_generations={self.num_generations}: a pair needs the best and the worst of 2 or more.",
            ),
            (
                self.rounds > 1 and best in ("loss", "eval_loss"),
                "metric_for_best_model: losses against different references do not compare; name score.",
            ),
        ]


@dataclass
class SPINConfig(OnlineDPOConfig):
    """Hold the options of SPIN: those of [`OnlineDPOConfig`], with one sample of each prompt, of the reference."""

    fewest = 1

    refused = OnlineDPOConfig.refused | dict.fromkeys(
        ("reward_weights", "reward_timeout", "reward_retries", "missing_eos_penalty"),
        "has no effect, since SPIN has no rewards: leave it out.",
    )
    refused |= {"chat_template_kwargs": "has no effect in SPIN: give it as a column of the data, and leave it out."}

    num_generations: int = option(1, "Completions of each prompt, each of which makes a pair with the target.")
    rounds: int = option(3, OnlineDPOConfig.__dataclass_fields__["rounds"].metadata["help"])
    sample_from: str = option(
        "reference",
        OnlineDPOConfig.__dataclass_fields__["sample_from"].metadata["help"],
        choices=("policy", "reference"),
    )


class MovedReference:
    """Make the reference the present policy at the start of each round, and keep it over checkpoints.

    Attributes:
        round: the present round, from 0 on.
    """

    def __init__(self, trainer):
        self.trainer, self.round = trainer, 0

    def parameters(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Return (name, weight of the reference, weight of the policy) of all that differs between them."""
        models = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if models.reference is not None:
            pairs = zip(models.reference.named_parameters(), models.policy.parameters(), strict=True)
            return [(name, theirs, ours) for (name, theirs), ours in pairs]
        weights = dict(models.policy.named_parameters())
        mine, its = f".{models.policy_role}.", f".{models.reference_role}."
        return [(name, p, weights[name.replace(its, mine)]) for name, p in weights.items() if its in name]

    @torch.no_grad()
    def move(self, to: int) -> None:
        """Start the round `to`, unless it is the present one."""
        if to != self.round:
            for _, reference, policy in self.parameters():
                reference.copy_(policy)
            self.round = to

    def state_dict(self) -> dict[str, Any]:
        moved = {name: weight.detach().cpu() for name, weight, _ in self.parameters()} if self.round else {}
        return {"round": self.round} | moved

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = state["round"]
        for name, weight, _ in self.parameters() if self.round else ():
            weight.copy_(state[name])


class OnlineDPOTrainer(PreferenceTrainer):
    """Train on pairs that are sampled from the policy during training and ranked by rewards or by a judge.

    Of the completions of a prompt the one with the highest score is chosen and the one with the lowest rejected
    (https://arxiv.org/abs/2402.04792). A prompt whose completions have equal scores gives no pair and is counted in
    `ties`. With `rounds` and `sample_from="reference"` it is iterative DPO.

    Metrics: those of [`PreferenceTrainer`], and `score`, `ties`, `reward/NAME`, `completions/length`,
    `completions/no_eos`, and those of the alarm for reward hacking. An evaluation samples with a seed of its own.

    Args:
        reward_funcs: one or a list of: a reward model, its name or path, or a callable, as in [`PPOTrainer`].
        judge: function `judge(prompts, pairs) -> P(first is better)`, see [`lifecycle_hf.completions.judges`]; in
            place of `reward_funcs`.
        objective: a name in `OBJECTIVES`, or a `PairedObjective`.
        train_dataset, eval_dataset: prompts, chat or plain.
        Others: see [`CompletionTrainer`].

    Attributes:
        ranks: whether completions are ranked, by rewards or a judge.

    Raises:
        ValueError: neither or both of `reward_funcs` and `judge` are given; and as [`PreferenceTrainer`].
    """

    config_class = OnlineDPOConfig
    ranks = True
    card_options = (
        *SamplingOptions.__annotations__, *PreferenceConfig.__annotations__, *OnlineDPOConfig.__annotations__,
    )  # fmt: skip

    def __init__(self, model, ref_model=None, reward_funcs=None, args=None, *, judge: Judge | None = None, **kwargs):
        args = args if args is not None else self.config_class(f"output/{type(self).__name__[:-7].lower()}")
        if (reward_funcs is None) == (judge is None) and self.ranks:
            raise ValueError("Give either reward_funcs or a judge: they rank the completions of a prompt.")
        super().__init__(model, ref_model, args, **kwargs)
        if not self.needs_reference and (args.rounds > 1 or args.sample_from == "reference"):
            raise ValueError(
                f"rounds={args.rounds} and sample_from={args.sample_from!r} need a reference, and this objective has "
                "none: leave both out, or take one that has."
            )
        if judge is not None and args.reward_weights is not None:
            raise ValueError(f"reward_weights={args.reward_weights} has no effect with a judge: leave it out.")
        check_room(self.model, args)
        if args.rounds > 1 and is_sharded(self.model):
            raise ValueError(f"rounds={args.rounds} moves the reference, which ZeRO-3 has sharded: use ZeRO-2 or DDP.")
        self.judge, self.scorer, self.weights = judge, None, {}
        if reward_funcs is not None:
            kept = KeptScores(Path(args.output_dir) / f"_unscored_step_rank{args.process_index}.jsonl")
            calls = {"timeout": args.reward_timeout, "retries": args.reward_retries}
            self.scorer, self.weights = reward_scorer(reward_funcs, args.reward_weights, args.device, kept, **calls)
            check_reward_columns(self.scorer.sources, self.train_dataset.column_names)
        stops = stop_token_ids(self.model.policy, self.processing_class, args.stop_tokens)
        self.sampler, self.alarm = PolicySampler(self, stops), HackingAlarm(self)
        self.add_callback(self.alarm)
        self.moved = MovedReference(self)
        self.stateful |= {"hacking": self.alarm.detector, "reference": self.moved}

    def _tokenized(self, dataset, where: str):
        def tokenize(part, place):
            return part if "prompt_ids" in part.column_names else self.tokenize(part, place)

        return each(dataset, tokenize, where)

    def tokenize(self, dataset: Dataset, where: str) -> Dataset:
        return prepare_prompts(dataset, self._tokenizing["tokenizer"], self.args, where)

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        return super()._collate(rows) if self.columns[0] in rows[0] else rows

    def made(self, batches: list[list[dict]]) -> list[dict[str, torch.Tensor]]:
        """Sample for all prompts of the optimizer step, and return the pairs as micro-batches.

        Ties are left out. A micro-batch of ties alone keeps one, with weight 0, so that every process makes as many
        forward passes.
        """
        args, step = self.args, self.state.global_step
        self.moved.move(step * args.rounds // self.state.max_steps)
        # A seed for each step, because a resumed run restores torch's random state only after this.
        seed = (args.seed * 1_000_003 + step) * args.world_size + args.process_index
        groups = self.pairs([row for batch in batches for row in batch], seed)
        for pair in (pair for group in groups for pair in group):
            for name, (total, count) in pair["noted"].items():
                self.metrics["train"].add(name, total, count)
        self.model_wrapped.train()
        each = iter(groups)
        parts = [[pair for _ in batch for pair in next(each)] for batch in batches]
        return [self._weighted([pair for pair in part if pair["weight"]] or part[:1]) for part in parts]

    def _weighted(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        return self._collate(pairs) | {"weights": torch.tensor([pair["weight"] for pair in pairs])}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if isinstance(inputs, list):
            pairs = [pair for group in self.pairs(inputs, self.args.seed, training=False) for pair in group]
            noted = {name: [pair["noted"][name] for pair in pairs] for name in pairs[0]["noted"]}
            inputs = self._weighted(pairs)
            inputs["noted"] = {name: tuple(torch.tensor(both).T) for name, both in noted.items()}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def pairs(self, rows: list[dict], seed: int, training: bool = True) -> list[list[dict[str, Any]]]:
        """Return the pairs of each row: token ids, weight 0 for a tie, else 1, "noted" {metric: (total, count)}."""
        args, n = self.args, self.args.num_generations
        samples, ids = self.sampler.sample(rows, n, seed, reference=args.sample_from == "reference")
        columns = self._columns(samples, n)
        columns["score"] = columns["score"] - (args.missing_eos_penalty or 0.0) * ~self.sampler.ended(ids)
        if training:
            self._look(samples, ids, columns)
        groups, noted, found = columns["score"].view(-1, n), self._noted(ids, columns), []
        best, worst = groups.argmax(1).tolist(), groups.argmin(1).tolist()
        for i, row in enumerate(rows):
            own, tie = slice(i * n, (i + 1) * n), bool(groups[i].amax() == groups[i].amin())
            mine = {name: (values[own].sum().item(), n) for name, values in noted.items()}
            pair = self._pair(row, ids[own][best[i]], ids[own][worst[i]], tie)
            found.append([pair | {"noted": mine | {"ties": (float(tie), 1)}}])
        return found

    @staticmethod
    def _pair(row: dict, chosen: list[int], rejected: list[int], tie: bool) -> dict[str, Any]:
        ids = {"prompt_ids": row["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
        return ids | {"weight": float(not tie)}

    def _columns(self, samples: Samples, n: int) -> dict[str, torch.Tensor]:
        """Return the scores by name [P·n], with their weighted sum, or the judge's win rates, as "score"."""
        if self.judge is not None:
            return {"score": win_rates(self.judge, samples, n)}
        raw = self.scorer(samples, self.args.per_device_train_batch_size * n)
        return raw | {"score": sum(self.weights[name] * values for name, values in raw.items())}

    def _noted(self, ids: list[list[int]], columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what is logged of each completion, by the metric's name, [P·n]."""
        noted = {name if name == "score" else f"reward/{name}": values.float() for name, values in columns.items()}
        noted["completions/no_eos"] = (~self.sampler.ended(ids)).float()
        return noted | {"completions/length": torch.tensor([float(len(row)) for row in ids])}

    def _look(self, samples: Samples, ids: list[list[int]], columns: dict[str, torch.Tensor]) -> None:
        """Let the alarm look at what was sampled, and show some of it."""
        held_out = {name: columns[name].tolist() for name, weight in self.weights.items() if weight == 0}
        look = look_at_all(samples, list(map(len, ids)), columns["score"].tolist(), held_out)
        for name, value in look.metrics.items():
            self.metrics["train"].add(name, value)
        self.alarm.check_rollout(look)
        if self.args.log_completions:
            show_samples(self, samples, columns)


class SPINTrainer(OnlineDPOTrainer):
    """Train by self-play (SPIN): the chosen answer is that of the data, the rejected one a sample of the reference.

    The loss is DPO's by default. The reference is the policy at the start of the round, so each of the `rounds` plays
    against the one before (https://arxiv.org/abs/2401.01335, Eq. 4.7). A sample that equals its target gives no pair.

    Args:
        train_dataset, eval_dataset: prompt-completion rows, or chats that end with the answer.
        Others: see [`OnlineDPOTrainer`], without `reward_funcs` and `judge`.
    """

    config_class = SPINConfig
    ranks = False

    def __init__(self, model, ref_model=None, args: SPINConfig | None = None, **kwargs):
        super().__init__(model, ref_model, None, args, **kwargs)

    def tokenize(self, dataset: Dataset, where: str) -> Dataset:
        args, limit = self.args, self.args.max_prompt_length
        options = self._tokenizing | {"max_length": None if limit is None else limit + args.max_completion_length}
        rows = tokenize_unpaired(to_targets(dataset, where), where=where, **options)
        rows = rows.rename_column("completion_ids", "target_ids")
        decode = options["tokenizer"].batch_decode
        rows = rows.map(lambda part: {"prompt": decode(part["prompt_ids"])}, batched=True)
        short = rows if limit is None else rows.filter(lambda row: len(row["prompt_ids"]) <= limit)
        if len(short) < len(rows):
            problem = (
                f"{where}: the prompts of {len(rows) - len(short)} of {len(rows)} rows have more than {limit} tokens"
            )
            if args.strict_data or not len(short):
                raise ValueError(f"{problem} (max_prompt_length): raise it, or shorten them.")
            warnings.warn(f"{problem} (max_prompt_length); they are dropped.", stacklevel=2)
        return short

    def pairs(self, rows: list[dict], seed: int, training: bool = True) -> list[list[dict[str, Any]]]:
        n = self.args.num_generations
        samples, ids = self.sampler.sample(rows, n, seed, reference=self.args.sample_from == "reference")
        if training:
            self._look(samples, ids, {"score": torch.zeros(len(ids))})
        noted, found = self._noted(ids, {}), []
        for i, row in enumerate(rows):
            pairs = []
            for j in range(i * n, (i + 1) * n):
                tie, target = ids[j] == row["target_ids"], row["target_ids"]
                mine = {name: (values[j].item(), 1) for name, values in noted.items()} | {"ties": (float(tie), 1)}
                pairs.append(self._pair(row, target, ids[j], tie) | {"noted": mine})
            found.append(pairs)
        return found
