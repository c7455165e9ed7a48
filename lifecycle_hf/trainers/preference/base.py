"""Code that the trainers on given completions share: data, reference, exact normalisation and metrics."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, set_seed

from lifecycle_hf.completions.scoring import Completions, packs
from lifecycle_hf.data.schemas import check_train_dataset
from lifecycle_hf.models.loading import disable_dropout, is_sharded
from lifecycle_hf.models.reference import load_logprobs, model_fingerprint, rows_fingerprint, save_logprobs
from lifecycle_hf.trainers.base.mitigations import protect
from lifecycle_hf.trainers.base.policy import PolicyAndReference, PolicyBuilder, PolicyTrainerMixin
from lifecycle_hf.trainers.base.trainer import with_lengths

RowMetrics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{metric: (total, count)} with one entry per example, [B] each."""


class CompletionTrainer(PolicyTrainerMixin, Trainer):
    """Base class of the trainers whose examples are a prompt with given completions.

    The loss is the mean over all examples of an optimizer step, over all its micro-batches and ranks. A subclass names
    the columns of its completions and those of their reference log-probs, in the same order, and computes `losses`.

    Args:
        model: policy; a name or path (of a model or an adapter), a causal LM or a PeftModel.
        ref_model: reference; by default a frozen copy of the policy at the start of training, with PEFT the base with
            its adapters off, or a frozen copy of the adapter that the policy starts from.
        args: options of the subclass.
        train_dataset, eval_dataset: in TRL's formats, chat or plain; `eval_dataset` may be a dict of several.
        processing_class: tokenizer; the model's by default.
        ptx_dataset: text, chat or prompt-completion data that [`MitigationOptions`] protect.
        peft_config, quantization_config: as in TRL.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: data, model, tokenizer or options would make the run wrong. It is raised before training.
    """

    loss_is_scaled_for_ga = True
    config_class: type
    columns: tuple[str, ...]
    ref_columns: tuple[str, ...]
    extra_columns: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)  # of the inputs' names, one for each batch of completions
    needs_reference = True

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        ptx_dataset: Dataset | None = None,
        peft_config=None,
        quantization_config=None,
        **kwargs,
    ):
        name = type(self).__name__
        args = args if args is not None else self.config_class(f"output/{name.removesuffix('Trainer').lower()}")
        self.args = args
        check_train_dataset(train_dataset, name)
        set_seed(args.seed)  # new adapters are random
        options = {"quantization_config": quantization_config, "init_kwargs": args.model_init_kwargs}
        builder = PolicyBuilder(args, model, processing_class=processing_class, peft_config=peft_config, **options)
        tokenizer = builder.tokenizer
        self._tokenizing = {"tokenizer": tokenizer, "max_length": args.max_length, "strict": args.strict_data}
        self._tokenizing["num_proc"] = args.dataset_num_proc
        train_dataset = self.prepare_train(self._tokenized(train_dataset, "train_dataset"))
        eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        needed = self.needs_reference and not all_have(self.ref_columns, train_dataset, eval_dataset)
        reference = builder.reference(ref_model) if needed else {}
        whole = PolicyAndReference(builder.policy, shared=builder.shared, **reference)
        if args.disable_dropout:
            disable_dropout(whole)
        super().__init__(whole, args, self._collate, train_dataset, eval_dataset, tokenizer, **kwargs)
        self.check_engine()
        self._step_examples, self.displacement = 0.0, Displacement()
        self.stateful["displacement"] = self.displacement
        self.can_return_loss, self.label_names = True, []
        if self.needs_reference and args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
            self.eval_dataset = each(self.eval_dataset, self._with_reference, "eval")
            self.model.reference, self.model.reference_role = None, None
        protect(self, ptx_dataset)

    # Data

    def tokenize(self, dataset: Dataset, where: str) -> Dataset:
        """Return rows with "prompt_ids" and with the ids of the completions in `columns`."""
        raise NotImplementedError

    def prepare_train(self, dataset: Dataset) -> Dataset:
        """Check the tokenised training data, and return them."""
        return dataset

    def _tokenized(self, dataset, where: str):
        def tokenize(part, place):
            done = {"prompt_ids", *self.columns, *self.extra_columns} <= set(part.column_names)
            return with_lengths(part if done else self.tokenize(part, place), ("prompt_ids", *self.columns), self.args)

        return each(dataset, tokenize, where)

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        out = self._pack(rows, self.columns)
        if set(self.ref_columns) <= rows[0].keys():
            out["ref_logps"] = torch.tensor([row[name] for name in self.ref_columns for row in rows])
        return out

    def _pack(self, rows: list[dict], columns: tuple[str, ...], prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the completions of the first column of all rows, then those of the next column, as one batch."""
        batch = Completions.from_lists(
            [row["prompt_ids"] for _ in columns for row in rows],
            [row[name] for name in columns for row in rows],
            self.processing_class.pad_token_id,
            groups=list(range(len(rows))) * len(columns),
        )
        return {prefix + name: value for name, value in (batch.tensors() | {"sizes": batch.sizes}).items()}

    @staticmethod
    def completions(inputs: dict[str, torch.Tensor], prefix: str = "") -> Completions:
        names = ("input_ids", "prompt_lengths", "completion_lengths", "groups", "sizes")
        return Completions(*(inputs[prefix + name] for name in names))

    # Log-probs of the reference that are computed once

    def _with_reference(self, dataset: Dataset, where: str, keep: bool = True) -> Dataset:
        """Return `dataset` with the columns of the reference's log-probs, read from their file if it is there."""
        if set(self.ref_columns) <= set(dataset.column_names):
            return dataset
        folder = self.args.ref_log_probs_path if keep else None
        path = Path(folder) / f"{where}.safetensors" if folder else None
        fingerprint = {} if path is None else self._reference_fingerprint() | {"data": rows_fingerprint(dataset)}
        # The main process decides, since other machines may have another file system.
        read = self.is_world_process_zero() and path is not None and path.exists()
        (columns,) = broadcast_object_list([load_logprobs(path, fingerprint) if read else None])
        if columns is None:
            columns = self._reference_columns(dataset, where)
            if path is not None and self.is_world_process_zero():
                save_logprobs({k: torch.tensor(v, dtype=torch.float64) for k, v in columns.items()}, path, fingerprint)
        for name, values in columns.items():
            if name in dataset.column_names:
                dataset = dataset.remove_columns(name)
            dataset = dataset.add_column(name, values)
        return dataset

    def _reference_fingerprint(self) -> dict[str, str]:
        whole, args = self.model, self.args
        role = whole.reference_role if whole.reference is None else None
        model = whole.reference if whole.reference is not None else whole.policy
        autocast = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        return {"model": model_fingerprint(model, role), "precision": f"{model.dtype}, {autocast} autocast"}

    def _reference_columns(self, dataset: Dataset, where: str) -> dict[str, list[float]]:
        if self.model.reference is None and self.model.reference_role is None:
            raise ValueError(
                "precompute_ref_log_probs removed the reference before training: turn it off, or give this dataset as "
                "eval_dataset from the start."
            )
        if is_sharded(self.model):
            raise ValueError(
                "precompute_ref_log_probs does not run under ZeRO-3: turn it off, or compute them in one process with "
                "the same ref_log_probs_path, from which the run under ZeRO-3 reads them."
            )
        args, world = self.args, self.accelerator.num_processes
        if self.is_deepspeed_enabled and not getattr(self.model.policy, "is_quantized", False):
            self.model.to(args.device)  # DeepSpeed moves the model, but only when training starts
        size = args.per_device_train_batch_size if where == "train" else args.per_device_eval_batch_size
        own = range(self.accelerator.process_index, len(dataset), world)
        loader = DataLoader(dataset.select(own), args.precompute_ref_batch_size or size, collate_fn=self._collate)
        found = []
        for inputs in tqdm(loader, f"Reference log-probs ({where})", disable=not self.is_local_process_zero()):
            inputs = send_to_device(inputs, args.device)
            with torch.no_grad(), self.accelerator.autocast():
                found += self.reference_logps(self.model.eval(), inputs).T.tolist()
        rows = {i: row for part in gather_object([dict(zip(own, found, strict=True))]) for i, row in part.items()}
        return {name: [rows[i][k] for i in range(len(rows))] for k, name in enumerate(self.ref_columns)}

    def reference_logps(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return Σ log π_ref of the completions of each of `ref_columns`, [columns, B], nats."""
        outs = [model(self.completions(inputs, prefix), want=("ref_logprobs",)) for prefix in self.prefixes]
        return torch.cat([out["ref_logprobs"].sum(1) for out in outs]).view(len(self.ref_columns), -1)

    def score(self, model, inputs: dict[str, torch.Tensor], *want: str, prefix: str = "") -> tuple[dict, torch.Tensor]:
        """Return what `want` names of the completions, and Σ log π_ref of these, or of all columns if it is known."""
        known, batch = inputs.get("ref_logps"), self.completions(inputs, prefix)
        if known is None and self.needs_reference:
            out = model(batch, want=(*want, "ref_logprobs"))
            return out, out["ref_logprobs"].sum(1)
        return model(batch, want=want), known

    # The loop

    def losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, RowMetrics]:
        """Return the loss of every example, [B], and its metrics."""
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but count the examples of the step, over all its micro-batches and ranks."""
        batches = self.made(super().get_batch_samples(epoch_iterator, num_batches, device)[0])
        count = sum(self._examples(batch) for batch in batches)
        self._step_examples = self.accelerator.reduce(torch.tensor(count, device=device), "sum").item()
        return batches, None

    def made(self, batches: list) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of an optimizer step; a trainer that samples makes them of rows here."""
        return batches

    def _examples(self, inputs: dict[str, torch.Tensor]) -> float:
        return float(inputs["weights"].sum()) if "weights" in inputs else len(inputs["input_ids"]) / len(self.columns)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, rows = self.losses(model, inputs)
        training = self.model.training
        if (weights := inputs.get("weights")) is not None:
            weighted = {name: (total * weights, n * weights) for name, (total, n) in rows.items()}
            losses, rows = losses * weights, weighted | inputs.get("noted", {})
        if training:
            # DDP and the other engines average gradients over processes. The loss is a share of a sum, so undo that.
            share = losses.sum() / max(self._step_examples, 1)
            loss = self.with_auxiliary(share * self.accelerator.num_processes)
            self._count_tokens(model, inputs)
        else:
            loss = losses.mean()
            rows = rows | {"loss": (losses, torch.ones_like(losses) if weights is None else weights)}
        table = torch.stack([column.detach().double() for pair in rows.values() for column in pair], dim=1)
        if not training:  # without the rows that only fill up the last batch
            table = self.accelerator.gather_for_metrics(table)
        sums = table.sum(0).unbind()
        for i, name in enumerate(rows):
            self.metrics["train" if training else "eval"].add(name, sums[2 * i], sums[2 * i + 1])
        return (loss, {}) if return_outputs else loss

    def _count_tokens(self, model, inputs: dict[str, torch.Tensor]) -> None:
        padded, examples = inputs["input_ids"].numel(), len(inputs["input_ids"]) // len(self.columns)
        packed = sum(inputs["sizes"].prompts[:examples]) + sum(inputs["sizes"].completions)
        saved = padded - packed if packs(self.accelerator.unwrap_model(model).policy) else 0
        self.metrics["train"].add("tokens_saved", saved, padded)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def prepared(self, dataset, where: str):
        """Return raw rows tokenised, and with the reference's log-probs where those are computed once."""
        dataset = self._tokenized(dataset, where)
        known = self.needs_reference and self.args.precompute_ref_log_probs
        return self._with_reference(dataset, where, keep=False) if known else dataset

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        displacement, patience = logs.get("logps/chosen_displacement"), self.args.displacement_patience
        if displacement is None:
            return
        step = self.state.global_step
        fallen = self.displacement.update(displacement, step)
        if patience and fallen >= patience and not self.displacement.told:
            self.displacement.told = True
            warnings.warn(
                f"For {fallen} steps the chosen answers have been less likely than at the start (by "
                f"{-displacement:.3g} nats at step {step}): likelihood moves to answers that are in neither column. "
                "Raise beta, lower the learning rate, or add a language-modelling loss on the chosen answers "
                "(docs/preference.md).",
                stacklevel=2,
            )


def each(dataset, function: Callable, where: str):
    """Return `function(dataset, where)` of a dataset, of each one in a dict of them, or None."""
    if isinstance(dataset, dict):
        return {name: function(part, f"{where}_{name}") for name, part in dataset.items()}
    return dataset if dataset is None else function(dataset, where)


def all_have(columns: tuple[str, ...], *datasets) -> bool:
    """Return whether all datasets, alone or in dicts, have the columns."""
    parts = [p for d in datasets if d is not None for p in (d.values() if isinstance(d, dict) else [d])]
    return all(set(columns) <= set(part.column_names) for part in parts)


class Displacement:
    """Count the steps for which the chosen answers have been less likely than at the start.

    Attributes:
        baseline: mean log-prob per token of the first logged steps, for objectives without a reference.
        fallen_from: first step of the present count; None while the chosen answers are as likely as at the start.
        told: whether the trainer has warned.
    """

    def __init__(self):
        self.baseline: float | None = None
        self.fallen_from: int | None = None
        self.told = False

    def update(self, displacement: float, step: int) -> int:
        """Take in the rise of the chosen answers' log-prob at `step`, and return the number of steps."""
        if displacement >= 0:
            self.fallen_from = None
        elif self.fallen_from is None:
            self.fallen_from = step
        return 0 if self.fallen_from is None else step - self.fallen_from

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
