"""Measure checkpoints of any kind: capability and alignment metrics by name, and the tax between two of them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import Samples, find_reward
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.scorer import RewardScorer, reward_scorer
from lifecycle_hf.data.loading import first_rows, load_test
from lifecycle_hf.data.schemas import to_prompts
from lifecycle_hf.data.tokenize import encode_prompt
from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval
from lifecycle_hf.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from lifecycle_hf.evaluation.diversity import distinct_n, self_bleu, token_entropy
from lifecycle_hf.evaluation.harness import lm_eval_tasks
from lifecycle_hf.evaluation.metrics import exact_match, kl_to_reference, multiple_choice, perplexity
from lifecycle_hf.evaluation.pareto import hypervolume, pareto_front
from lifecycle_hf.evaluation.pictures import plot_pareto, plot_reliability
from lifecycle_hf.evaluation.report import TaxReport, write_report
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

NUMBER = r"(?<!\d)-?\d+(?:\.\d+)?"
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@dataclass
class Result:
    """Values by name, whether more of each is better, (confidence, correct) of each set of questions, and the names by
    side: what alignment is for, what capability pays for it."""

    values: dict[str, float] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    confidences: dict[str, tuple] = field(default_factory=dict)
    sides: dict[str, list[str]] = field(default_factory=lambda: {"alignment": [], "capability": []})

    def add(self, name: str, value: float, higher: bool, side: str | None = "capability") -> None:
        """Add a metric; `side` is None for one that is neither alignment nor capability."""
        self.values[name], self.higher_is_better[name] = value, higher
        if side:
            self.sides[side].append(name)


@dataclass(frozen=True)
class World:
    """Describe a world whose truth is known, in which a checkpoint is measured by one name.

    Attributes:
        measure: `f(model, tokenizer, *, n, seed) -> {metric: value}`.
        questions: returns multiple-choice rows (question, choices, answer).
        higher_is_better: {metric: whether more is better}, the capability that a Pareto front is drawn of first.
        alignment: the metrics that alignment is for; the others are capability.
    """

    measure: Callable[..., dict[str, float]]
    questions: Callable[[], Dataset]
    higher_is_better: dict[str, bool]
    alignment: tuple[str, ...]


WORLDS: dict[str, World] = {}
"""Worlds by name. `lifecycle_hf.toyworld` adds itself here when it is imported."""


@dataclass
class Evaluation:
    """Measure checkpoints by the same metrics on the same items.

    Args:
        capability: each KIND:DATA[:COLUMN], with data as `load_test` finds it, that no model has trained on:
            `perplexity:DATA[:COLUMN]` (column text), `multiple_choice:DATA` (columns question, choices, answer: an
            index or one of the choices), `exact_match:DATA[:COLUMN]` (columns question and answer; the last number of
            either is compared where the reference has one), `lm_eval:TASK` (a name or YAML file), or the name
            of a world, `toyworld`.
        alignment: reward models and MODULE:FUNCTION rewards of sampled completions, `diversity`, and `drift`.
        prompts: data whose prompts are answered for `alignment`.
        rows: the first rows of each data set, and documents of each lm_eval task.
        max_new_tokens, temperature, seed: of sampling; answers of exact_match are decoded greedily.

    Raises:
        ValueError: a kind that is not known, a metric named twice, or alignment metrics without prompts.
    """

    capability: Sequence[str]
    alignment: Sequence[str] = ()
    prompts: str | None = None
    rows: int = 128
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 8
    dtype: str | None = None

    def __post_init__(self):
        kinds = ("perplexity", "multiple_choice", "exact_match", "lm_eval")
        for spec in self.capability:
            kind, _, data = spec.partition(":")
            if spec not in WORLDS and (kind not in kinds or not data):
                known = " ".join(WORLDS) or "a world (import lifecycle_hf.toyworld first)"
                raise ValueError(f"capability: {spec!r} is neither {known} nor KIND:DATA, KIND one of {kinds}.")
        for side in (self.capability, self.alignment):
            twice = next((spec for spec in side if list(side).count(spec) > 1), None)
            if twice:
                raise ValueError(f"{twice!r} is asked for twice: name each metric once.")
        if self.alignment and not self.prompts:
            raise ValueError("alignment: its metrics need prompts to answer (--prompts DATA).")

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a checkpoint of any kind, on the accelerator where there is one."""
        kwargs = {"dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)} if self.dtype else {}
        return load_causal_lm(name, init_kwargs=kwargs).to(_device()).eval(), load_tokenizer(name)

    def measure(self, model, tokenizer, reference: PreTrainedModel | None = None) -> Result:
        """Return all metrics of a model; `drift` only against a `reference` that shares the tokenizer."""
        result = Result()
        for spec in self.capability:
            metric = self._world if spec in WORLDS else getattr(self, f"_{spec.partition(':')[0]}")
            metric(result, model, tokenizer, spec)
        if self.alignment:
            self._alignment(result, model, tokenizer, reference)
        return result

    def _world(self, result, model, tokenizer, spec):
        world = WORLDS[spec]
        measured = world.measure(model, tokenizer, n=self.rows, seed=self.seed)
        for name, higher in world.higher_is_better.items():
            result.add(name, measured[name], higher, "alignment" if name in world.alignment else "capability")
        self._choices(result, model, tokenizer, "facts and sums", world.questions())

    def _perplexity(self, result, model, tokenizer, spec):
        column, rows = self._rows(spec, "text", "ptx")
        value = perplexity(model, tokenizer, list(rows[column]), batch_size=self.batch_size)
        result.add(f"perplexity {self._titles[spec]}", value, False)

    def _multiple_choice(self, result, model, tokenizer, spec):
        _, rows = self._rows(spec, "question", "sft", "choices", "answer")
        for i, (answer, choices) in enumerate(zip(rows["answer"], rows["choices"])):
            if not (isinstance(answer, int) or answer in choices):
                raise ValueError(f"{spec}: the answer of row {i}, {answer!r}, is none of its choices, {choices}.")
        self._choices(result, model, tokenizer, self._titles[spec], rows)

    def _choices(self, result, model, tokenizer, name, rows):
        labels = [a if isinstance(a, int) else c.index(a) for a, c in zip(rows["answer"], rows["choices"])]
        questions = list(rows["question"]), list(rows["choices"]), labels
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        answered = multiple_choice(model, tokenizer, *questions, batch_size=self.batch_size, max_length=longest)
        p = answered.probabilities
        confidence, correct = p.max(1), p.argmax(1) == answered.labels
        result.add(f"accuracy {name}", answered.acc, True)
        result.add(f"normalised accuracy {name}", answered.acc_norm, True)
        result.add(f"ECE {name}", expected_calibration_error(confidence, correct), False)
        result.add(f"Brier score {name}", brier_score(p, answered.labels), False)
        result.add(f"NLL of the answer {name}", negative_log_likelihood(p, answered.labels), False)
        result.confidences[name] = confidence, correct

    def _exact_match(self, result, model, tokenizer, spec):
        column, rows = self._rows(spec, "answer", "sft", "question")
        ids = [encode_prompt(tokenizer, question) for question in rows["question"]]
        answers, _ = self._sample(model, tokenizer, ids, temperature=0.0)
        texts = ([THOUSANDS.sub("", text) for text in side] for side in (answers, rows[column]))
        result.add(f"exact match {self._titles[spec]}", exact_match(*texts, pattern=NUMBER), True)

    def _lm_eval(self, result, model, tokenizer, spec):
        task = spec.partition(":")[2]
        values, higher = lm_eval_tasks(model, tokenizer, [task], limit=self.rows, batch_size=self.batch_size)
        for name, value in values.items():
            result.add(name, value, higher[name])

    def _rows(self, spec, column, stage, *needed) -> tuple[str, Dataset]:
        """(column, rows) of KIND:DATA[:COLUMN]; `needed` columns are there, too."""
        _, data, *named = spec.split(":", 2)
        column = named[0] if named else column
        rows = first_rows(load_test(data, stage), self.rows)
        for name in (column, *needed):
            if name not in rows.column_names:
                raise ValueError(f"capability: {data} has no column {name!r}; it has {rows.column_names}.")
        return column, rows

    @cached_property
    def _titles(self) -> dict[str, str]:
        """{spec: its name}: the last part of its data's name, or the whole name where two specs share that."""
        parts = {spec: spec.partition(":")[::2] for spec in self.capability}
        short = {spec: (kind, Path(data.partition(":")[0]).name.split(".")[0]) for spec, (kind, data) in parts.items()}
        parts |= {spec: ("", spec) for spec in self.alignment}
        short |= {spec: ("", re.split("[:/]", spec.rstrip("/"))[-1]) for spec in self.alignment}
        names = list(short.values())
        return {spec: name[1] if names.count(name) == 1 else parts[spec][1] for spec, name in short.items()}

    def _sample(self, model, tokenizer, ids, temperature) -> tuple[list[str], list[list[int]]]:
        completions = generate(
            model,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            stop_token_ids=stop_token_ids(model, tokenizer),
            pad_token_id=0,
            generator_seed=self.seed,
            batch_size=self.batch_size,
        )
        return tokenizer.batch_decode(completions, skip_special_tokens=True), completions

    @cached_property
    def _data(self) -> Dataset:
        return to_prompts(first_rows(load_test(self.prompts, "ppo"), self.rows), "prompts")

    @cached_property
    def _rewards(self) -> tuple[list[str], RewardScorer | None]:
        """The titles of the alignment metrics that are rewards, and what scores samples by all of them."""
        specs = [spec for spec in self.alignment if spec not in ("diversity", "drift")]
        scorer = reward_scorer([find_reward(spec) for spec in specs], None, _device())[0] if specs else None
        return [self._titles[spec] for spec in specs], scorer

    def _alignment(self, result, model, tokenizer, reference):
        data, size = self._data, {"batch_size": self.batch_size}
        ids = [encode_prompt(tokenizer, prompt) for prompt in data["prompt"]]
        texts, completions = self._sample(model, tokenizer, ids, self.temperature)
        columns = {name: list(data[name]) for name in data.column_names if name != "prompt"}
        samples = Samples(list(data["prompt"]), texts, columns)
        names, scorer = self._rewards
        scores = scorer(samples, self.batch_size) if scorer else {}
        for name, values in zip(names, scores.values(), strict=True):
            result.add(name, Measurement(values.tolist()), True, "alignment")
        if "diversity" in self.alignment:
            result.add("token entropy (nats)", token_entropy(model, ids, completions, **size), True, None)
            for n in (1, 2):
                result.add(f"distinct-{n}", distinct_n(texts, n), True, None)
            result.add("self-BLEU", self_bleu(texts), False, None)
        if "drift" in self.alignment and reference is not None:
            for name, value in kl_to_reference(model, reference, ids, completions, **size).items():
                result.add("KL per token (nats)" if "token" in name else "KL (nats per sequence)", value, False, None)


def _device() -> torch.device | str:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"


def measure_tax(
    evaluation: Evaluation, base: str, aligned: Sequence[str], output_dir: str | Path
) -> dict[str, TaxReport]:
    """Measure checkpoints against the one they came from, and write report.md, report.json and pictures.

    Pictures: a reliability diagram per model and set of questions; with two aligned models or more the Pareto front of
    the first alignment and the first capability metric, lower-is-better ones with their sign turned.

    Args:
        base, aligned: local or Hub names of full checkpoints or PEFT adapters.

    Returns:
        {label of an aligned model: its report}.

    Raises:
        ValueError: as `Evaluation`, or `drift` between models of different vocabularies.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    labels = _labels([base, *aligned])
    model, tokenizer = evaluation.load(base)
    reference = model if "drift" in evaluation.alignment else None
    results = {labels[0]: evaluation.measure(model, tokenizer, reference)}
    del model
    for label, name in zip(labels[1:], aligned):
        model, own = evaluation.load(name)
        if reference is not None and own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"drift: {name} and {base} have different vocabularies, so no KL between them.")
        results[label] = evaluation.measure(model, own, reference)
        del model
    first = results[labels[0]]
    reports = {label: TaxReport(first.values, results[label].values, first.higher_is_better) for label in labels[1:]}
    for label, result in results.items():
        for name, judged in result.confidences.items():
            file = f"reliability_{label}_{name}.png".replace(" ", "_").replace("/", "_")
            plot_reliability(*judged, folder / file, title=f"{label}, {name}")
    pareto = _pareto(results, folder / "pareto.png") if len(aligned) > 1 else None
    models = {label: report.to_json() for label, report in reports.items()}
    write_report({"base": base, "models": models, "pareto": pareto}, folder)
    parts = [f"# Alignment tax against {labels[0]}"]
    parts += [f"## {label}\n\n{report.to_markdown()}" for label, report in reports.items()]
    if pareto:
        front, worst = ", ".join(pareto["front"]), ", ".join(f"{value:.4g}" for value in pareto["reference"])
        parts.append(
            f"## Pareto front\n\n![Pareto front](pareto.png)\n\nOf {' and '.join(pareto['axes'].values())}: {front}. "
            f"Hypervolume {pareto['hypervolume']:.4g} against the worst of all in each, ({worst})."
        )
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    return reports


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, or as many parts as make it different from the others."""
    parts = [name.rstrip("/").split("/") for name in names]
    for size in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-size:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"aligned: a checkpoint is named twice in {list(names)}.")


def _pareto(results: dict[str, Result], path: Path) -> dict | None:
    """Draw and describe the front; None where a side has no metric."""
    first = next(iter(results.values()))
    if not all(first.sides.values()):
        return None
    names = {side: metrics[0] for side, metrics in first.sides.items()}
    signs = {side: 1 if first.higher_is_better[name] else -1 for side, name in names.items()}
    rows = [{"label": label} for label in results]
    for row, result in zip(rows, results.values()):
        for side, name in names.items():
            value = result.values[name]
            row[side] = signs[side] * value
            if isinstance(value, Measurement) and len(value.columns) > 1:
                row[f"{side}_interval"] = sorted(signs[side] * end for end in bootstrap_interval(value))
    titles = {side: f"{'−' * (signs[side] < 0)}{name}" for side, name in names.items()}
    plot_pareto(rows, path, **titles)
    points = [(row["alignment"], row["capability"]) for row in rows]
    worst = [min(values) for values in zip(*points)]
    return {
        "axes": titles,
        "rows": rows,
        "front": [rows[i]["label"] for i in pareto_front(points)],
        "hypervolume": hypervolume(points, worst),
        "reference": worst,
    }
