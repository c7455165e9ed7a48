"""Train classifiers of texts and of pairs of texts: single label, several labels, or a number to predict."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from scipy.special import softmax
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from lifecycle_hf.data.task_rows import MULTI, REGRESSION, SINGLE, Labels, find_labels, tokenize_classification
from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.calibration import expected_calibration_error
from lifecycle_hf.evaluation.classification import f1_score, pearson_correlation, spearman_correlation
from lifecycle_hf.evaluation.pictures import plot_reliability
from lifecycle_hf.evaluation.report import json_ready
from lifecycle_hf.models.adapters.notes import labels_of, read_adapter_notes
from lifecycle_hf.models.loading import is_adapter
from lifecycle_hf.trainers.base.options import option
from lifecycle_hf.trainers.supervised.tasks import TaskConfig, TaskTrainer

MEASURED = {
    SINGLE: {"accuracy": True, "macro_f1": True, "ece": False},
    MULTI: {"micro_f1": True, "macro_f1": True},
    REGRESSION: {"mse": False, "pearson": True, "spearman": True},
}
"""Of each kind of classification its metrics, and whether more is better."""
BALANCED = ("balanced", ["balanced"])


@dataclass
class ClassificationConfig(TaskConfig):
    """Hold the options of classification."""

    labels: list[str] | None = option(
        None, "Names of the classes, in order; by default those of the model, or those that occur in the data."
    )
    class_weights: list[str] | None = option(
        None,
        "Weight of each class in the loss, in the order of the labels, or 'balanced' for N / (C·N_c); of several "
        "labels those of the rows where the class holds.",
    )


class ClassificationTrainer(TaskTrainer):
    """Train a classifier: −log softmax(W h + b)_y, mean over rows; h is the state that the model's head pools.

    A decoder pools the last real token of a text, which is its EOS token: the pad token is one that ends no text, so
    that transformers pools the same one. [`LifecycleForSequenceClassification`] does so with every kind of attention.
    BERT and its kind pool the first token.

    Data: "text", optionally "text_pair", and "label": a string or a whole number (one class), a list of these (all
    classes that hold; the loss is the mean binary cross entropy), or another number (regression; squared error).

    Metrics of held-out rows: `accuracy`, `macro_f1`, `ece` (10 equal-width bins of the highest probability); of
    several labels `micro_f1` and `macro_f1` at p > ½; of regression `mse`, `pearson` and `spearman`.

    Args:
        model: a name or path of any model with AutoModelForSequenceClassification (without a classifier it gets a new
            head) or of an adapter; or such a model as object.
        args: [`ClassificationConfig`].
        train_dataset, eval_dataset, processing_class, peft_config, quantization_config: as in the other trainers.
        ptx_dataset: rows of an earlier task with the same labels, which EWC and projection protect.
        kwargs: callbacks, optimizers and others, as in `transformers.Trainer`.

    Raises:
        ValueError: data, labels, weights or model would make the run wrong. It is raised before training.
    """

    config_class = ClassificationConfig
    task_type = "SEQ_CLS"
    card_objective = "Classification: minimise $-\\log\\operatorname{softmax}(W h + b)_y$, mean over rows."
    card_paper = ("BERT: Pre-training of Deep Bidirectional Transformers", "1810.04805")

    def head_options(self, model, train_dataset: Dataset) -> dict:
        self.labels = find_labels(train_dataset, "train_dataset", self.args.labels)
        known = _known_labels(model, self.args.trust_remote_code)
        if self.args.labels is None and set(known) == set(self.labels.names):
            self.labels = Labels(self.labels.kind, known)  # the order that the head was trained with
        self.measured = MEASURED[self.labels.kind]
        check_class_weights(self.args.class_weights, self.labels)
        names = dict(enumerate(self.labels.names))
        named = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
        return named | {"problem_type": self.labels.kind}

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """The weight of each class in the loss, [C]."""
        given, count = self.args.class_weights, len(self.labels.names)
        if given not in BALANCED:
            return None if given is None else torch.tensor([float(value) for value in given])
        rows = torch.bincount(torch.tensor(self.train_dataset["label"][:]), minlength=count)
        return rows.sum() / (count * rows.clamp(min=1))

    def tokenized(self, dataset: Dataset, where: str, **options) -> Dataset:
        return tokenize_classification(dataset, self._tokenizer, self.labels, where=where, **options)

    def targets_of(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["label"] for row in rows])
        return {"labels": labels if self.labels.kind == SINGLE else labels.float()}

    def task_loss(self, model, inputs):
        given = {name: x for name, x in inputs.items() if name not in ("labels", "index")}
        logits, labels = model(**given).logits.float(), inputs["labels"]
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        if self.labels.kind == SINGLE:
            losses = functional.cross_entropy(logits, labels, weight=weights, reduction="none")
        elif self.labels.kind == MULTI:
            losses = functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
            losses = losses.mean(1)
        else:
            losses = (logits.squeeze(-1) - labels).square()
        return losses, logits

    def measurements(self, predictions: np.ndarray, rows: Dataset) -> dict[str, Measurement]:
        logits, labels = predictions.astype(np.float64), np.asarray(rows["label"])
        named = np.array(self.labels.names)
        if self.labels.kind == REGRESSION:
            said, right, logits = logits[:, 0], labels, logits[:, 0]
            found = {"mse": Measurement(np.square(logits - labels)), "pearson": pearson_correlation(logits, labels)}
            found["spearman"] = spearman_correlation(logits, labels)
        elif self.labels.kind == MULTI:
            said, right = ([named[held > 0].tolist() for held in table] for table in (logits, labels))
            found = {f"{kind}_f1": f1_score(logits > 0, labels, average=kind) for kind in ("micro", "macro")}
        else:
            classes, best = np.arange(logits.shape[1]), logits.argmax(1)
            self._confidence, self._correct = softmax(logits, axis=1).max(1), best == labels
            said, right = named[best], named[labels]
            found = {"accuracy": Measurement(self._correct)}
            found["macro_f1"] = f1_score(best[:, None] == classes, labels[:, None] == classes)
            found["ece"] = expected_calibration_error(self._confidence, self._correct)
        table = zip(rows["row"], said, right, logits.tolist(), strict=True)
        self.predictions = [
            json_ready({"row": row, "predicted": one, "label": other, "logits": values})
            for row, one, other, values in table
        ]
        return found

    def finalize(self) -> dict[str, float]:
        """As in the base; of single labels also draw calibration.png."""
        metrics = super().finalize()
        if self.labels.kind == SINGLE and self.is_world_process_zero():
            path = f"{self.args.output_dir}/calibration.png"
            plot_reliability(self._confidence, self._correct, path, title="Held-out rows")
        return metrics


def check_class_weights(given: list | str | None, labels: Labels) -> None:
    """Check that there is a weight for each class.

    Raises:
        ValueError: there is not, or the labels have no classes to weigh.
    """
    if given is None:
        return
    if labels.kind == REGRESSION:
        raise ValueError(f"class_weights={given}: a regression has no classes, so leave them out.")
    if given in BALANCED:
        if labels.kind == MULTI:
            raise ValueError("class_weights='balanced' is for one label in a row: give a number for each class.")
        return
    try:
        weights = [float(value) for value in given]
    except ValueError:
        weights = []
    if len(weights) != len(labels.names) or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"class_weights={given}: give 'balanced', or a number from 0 for each of the {len(labels.names)} labels "
            f"{list(labels.names)}."
        )


def _known_labels(model: str | PreTrainedModel, trust_remote_code: bool) -> tuple[str, ...]:
    """Return the names of the labels in a model's config."""
    if isinstance(model, str):
        if is_adapter(model):
            return tuple(labels_of(read_adapter_notes(model)).get("id2label", {}).values())
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    else:
        config = model.config
    return tuple(name for _, name in sorted(config.id2label.items()))
