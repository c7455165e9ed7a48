"""Train models that find the answer to a question in a text (extractive question answering, as in SQuAD)."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from lifecycle_hf.data.task_rows import tokenize_questions
from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.spans import best_spans, squad_scores
from lifecycle_hf.trainers.base.options import option
from lifecycle_hf.trainers.supervised.tasks import TaskConfig, TaskTrainer


@dataclass
class QuestionAnsweringConfig(TaskConfig):
    """Hold the options of extractive question answering."""

    doc_stride: int = option(128, "Tokens of a context that two windows which follow each other share.")
    max_answer_length: int = option(30, "Most tokens of an answer.")
    n_best: int = option(20, "Answers that are kept of each question, the best first.")
    null_threshold: float | None = option(
        None,
        "Questions may have no answer (SQuAD 2.0): say so if the score of no answer is higher than that of the best "
        "span by more than this. None: every question has an answer, and rows without one are refused.",
    )

    def conflicts(self) -> list[tuple[bool, str]]:
        wrong = f"doc_stride={self.doc_stride} must lie between 0 and max_length={self.max_length}: lower it."
        return [*super().conflicts(), (not 0 <= self.doc_stride < self.max_length, wrong)]


class QuestionAnsweringTrainer(TaskTrainer):
    """Train extractive question answering: ½ (−log p_start − log p_end), mean over windows.

    A context that is too long becomes windows which overlap by `doc_stride` tokens. A window that does not hold the
    first answer wholly points at its first token (position 0: [CLS] of BERT, the first token of the question of a
    decoder). p_start and p_end are softmaxes over the tokens of the context and that first token.

    A question's answer is the span with the highest start + end logit over all windows, of at most
    `max_answer_length` tokens. With `null_threshold` it is "" if the score of no answer, the lowest start + end logit
    of the first tokens of its windows, is above the best span's by more than that.

    Metrics of held-out questions: `exact_match` and `f1` as in SQuAD (see `squad_scores`); with `null_threshold` also
    `has_answer_f1` and `no_answer_accuracy` where there are such questions. `eval_loss` is the mean over windows.

    Args:
        model: a name or path of any model with AutoModelForQuestionAnswering (its head is new if it has none) or of an
            adapter; or such a model as object.
        args: [`QuestionAnsweringConfig`].
        train_dataset, eval_dataset: "question", "context", "answers" ({"text": [...], "answer_start": [...]}).
        processing_class: a fast tokenizer, which knows where its tokens stand in a text.
        ptx_dataset: questions of an earlier task, which EWC and projection protect.
        peft_config, quantization_config, kwargs: as in the other trainers.

    Raises:
        ValueError: data, tokenizer or model would make the run wrong. It is raised before training.

    Reference: https://arxiv.org/abs/1810.04805, §4.2 and §4.3.
    """

    config_class = QuestionAnsweringConfig
    task_type = "QUESTION_ANS"
    card_objective = "Extractive QA: minimise $-\\frac12(\\log p_{start} + \\log p_{end})$, mean over windows."
    card_paper = ("Know What You Don't Know: Unanswerable Questions for SQuAD", "1806.03822")
    card_options = ("max_length", "doc_stride", "max_answer_length", "null_threshold")
    measured = {"exact_match": True, "f1": True}

    def tokenized(self, dataset: Dataset, where: str, **options) -> Dataset:
        options |= {"stride": self.args.doc_stride, "unanswerable": self.args.null_threshold is not None}
        return tokenize_questions(dataset, self._tokenizer, where=where, **options)

    def targets_of(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        offsets = torch.full((len(rows), width, 2), -1)
        for row, places in zip(rows, offsets):
            places[: len(row["input_ids"])] = torch.tensor(row["offsets"]).view(-1, 2)
        return {"offsets": offsets} | {name: torch.tensor([row[name] for row in rows]) for name in ("start", "end")}

    def task_loss(self, model, inputs):
        targets = ("start", "end", "offsets", "index")
        outputs = model(**{name: x for name, x in inputs.items() if name not in targets})
        of_context = inputs["offsets"][:, :, 0] >= 0
        allowed = of_context.clone()
        allowed[:, 0] = True
        start, end = (x.float().masked_fill(~allowed, -torch.inf) for x in (outputs.start_logits, outputs.end_logits))
        losses = sum(cross_entropy(x, inputs[name], reduction="none") for x, name in ((start, "start"), (end, "end")))
        if model.training:
            return losses / 2, losses
        return losses / 2, self._candidates(start, end, of_context, inputs["offsets"])

    def _candidates(self, start, end, of_context, offsets) -> torch.Tensor:
        """Return the score of no answer, and score and place (characters) of the best spans, [B, 1 + 3·n_best]."""
        options = {"n": self.args.n_best, "max_length": self.args.max_answer_length}
        scores, first, last = best_spans(start, end, of_context, **options)
        rows, last = torch.arange(len(start), device=start.device)[:, None], last.clamp(max=start.shape[1] - 1)
        places = torch.stack([scores.double(), offsets[rows, first, 0], offsets[rows, last, 1]], dim=2)
        return torch.cat([(start[:, :1] + end[:, :1]).double(), places.flatten(1)], dim=1)

    def measurements(self, predictions: np.ndarray, rows: Dataset) -> dict[str, Measurement]:
        windows = rows.select_columns(["row", "context", "answers"])
        self.predictions = join_windows(predictions, windows, self.args.n_best, self.args.null_threshold)
        scores = np.array([squad_scores(said["answer"], said["answers"]) for said in self.predictions])
        found = {"exact_match": Measurement(scores[:, 0]), "f1": Measurement(scores[:, 1])}
        if self.args.null_threshold is not None:
            has = np.array([bool(said["answers"]) for said in self.predictions])
            kinds = {"has_answer_f1": scores[has, 1], "no_answer_accuracy": scores[~has, 0]}
            found |= {name: Measurement(values) for name, values in kinds.items() if len(values)}
        return found


def join_windows(
    predictions: np.ndarray, windows: Dataset, n_best: int, null_threshold: float | None
) -> list[dict[str, object]]:
    """Return for each question its row, its answer, the right answers, and the best spans over all its windows.

    Args:
        predictions: [windows, 1 + 3·n], score of no answer and (score, start, end) of spans, as characters.
        windows: "row", "context" and "answers" of each.
        n_best: spans that are kept; one that stands in several windows is kept once, with its highest score.
        null_threshold: see [`QuestionAnsweringConfig`].

    Returns:
        dicts in the order of "row", with "row", "answer", "answers", "null_score" and "n_best": [{"text", "score"}].
    """
    joined = {}
    for (null, *spans), window in zip(predictions.tolist(), windows, strict=True):
        question = joined.setdefault(window["row"], {"window": window, "null": null, "spans": {}})
        question["null"] = min(question["null"], null)
        for score, start, end in zip(spans[::3], spans[1::3], spans[2::3], strict=True):
            place = int(start), int(end)
            if score > question["spans"].get(place, -np.inf):
                question["spans"][place] = score
    found = []
    for row, question in sorted(joined.items()):
        context, answers = (question["window"][name] for name in ("context", "answers"))
        best = sorted(question["spans"].items(), key=lambda item: -item[1])[:n_best]
        spans = [{"text": context[start:end].strip(), "score": score} for (start, end), score in best]
        no_answer = not spans or (null_threshold is not None and question["null"] - spans[0]["score"] > null_threshold)
        said = {"row": row, "answer": "" if no_answer else spans[0]["text"], "answers": answers}
        found.append(said | {"null_score": question["null"], "n_best": spans})
    return found
