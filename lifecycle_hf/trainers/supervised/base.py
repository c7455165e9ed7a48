"""Code that the supervised stages (pretraining, SFT, reward model) share."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.models.loading import load_tokenizer, save_adapter_notes
from lifecycle_hf.trainers.base.options import STRICT_DATA, check_options, option
from lifecycle_hf.trainers.base.trainer import LifecycleTrainerMixin


@dataclass
class StageConfig:
    """Options of the stages that are built on TRL's trainers. Put this before TRL's class in the bases of a config.

    An unset `bf16` is off on a machine without an accelerator; TRL's default is True everywhere.
    """

    refused = {}
    strict_data: bool = option(False, STRICT_DATA)

    def __post_init__(self):
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        if self.activation_checkpointing is None:  # TRL's default under the new name, so that nothing warns
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        check_options(self)


def own_copy(args: TrainingArguments, **changes) -> TrainingArguments:
    """Return a shallow copy of `args` with some values changed; the values are not checked again."""
    args = copy.copy(args)
    vars(args).update(changes)
    return args


def loading_options(args: TrainingArguments, quantization_config) -> dict:
    """Return the keyword arguments with which a model is loaded by its name."""
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    return {"quantization_config": quantization_config, "init_kwargs": init_kwargs}


def prepare_tokenizer(model, processing_class, args: TrainingArguments) -> PreTrainedTokenizerBase:
    """Return `processing_class`, by default the model's tokenizer, with `args.eos_token` as EOS token if it is set.

    Raises:
        ValueError: the model has no name to load a tokenizer by, or the EOS token is not in the vocabulary.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError("processing_class is missing, and the model has no name to load a tokenizer by: pass it.")
        processing_class = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if args.eos_token is not None:
        if args.eos_token not in processing_class.get_vocab():
            raise ValueError(f"eos_token {args.eos_token!r} is not in the tokenizer's vocabulary: choose one that is.")
        processing_class.eos_token = args.eos_token
    return processing_class


class StageTrainerMixin(LifecycleTrainerMixin):
    """Write notes beside adapters, and make a table of the held-out metrics before and after training.

    A subclass names these metrics in `measured`: {metric: whether higher is better}.
    """

    card_options = ("max_length",)
    measured: dict[str, bool]

    @property
    def tax_report(self) -> TaxReport | None:
        """The table of a [`TaxMonitor`] if there is one, else of the held-out metrics before and after training.

        The metrics before training need `eval_on_start`. None if one of the two evaluations is missing.
        """
        if measured := super().tax_report:
            return measured
        keys = {name: f"eval_{name}" for name in self.measured}
        entries = [entry for entry in self.state.log_history if set(keys.values()) <= entry.keys()]
        if not entries or entries[0]["step"] > 0 or entries[-1]["step"] == 0:
            return None
        before, after = ({name: entry[key] for name, key in keys.items()} for entry in (entries[0], entries[-1]))
        return TaxReport(before, after, self.measured)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the checkpoint; beside an adapter also what is needed to load its base (`save_adapter_notes`)."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and isinstance(self.model, PeftModel):
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter_notes(self.model, folder)
        super().save_model(str(folder), _internal_call)
