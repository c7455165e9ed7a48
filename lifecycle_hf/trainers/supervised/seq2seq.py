"""Train models that write one text from another: encoder-decoders, prefix LMs and causal LMs."""

from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from datasets import Dataset

from lifecycle_hf.completions.beams import beam_search
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.data.collators import length_mask, pad_sequences, prompt_lengths
from lifecycle_hf.data.denoising import IGNORED
from lifecycle_hf.data.seq2seq_rows import tokenize_seq2seq
from lifecycle_hf.evaluation.bootstrap import Measurement, exp_ratio, ratio
from lifecycle_hf.evaluation.text import bleu, leads, normalized_answer, rouge_l
from lifecycle_hf.models.loading import is_encoder_decoder, is_sharded
from lifecycle_hf.objectives.language import masked_lm_loss
from lifecycle_hf.trainers.base.capability import CapabilityLoss
from lifecycle_hf.trainers.base.options import MitigationOptions, option
from lifecycle_hf.trainers.supervised.pretraining import columns_with_targets
from lifecycle_hf.trainers.supervised.tasks import TaskConfig, TaskTrainer

OF_TOKENS = ("label_smoothing_factor", "ptx_coef", "ptx_ceiling", "ptx_rate", "ptx_max_length")
"""Options that a trainer has which predicts tokens."""
OF_GENERATION = {"rouge_l": True, "bleu": True, "exact_match": True, "lead_rouge_l": True}


@dataclass
class Seq2SeqConfig(TaskConfig):
    """Hold the options of sequence to sequence, with the names of transformers' where it has them."""

    refused = {name: why for name, why in TaskConfig.refused.items() if name not in OF_TOKENS}

    max_length: int = option(
        512, "Tokens of a prompt. A longer one is cut at its end for an encoder-decoder, and dropped for a decoder."
    )
    max_target_length: int = option(128, "Tokens of a completion, with its EOS token; a longer one is cut at its end.")
    prompt_column: str = option("prompt", "Column of the texts to read.")
    completion_column: str = option("completion", "Column of the texts to write.")
    prompt_prefix: str = option("", "Written before each prompt that is text, such as 'summarize: ' for T5.")
    predict_with_generate: bool = option(True, "Generate at evaluation, for ROUGE-L, BLEU and exact match.")
    generation_max_length: int | None = option(None, "New tokens of a prediction; max_target_length by default.")
    generation_num_beams: int = option(1, "Beams of the search for a prediction; 1: greedy.")
    generation_length_penalty: float = option(1.0, "Divide a beam's log-probability by its length to this power.")

    def conflicts(self) -> list[tuple[bool, str]]:
        changed = [
            name for name in ("generation_max_length", "generation_num_beams", "generation_length_penalty")
            if getattr(self, name) != getattr(type(self), name)
        ]  # fmt: skip
        idle = f"{', '.join(changed)}: predict_with_generate=False generates nothing, so leave it out."
        greedy = "generation_length_penalty has no effect on one beam: set generation_num_beams, or leave it out."
        return [
            *super().conflicts(),
            (bool(changed) and not self.predict_with_generate, idle),
            (self.generation_length_penalty != 1 and self.generation_num_beams == 1, greedy),
        ]


class Seq2SeqTrainer(TaskTrainer):
    """Train a model to write a completion for a prompt: −log p(y_t | x, y_<t), mean over all tokens of the step.

    An encoder-decoder (T5, BART and their kind) reads the prompt with its encoder. A decoder reads prompt, completion
    and EOS as one text, with the loss on what follows the prompt; the prompt is the prefix of a model with prefix
    attention. The step's mean is over the tokens of all its micro-batches and processes. With
    `label_smoothing_factor` ε the loss is (1 − ε)·(−log p(y_t)) + ε·(mean of −log p over the vocabulary).

    Metrics of held-out rows: `loss` (nats per token, not smoothed), `perplexity`, and, from generated predictions,
    `rouge_l` (F, as rouge-score), `bleu` (of the corpus, as sacrebleu, in [0, 1]), `exact_match` (after SQuAD's
    normalisation), and `lead_rouge_l`, the ROUGE-L of a copy of the prompt's first sentence (see `leads`).

    Args:
        model: a name or path of any encoder-decoder or causal LM or of an adapter, or such a model as object.
        args: [`Seq2SeqConfig`].
        train_dataset, eval_dataset: "prompt" and "completion" (or other columns by option), as texts or as messages.
        ptx_dataset: what [`MitigationOptions`] protect: rows of the same columns, or texts if the model is a decoder.
        processing_class, peft_config, quantization_config, kwargs: as in the other trainers.

    Raises:
        ValueError: data, tokenizer or model would make the run wrong. It is raised before training.

    Reference: https://arxiv.org/abs/1910.10683; label smoothing: https://arxiv.org/abs/1512.00567, §7.
    """

    loss_is_scaled_for_ga = True
    config_class = Seq2SeqConfig
    token_columns = ("input_ids", "labels")
    card_objective = (
        "Sequence to sequence: minimise $-\\log p(y_t \\mid x, y_{<t})$, mean over the completions' tokens."
    )
    card_paper = ("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", "1910.10683")
    card_options = (
        "max_length", "max_target_length", "label_smoothing_factor", "generation_num_beams",
        "generation_length_penalty",
    )  # fmt: skip

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that transformers counts the tokens of a step

    def head_options(self, model, train_dataset: Dataset) -> dict:
        self.is_seq2seq = is_encoder_decoder(model, self.args.trust_remote_code)
        self.task_type = "SEQ_2_SEQ_LM" if self.is_seq2seq else "CAUSAL_LM"
        self.measured = {"loss": False, "perplexity": False} | (
            OF_GENERATION if self.args.predict_with_generate else {}
        )
        return {}

    def _loaded(self, model, head: dict, quantization_config):
        model = super()._loaded(model, head, quantization_config)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not base.can_generate():
            kind = type(base).__name__
            raise ValueError(f"{kind} can't generate text: give an encoder-decoder, or a causal or prefix LM.")
        self._keeps_columns = not self.is_seq2seq and "logits_to_keep" in signature(base.forward).parameters
        return model

    # Data

    def tokenized(self, dataset: Dataset, where: str, **options) -> Dataset:
        args = self.args
        options |= {"encoder_decoder": self.is_seq2seq, "max_target_length": args.max_target_length}
        options |= {"columns": (args.prompt_column, args.completion_column), "prefix": args.prompt_prefix}
        return tokenize_seq2seq(dataset, self._tokenizer, where=where, **options)

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return rows as one batch, padded on the right; a label that is not predicted is -100."""
        prompts, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        lengths = torch.tensor([len(row) for row in prompts])
        batch = {"prefix_lengths": lengths} if self.takes_prefix else {}
        if not self.is_seq2seq:
            prompts = [prompt + target for prompt, target in zip(prompts, labels, strict=True)]
            labels = [[IGNORED] * n + target for n, target in zip(lengths.tolist(), labels, strict=True)]
            lengths = torch.tensor([len(row) for row in prompts])
        batch |= {"input_ids": pad_sequences(prompts, self.pad_token_id), "labels": pad_sequences(labels, IGNORED)}
        batch["attention_mask"] = length_mask(lengths, batch["input_ids"].shape[1]).long()
        return batch | {"index": torch.tensor([row["index"] for row in rows])}

    # The loss

    def task_loss(self, model, inputs):
        """Return the sum of the losses of each row's tokens, [B], and that without smoothing and the count, [B, 2]."""
        labels, smoothing = inputs["labels"], self.args.label_smoothing_factor
        given = {name: x for name, x in inputs.items() if name not in ("labels", "index")}
        if self.is_seq2seq:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            given |= {"decoder_input_ids": shift(labels)} if shift else {"labels": labels}
            logits = model(**given, use_cache=False).logits
        else:
            columns = columns_with_targets(labels)
            given |= {"logits_to_keep": columns} if self._keeps_columns else {}
            logits, labels = model(**given, use_cache=False).logits, labels[:, columns + 1]
            logits = logits if self._keeps_columns else logits[:, columns]
        learnt = labels != IGNORED
        logits, labels = logits[learnt][None], labels[learnt][None]  # few of all, and the loss copies them in fp32

        def of_rows(smoothing):
            losses = masked_lm_loss(logits, labels, smoothing)
            return losses.new_zeros(learnt.shape).masked_scatter(learnt, losses).sum(1)

        losses = of_rows(smoothing)
        nll = of_rows(0.0) if smoothing and not model.training else losses.detach()
        return losses, torch.stack([nll, learnt.sum(1)], dim=1)

    def mean_loss(self, losses, inputs, num_items_in_batch=None):
        if num_items_in_batch is None:
            return losses.sum() / (inputs["labels"] != IGNORED).sum()
        # The engines average gradients over processes. The loss is a share of a sum, so undo that.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def protected_loss(self, dataset: Dataset, tokenizer, **options) -> CapabilityLoss:
        if not self.is_seq2seq and self.args.prompt_column not in dataset.column_names:
            return CapabilityLoss(dataset, tokenizer, **options)
        if self.args.ptx_max_length != MitigationOptions.ptx_max_length:
            raise ValueError(
                f"ptx_max_length={self.args.ptx_max_length} has no effect on rows of prompts and completions, whose "
                "lengths max_length and max_target_length limit: leave it out."
            )
        return super().protected_loss(dataset, tokenizer, **options)

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        loss, kept, index = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if kept is not None and self.args.predict_with_generate:
            with self.compute_loss_context_manager():
                said = pad_sequences(self.generated(model, inputs), IGNORED)
            kept = torch.cat([kept, said.to(kept)], dim=1)
        return loss, kept, index

    def generated(self, model, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
        """Return the tokens that the model writes for each prompt of a batch."""
        args, model = self.args, self.accelerator.unwrap_model(model)
        rows, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
        lengths = (mask.sum(1) if self.is_seq2seq else prompt_lengths(labels, mask)[:, 0]).tolist()
        prompts = [row[:length] for row, length in zip(rows.tolist(), lengths, strict=True)]
        options = {"max_new_tokens": args.generation_max_length or args.max_target_length}
        options |= {"stop_token_ids": stop_token_ids(model, self._tokenizer), "pad_token_id": self.pad_token_id}
        sharded = is_sharded(model) or self.is_fsdp_enabled
        virtual = hasattr(model, "active_peft_config") and model.active_peft_config.is_prompt_learning
        if not (self.is_seq2seq or args.generation_num_beams > 1 or sharded or virtual):
            return generate(model, prompts, **options, temperature=0)
        options |= {"num_beams": args.generation_num_beams, "length_penalty": args.generation_length_penalty}
        return beam_search(model, prompts, **options, synced_gpus=True if sharded else None)

    def measurements(self, predictions: np.ndarray, rows: Dataset) -> dict[str, Measurement]:
        found = {
            "loss": Measurement(predictions[:, :2], ratio),
            "perplexity": Measurement(predictions[:, :2], exp_ratio),
        }
        if not self.args.predict_with_generate:
            return found
        ids = [[int(token) for token in row if token >= 0] for row in predictions[:, 2:]]
        said = [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
        given = {name: list(rows[name]) for name in ("row", "prompt", "completion")}
        right = given["completion"]
        self.predictions = [dict(zip((*given, "prediction"), row)) for row in zip(*given.values(), said, strict=True)]
        copied = leads(given["prompt"])
        return found | {
            "rouge_l": Measurement([rouge_l(*pair) for pair in zip(said, right)]),
            "bleu": bleu(said, right),
            "exact_match": Measurement([normalized_answer(a) == normalized_answer(b) for a, b in zip(said, right)]),
            "lead_rouge_l": Measurement([rouge_l(*pair) for pair in zip(copied, right)]),
        }
