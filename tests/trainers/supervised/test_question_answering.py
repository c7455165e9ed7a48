"""Question answering: the loss by hand, decoding against a search of every span of every window, no answers."""

import json

import pytest
import torch
from datasets import Dataset
from lifecycle_setting import SIZES
from peft import LoraConfig
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

from lifecycle_hf import (
    LifecycleConfig,
    LifecycleForQuestionAnswering,
    QuestionAnsweringConfig,
    QuestionAnsweringTrainer,
    merge_adapter,
)
from lifecycle_hf.evaluation.spans import squad_scores
from lifecycle_hf.models.loading import load_classifier

CONTEXT = "The capital of France is Paris. Please tell me a story about a small red fox. Two and three make five."
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
         "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_length": 24,
         "doc_stride": 6, "max_answer_length": 4, "n_best": 5}  # fmt: skip


def rows(*answers):
    asked = [f"question {i}" for i in range(len(answers))]
    found = [{"text": list(texts), "answer_start": [CONTEXT.index(text) for text in texts]} for texts in answers]
    return Dataset.from_dict({"question": asked, "context": [CONTEXT] * len(answers), "answers": found})


ANSWERED = rows(["Paris"], ["fox", "small red fox"], ["five"])
WITH_NONE = rows(["Paris"], [], ["five"])


def new_model(tokenizer, attention="bidirectional"):
    torch.manual_seed(0)
    model = LifecycleForQuestionAnswering(
        LifecycleConfig(**SIZES | {"vocab_size": len(tokenizer), "attention": attention})
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "qa_outputs.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make(tiny_llama, tmp_path, model=None, train=ANSWERED, evaluation=None, **options):
    given = {name: options.pop(name) for name in ("peft_config", "ptx_dataset") if name in options}
    given["processing_class"] = options.pop("processing_class", tiny_llama[1])
    args = QuestionAnsweringConfig(str(tmp_path / "out"), **QUIET | options)
    model = new_model(tiny_llama[1]) if model is None else model
    return QuestionAnsweringTrainer(model, args, train, evaluation, **given)


def logits_of(run, row):
    """Start and end logits of a window alone, and the places where an answer may stand."""
    given = {"prefix_lengths": torch.tensor([len(row["input_ids"])])} if run.takes_prefix else {}
    with torch.no_grad():
        out = run.model.eval()(input_ids=torch.tensor([row["input_ids"]]), **given)
    of_context = [row["offsets"][2 * i] >= 0 for i in range(len(row["input_ids"]))]
    return out.start_logits[0].double(), out.end_logits[0].double(), of_context


@pytest.mark.parametrize("attention", ["causal", "bidirectional", "prefix"])
def test_loss_is_half_of_both_nlls_over_context_and_first_token(tiny_llama, tmp_path, attention):
    run = make(tiny_llama, tmp_path, new_model(tiny_llama[1], attention))
    windows = list(run.train_dataset)
    assert any(row["start"] == 0 for row in windows) and any(row["start"] > 0 for row in windows)
    expected = []
    for row in windows:
        start, end, of_context = logits_of(run, row)
        places = [i for i, inside in enumerate(of_context) if inside or i == 0]
        nll = [x[places].logsumexp(0) - x[row[name]] for x, name in ((start, "start"), (end, "end"))]
        expected.append(sum(nll).item() / 2)
    losses, _ = run.task_loss(run.model.eval(), run.collate(windows))
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert run.compute_loss(run.model.train(), run.collate(windows)).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-4
    )


def brute_force(run, data):
    """{question: (score of no answer, {(first, last character): score}) over every span of every window}."""
    found = {}
    for row in run.prepared(data, "data"):
        start, end, of_context = logits_of(run, row)
        null, spans = found.setdefault(row["row"], [float("inf"), {}])
        found[row["row"]][0] = min(null, (start[0] + end[0]).item())
        for i in range(len(of_context)):
            for j in range(i, min(i + run.args.max_answer_length, len(of_context))):
                if of_context[i] and of_context[j]:
                    place = row["offsets"][2 * i], row["offsets"][2 * j + 1]
                    spans[place] = max(spans.get(place, -float("inf")), (start[i] + end[j]).item())
    return found


@pytest.mark.parametrize("threshold", [None, 0.0, -2.0, 1e9])
def test_decoding_equals_a_search_of_everything(tiny_llama, tmp_path, threshold):
    data = ANSWERED if threshold is None else WITH_NONE
    run = make(tiny_llama, tmp_path, train=data, evaluation=data, null_threshold=threshold)
    metrics = run.finalize()
    scores, said = [], []
    for row, (null, spans) in sorted(brute_force(run, data).items()):
        ranked = sorted(spans.items(), key=lambda item: -item[1])
        (low, high), best = ranked[0]
        none = threshold is not None and null - best > threshold
        said.append("" if none else CONTEXT[low:high].strip())
        scores.append(squad_scores(said[-1], data[row]["answers"]["text"]))
        kept = run.predictions[row]
        assert kept["null_score"] == pytest.approx(null, abs=1e-4)
        assert [one["text"] for one in kept["n_best"]] == [CONTEXT[a:b].strip() for (a, b), _ in ranked[:5]]
        assert [one["score"] for one in kept["n_best"]] == pytest.approx([x for _, x in ranked[:5]], abs=1e-4)
    assert [one["answer"] for one in run.predictions] == said
    assert metrics["eval_exact_match"] == pytest.approx(sum(em for em, _ in scores) / 3)
    assert metrics["eval_f1"] == pytest.approx(sum(f1 for _, f1 in scores) / 3)
    if threshold is not None:
        assert metrics["eval_no_answer_accuracy"] == float(said[1] == "")
        assert metrics["eval_has_answer_f1"] == pytest.approx((scores[0][1] + scores[2][1]) / 2)
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == said and len(metrics["eval_f1_interval"]) == 2


def test_it_learns_where_answers_are(tiny_llama, tmp_path):
    run = make(tiny_llama, tmp_path, train=WITH_NONE, evaluation=WITH_NONE, null_threshold=0.0, max_steps=40,
               learning_rate=5e-3, per_device_train_batch_size=8, eval_on_start=True, eval_strategy="steps",
               eval_steps=40, logging_steps=40)  # fmt: skip
    run.train()
    assert run.evaluate()["eval_exact_match"] == 1
    assert [one["answer"] for one in run.predictions] == ["Paris", "", "five"]
    assert run.tax_report.to_json()["f1"]["after"] == 1


def test_bert_points_at_cls(tiny_llama, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "is", "red", "the", "fox"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    answers = [{"text": ["fox"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    data = {"question": ["who is red"] * 2, "context": ["the fox is red", "the fox"], "answers": answers}
    data = Dataset.from_dict(data)
    run = make(tiny_llama, tmp_path, BertForQuestionAnswering(config), data, data, processing_class=tokenizer,
               null_threshold=0.0, doc_stride=2)  # fmt: skip
    batch = run.collate(list(run.train_dataset))
    assert batch["input_ids"][0].tolist() == [2, 4, 5, 6, 3, 7, 8, 5, 6, 3]
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 5
    assert (batch["start"].tolist(), batch["end"].tolist()) == ([6, 0], [6, 0])
    run.train()
    assert 0 <= run.evaluate()["eval_f1"] <= 1


def test_an_adapter_trains_with_its_head_and_merges(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear")
    run = make(tiny_llama, tmp_path, str(tmp_path / "base"), peft_config=lora)
    weights = run.model.get_base_model().state_dict()  # whose backbone has another name than in the checkpoint
    assert torch.equal(weights["transformer.norm.weight"], make_model().model.norm.weight)
    embedded = make_model().model.embed_tokens.weight
    assert torch.equal(weights["transformer.embed_tokens.weight"], embedded)
    run.train()
    run.save_model(), run.create_model_card()
    given = {"input_ids": torch.tensor([run.train_dataset[0]["input_ids"]])}
    expected = run.model.eval()(**given).start_logits
    again = load_classifier(str(tmp_path / "out"), task="QUESTION_ANS").eval()
    torch.testing.assert_close(again(**given).start_logits, expected)
    merged = merge_adapter(str(tmp_path / "out"), tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**given).start_logits, expected, atol=1e-5, rtol=0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "AutoPeftModelForQuestionAnswering" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": WITH_NONE, "strict_data": True}, "question without an answer.*Set null_threshold"),
        ({"doc_stride": 24}, "doc_stride=24 must lie between 0 and max_length=24"),
        ({"n_best": 0}, "n_best=0 must be at least 1"),
        ({"ptx_ceiling": 1.0}, "ptx_ceiling=1.0 is a loss per token"),
        ({"train": Dataset.from_dict({"question": ["a"]})}, "lacks the column 'context'"),
    ],
)
def test_what_can_not_be(tiny_llama, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_llama, tmp_path, **options)
