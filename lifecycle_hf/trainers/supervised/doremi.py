"""DoReMi: find the weights of a corpus's domains by a small proxy model that group DRO trains.

Reference: Xie et al., https://arxiv.org/abs/2305.10429.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from lifecycle_hf.data.denoising import IGNORED
from lifecycle_hf.data.domains import join_domains, shares_of, split_domains
from lifecycle_hf.evaluation.pictures import plot_history
from lifecycle_hf.models.adapters.embeddings import embedding_rows
from lifecycle_hf.models.loading import is_sharded, load_pretraining_model
from lifecycle_hf.objectives.domains import domain_sums, doremi_weights, excess_loss
from lifecycle_hf.objectives.language import causal_lm_loss
from lifecycle_hf.trainers.base.options import option
from lifecycle_hf.trainers.supervised.base import own_copy
from lifecycle_hf.trainers.supervised.pretraining import PretrainingConfig, PretrainingTrainer, model_inputs

WEIGHTS, PICTURE = "domain_weights.yaml", "domain_weights.png"


@dataclass
class DoReMiConfig(PretrainingConfig):
    """Hold the options of DoReMi beside those of pretraining.

    `domain_weights` are here the weights by which rows are drawn, and from which the weights start; by default they
    are uniform, as in the paper. Give those of the reference to start from these.
    """

    weight_step_size: float = option(1.0, "η, how far the excess losses (nats per token) move the weights in a step.")
    weight_smoothing: float = option(1e-3, "c, share of the uniform distribution in the weights after each step.")

    def conflicts(self) -> list[tuple[bool, str]]:
        other = f"objective={self.objective!r}: DoReMi compares the losses of causal LMs, so leave it out."
        held_out = f"eval_strategy={self.eval_strategy!r}: DoReMi reads training losses alone, so leave it out."
        mine = [(self.objective != "causal", other), (self.eval_strategy != "no", held_out)]
        return [*mine, *super().conflicts()]


class DomainWeights(TrainerCallback):
    """Move the weights of domains after every optimizer step by the losses that were seen in it, over all ranks.

    Attributes:
        weights: w [K]. total: sum of w over the steps, so that total / steps is the result.
        excess: λ [K] of the last step in which the domain had a token.
        reference: [K, 2], the sum of the reference's losses over all steps, and their number.
        tokens: [K], predicted tokens of the present step, over all micro-batches and ranks.
    """

    def __init__(self, trainer: "DoReMiTrainer", start: torch.Tensor):
        self.trainer, self.weights, self.steps = trainer, start, 0
        self.total, self.excess = torch.zeros_like(start), torch.zeros_like(start)
        self.reference = start.new_zeros(len(start), 2)
        self.tokens, self._seen = None, torch.zeros((), dtype=start.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "total", "excess", "reference", "steps")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def see(self, excess: torch.Tensor, reference: torch.Tensor) -> None:
        """Add a micro-batch: the sums of the excess losses and of the reference's losses, [K] each."""
        self._seen = self._seen.to(excess.device) + torch.stack([excess, reference])

    def on_step_end(self, args, state, control, **kwargs):
        names, metrics = self.trainer.kinds, self.trainer.metrics["train"]
        excess, reference = self.trainer.accelerator.reduce(self._seen, "sum").cpu()
        tokens, self._seen = self.tokens.cpu(), torch.zeros_like(self._seen)
        if not excess.isfinite().all():
            worst = names[int((~excess.isfinite()).nonzero()[0])]
            raise ValueError(
                f"step {state.global_step}: the excess loss of domain {worst!r} is not finite. The proxy or the "
                f"reference has diverged: lower the learning rate (now {args.learning_rate})."
            )
        self.excess = torch.where(tokens > 0, excess / tokens.clamp(min=1), self.excess)
        options = {"step_size": args.weight_step_size, "smoothing": args.weight_smoothing}
        self.weights = doremi_weights(self.weights, self.excess, **options)
        self.total, self.steps = self.total + self.weights, self.steps + 1
        self.reference += torch.stack([reference, tokens], 1)
        for k, name in enumerate(names):
            metrics.add(f"weight/{name}", self.weights[k])
            metrics.add(f"excess/{name}", excess[k], tokens[k])

    def on_train_end(self, args, state, control, **kwargs):
        if self.steps and self.trainer.is_world_process_zero():
            self.trainer.write_weights(args.output_dir)


class DoReMiTrainer(PretrainingTrainer):
    """Train a proxy by group DRO, and find how often a model should read each domain: minimise Σ_k w_k·mean NLL_k.

    The excess loss of domain k in a step is λ_k = Σ max(ℓ_proxy − ℓ_ref, 0) / tokens, over its tokens in the step.
    After the step w ← w·exp(η·λ), normalised, and w ← (1 − c)·w + c / K. The result is the mean of w over all steps.
    A domain without a token in a step keeps its λ. The gradient of a step is weighted by the w before it, so that
    one forward pass of each micro-batch is enough. The paper weighs it by the w after.

    `output_dir` gets domain_weights.png and domain_weights.yaml: the weights, and what they depend on. The YAML is
    read by `PretrainingConfig.domain_weights` and `InstructionMixture(weights=…)`. The log has `weight/<domain>`,
    `excess/<domain>` and `loss/<domain>`, in nats per token.

    Args:
        model: the proxy, untrained; a name or path, or a causal LM.
        ref_model: the reference, a causal LM with the same tokenizer, trained by [`PretrainingTrainer`] with the
            weights that are to be improved; it is frozen.
        args: [`DoReMiConfig`].
        train_dataset: {name of a domain: texts}, or a dataset in memory with a column "domain".
        processing_class: tokenizer.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: there are fewer than two domains, one is empty, shorter than a row or without a weight above 0, or
            the reference is the proxy itself or does not fit the tokenizer.

    Reference: https://arxiv.org/abs/2305.10429, algorithm 1.
    """

    card_objective = "DoReMi's proxy: minimise Σ_k w_k·(mean NLL of domain k), w by group DRO."
    card_options = ("max_length", "weight_step_size", "weight_smoothing")
    card_paper = ("DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", "2305.10429")

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel,
        args: DoReMiConfig | None = None,
        train_dataset: Mapping[str, Iterable[str]] | Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        args = DoReMiConfig("output/doremi") if args is None else args
        if "eval_dataset" in kwargs:
            self.prepared(kwargs["eval_dataset"], "eval_dataset")
        if isinstance(train_dataset, Mapping):
            train_dataset = join_domains(train_dataset)
        names = list(split_domains(train_dataset, "train_dataset"))
        if len(names) < 2:
            raise ValueError(f"train_dataset: {names[0]!r} is its only domain; DoReMi weighs two or more.")
        given = dict.fromkeys(names, 1) if args.domain_weights is None else args.domain_weights
        start = shares_of(given, names, "domain_weights: each domain of train_dataset")
        if not start.all():
            raise ValueError(f"domain_weights: {names[start.argmin()]!r} has the weight 0 and would never be drawn.")
        if ref_model is model and not isinstance(model, str):
            raise ValueError("ref_model is the model that trains, and would be frozen with it: load it twice.")
        in_order = {"train_sampling_strategy": "sequential"}  # of the rows, which are drawn at random
        args = own_copy(args, domain_weights=dict(zip(names, start.tolist())), **in_order)
        super().__init__(model, args, train_dataset, processing_class=processing_class, **kwargs)
        ref_model = load_pretraining_model(ref_model, masked=False, args=args)
        if is_sharded(ref_model):
            raise ValueError("DeepSpeed ZeRO-3 has sharded ref_model: use DDP, ZeRO-1 or ZeRO-2.")
        if (known := embedding_rows(ref_model)) < (tokens := len(self.processing_class)):
            raise ValueError(
                f"ref_model knows {known} tokens of the tokenizer's {tokens}: train it with this tokenizer."
            )
        self.ref_model = ref_model.to(args.device).eval().requires_grad_(False)
        self.kinds, self.domains = names, DomainWeights(self, torch.from_numpy(start))
        self.stateful["domains"] = self.domains
        self.add_callback(self.domains)

    @property
    def weights(self) -> dict[str, float]:
        """The mean of w over the steps so far, by domain."""
        return dict(zip(self.kinds, (self.domains.total / self.domains.steps).tolist()))

    def prepared(self, dataset, where: str):
        raise ValueError(f"{where}: DoReMi's proxy is not evaluated. Evaluate models of PretrainingTrainer.")

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the batch of `PretrainingTrainer.collate`, with the domains of the rows as their kinds."""
        return super().collate(rows) | {"kinds": torch.tensor([row["domain"] for row in rows])}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `PretrainingTrainer`, but count the targets of each domain, too."""
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.zeros(len(self.kinds), dtype=torch.float64, device=device)
        for batch in batches:
            mask = batch["labels"][:, 1:] != IGNORED
            tokens += domain_sums(mask, mask, batch["kinds"], len(self.kinds))[:, 1].to(device)
        self.domains.tokens = self.accelerator.reduce(tokens, "sum")
        return batches, targets

    def weigh(self, nll: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return nll·w_k·N / n_k: its mean over the N tokens of the step is Σ_k w_k·(mean NLL of domain k)."""
        labels, domains, tokens = inputs["labels"], inputs["kinds"], self.domains.tokens
        with torch.no_grad(), self.accelerator.autocast():
            reference = causal_lm_loss(self.ref_model(**model_inputs(inputs), use_cache=False).logits, labels)
        groups = labels[:, 1:] != IGNORED, domains, len(self.kinds)
        excess = excess_loss(nll.detach(), reference, *groups)
        self.domains.see(excess[:, 0], domain_sums(reference, *groups)[:, 0])
        factors = self.domains.weights.to(tokens.device) * tokens.sum() / tokens.clamp(min=1)
        return nll * factors[domains, None].to(nll.dtype)

    def write_weights(self, folder: str | Path) -> None:
        """Write the weights with what they depend on to domain_weights.yaml, and draw their history beside it."""
        args, found, tokenizer = self.args, self.domains, self.processing_class
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        models = {"proxy": self.accelerator.unwrap_model(self.model), "reference": self.ref_model}
        losses = (found.reference[:, 0] / found.reference[:, 1].clamp(min=1)).tolist()
        record = {
            "weights": self.weights,
            "last_weights": dict(zip(self.kinds, found.weights.tolist())),
            "start_weights": args.domain_weights,
            "reference_loss": dict(zip(self.kinds, losses)),
            "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            "tokenizer": {
                "name": tokenizer.name_or_path, "tokens": len(tokenizer),
                "sha256": hashlib.sha256(vocabulary).hexdigest(),
            },
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "tokens_per_row": args.max_length,
            "steps": found.steps,
            "weight_step_size": args.weight_step_size,
            "weight_smoothing": args.weight_smoothing,
            "seed": args.seed,
        }  # fmt: skip
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / WEIGHTS).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
        titles = {"weight": "Weight", "excess": "Excess loss (nats per token)", "loss": "Loss (nats per token)"}
        panels = {title: {f"{kind}/{name}": name for name in self.kinds} for kind, title in titles.items()}
        plot_history(self.state.log_history, Path(folder) / PICTURE, panels)
