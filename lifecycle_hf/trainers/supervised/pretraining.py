"""Pretrain language models by one of the objectives causal, masked, span corruption, prefix LM and UL2."""

import math
import warnings
from dataclasses import dataclass, replace
from inspect import signature

import torch
from datasets import Dataset
from datasets import IterableDataset as StreamedDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lifecycle_hf.completions.sampling import generate
from lifecycle_hf.completions.scoring import has_prefix
from lifecycle_hf.data.collators import length_mask, pad_sequences
from lifecycle_hf.data.corpora import encode_corpus
from lifecycle_hf.data.denoising import IGNORED, PREFIX_LM, SPAN_CORRUPTION, UL2_DENOISERS, sentinels_needed
from lifecycle_hf.data.domains import DomainRows, shares_of, split_domains
from lifecycle_hf.data.packing import PackedDataset, RowDataset, RowStream, TokenStream
from lifecycle_hf.data.rows import CausalRows, DenoisedRows, MaskedRows, RowPlan
from lifecycle_hf.data.special_tokens import add_denoising_tokens
from lifecycle_hf.models.adapters.embeddings import embedding_rows
from lifecycle_hf.models.lifecycle import LifecycleConfig, LifecycleForCausalLM, LifecycleForMaskedLM
from lifecycle_hf.models.loading import ensure_pad_token, load_pretraining_model
from lifecycle_hf.objectives.domains import domain_sums
from lifecycle_hf.objectives.language import causal_lm_loss, masked_lm_loss
from lifecycle_hf.trainers.base.metrics import StepClock
from lifecycle_hf.trainers.base.mitigations import mitigations_in_force, protect
from lifecycle_hf.trainers.base.options import TrainerConfig, option
from lifecycle_hf.trainers.supervised.base import StageTrainerMixin, prepare_tokenizer

DENOISERS = {"span_corruption": (SPAN_CORRUPTION,), "prefix": (PREFIX_LM,), "ul2": UL2_DENOISERS}
OBJECTIVES = ("causal", "masked", *DENOISERS)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""{part of the device's name: peak of bf16 matrix products without sparsity, FLOP/s}."""


@dataclass
class PretrainingConfig(TrainerConfig):
    """Hold the options of pretraining. The defaults are AdamW with β = (.9, .95), cosine with warm-up, clipping."""

    objective: str = option("causal", "The pretraining objective.", choices=OBJECTIVES)
    max_length: int = option(512, "Tokens of a row: the text together with sentinels and mode tokens.")
    denoiser_weights: list[float] | None = option(
        None, "How often each denoiser is drawn, for ul2 of R3, R8, S, X3, X8, X64 and X64h; equally often by default."
    )
    random_roll: bool = option(
        True, "Let spans of noise stand anywhere in a row; False: a row begins with a kept token and ends with noise."
    )
    masking_rate: float = option(0.15, "Share of the tokens that masked LM hides and predicts.")
    target_length: int | None = option(None, "Encoder-decoder models: tokens of a target; max_length by default.")
    across_documents: bool = option(True, "Let tokens of a causal row attend to the documents before their own.")
    dataset_text_field: str = option("text", "Column of the text.")
    domain_weights: dict | str | None = option(
        None,
        "Draw training rows from the domains (column `domain`) by these weights: a YAML file of DoReMi, or a dict.",
    )
    model_init_kwargs: dict | str | None = option(None, "Options of from_pretrained if the model is given by name.")
    eos_token: str | None = option(None, "Token between documents; the tokenizer's EOS token by default.")
    learning_rate: float = option(6e-4, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.02, "Steps of warm-up; a value below 1 is a share of all steps.")
    adam_beta2: float = option(0.95, "Decay of AdamW's second moment.")
    weight_decay: float = option(0.1, "Decoupled weight decay; norms and biases have none.")

    def conflicts(self) -> list[tuple[bool, str]]:
        weights = f"denoiser_weights: objective={self.objective!r} has one kind of row, so leave them out."
        apart = f"across_documents=False is for objective='causal', not {self.objective!r}: leave it out."
        strategy = self.train_sampling_strategy
        alike = f"train_sampling_strategy={strategy!r}: rows are equally long, so leave it out."
        fixed = f"random_roll=False is for span_corruption and ul2, not {self.objective!r}: leave it out."
        return [
            (not self.random_roll and self.objective not in ("span_corruption", "ul2"), fixed),
            (strategy not in ("random", "sequential"), alike),
            (self.denoiser_weights is not None and self.objective not in DENOISERS, weights),
            (not self.across_documents and self.objective != "causal", apart),
        ]


class _NewNoise(TrainerCallback):
    """Set the epoch of the rows, on which their noise depends, where accelerate does not."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class PretrainingTrainer(StageTrainerMixin, Trainer):
    """Train a language model on text: −log p of the targets that the objective makes of the text, mean over targets.

    - "causal": predict every token from those before it. Any causal LM.
    - "masked": predict 15 % of the tokens from all others (https://arxiv.org/abs/1810.04805). Any masked LM.
    - "prefix": predict the second part of a row from the first. "span_corruption": predict the spans that sentinels
      replace (T5, https://arxiv.org/abs/1910.10683). "ul2": a mixture of seven denoisers
      (https://arxiv.org/abs/2205.05131, §3). Encoder-decoder models, prefix LMs ([`LifecycleForCausalLM`] with
      ``attention="prefix"``), and causal LMs, which read the inputs from left to right only.

    Logs `loss/<kind>` (nats per target, of every denoiser), `perplexity`, `tokens_per_second`, and `mfu` if the peak
    of the device is known. `eval_loss` and `eval_perplexity` are over all held-out targets, with the same noise in
    every evaluation.

    Args:
        model: a name or path, or a model. Its embeddings grow to the size of the tokenizer.
        args: [`PretrainingConfig`].
        train_dataset, eval_dataset: a column of text (`dataset_text_field`) or "input_ids", in memory or streamed.
            With `domain_weights` the training data are in memory and have a column "domain". A row then holds text of
            one domain, and an epoch has as many rows as the domains together.
        processing_class: tokenizer; sentinels, mode tokens and a mask token are added if the objective needs them.
        ptx_dataset: texts that [`MitigationOptions`] protect if a model is pretrained further by causal LM.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: the objective can't train the model, a corpus is empty, a row is too short for its spans, or the
            tokenizer has no room for sentinels.
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
        **kwargs,
    ):
        args = PretrainingConfig("output/pretraining") if args is None else args
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a dataset with a column of text.")
        tokenizer = prepare_tokenizer(model, processing_class, args)
        model = load_pretraining_model(model, masked=args.objective == "masked", args=args)
        self.is_seq2seq = model.config.is_encoder_decoder
        # Whether the output at a position predicts the label at that position, and not the next one.
        self._aligned = self.is_seq2seq or args.objective == "masked"
        takes_positions = not self.is_seq2seq and "logits_to_keep" in signature(model.forward).parameters
        # Most tokens of a denoiser's row are inputs. The head skips the columns without a target in any row.
        self._spares_columns = args.objective in DENOISERS and takes_positions
        # accelerate reads a stream in the main process, joins the batches of all processes, and deals them out.
        joined = not isinstance(train_dataset, Dataset) or args.accelerator_config.dispatch_batches
        self._joins_batches = args.world_size > 1 and joined
        check_objective(model, args.objective)
        plan = row_plan(args, tokenizer, self.is_seq2seq)
        self.plan = plan
        self.takes_prefix = not self.is_seq2seq and has_prefix(model)
        self.pad_token_id, self.kinds = ensure_pad_token(tokenizer, model), plan.names
        if embedding_rows(model) < len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        train_rows = make_rows(train_dataset, plan, tokenizer, args, "train_dataset", args.domain_weights)
        eval_rows = None if eval_dataset is None else make_rows(eval_dataset, plan, tokenizer, args, "eval_dataset")
        super().__init__(model, args, self.collate, train_rows, eval_rows, tokenizer, **kwargs)
        self._clock = StepClock(args.device)
        self.model_accepts_loss_kwargs = True  # so that targets are counted over all micro-batches
        if hasattr(train_rows, "set_epoch"):
            self.add_callback(_NewNoise(train_rows))
        if self._aligned and (options := mitigations_in_force(args)):
            kind = type(model).__name__
            raise ValueError(
                f"{next(iter(options))} is for causal and prefix LMs, and {kind} is neither: leave it out."
            )
        protect(self, ptx_dataset)

    def prepared(self, dataset, where: str):
        """Return the rows of a corpus."""
        if isinstance(dataset, Dataset | StreamedDataset):
            return make_rows(dataset, self.plan, self.processing_class, self.args, where)
        return dataset

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return rows of numpy arrays as one batch, padded on the right."""
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
        if self._spares_columns and not self._joins_batches:
            batch["logits_to_keep"] = columns_with_targets(batch["labels"])  # here, in the host's memory
        return batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but count the targets of the step, over all its micro-batches and ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        first = 0 if self._aligned else 1
        targets = sum((batch["labels"][:, first:] != IGNORED).sum() for batch in batches)
        return batches, self.accelerator.reduce(torch.as_tensor(targets).to(device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, kinds, given = inputs["labels"], inputs["kinds"], model_inputs(inputs)
        if self.is_seq2seq:
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        if self._spares_columns:
            if "logits_to_keep" not in given:
                given["logits_to_keep"] = columns_with_targets(labels)
            labels = labels[:, given["logits_to_keep"] + 1]
        outputs = model(**given, use_cache=False) if self.args.objective != "masked" else model(**given)
        aligned = self._aligned or "logits_to_keep" in given
        nll = (masked_lm_loss if aligned else causal_lm_loss)(outputs.logits, labels)
        targets = (labels if aligned else labels[:, 1:]) != IGNORED
        self._log_kinds(nll.detach(), targets, kinds)
        nll = self.weigh(nll, inputs)
        total = targets.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        # DDP and the other engines average gradients over processes. The loss is a share of a sum, so undo that.
        share = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = self.with_auxiliary(nll.sum() / total * share, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def weigh(self, nll: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the losses of a micro-batch [B, T] as they enter the mean of the step; a subclass may weigh them."""
        return nll

    def _log_kinds(self, nll: torch.Tensor, targets: torch.Tensor, kinds: torch.Tensor) -> None:
        metrics = self.metrics["train" if self.model.training else "eval"]
        sums = domain_sums(nll, targets, kinds, len(self.kinds))
        for name, (total, count) in zip(self.kinds, sums, strict=True):
            metrics.add(f"loss/{name}", total, count)
        metrics.add("nll", *sums.sum(0))

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._clock.step(inputs["input_ids"].numel() * self.accelerator.num_processes):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        if kind == "train":
            self.metrics["train"].add("tokens_per_second", *self._clock.read())
        means = super().reduced_metrics(kind)
        if "nll" in means:
            nll = means.pop("nll")
            means["perplexity"] = math.exp(min(nll, 700))
            means |= {"loss": nll} if kind == "eval" else {}
        if "tokens_per_second" in means and (peak := peak_flops(self.args.device)):
            parameters = sum(p.numel() for p in self.model.parameters())
            means["mfu"] = 6 * parameters * means["tokens_per_second"] / self.accelerator.num_processes / peak
        return means


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the model's forward takes of a batch."""
    return {name: x for name, x in batch.items() if name not in ("labels", "kinds")}


def columns_with_targets(labels: torch.Tensor) -> torch.Tensor:
    """Return the columns of `labels` [B, L] whose output predicts a target in at least one row."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]


def new_model(args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, **sizes) -> PreTrainedModel:
    """Return an untrained lifecycle model for `args.objective`, drawn by `args.seed`.

    Args:
        sizes: fields of [`LifecycleConfig`], such as `hidden_size`.
    """
    masked = args.objective == "masked"
    attention = "bidirectional" if masked else "prefix" if args.objective in DENOISERS else "causal"
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 4 * args.max_length, "attention": attention}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LifecycleConfig(**sizes, **tokens, tie_word_embeddings=True)
    set_seed(args.seed)
    return (LifecycleForMaskedLM if masked else LifecycleForCausalLM)(config)


def sample(trainer: PretrainingTrainer, prompt: str) -> str | None:
    """Return `prompt` and its continuation by 60 tokens, or None for a masked LM or an encoder-decoder model.

    The tokens are sampled at temperature 0.8 with seed 0, under UL2 in the mode [S].
    """
    if trainer.args.objective == "masked" or trainer.is_seq2seq:
        return None
    tokenizer, mode = trainer.processing_class, "[S]" if trainer.args.objective == "ul2" else ""
    ids = tokenizer(mode + prompt, add_special_tokens=False)["input_ids"]
    options = {"max_new_tokens": 60, "temperature": 0.8, "stop_token_ids": [tokenizer.eos_token_id]}
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = generate(model, [ids], **options, pad_token_id=tokenizer.pad_token_id, generator_seed=0)
    return prompt + tokenizer.decode(found[0], skip_special_tokens=True)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak bf16 FLOP/s of a CUDA device, or None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def check_objective(model: PreTrainedModel, objective: str) -> None:
    """Check that an objective can train a model.

    Raises:
        ValueError: it can't; the message names the model and the objectives that fit it.
    """
    name, seq2seq = type(model).__name__, model.config.is_encoder_decoder
    masked = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM")
    if (objective == "masked") != masked or (seq2seq and objective not in DENOISERS):
        fits = "masked" if masked else ", ".join(DENOISERS) if seq2seq else ", ".join(("causal", *DENOISERS))
        raise ValueError(f"objective={objective!r} can't train {name}, whose objectives are: {fits}.")
    if objective in DENOISERS and not seq2seq and getattr(model.config, "attention", "causal") == "causal":
        warnings.warn(
            f"{name} reads from left to right, so an input of objective={objective!r} does not attend to the inputs "
            "after it. A model with LifecycleConfig(attention='prefix') does.",
            stacklevel=3,
        )
    if objective == "causal" and getattr(model.config, "attention", "causal") == "bidirectional":
        raise ValueError(f"objective='causal' with attention='bidirectional': {name} would read what it predicts.")


def row_plan(args: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, seq2seq: bool) -> RowPlan:
    """Return how rows are made under `args`; add the tokens that this needs to the tokenizer."""
    if args.objective == "causal":
        return CausalRows(args.max_length)
    if args.objective == "masked":
        return MaskedRows(add_denoising_tokens(tokenizer, mask="<mask>"), args.max_length, rate=args.masking_rate)
    denoisers = [replace(denoiser, random_roll=args.random_roll) for denoiser in DENOISERS[args.objective]]
    target_length = (args.target_length or args.max_length) if seq2seq else None
    sentinels = sentinels_needed(denoisers, args.max_length, target_length)
    modes = sorted({denoiser.mode for denoiser in denoisers} - {None})
    tokens = add_denoising_tokens(tokenizer, n_sentinels=sentinels, modes=modes)
    options = {"weights": args.denoiser_weights, "target_length": target_length}
    return DenoisedRows(denoisers, tokens, args.max_length, **options)


def make_rows(
    dataset, plan: RowPlan, tokenizer: PreTrainedTokenizerBase, args: PretrainingConfig, where: str, weights=None
):
    """Return the rows of a corpus: for causal LM the text in order, packed, else rows made by `plan`.

    Args:
        weights: draw rows from the domains by them, see `shares_of`.
    """
    if weights is not None:
        parts = split_domains(dataset, where)
        shares = shares_of(weights, list(parts), f"domain_weights: each domain of {where}")
        rows = {k: make_rows(part, plan, tokenizer, args, f"{where}, domain {k!r}") for k, part in parts.items()}
        return DomainRows(rows, shares, seed=args.seed)
    with args.main_process_first(desc=f"tokenising {where}"):
        documents = encode_corpus(dataset, tokenizer, field=args.dataset_text_field, where=where)
    if isinstance(documents, StreamedDataset):
        return RowStream(documents, plan, tokenizer.eos_token_id, seed=args.seed, where=where)
    stream = TokenStream.from_documents(documents, tokenizer.eos_token_id, where=where)
    if isinstance(plan, CausalRows):
        return PackedDataset(stream, args.max_length, across_documents=args.across_documents)
    return RowDataset(stream, plan, seed=args.seed)
