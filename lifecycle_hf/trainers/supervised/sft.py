"""The supervised stage: TRL's SFTTrainer, with bad input told before training and exact held-out loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml
from trl.chat_template_utils import is_chat_template_stop_token_trained

from lifecycle_hf.completions.scoring import has_prefix
from lifecycle_hf.data.collators import prompt_lengths
from lifecycle_hf.data.schemas import SCHEMAS, check_train_dataset, detect, is_messages
from lifecycle_hf.data.tokenize import (
    has_generation_markers,
    require_chat_template,
    require_eos,
    text_problem,
    usable_rows,
)
from lifecycle_hf.models.loading import check_pad_token, is_adapter, load_causal_lm, load_tokenizer, prepare_quantized
from lifecycle_hf.trainers.base.mitigations import protect
from lifecycle_hf.trainers.base.options import STRICT_DATA, MitigationOptions, check_options, option
from lifecycle_hf.trainers.supervised.base import (
    StageTrainerMixin,
    own_copy,
    prepare_tokenizer,
    settle_defaults,
)

ROW = "_row"


@dataclass
class SFTConfig(MitigationOptions, trl.SFTConfig):
    """TRL's options for supervised fine-tuning, `strict_data`, and what pays less alignment tax.

    An unset `bf16` is off without accelerator.
    """

    strict_data: bool = option(False, STRICT_DATA)

    def __post_init__(self):
        settle_defaults(self)
        super().__post_init__()
        check_options(self)


class SFTTrainer(StageTrainerMixin, trl.SFTTrainer):
    """Fine-tunes a language model on text, chat or prompt-completion data: −log p per token, mean over all tokens.

    Loss is taken on completions of prompt-completion data, with `assistant_only_loss` on the assistant's turns, their
    end-of-turn tokens included, else on all tokens. To a model with prefix attention the prompt, all that stands
    before the first token of the loss, is the prefix. `eval_loss` (nats per token), `eval_perplexity`, `eval_entropy`
    and `eval_mean_token_accuracy` are sums over all held-out tokens divided once; the training metrics are TRL's.

    Args:
        model: a name or path (of a model, or of an adapter to train on), or a causal LM or PeftModel.
        args, train_dataset, eval_dataset, processing_class, peft_config, quantization_config, ...: as in TRL.
        ptx_dataset: text, chat or prompt-completion data that [`MitigationOptions`] protect.

    Raises:
        ValueError: for data, tokenizer or chat template that would make the run wrong, before it starts.
    """

    card_objective = "Supervised fine-tuning: minimise $-\\log p(y_t \\mid x, y_{<t})$, mean over the tokens learnt."
    card_paper = ("Training language models to follow instructions with human feedback", "2203.02155")
    measured = {"loss": False, "perplexity": False}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config=None,
        ptx_dataset: Dataset | None = None,
        **kwargs,
    ):
        args = SFTConfig("output/sft") if args is None else args
        check_train_dataset(train_dataset, "SFTTrainer")
        tokenizer = prepare_tokenizer(model, processing_class, args)
        require_eos(tokenizer, "SFTTrainer")
        self._token_sums: list[torch.Tensor] | None = None
        formatted = kwargs.get("formatting_func") is not None
        if not formatted:
            templated = _with_template(tokenizer, args)
            train_dataset = _checked(train_dataset, templated, args, "train_dataset")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: _checked(part, templated, args, name) for name, part in eval_dataset.items()}
            elif eval_dataset is not None:
                eval_dataset = _checked(eval_dataset, templated, args, "eval_dataset")
        if isinstance(model, str) and is_adapter(model):
            init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            model = load_causal_lm(
                model, quantization_config=quantization_config, init_kwargs=init_kwargs, is_trainable=True
            )
            quantization_config, args = None, own_copy(args, model_init_kwargs=None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **kwargs,
        )
        prepare_quantized(self.model)
        check_pad_token(tokenizer, self.model)
        if ROW in self.train_dataset.column_names:
            self._tell_lost_rows(train_dataset[ROW])
        protect(self, ptx_dataset)

    def _tell_lost_rows(self, given: Sequence[int]) -> None:
        """Report the rows that TRL dropped because truncation left nothing to learn from."""
        lost = set(given) - set(self.train_dataset[ROW])
        problems = ["lost to max_length" if row in lost else "" for row in range(max(given) + 1)]
        usable_rows(problems, where="train_dataset", strict=self.args.strict_data)
        self.train_dataset = self.train_dataset.remove_columns(ROW)

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
        # Rows of a padding-free batch are no examples, so there are none to cut off that only fill up the last batch.
        gather = self.accelerator.gather if self.padding_free else self.accelerator.gather_for_metrics
        self._token_sums.append(gather(sums).sum(0).cpu())
        return sums[:, 1].sum() / sums[:, 0].sum().clamp(min=1)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, with the metrics of the class docstring, exact over all tokens."""
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
    """A tokenizer with the chat template that will be in force, to check data by."""
    path = args.chat_template_path
    if path is None:
        return tokenizer
    if not path.endswith((".jinja", ".j2")):
        return load_tokenizer(path)
    tokenizer.chat_template = Path(path).read_text()
    return tokenizer


def _checked(dataset: Dataset, tokenizer, args: SFTConfig, where: str) -> Dataset:
    """`dataset` without the rows that hold nothing to learn, and a column with each row's index.

    Raises:
        ValueError: wrong columns, no usable row (any unusable row under `strict_data`), no chat template for chat
            data, or one that can't mark what the assistant said where `assistant_only_loss` asks for it.
    """
    columns = dataset.column_names
    if {"input_ids", "image", "images"} & set(columns):
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
    rows = dataset.select_columns(list(read))
    problems = [_problem(maybe_convert_to_chatml(row), args.assistant_only_loss) for row in rows]
    kept = usable_rows(problems, where=where, strict=args.strict_data)
    conversation = _conversation(maybe_convert_to_chatml(rows[kept[0]]))
    if is_messages(conversation):
        require_chat_template(tokenizer, where)
    if args.assistant_only_loss:
        _check_assistant_mask(tokenizer, conversation, where)
    return dataset.select(kept).add_column(ROW, kept)


def _conversation(row: dict) -> str | list[dict]:
    return row["prompt"] + row["completion"] if "prompt" in row else next(iter(row.values()))


def _problem(row: dict, assistant_only: bool) -> str:
    *prompt, (name, value) = row.items()
    problem = text_problem(value, name)
    if not problem and prompt and type(prompt[0][1]) is not type(value):
        problem = "prompt and completion of different kinds (text, messages)"
    if not problem and assistant_only and is_messages(value) and not any(m["role"] == "assistant" for m in value):
        problem = "without an assistant turn"
    return problem


def _check_assistant_mask(tokenizer, conversation, where: str) -> None:
    """Check that the mask of the assistant's tokens is neither empty nor full and holds the end-of-turn token."""
    if not is_messages(conversation):
        raise ValueError(f"assistant_only_loss needs chat messages, but {where} holds plain text: turn it off.")
    mend = "Give a chat_template_path whose template marks assistant turns, or turn assistant_only_loss off."
    template = None
    if not has_generation_markers(tokenizer):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ValueError(
                "assistant_only_loss: the chat template has no {% generation %} markers, so the assistant's tokens "
                f"can't be told from the others. {mend}"
            ) from error
    mask = tokenizer.apply_chat_template(
        conversation, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    spoken = any(message["role"] == "assistant" for message in conversation)
    if spoken and (not any(mask) or all(mask)):
        raise ValueError(
            f"assistant_only_loss: the chat template marks {sum(mask)} of {len(mask)} tokens of the first row of "
            f"{where} as the assistant's. {mend}"
        )
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise ValueError(
            "assistant_only_loss: the chat template leaves the end-of-turn token outside {% generation %}, so the "
            "model would never learn to stop. Move the token inside the markers, or turn assistant_only_loss off."
        )
