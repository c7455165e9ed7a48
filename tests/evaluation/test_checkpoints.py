"""Checkpoints measured by name: every kind of metric, on full models and adapters."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lifecycle_hf.evaluation import Evaluation, measure_tax
from lifecycle_hf.evaluation.metrics import perplexity
from lifecycle_hf.evaluation.report import NO_DIFFERENCE
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "alignment_tax.py"
TEXTS = ["The capital of France is Paris.", "Two and three make five.", "A story about a small red fox.", "Hello"]
QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": ["five", "seven", "a red fox"], "answer": answer}
    for a, b, answer in (("Two", "three", "five"), ("Two", "five", "seven"), ("One", "four", "five"))
]
REWARD = "def shortness(prompts, completions, **columns):\n    return [-float(len(text)) for text in completions]\n"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(tiny_llama, tmp_path, monkeypatch):
    """A base, a full fine-tune and an adapter of it, data and a reward, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_model, tokenizer = tiny_llama
    model = make_model(initializer_range=0.2)
    model.save_pretrained("base"), tokenizer.save_pretrained("base")
    adapter = get_peft_model(load_causal_lm("base"), LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    adapter.save_pretrained("adapter")
    with torch.no_grad():
        model.model.norm.weight *= 0.5
    model.save_pretrained("aligned"), tokenizer.save_pretrained("aligned")
    write_rows(tmp_path / "texts.jsonl", [{"words": text} for text in TEXTS])
    write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    write_rows(tmp_path / "sums.jsonl", [{"question": "2 + 2 =", "answer": "It is #### 4"}] * 2)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text[:9]} for text in TEXTS])
    (tmp_path / "tiny_rewards.py").write_text(REWARD)
    return tmp_path


CAPABILITY = ["perplexity:texts.jsonl:words", "multiple_choice:questions.jsonl", "exact_match:sums.jsonl"]
ALIGNMENT = {"alignment": ["tiny_rewards:shortness", "diversity", "drift"], "prompts": "prompts.jsonl"}


def test_a_full_model_and_an_adapter_against_their_base(world):
    evaluation = Evaluation(CAPABILITY, **ALIGNMENT, max_new_tokens=8)
    reports = measure_tax(evaluation, "base", ["aligned", str(world / "adapter")], "tax")
    assert list(reports) == ["aligned", "adapter"]
    rows = {row["metric"]: row for row in reports["adapter"].rows()}
    tokenizer = load_tokenizer("base")
    for name, end in (("base", "before"), ("adapter", "after")):
        assert rows["perplexity texts"][end] == pytest.approx(
            perplexity(load_causal_lm(name), tokenizer, TEXTS), rel=1e-6
        )
    assert rows["KL (nats per sequence)"]["before"] == 0 < rows["KL (nats per sequence)"]["after"]
    assert {name for name, row in rows.items() if "interval" not in row} == {"distinct-1", "distinct-2"}
    assert rows["exact match sums"]["interval"] == [0, 0] and rows["exact match sums"]["verdict"] == NO_DIFFERENCE
    written = json.loads(Path("tax/report.json").read_text())
    assert written["models"]["adapter"] == reports["adapter"].to_json()
    assert written["pareto"]["axes"] == {"alignment": "shortness", "capability": "−perplexity texts"}
    assert reports["aligned"].to_markdown() in Path("tax/report.md").read_text()
    reliability = {f"reliability_{name}_questions.png" for name in ("base", "aligned", "adapter")}
    assert {path.name for path in Path("tax").glob("*.png")} == {"pareto.png", *reliability}


def test_metrics_of_the_same_short_name_stay_apart(world):
    (world / "other").mkdir()
    write_rows(world / "other" / "texts.jsonl", [{"words": "Hello", "more": "Two and three"}])
    specs = ["perplexity:texts.jsonl:words", "perplexity:other/texts.jsonl:words", "perplexity:other/texts.jsonl:more"]
    evaluation = Evaluation(specs)
    values = evaluation.measure(*evaluation.load("base")).values
    assert list(values) == [spec.replace(":", " ", 1) for spec in specs] and len(set(values.values())) == 3


def test_diversity_is_no_capability_that_a_front_is_drawn_of(world):
    measure_tax(Evaluation([], **ALIGNMENT, max_new_tokens=8), "base", ["aligned", "adapter"], "tax")
    assert json.loads(Path("tax/report.json").read_text())["pareto"] is None


def test_numbers_with_commas_and_words_match(world):
    """1,200 and 1200 are the same, a comma between clauses is none of the number's, and words are compared as such."""
    answers = ["so 1,200", "it is 1200, or so", "3, no: 5", "Paris", "10-3"]
    references = ["1200", "#### 1,200", "5", "Paris", "3"]
    write_rows(world / "mixed.jsonl", [{"question": "?", "answer": reference} for reference in references])

    class Answers(Evaluation):
        def _sample(self, *args, **options):
            return answers, None

    evaluation = Answers(["exact_match:mixed.jsonl"])
    value = evaluation.measure(*evaluation.load("base")).values["exact match mixed"]
    assert value.columns[:, 0].tolist() == [1, 1, 1, 1, 1]


def test_a_model_against_itself_has_no_tax(world):
    (report,) = measure_tax(Evaluation(CAPABILITY, **ALIGNMENT, max_new_tokens=8), "base", ["./base/"], "tax").values()
    assert all(row["tax"] == 0 for row in report.rows())


def test_the_recipe(world, capsys):
    spec = importlib.util.spec_from_file_location("alignment_tax_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(recipe.parse(["base", "aligned", "--capability", "multiple_choice:questions.jsonl", "--rows", "4"]))
    printed = capsys.readouterr().out
    assert "Alignment tax of aligned" in printed and "ECE questions ↓" in printed and "verdict" in printed
    assert Path("output/alignment_tax/report.md").exists()
    recipe.main(recipe.parse(["base", "adapter", "--interpolate", "0", "1", "--capability", CAPABILITY[0]]))
    found = json.loads(Path("output/alignment_tax/report.json").read_text())["models"]
    taxes = {label: values["perplexity texts"]["tax"] for label, values in found.items()}
    assert taxes["adapter_alpha_0"] == 0 != taxes["adapter"] == taxes["adapter_alpha_1"]
    for options, words in (([], "recipes/ppo.py"), (["base", "aligned"], "nothing to measure")):
        with pytest.raises(SystemExit):
            recipe.parse(options)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capability": ["perplexty:texts.jsonl"]}, "'perplexty:texts.jsonl' is neither"),
        ({"capability": ["perplexity:"]}, "is neither"),
        ({"capability": ["perplexity:texts.jsonl"]}, r"no column 'text'; it has \['words'\]"),
        ({"capability": ["exact_match:texts.jsonl:words"]}, r"no column 'question'; it has \['words'\]"),
        ({"capability": ["multiple_choice:unasked.jsonl"]}, "the answer of row 1, 'six', is none of its choices"),
        ({"capability": ["lm_eval:arc", "lm_eval:arc"]}, "'lm_eval:arc' is asked for twice"),
        ({"capability": [], "alignment": ["diversity"]}, "need prompts"),
    ],
)
def test_what_cannot_be_measured(world, options, words):
    write_rows(world / "unasked.jsonl", [QUESTIONS[0], QUESTIONS[1] | {"answer": "six"}])
    with pytest.raises(ValueError, match=words):
        measure_tax(Evaluation(**options), "base", ["aligned"], "tax")


def test_twice_the_same_name_is_refused(world):
    with pytest.raises(ValueError, match="named twice"):
        measure_tax(Evaluation(["perplexity:texts.jsonl:words"]), "base", ["aligned", "aligned"], "tax")
