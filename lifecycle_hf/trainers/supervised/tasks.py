"""Code that the trainers of tasks share: classification, extractive question answering, sequence to sequence."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lifecycle_hf.completions.scoring import has_prefix
from lifecycle_hf.data.collators import length_mask, pad_sequences, shuffled
from lifecycle_hf.data.schemas import check_train_dataset
from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval
from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.models.loading import ensure_pad_token, is_sharded, load_classifier
from lifecycle_hf.trainers.base.capability import CapabilityLoss
from lifecycle_hf.trainers.base.mitigations import protect
from lifecycle_hf.trainers.base.options import OWN_LOSS, STRICT_DATA, TrainerConfig, option
from lifecycle_hf.trainers.base.trainer import with_lengths
from lifecycle_hf.trainers.supervised.base import StageTrainerMixin, loading_options, prepare_tokenizer

_NO_TOKENS = (
    "is a loss per token, and the head of a task predicts none: leave it out. EWC and projection protect tasks."
)
_WHOLE = "has no effect, since metrics are taken over all predictions together: leave it out."


@dataclass
class TaskConfig(TrainerConfig):
    """Hold the options that the trainers of tasks share."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]
    refused = (
        OWN_LOSS
        | {"label_smoothing_factor": "is not implemented for the heads of tasks: leave it out."}
        | dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches"), _WHOLE)
        | dict.fromkeys(("ptx_coef", "ptx_ceiling", "ptx_rate"), _NO_TOKENS)
        | {"ptx_max_length": "has no effect, since max_length cuts the rows to protect, too: leave it out."}
    )

    max_length: int = option(384, "Tokens of a row.")
    model_init_kwargs: dict | str | None = option(None, "Options of from_pretrained if the model is given by name.")
    eos_token: str | None = option(None, "Token at the end of a text; the tokenizer's EOS token by default.")
    strict_data: bool = option(False, STRICT_DATA)
    dataset_num_proc: int | None = option(None, "Number of processes that tokenise the data; None: one.")


class TaskLoss(CapabilityLoss):
    """Compute the mean loss of a trainer on the next rows of another dataset of its task.

    It serves EWC and projection, which protect an earlier task. Arguments, state and order of the rows are as in
    [`CapabilityLoss`].
    """

    def __init__(
        self, trainer, dataset: Dataset, *, seed: int, batch_size: int, where: str, reduction: str = "mean", **_
    ):
        self.trainer, self.dataset, self.position = trainer, trainer.prepared(dataset, where), 0
        self.seed, self.batch_size, self.reduction = seed, batch_size, reduction

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        args, size = self.trainer.args, len(self.dataset)
        start = (self.position * args.world_size + args.process_index) * self.batch_size
        self.position += 1
        places = [divmod(start + i, size) for i in range(self.batch_size)]
        orders = {epoch: shuffled(size, self.seed + epoch) for epoch in {epoch for epoch, _ in places}}
        batch = self.trainer.collate([self.dataset[orders[epoch][place]] for epoch, place in places])
        device = next(model.parameters()).device
        batch = {name: x.to(device) for name, x in batch.items()}
        losses = self.trainer.task_loss(model, batch)[0]
        return losses.sum() if self.reduction == "sum" else self.trainer.mean_loss(losses, batch)


class TaskTrainer(StageTrainerMixin, Trainer):
    """Train a model on a task: base of classification, question answering and sequence to sequence.

    A subclass tokenises rows (`tokenized`), names the options of a new head (`head_options`), computes the loss of
    each row with its prediction (`task_loss`), and measures predictions (`measurements`).

    Attributes:
        measurements_by_set: {prefix of the metrics: what was measured last, as [`Measurement`]s}.
        predictions: dicts, one for each held-out row that was measured last.
    """

    loss_is_scaled_for_ga = False
    config_class: type[TaskConfig]
    task_type: str
    token_columns: tuple[str, ...] = ("input_ids",)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TaskConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config=None,
        ptx_dataset: Dataset | None = None,
        **kwargs,
    ):
        name = type(self).__name__
        args = self.config_class(f"output/{name.lower()}") if args is None else args
        check_train_dataset(train_dataset, name)
        self.args, self._tokenizer = args, prepare_tokenizer(model, processing_class, args)
        head = self.head_options(model, train_dataset)
        model = self._with_adapter(self._loaded(model, head, quantization_config), peft_config)
        self.pad_token_id = ensure_pad_token(self._tokenizer, model)
        self.takes_prefix = has_prefix(model)
        self.measurements_by_set: dict[str, dict[str, Measurement]] = {}
        self._history: dict[int, dict[str, Measurement]] = {}
        self._evaluated, self.predictions = None, []
        train_dataset = self.prepared(train_dataset, "train_dataset")
        eval_dataset = self.prepared(eval_dataset, "eval_dataset")
        super().__init__(model, args, self.collate, train_dataset, eval_dataset, self._tokenizer, **kwargs)
        self.compute_metrics = self._measure
        protect(self, ptx_dataset, capability=self.protected_loss)

    # What a task defines

    def head_options(self, model, train_dataset: Dataset) -> dict:
        """Return what the model's config says of the head, from the data."""
        return {}

    def tokenized(self, dataset: Dataset, where: str, **options) -> Dataset:
        """Return raw rows as rows that the collator takes."""
        raise NotImplementedError

    def task_loss(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of the rows, [B], and what is kept of their predictions, [B, K]."""
        raise NotImplementedError

    def mean_loss(self, losses: torch.Tensor, inputs: dict[str, torch.Tensor], num_items_in_batch=None):
        """Return the loss of a micro-batch from those of its rows."""
        return losses.mean()

    def protected_loss(self, dataset: Dataset, tokenizer, **options) -> CapabilityLoss:
        """Return the loss on `ptx_dataset` that mitigations read; the options are those of [`CapabilityLoss`]."""
        return TaskLoss(self, dataset, **options)

    def measurements(self, predictions: np.ndarray, rows: Dataset) -> dict[str, Measurement]:
        """Return the metrics of predictions, [N, K], of `rows`; set `self.predictions` to a dict for each row."""
        raise NotImplementedError

    def targets_of(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the part of a batch that `task_loss` needs beside the model's inputs."""
        raise NotImplementedError

    # The model

    def _loaded(self, model, head: dict, quantization_config):
        if isinstance(model, str):
            set_seed(self.args.seed)  # a new head is random
            options = loading_options(self.args, quantization_config)
            options["init_kwargs"] |= head
            return load_classifier(model, task=self.task_type, **options)
        labels = head.get("id2label")
        if labels and model.config.num_labels != len(labels):
            raise ValueError(
                f"{type(model).__name__} has num_labels={model.config.num_labels}, but the data have {len(labels)} "
                f"labels: load it with num_labels={len(labels)}, or pass its name or path."
            )
        for key, value in head.items():
            setattr(model.config, key, value)
        return model

    def _with_adapter(self, model, peft_config: PeftConfig | None):
        quantised = getattr(model, "is_quantized", False)
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("The model is an adapter already, which trains on: leave peft_config out.")
            return model
        if peft_config is None:
            if quantised:
                raise ValueError("A quantised model can't train by itself: pass a peft_config (--use_peft).")
            return model
        config = copy.deepcopy(peft_config)
        config.task_type = self.task_type  # with which PEFT trains the whole head beside the adapter
        if self.task_type == "QUESTION_ANS" and getattr(config, "target_modules", None) == "all-linear":
            config.exclude_modules = config.exclude_modules or ["qa_outputs"]  # which PEFT would adapt and save whole
        model = get_peft_model(model, config)
        if (self.args.bf16 or self.args.fp16 or model.dtype == torch.float32) and not is_sharded(model):
            for parameter in model.parameters():  # in bf16 small steps would be lost
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        return model

    # Data

    def prepared(self, dataset, where: str):
        """Return raw rows tokenised; other datasets as they are."""
        if isinstance(dataset, dict):
            return {name: self.prepared(part, f"{where} {name!r}") for name, part in dataset.items()}
        if not isinstance(dataset, Dataset) or {"input_ids", "index"} <= set(dataset.column_names):
            return dataset
        options = {"strict": self.args.strict_data, "num_proc": self.args.dataset_num_proc}
        with self.args.main_process_first(desc=f"tokenising {where}"):
            dataset = self.tokenized(dataset, where, max_length=self.args.max_length, **options)
        return with_lengths(dataset, self.token_columns, self.args)

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return rows as one batch, padded on the right."""
        ids = [row["input_ids"] for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        batch = {"input_ids": pad_sequences(ids, self.pad_token_id)}
        batch["attention_mask"] = length_mask(lengths, batch["input_ids"].shape[1]).long()
        if rows[0].get("token_type_ids") is not None:
            batch["token_type_ids"] = pad_sequences([row["token_type_ids"] for row in rows], 0)
        if self.takes_prefix:  # the whole text is the prefix, in which tokens attend both ways
            batch["prefix_lengths"] = lengths
        return batch | self.targets_of(rows) | {"index": torch.tensor([row["index"] for row in rows])}

    # Training and evaluation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, predictions = self.task_loss(model, inputs)
        loss = self.with_auxiliary(self.mean_loss(losses, inputs, num_items_in_batch), num_items_in_batch)
        return (loss, {"losses": losses, "predictions": predictions}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        kept = torch.cat([outputs["losses"][:, None].double(), outputs["predictions"].double()], dim=1)
        return loss.detach(), *((None, None) if prediction_loss_only else (kept, inputs["index"]))

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, with the metrics of the class docstring, each over all rows at once."""
        self._evaluated, self._measured = dataloader.dataset, None
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._measured is not None:
            # transformers' mean counts the rows twice that fill up the last batch of several processes.
            output.metrics[f"{metric_key_prefix}_loss"] = float(self._measured["loss"])
            output = output._replace(predictions=output.predictions[:, 1:])
            self.measurements_by_set[metric_key_prefix] = self._measured
            if metric_key_prefix == "eval":  # the first and the last
                self._history = {k: v for k, v in self._history.items() if k == 0}
                self._history[self.state.global_step] = self._measured
        return output

    def _measure(self, found: EvalPrediction) -> dict[str, float]:
        rows, losses = self._evaluated.select(found.label_ids), found.predictions[:, 0]
        self._measured = {"loss": Measurement(losses)} | self.measurements(found.predictions[:, 1:], rows)
        return {name: float(value) for name, value in self._measured.items()}

    @property
    def tax_report(self) -> TaxReport | None:
        """As in the base, with intervals where the first evaluation was made in this process."""
        plain = super().tax_report
        ends = [self._history.get(step) for step in (0, self.state.global_step)]
        if plain is None or plain.before.keys() != self.measured.keys() or not all(ends):
            return plain
        return TaxReport(*({name: end[name] for name in self.measured} for end in ends), self.measured)

    def finalize(self) -> dict[str, float]:
        """Measure the held-out rows with the final weights, and write what is predicted for them to predictions.jsonl.

        Returns:
            the metrics, and of each its 95 % bootstrap interval as NAME_interval.
        """
        metrics = self.evaluate()
        for prefix, measured in self.measurements_by_set.items():
            many = {name: value for name, value in measured.items() if len(value.columns) > 1}
            metrics |= {f"{prefix}_{name}_interval": bootstrap_interval(value) for name, value in many.items()}
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions]
            (folder / "predictions.jsonl").write_text("".join(lines))
        return metrics
