"""What the stages built on TRL's trainers (SFT, reward model) share."""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.models.loading import load_tokenizer, save_adapter_notes
from lifecycle_hf.trainers.base.trainer import LifecycleTrainerMixin


def settle_defaults(args: TrainingArguments) -> None:
    """Where unset, turn `bf16` off on a machine without accelerator (TRL's default is True everywhere).

    TRL's default for activation checkpointing is handed over under the option's new name, which saves a warning.
    """
    if args.bf16 is None and (args.use_cpu or not torch.accelerator.is_available()):
        args.bf16 = False
    if args.activation_checkpointing is None:
        args.activation_checkpointing = args.gradient_checkpointing


def own_copy(args: TrainingArguments, **changes) -> TrainingArguments:
    """A shallow copy of `args` with some values changed and nothing checked anew."""
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def prepare_tokenizer(model, processing_class, args: TrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with `args.eos_token` in force.

    Raises:
        ValueError: a model without a name comes without a tokenizer, or the EOS is not in the vocabulary.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError("processing_class is missing: the model names no checkpoint to take the tokenizer from.")
        processing_class = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if args.eos_token is not None:
        if args.eos_token not in processing_class.get_vocab():
            raise ValueError(f"eos_token {args.eos_token!r} is not in the tokenizer's vocabulary: choose one that is.")
        processing_class.eos_token = args.eos_token
    return processing_class


class StageTrainerMixin(LifecycleTrainerMixin):
    """Notes beside adapters, and a table of the held-out metrics before and after training.

    A subclass names these metrics in `measured`: {metric: whether higher is better}.
    """

    card_options = ("max_length",)
    measured: dict[str, bool]

    @property
    def tax_report(self) -> TaxReport | None:
        """A [`TaxMonitor`]'s table; else held-out metrics before (with `eval_on_start`) and after training; None where
        neither was measured."""
        if measured := super().tax_report:
            return measured
        keys = {name: f"eval_{name}" for name in self.measured}
        entries = [entry for entry in self.state.log_history if set(keys.values()) <= entry.keys()]
        if not entries or entries[0]["step"] > 0 or entries[-1]["step"] == 0:
            return None
        before, after = ({name: entry[key] for name, key in keys.items()} for entry in (entries[0], entries[-1]))
        return TaxReport(before, after, self.measured)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the checkpoint; beside an adapter also what its base needs to be rebuilt (`save_adapter_notes`)."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(self.model, PeftModel):
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter_notes(self.model, folder)
        super().save_model(str(folder), _internal_call)
