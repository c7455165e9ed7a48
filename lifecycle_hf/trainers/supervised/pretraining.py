"""Pretraining by any objective of the family: causal, masked, span corruption, prefix LM, UL2."""

import math
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lifecycle_hf.completions.sampling import generate
from lifecycle_hf.completions.scoring import has_prefix
from lifecycle_hf.data.collators import length_mask, pad_sequences
from lifecycle_hf.data.corpora import encode_corpus
from lifecycle_hf.data.denoising import IGNORED, PREFIX_LM, SPAN_CORRUPTION, UL2_DENOISERS, Denoiser, sentinels_needed
from lifecycle_hf.data.packing import PackedDataset, RowDataset, RowStream, TokenStream
from lifecycle_hf.data.rows import CausalRows, DenoisedRows, MaskedRows, RowPlan
from lifecycle_hf.data.special_tokens import add_denoising_tokens
from lifecycle_hf.models.lifecycle import LifecycleConfig, LifecycleForCausalLM, LifecycleForMaskedLM
from lifecycle_hf.models.loading import ensure_pad_token, load_pretraining_model
from lifecycle_hf.objectives.language import causal_lm_loss, masked_lm_loss
from lifecycle_hf.trainers.base.mitigations import mitigations_in_force, protect
from lifecycle_hf.trainers.base.options import TrainerConfig, option
from lifecycle_hf.trainers.supervised.base import StageTrainerMixin, prepare_tokenizer

DENOISERS: dict[str, tuple[Denoiser, ...]] = {
    "span_corruption": (SPAN_CORRUPTION,),
    "prefix": (PREFIX_LM,),
    "ul2": tuple(UL2_DENOISERS),
}
OBJECTIVES = ("causal", "masked", *DENOISERS)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Of bf16 products without sparsity, FLOP/s, by a part of the device's name."""


@dataclass
class PretrainingConfig(TrainerConfig):
    """Options of pretraining: AdamW with β = (.9, .95), cosine with warm-up, clipping."""

    objective: str = option("causal", "The pretraining objective.", choices=OBJECTIVES)
    max_length: int = option(512, "Tokens of a row, which documents and their noise fill.")
    denoiser_weights: list[float] | None = option(
        None, "How often each denoiser of the objective is drawn, in MATHS' order for ul2; equally often by default."
    )
    masking_rate: float = option(0.15, "Share of the tokens that masked LM hides.")
    target_length: int | None = option(
        None, "Tokens of a target of an encoder-decoder model; max_length by default. Others have none."
    )
    across_documents: bool = option(
        True, "Whether the documents of a causal row see those before them; False keeps them apart."
    )
    dataset_text_field: str = option("text", "Column of the text.")
    model_init_kwargs: dict | str | None = option(None, "Options of from_pretrained, where the model is a name.")
    eos_token: str | None = option(None, "Token between documents; the tokenizer's by default.")
    learning_rate: float = option(6e-4, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.02, "Steps of warm-up, or their share if below 1.")
    adam_beta2: float = option(0.95, "Decay of AdamW's second moment.")
    weight_decay: float = option(0.1, "Decoupled weight decay; not of norms and biases.")

    def conflicts(self) -> list[tuple[bool, str]]:
        return [
            (
                self.denoiser_weights is not None and self.objective not in DENOISERS,
                f"denoiser_weights: objective={self.objective!r} has one kind of row, so leave them out.",
            ),
            (
                not self.across_documents and self.objective != "causal",
                f"across_documents=False is for objective='causal', not {self.objective!r}.",
            ),
        ]


class _NewNoise(TrainerCallback):
    """Tells the rows which epoch begins."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class PretrainingTrainer(StageTrainerMixin, Trainer):
    """Pretrains a language model: −log p of the targets that the objective makes of the text, mean over all targets.

    - "causal": every token from those before it. Any causal LM.
    - "masked": 15 % of the tokens from all others (https://arxiv.org/abs/1810.04805). Any masked LM.
    - "prefix": the second part of a row from the first; "span_corruption": what sentinels hide (T5,
      https://arxiv.org/abs/1910.10683); "ul2": the mixture of seven denoisers (https://arxiv.org/abs/2205.05131, §3).
      Encoder-decoder models, prefix LMs ([`LifecycleForCausalLM`] with ``attention="prefix"``), and causal LMs, which
      read the inputs from left to right only.

    Logs `loss/<kind>` (nats per target, of every denoiser), `perplexity`, `tokens_per_second`, and `mfu` where the
    device's peak is known. `eval_loss` and `eval_perplexity` are over all held-out targets, with noise that stays.

    Args:
        model: a name or path, or a model. Its embeddings grow to the tokenizer's size.
        train_dataset, eval_dataset: a column of text (`dataset_text_field`) or "input_ids", in memory or streamed.
        processing_class: tokenizer; sentinels, mode tokens and a mask token are added where the objective needs them.
        ptx_dataset: texts that [`MitigationOptions`] protect as a model is pretrained further, by causal LM.

    Raises:
        ValueError: a model that the objective can't train, an empty corpus, a row too short for its spans, or a
            tokenizer without room for sentinels.
    """

    loss_is_scaled_for_ga = True
    card_objective = "Pretraining: minimise −log p of the targets that the objective makes of text, mean per target."
    card_options = ("objective", "max_length", "denoiser_weights", "masking_rate", "target_length")
    card_paper = ("UL2: Unifying Language Learning Paradigms", "2205.05131")
    measured = {"loss": False, "perplexity": False}

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PretrainingConfig | None = None,
        train_dataset: Dataset | StreamedDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ptx_dataset: Dataset | None = None,
        callbacks=None,
        optimizers=(None, None),
    ):
        args = PretrainingConfig("output/pretraining") if args is None else args
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a dataset with a column of text.")
        tokenizer = prepare_tokenizer(model, processing_class, args)
        model = load_pretraining_model(model, masked=args.objective == "masked", args=args)
        self.is_seq2seq = model.config.is_encoder_decoder
        check_objective(model, args.objective)
        plan = row_plan(args, tokenizer, self.is_seq2seq)
        self.takes_prefix = not self.is_seq2seq and has_prefix(model)
        ensure_pad_token(tokenizer, model)
        if model.get_input_embeddings().num_embeddings < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        self.kinds = plan.names
        data = [
            None if rows is None else make_rows(rows, plan, tokenizer, args, where)
            for rows, where in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset"))
        ]
        self.pad_token_id = tokenizer.pad_token_id
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # so that targets are counted over all micro-batches
        if hasattr(data[0], "set_epoch"):
            self.add_callback(_NewNoise(data[0]))
        if mitigations_in_force(args) and (self.is_seq2seq or args.objective == "masked"):
            raise ValueError(
                f"{next(iter(mitigations_in_force(args)))} protects what a causal or prefix LM knows, and "
                f"{type(model).__name__} is none: leave it out."
            )
        protect(self, ptx_dataset)

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Rows of numpy arrays as one batch, padded on the right."""
        batch = {
            "input_ids": pad_sequences([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": pad_sequences([row["labels"] for row in rows], IGNORED),
            "kinds": torch.tensor([row.get("denoiser", 0) for row in rows]),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = pad_sequences([row["position_ids"] for row in rows], 0)
        elif len({len(row["input_ids"]) for row in rows}) > 1:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = length_mask(lengths, batch["input_ids"].shape[1]).long()
        if self.takes_prefix:
            batch["prefix_lengths"] = torch.tensor([row.get("prefix_length", 0) for row in rows])
        return batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers; the items of a step are its targets, over all micro-batches and ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        first = 0 if self._aligned else 1
        targets = sum((batch["labels"][:, first:] != IGNORED).sum() for batch in batches)
        return batches, self.accelerator.reduce(torch.as_tensor(targets).to(device), "sum")

    @property
    def _aligned(self) -> bool:
        """Whether the output at a position predicts the label at the same position, and not the next."""
        return self.is_seq2seq or self.args.objective == "masked"

    @cached_property
    def _head_takes_positions(self) -> bool:
        return not self.is_seq2seq and "logits_to_keep" in signature(self.model.forward).parameters

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, kinds = inputs["labels"], inputs["kinds"]
        given = {name: x for name, x in inputs.items() if name not in ("labels", "kinds")}
        if self.is_seq2seq:
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        if self.args.objective in DENOISERS and self._head_takes_positions:
            # Most of a denoiser's row is input: the head is spared the columns that are so in every row.
            columns = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
            given["logits_to_keep"], labels = columns, labels[:, columns + 1]
        outputs = model(**given, use_cache=False) if self.args.objective != "masked" else model(**given)
        aligned = self._aligned or "logits_to_keep" in given
        nll = (masked_lm_loss if aligned else causal_lm_loss)(outputs.logits, labels)
        targets = (labels if aligned else labels[:, 1:]) != IGNORED
        self._log_kinds(nll.detach(), targets, kinds)
        total = targets.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        # Engines average gradients over processes; the loss is a share of a sum, so the average is undone.
        share = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = self.with_auxiliary(nll.sum() / total * share, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _log_kinds(self, nll: torch.Tensor, targets: torch.Tensor, kinds: torch.Tensor) -> None:
        metrics = self.metrics["train" if self.model.training else "eval"]
        rows = torch.stack([nll.double().sum(1), targets.double().sum(1)], 1)
        sums = (
            torch.zeros(len(self.kinds), 2, dtype=rows.dtype, device=rows.device).index_add_(0, kinds, rows).tolist()
        )
        for name, (total, count) in zip(self.kinds, sums, strict=True):
            if count:
                metrics.add(f"loss/{name}", total, count)
                metrics.add("nll", total, count)

    def training_step(self, model, inputs, num_items_in_batch=None):
        start, tokens = time.perf_counter(), inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds, world_size = time.perf_counter() - start, self.accelerator.num_processes
        self.metrics["train"].add("tokens_per_second", tokens * world_size, seconds)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        means = super().reduced_metrics(kind)
        if "nll" in means:
            nll = means.pop("nll")
            means["perplexity"] = math.exp(min(nll, 700))
            means |= {"loss": nll} if kind == "eval" else {}
        if "tokens_per_second" in means and (peak := peak_flops(self.args.device)):
            parameters = sum(p.numel() for p in self.model.parameters())
            speed = 6 * parameters * means["tokens_per_second"] / self.accelerator.num_processes
            means["mfu"] = speed / peak
        return means


def new_model(args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, **sizes) -> PreTrainedModel:
    """An untrained lifecycle model for `args.objective`, drawn by `args.seed`; `sizes` are fields of its config."""
    masked = args.objective == "masked"
    config = LifecycleConfig(
        **sizes,
        vocab_size=len(tokenizer),
        attention="bidirectional" if masked else "prefix" if args.objective in DENOISERS else "causal",
        max_position_embeddings=4 * args.max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(args.seed)
    return (LifecycleForMaskedLM if masked else LifecycleForCausalLM)(config)


def sample(trainer: PretrainingTrainer, prompt: str) -> str | None:
    """`prompt` and 60 tokens that the model continues it by, at temperature 0.8 and seed 0, UL2 in mode [S]; None of a
    masked or an encoder-decoder model."""
    if trainer.args.objective == "masked" or trainer.is_seq2seq:
        return None
    tokenizer, mode = trainer.processing_class, "[S]" if trainer.args.objective == "ul2" else ""
    ids = tokenizer(mode + prompt, add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 60, "temperature": 0.8, "stop_token_ids": [tokenizer.eos_token_id]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = generate(model, [ids], **options, pad_token_id=tokenizer.pad_token_id, generator_seed=0)
    return prompt + tokenizer.decode(found[0], skip_special_tokens=True)


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a CUDA device, where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def check_objective(model: PreTrainedModel, objective: str) -> None:
    """Check that a model can be trained by an objective.

    Raises:
        ValueError: naming the model and what fits it.
    """
    name, seq2seq = type(model).__name__, model.config.is_encoder_decoder
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM")
    if (objective == "masked") != masked or (seq2seq and objective not in DENOISERS):
        fits = "masked" if masked else ", ".join(DENOISERS) if seq2seq else ", ".join(("causal", *DENOISERS))
        raise ValueError(f"objective={objective!r} can't train {name}, whose objectives are: {fits}.")
    if objective in DENOISERS and not seq2seq and getattr(model.config, "attention", "causal") == "causal":
        warnings.warn(
            f"{name} reads from left to right, so that the inputs of objective={objective!r} do not see each other "
            "both ways. LifecycleConfig(attention='prefix') is the model for it.",
            stacklevel=3,
        )
    if objective == "causal" and getattr(model.config, "attention", "causal") == "bidirectional":
        raise ValueError(f"objective='causal' with attention='bidirectional': {name} would see what it predicts.")


def row_plan(args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> RowPlan:
    """What a row is by `args`; the tokenizer gets the tokens that it needs."""
    if args.objective == "causal":
        return CausalRows(args.max_length)
    if args.objective == "masked":
        return MaskedRows(add_denoising_tokens(tokenizer, mask="<mask>"), args.max_length, rate=args.masking_rate)
    denoisers = DENOISERS[args.objective]
    target_length = (args.target_length or args.max_length) if seq2seq else None
    tokens = add_denoising_tokens(
        tokenizer,
        n_sentinels=sentinels_needed(denoisers, args.max_length, target_length),
        modes=sorted({denoiser.mode for denoiser in denoisers} - {None}),
    )
    options = {"weights": args.denoiser_weights, "target_length": target_length}
    return DenoisedRows(denoisers, tokens, args.max_length, **options)


def make_rows(dataset, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, where: str):
    """The rows of a corpus: packed in order where they are plain text, else by `plan`."""
    with args.main_process_first(desc=f"tokenising {where}"):
        documents = encode_corpus(dataset, tokenizer, field=args.dataset_text_field, where=where)
    if isinstance(documents, StreamedDataset):
        return RowStream(documents, plan, tokenizer.eos_token_id, seed=args.seed, where=where)
    stream = TokenStream.from_documents(documents, tokenizer.eos_token_id, where=where)
    if isinstance(plan, CausalRows):
        return PackedDataset(stream, args.max_length, across_documents=args.across_documents)
    return RowDataset(stream, plan, seed=args.seed)
