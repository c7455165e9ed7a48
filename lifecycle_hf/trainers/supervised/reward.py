"""Train reward models by Bradley–Terry on preference pairs, with held-out calibration and centred scores."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import clone_chat_template

from lifecycle_hf.data.schemas import check_train_dataset, to_preference
from lifecycle_hf.data.tokenize import tokenize_preference
from lifecycle_hf.evaluation.calibration import expected_calibration_error, reliability_bins
from lifecycle_hf.evaluation.pictures import plot_reliability
from lifecycle_hf.models.heads import RewardModel
from lifecycle_hf.models.loading import ensure_pad_token, load_classifier, prepare_quantized
from lifecycle_hf.objectives.reward import bradley_terry_loss
from lifecycle_hf.trainers.base.options import OWN_LOSS
from lifecycle_hf.trainers.base.trainer import with_lengths
from lifecycle_hf.trainers.supervised.base import (
    StageConfig,
    StageTrainerMixin,
    loading_options,
    own_copy,
    prepare_tokenizer,
)


@dataclass
class RewardConfig(StageConfig, trl.RewardConfig):
    """Hold TRL's options for reward models and `strict_data`; an unset `bf16` is off without an accelerator."""

    refused = OWN_LOSS


class RewardTrainer(StageTrainerMixin, trl.RewardTrainer):
    """Train a scalar reward on preference pairs: −log σ(r_w − r_l [− margin]).

    The score is the output of the head at the last token before the padding. The data end with their EOS token, and
    the pad token is one that ends no text, so that transformers reads the score at the same token.
    `AutoModelForSequenceClassification.from_pretrained` gives the raw scores. `load_reward_model` subtracts
    `config.reward_center`, their mean over the held-out chosen and rejected answers.

    Metrics: `accuracy` (share of pairs with r_w > r_l), `margin` (mean r_w − r_l), `mean_reward` (mean raw score).
    With the prefix `eval_` they are those of held-out pairs. There are also `eval_loss`, `eval_ece` (σ(|r_w − r_l|)
    against correctness, 10 equal-width bins) and `eval_reward_center`. Each is a sum over all processes, divided once.

    Args:
        model: a name or path of any decoder (it gets a new head), of a classifier with one label, or of an adapter; or
            such a classifier or PeftModel as object.
        args, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers, peft_config,
            quantization_config: as in TRL. Data: preference pairs, chat or plain, prompt explicit or implicit,
            "Human: / Assistant:" transcripts, and an optional column "margin".

    Raises:
        ValueError: data, tokenizer or model would make the run wrong. It is raised before training.
    """

    card_objective = "Bradley–Terry: minimise $-\\log\\sigma(r(x, y_w) - r(x, y_l) - m)$ over preference pairs."
    card_paper = ("Training language models to follow instructions with human feedback", "2203.02155")
    measured = {"accuracy": True, "loss": False, "ece": False}
    idle_arguments = ()

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config=None,
        **kwargs,
    ):
        args = RewardConfig("output/reward") if args is None else args
        check_train_dataset(train_dataset, "RewardTrainer")
        tokenizer = prepare_tokenizer(model, processing_class, args)
        model = _prepare_model(model, tokenizer, args, quantization_config, peft_config)
        self._scored: list[torch.Tensor] | None = None
        self._held_out: list[torch.Tensor] = []
        self._finalized_at: int | None = None
        self.args = args
        self._tokenizing = {"tokenizer": tokenizer, "max_length": args.max_length, "strict": args.strict_data}
        self._tokenizing["num_proc"] = args.dataset_num_proc
        train_dataset = self._tokenized(train_dataset, "train_dataset")
        eval_dataset = self._tokenized(eval_dataset, "eval_dataset")
        settled = own_copy(args, model_init_kwargs=None, chat_template_path=None, pad_token=None)
        if args.train_sampling_strategy not in ("random", "sequential"):
            settled.remove_unused_columns = False  # the sampler reads the lengths; the collator takes what it needs
        kwargs |= {"processing_class": tokenizer, "peft_config": _with_score_head(peft_config)}
        super().__init__(model, settled, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._trainables_to_fp32(args)
        RewardModel(self.model, tokenizer)  # raises if the trained model is no reward model

    def _trainables_to_fp32(self, args: RewardConfig) -> None:
        """Turn adapter and head to fp32; on a bf16 or quantised base they start in bf16, which loses small steps."""
        autocast = args.bf16 or args.fp16
        if isinstance(self.model, PeftModel) and (autocast or self.model.dtype == torch.float32):
            for parameter in self.model.parameters():
                # ZeRO-3 has sharded its parameters already and gathers those of one dtype together: leave them.
                if parameter.requires_grad and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.float()

    def _tokenized(self, dataset, where: str):
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, dict):
            return {name: self._tokenized(part, f"{where} {name!r}") for name, part in dataset.items()}
        pair = ("chosen_ids", "rejected_ids")
        if not set(pair) <= set(dataset.column_names):
            dataset = tokenize_preference(to_preference(dataset, where), where=where, **self._tokenizing)
        return with_lengths(dataset, pair, self.args)

    def prepared(self, dataset, where: str):
        """Return raw pairs tokenised."""
        return self._tokenized(dataset, where)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        losses = bradley_terry_loss(chosen, rejected, margin=inputs.get("margin"))
        loss = losses.mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected).square().mean()
        with torch.no_grad():
            if self.model.training:
                pairs, metrics = len(losses), self.metrics["train"]
                metrics.add("accuracy", (chosen > rejected).sum(), pairs)
                metrics.add("margin", (chosen - rejected).sum(), pairs)
                metrics.add("mean_reward", (chosen + rejected).sum(), 2 * pairs)
            elif self._scored is not None:
                rows = torch.stack([chosen, rejected, losses], dim=1)
                self._scored.append(self.accelerator.gather_for_metrics(rows).double().cpu())
        loss = self.with_auxiliary(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, with the metrics of the class docstring, which are exact over all pairs."""
        self._scored = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        scored, self._scored = torch.cat(self._scored), None
        self._held_out.append(scored)
        output.metrics.update({f"{metric_key_prefix}_{k}": value for k, value in _pair_metrics(scored).items()})
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Return metrics on held-out pairs; on the trainer's own `eval_dataset`, also set `config.reward_center`."""
        whole = eval_dataset is None
        if whole:
            self._held_out = []
        metrics = super().evaluate(self._tokenized(eval_dataset, "eval_dataset"), ignore_keys, metric_key_prefix)
        if whole:
            center = float(torch.cat(self._held_out)[:, :2].mean())
            self.model.config.reward_center = metrics[f"{metric_key_prefix}_reward_center"] = center
        return metrics

    def finalize(self) -> dict[str, float]:
        """Score the held-out pairs with the final weights, centre the model, write calibration.json and .png.

        `save_model` and `push_to_hub` call it unless it was called after the last step.

        Returns:
            the metrics on the held-out pairs.
        """
        metrics = self.evaluate()
        self._finalized_at = self.state.global_step
        scored = torch.cat(self._held_out)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            confidence, correct = _confidence(scored)
            table = {name: values.tolist() for name, values in reliability_bins(confidence, correct).items()}
            table = {name: [None if v != v else v for v in values] for name, values in table.items()}
            summary = {"pairs": len(scored), **_pair_metrics(scored), "bins": table}
            (folder / "calibration.json").write_text(json.dumps(summary, indent=2) + "\n")
            plot_reliability(confidence, correct, folder / "calibration.png", title="Held-out pairs")
        return metrics

    def _finalize_once(self) -> None:
        if self.eval_dataset is not None and self._finalized_at != self.state.global_step:
            self.finalize()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the checkpoint; if there are held-out pairs, centre the scores on them first."""
        if not _internal_call:
            self._finalize_once()
        super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args, **kwargs):
        """Push model, tokenizer, calibration and card."""
        self._finalize_once()
        return super().push_to_hub(*args, **kwargs)


def _confidence(scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return σ(|r_w − r_l|), the probability that the model gives its own choice, and whether the choice is right."""
    chosen, rejected = scored[:, 0], scored[:, 1]
    return torch.sigmoid((chosen - rejected).abs()), chosen > rejected


def _pair_metrics(scored: torch.Tensor) -> dict[str, float]:
    """Return the metrics of pairs [N, 3], whose columns are chosen score, rejected score and loss."""
    chosen, rejected, losses = scored.unbind(1)
    confidence, correct = _confidence(scored)
    return {
        "loss": losses.mean().item(),
        "accuracy": correct.double().mean().item(),
        "ece": expected_calibration_error(confidence, correct),
        "margin": (chosen - rejected).mean().item(),
        "mean_reward": scored[:, :2].mean().item(),
    }


def _prepare_model(model, tokenizer, args: RewardConfig, quantization_config, peft_config):
    """Return the classifier to train; set chat template and pad token, since TRL would pad with the EOS token."""
    if isinstance(model, str):
        set_seed(args.seed)  # a new head is random
        model = load_classifier(model, **loading_options(args, quantization_config))
    if args.chat_template_path is not None:
        if args.chat_template_path.endswith((".jinja", ".j2")):
            tokenizer.chat_template = Path(args.chat_template_path).read_text()
        else:
            model, tokenizer, added = clone_chat_template(model, tokenizer, args.chat_template_path)
            if added and (peft_config is not None or isinstance(model, PeftModel)):
                what = f"chat_template_path {args.chat_template_path} adds tokens that an adapter would not learn"
                raise ValueError(f"{what}: use a template whose tokens the model knows, or train without PEFT.")
    if args.pad_token is not None:
        tokenizer.pad_token = args.pad_token
    ensure_pad_token(tokenizer, model)
    return prepare_quantized(model)


def _with_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """Return a copy of `peft_config` for sequence classification that trains the whole ``score`` head."""
    if peft_config is None:
        return None
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    modules = getattr(peft_config, "modules_to_save", None) or ()
    peft_config.modules_to_save = list(dict.fromkeys([*modules, "score"]))
    return peft_config
