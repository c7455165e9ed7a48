"""What every trainer of the library shares: metrics, checkpoints, auxiliary losses, and the model card."""

from collections.abc import Iterable

from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments

from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.trainers.base.auxiliary import AuxiliaryLossMixin
from lifecycle_hf.trainers.base.callbacks import TaxMonitor
from lifecycle_hf.trainers.base.checkpoints import CheckpointMixin
from lifecycle_hf.trainers.base.metrics import MetricsMixin
from lifecycle_hf.trainers.base.mitigations import mitigations_in_force
from lifecycle_hf.trainers.base.model_card import write_model_card

CARD_OPTIONS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "bf16", "seed",
)  # fmt: skip


def with_lengths(dataset: Dataset, columns: Iterable[str], args: TrainingArguments) -> Dataset:
    """Return `dataset` with the number of tokens in `columns` as `length_column_name`, if batches go by length."""
    name, columns = args.length_column_name, list(columns)
    if args.train_sampling_strategy in ("random", "sequential") or name in dataset.column_names:
        return dataset
    rows = dataset.select_columns(columns)
    return dataset.add_column(name, [sum(len(row[column]) for column in columns) for row in rows])


class LifecycleTrainerMixin(MetricsMixin, CheckpointMixin, AuxiliaryLossMixin):
    """Put this before `transformers.Trainer` (or a subclass) in the bases of a trainer.

    Attributes:
        card_objective, card_paper: the objective and its paper (title, arXiv id), for the model card.
        card_options: options that the card shows beside the common ones.
        dataset_name: the data's name on the card.
        idle_arguments: arguments of `transformers.Trainer` that would have no effect and are refused.
    """

    card_objective: str
    card_paper: tuple[str, str]
    card_options: tuple[str, ...] = ()
    dataset_name: str | None = None
    idle_arguments: tuple[str, ...] = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")

    def __init__(self, *args, **kwargs):
        for name in self.idle_arguments:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(self).__name__}: {name} would have no effect, because logits never leave the trainer. "
                    "Use a TaxMonitor for metrics, add_auxiliary_loss for a loss, or override compute_loss."
                )
        super().__init__(*args, **kwargs)

    def prepared(self, dataset, where: str):
        """Return a dataset that was given to `evaluate` or `predict` as rows that the collator takes."""
        return dataset

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers, of raw rows too."""
        given = eval_dataset is not None and not isinstance(eval_dataset, str)
        return super().get_eval_dataloader(self.prepared(eval_dataset, "eval_dataset") if given else eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in transformers, of raw rows too."""
        return super().get_test_dataloader(self.prepared(test_dataset, "test_dataset"))

    @property
    def tax_report(self) -> TaxReport | None:
        """The before/after table that a [`TaxMonitor`] among the callbacks measured, or None."""
        monitors = [c for c in self.callback_handler.callbacks if isinstance(c, TaxMonitor) and c.history]
        return monitors[0].report() if monitors else None

    @property
    def base_model(self) -> str:
        """The name or path of what was trained; for an adapter, of its base."""
        model = getattr(self.model, "policy", self.model)
        if isinstance(model, PeftModel):
            return model.active_peft_config.base_model_name_or_path
        return model.config._name_or_path

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None, **_):
        """Write the README.md of the model in `output_dir`; the arguments are those of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        options = {name: getattr(self.args, name) for name in (*CARD_OPTIONS, *self.card_options)}
        options |= mitigations_in_force(self.args)
        model = getattr(self.model, "policy", self.model)
        if isinstance(model, PeftModel):
            config = model.active_peft_config
            options |= {f"lora_{name}": getattr(config, name, None) for name in ("r", "lora_alpha")}
        write_model_card(
            self.args.output_dir,
            trainer_name=type(self).__name__,
            objective=self.card_objective,
            paper=self.card_paper,
            base_model=self.base_model,
            dataset_name=dataset_name or self.dataset_name,
            hyperparameters={k: getattr(v, "value", v) for k, v in options.items() if v is not None},
            tax=self.tax_report,
            tags=[tags] if isinstance(tags, str) else tags or [],
            model_name=self.hub_model_id or model_name,
        )
