"""Supervised fine-tuning: TRL's SFTTrainer with a check of the input before training and an exact held-out loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml
from trl.chat_template_utils import is_chat_template_stop_token_trained

from lifecycle_hf.completions.scoring import has_prefix
from lifecycle_hf.data.chat import has_generation_markers, require_chat_template, template_options
from lifecycle_hf.data.collators import prompt_lengths
from lifecycle_hf.data.schemas import SCHEMAS, TEMPLATE_COLUMNS, check_train_dataset, detect, is_messages
from lifecycle_hf.data.tokenize import conversation_texts, require_eos
from lifecycle_hf.data.usable import StreamFilter, Unusable, usable_rows
from lifecycle_hf.models.loading import check_pad_token, is_adapter, load_causal_lm, load_tokenizer, prepare_quantized
from lifecycle_hf.trainers.base.mitigations import protect
from lifecycle_hf.trainers.base.options import MitigationOptions
from lifecycle_hf.trainers.supervised.base import (
    StageConfig,
    StageTrainerMixin,
    loading_options,
    own_copy,
    prepare_tokenizer,
)

ROW, PROBLEM = "_row", "_problem"


@dataclass
class SFTConfig(StageConfig, MitigationOptions, trl.SFTConfig):
    """Hold TRL's options for supervised fine-tuning, `strict_data`, and the [`MitigationOptions`].

    An unset `bf16` is off on a machine without an accelerator.
    """


class SFTTrainer(StageTrainerMixin, trl.SFTTrainer):
    """Fine-tune a language model on text, chat or prompt-completion data: −log p per token, mean over all tokens.

    The loss is taken on the completions of prompt-completion data; with `assistant_only_loss` on the assistant's
    turns, including their end-of-turn tokens; else on all tokens. For a model with prefix attention the prefix is the
    prompt: all tokens before the first token of the loss. `eval_loss` (nats per token), `eval_perplexity`,
    `eval_entropy` and `eval_mean_token_accuracy` are sums over all held-out tokens, divided once by their number. The
    training metrics are TRL's.

    Args:
        model: a name or path (of a model, or of an adapter to train further), or a causal LM or PeftModel.
        args, train_dataset, eval_dataset, processing_class, peft_config, quantization_config, ...: as in TRL. The
            data may be streamed (with `max_steps`); unusable rows are then counted as they come.
        ptx_dataset: text, chat or prompt-completion data that [`MitigationOptions`] protect.

    Raises:
        ValueError: data, tokenizer or chat template would make the run wrong. It is raised before training.
    """

    card_objective = "Supervised fine-tuning: minimise $-\\log p(y_t \\mid x, y_{<t})$, mean over the tokens learnt."
    card_paper = ("Training language models to follow instructions with human feedback", "2203.02155")
    measured = {"loss": False, "perplexity": False}
    idle_arguments = ()

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config=None,
        ptx_dataset: Dataset | None = None,
        **kwargs,
    ):
        args = SFTConfig("output/sft") if args is None else args
        if not isinstance(train_dataset, IterableDataset):
            check_train_dataset(train_dataset, "SFTTrainer")
        elif args.max_steps <= 0:
            raise ValueError("SFTTrainer: train_dataset is streamed and has no length, so set max_steps.")
        tokenizer = prepare_tokenizer(model, processing_class, args)
        require_eos(tokenizer, "SFTTrainer")
        self._token_sums: list[torch.Tensor] | None = None
        if kwargs.get("formatting_func") is None:
            templated = _with_template(tokenizer, args)
            train_dataset = _checked(train_dataset, templated, args, "train_dataset")
            eval_dataset = _checked(eval_dataset, templated, args, "eval_dataset")
        if isinstance(model, str) and is_adapter(model):
            model = load_causal_lm(model, **loading_options(args, quantization_config), is_trainable=True)
            quantization_config, args = None, own_copy(args, model_init_kwargs=None)
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
        kwargs |= {"peft_config": peft_config, "quantization_config": quantization_config}
        super().__init__(model, args, **data, **kwargs)
        prepare_quantized(self.model)
        check_pad_token(tokenizer, self.model)
        if ROW in (self.train_dataset.column_names or ()):
            self._report_lost_rows(train_dataset[ROW])
        protect(self, ptx_dataset)

    def _report_lost_rows(self, given: Sequence[int]) -> None:
        """Report the rows that TRL dropped because no token of the loss was left after truncation."""
        lost = set(given) - set(self.train_dataset[ROW])
        problems = ["lost to max_length" if row in lost else "" for row in range(max(given) + 1)]
        usable_rows(problems, where="train_dataset", strict=self.args.strict_data)
        self.train_dataset = self.train_dataset.remove_columns(ROW)

    def prepared(self, dataset, where: str):
        """Return tokenised rows as they are.

        Raises:
            ValueError: the rows are raw; TRL tokenises them in `evaluate` only.
        """
        if isinstance(dataset, Dataset) and not {"input_ids", "image", "images"} & set(dataset.column_names):
            raise ValueError(
                f"{where} is not tokenised (columns {dataset.column_names}): call evaluate(dataset, "
                "metric_key_prefix='test') instead of predict."
            )
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if has_prefix(self.model) and "labels" in inputs:
            rows = (inputs.get(name) for name in ("labels", "attention_mask", "position_ids"))
            inputs = inputs | {"prefix_lengths": prompt_lengths(*rows)}
        if self.model.training or self._token_sums is None or return_outputs:
            out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs:
                return self.with_auxiliary(out[0], num_items_in_batch), out[1]
            return self.with_auxiliary(out, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        per_token = (outputs.label_mask, -outputs.log_probs, outputs.is_top1, outputs.entropy)
        sums = torch.stack([values.double().sum(-1) for values in per_token], dim=-1)
        # gather_for_metrics cuts off the examples that fill up the last batch. A padding-free batch has none.
        gather = self.accelerator.gather if self.padding_free else self.accelerator.gather_for_metrics
        self._token_sums.append(gather(sums).sum(0).cpu())
        return sums[:, 1].sum() / sums[:, 0].sum().clamp(min=1)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, with the metrics of the class docstring, which are exact over all tokens."""
        self._token_sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        batches, self._token_sums = self._token_sums, None
        if batches:
            tokens, *totals = torch.stack(batches).sum(0).tolist()
            loss, accuracy, entropy = (total / max(tokens, 1) for total in totals)
            values = {"loss": loss, "perplexity": math.exp(loss), "mean_token_accuracy": accuracy, "entropy": entropy}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output


def _with_template(tokenizer, args: SFTConfig):
    """Return a tokenizer with the chat template that TRL will use, to check the data with."""
    path = args.chat_template_path
    if path is not None and not path.endswith((".jinja", ".j2")):
        return load_tokenizer(path)
    if path is not None:
        tokenizer.chat_template = Path(path).read_text()
    return tokenizer


def _checked(dataset, tokenizer, args: SFTConfig, where: str):
    """Return `dataset` without the rows that hold nothing to learn, and with the index of each row in a new column.

    Of a dict each dataset is checked. Tokenised data and images are returned as they are. The rows of a stream are
    checked as they come, and get no index.

    Raises:
        ValueError: the columns are wrong, no row is usable (under `strict_data`: a row is not), chat data have no chat
            template, or the template can't mark the assistant's tokens and `assistant_only_loss` needs that.
    """
    if isinstance(dataset, dict):
        return {name: _checked(part, tokenizer, args, f"{where} {name!r}") for name, part in dataset.items()}
    columns = [] if dataset is None else dataset.column_names or list(next(iter(dataset), {}))
    if dataset is None or {"input_ids", "image", "images"} & set(columns):
        return dataset
    read = (args.dataset_text_field,)
    if read[0] not in columns:
        schema = detect(dataset, where)
        if schema not in ("text", "prompt-completion"):
            raise ValueError(
                f"{where} is a {schema} dataset (columns {columns}); supervised fine-tuning reads '{read[0]}', "
                "'messages', or 'prompt' and 'completion'."
            )
        read = next(option for option in SCHEMAS[schema] if set(option) <= set(columns))
    read = [*read, *(name for name in TEMPLATE_COLUMNS if name in columns)]
    if any(is_messages(value) for value in next(iter(dataset)).values()):
        require_chat_template(tokenizer, where)
    problem = partial(_problem, tokenizer, read, args.dataset_text_field, args.assistant_only_loss)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.filter(StreamFilter(problem, where=where, strict=args.strict_data), with_indices=True)
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{where}: no row of the stream is usable. The warnings above say why.")
    else:
        options = {"num_proc": args.dataset_num_proc, "desc": f"Checking {where}"}
        rows = dataset.select_columns(read)
        rows = rows.map(lambda row: {PROBLEM: problem(row)}, remove_columns=read, **options)
        kept = usable_rows(rows[PROBLEM], where=where, strict=args.strict_data)
        dataset = dataset.select(kept).add_column(ROW, kept)
        first = dataset[0]
    if "chat_template_kwargs" in columns:  # TRL takes no None
        dataset = dataset.map(lambda row: {"chat_template_kwargs": row["chat_template_kwargs"] or {}})
    if args.assistant_only_loss:
        first = maybe_convert_to_chatml({name: first[name] for name in read})
        conversation = first["prompt"] + first["completion"] if "prompt" in first else first.get("messages")
        _check_assistant_mask(tokenizer, conversation, where, template_options(first))
    return dataset


def _problem(tokenizer, read: list[str], text_field: str, assistant_only: bool, row: dict) -> str:
    """Return why a row can't be used, or an empty string if it can."""
    row = maybe_convert_to_chatml({name: row[name] for name in read})
    try:
        conversation_texts(tokenizer, row, text_field)
    except Unusable as problem:
        return str(problem)
    learnt = row.get("completion", row.get("messages"))
    if assistant_only and is_messages(learnt) and not any(message["role"] == "assistant" for message in learnt):
        return "without an assistant turn"
    return ""


def _check_assistant_mask(tokenizer, conversation, where: str, given: dict) -> None:
    """Check that the mask of the assistant's tokens is neither empty nor full and holds the end-of-turn token."""
    if not is_messages(conversation):
        raise ValueError(f"assistant_only_loss needs chat messages, but {where} holds plain text: turn it off.")
    template, subject = None, "assistant_only_loss: the chat template"
    mend = "Give a chat_template_path whose template marks assistant turns, or turn assistant_only_loss off."
    if not has_generation_markers(tokenizer):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(f"{subject} has no {{% generation %}} markers around assistant turns. {mend}") from error
    mask = tokenizer.apply_chat_template(
        conversation, return_dict=True, return_assistant_tokens_mask=True, **{"chat_template": template} | given
    )["assistant_masks"]
    if any(message["role"] == "assistant" for message in conversation) and (not any(mask) or all(mask)):
        marked = f"{sum(mask)} of {len(mask)} tokens of the first row of {where}"
        raise ValueError(f"{subject} marks {marked} as the assistant's. {mend}")
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise ValueError(
            f"{subject} leaves the end-of-turn token outside {{% generation %}}, so the model can't learn to stop. "
            "Move the token inside the markers, or turn assistant_only_loss off."
        )
