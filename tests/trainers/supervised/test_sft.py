import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lifecycle_hf.models.loading import load_causal_lm, merge_adapter
from lifecycle_hf.trainers.base.callbacks import TaxMonitor
from lifecycle_hf.trainers.supervised.sft import SFTConfig, SFTTrainer

WORDS = ["Paris", "a small red fox", "seven is a prime number", "hello"]
ASK, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Paris"}
UNMARKED = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
ALL_MARKED = "{% generation %}" + UNMARKED + "{% endgeneration %}"
STOP_OUTSIDE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
)
NEVER_MARKED = UNMARKED + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"


@pytest.fixture
def base(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model(hidden_size=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def completions(number):
    """Ragged prompt-completion rows."""
    rows = [{"prompt": "word " * (i % 3 + 1), "completion": " ".join([WORDS[i % 4]] * (i + 1))} for i in range(number)]
    return Dataset.from_list(rows)


def chats(*conversations):
    return Dataset.from_list([{"messages": list(messages)} for messages in conversations])


def make_trainer(model, tmp_path, train, evaluation=None, **options):
    names = ("peft_config", "quantization_config", "processing_class", "callbacks")
    rest = {name: options.pop(name) for name in names if name in options}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    defaults = {"max_steps": 2, "gradient_checkpointing": False, "per_device_eval_batch_size": 2}
    return SFTTrainer(
        model, SFTConfig(str(tmp_path / "out"), **{**quiet, **defaults, **options}), train, evaluation, **rest
    )


def learnt(trainer, row=0):
    """Text of the tokens that count in the loss."""
    labels = [token for token in trainer.train_dataset[row]["labels"] if token != -100]
    return trainer.processing_class.decode(labels)


def test_loss_on_the_completion_by_default(base, tmp_path):
    trainer = make_trainer(base, tmp_path, Dataset.from_list([{"prompt": "Q:", "completion": "Paris"}]))
    assert learnt(trainer) == "Paris<eos>"
    whole = make_trainer(base, tmp_path, Dataset.from_list([{"text": "Q: Paris"}]))
    assert learnt(whole) == "Q: Paris<eos>"


def test_assistant_only_loss_holds_the_end_of_turn_token(base, tmp_path):
    """Two assistant turns of 'Paris<eos>': the mask leaves out the user's tokens and the role markers."""
    trainer = make_trainer(base, tmp_path, chats([ASK, ANSWER, ASK, ANSWER]), assistant_only_loss=True)
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert learnt(trainer) == "Paris<eos>Paris<eos>"
    answer = [*tokenizer("Paris")["input_ids"], tokenizer.eos_token_id]
    question = [tokenizer.convert_tokens_to_ids("<|user|>"), *tokenizer("What is it?")["input_ids"]]
    turn = [-100] * (len(question) + 1) + answer
    assert list(row["labels"]) == [-100, *turn, *turn]
    assert 0 < sum(label != -100 for label in row["labels"]) < len(row["labels"])


def test_assistant_only_loss_is_the_mean_over_the_assistant_tokens(base, tmp_path):
    trainer = make_trainer(base, tmp_path, chats([ASK, ANSWER]), chats([ASK, ANSWER]), assistant_only_loss=True)
    ids, labels = (torch.tensor([trainer.train_dataset[0][name]]) for name in ("input_ids", "labels"))
    model = load_causal_lm(base)
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    expected = -logp[labels[0, 1:] != -100].mean().item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert 0 <= metrics["eval_mean_token_accuracy"] <= 1 and metrics["eval_entropy"] <= math.log(384)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (UNMARKED, "no {% generation %} markers"),
        (ALL_MARKED, r"marks (\d+) of \1 tokens"),
        (NEVER_MARKED, "marks 0 of"),
        (STOP_OUTSIDE, "end-of-turn token outside"),
    ],
)
def test_templates_that_cannot_mark_the_assistant_are_errors(base, tmp_path, template, words):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words):
        make_trainer(base, tmp_path, chats([ASK, ANSWER]), assistant_only_loss=True, processing_class=tokenizer)


def test_known_template_without_markers_is_patched(base, tmp_path):
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = qwen3_chat_template
    model = load_causal_lm(base)
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_trainer(model, tmp_path, chats([ASK, ANSWER]), assistant_only_loss=True, processing_class=tokenizer)
    assert learnt(trainer).strip().endswith("Paris<|im_end|>")
    assert "What" not in learnt(trainer)


def test_held_out_loss_is_exact_over_tokens(base, tmp_path):
    """5 ragged rows in batches of 2, 2 and 1: Σ NLL / Σ tokens, not the mean of batch means."""
    trainer = make_trainer(base, tmp_path, completions(5), completions(5))
    model = load_causal_lm(base)
    total = count = 0
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total, count = total - logp[labels != -100].sum().item(), count + (labels != -100).sum().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_accumulation_equals_one_batch(base, tmp_path):
    """1 × 8 = 8 × 1 in loss, gradient norm and weights for ragged rows."""

    def trained(size, steps):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(base, tmp_path, completions(16), optim="sgd", learning_rate=0.1, **options)
        trainer.train()
        logged = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        return logged, {name: p.detach() for name, p in trainer.model.named_parameters()}

    logged, parameters = trained(8, 1)
    split_logged, split = trained(1, 8)
    for row, split_row in zip(logged, split_logged, strict=True):
        assert split_row == pytest.approx(row, abs=1e-4, rel=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(split[name], parameter, atol=1e-6, rtol=1e-4)


def test_lora_starts_at_the_base_and_merges_exactly(base, tmp_path):
    options = {"learning_rate": 1e-2, "max_steps": 5, "peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")}
    trainer = make_trainer(base, tmp_path, completions(8), **options)
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def logits(model):
        with torch.no_grad():
            return model.eval()(ids).logits

    start = logits(load_causal_lm(base))
    assert logits(trainer.model).equal(start)
    trainer.train()
    trained = logits(trainer.model)
    assert (trained - start).abs().max() > 1e-3
    trainer.save_model()
    assert (logits(load_causal_lm(str(tmp_path / "out"))) - trained).abs().max() < 1e-6
    merge_adapter(str(tmp_path / "out"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - trained).abs().max() < 1e-5


def test_training_goes_on_from_an_adapter_path(base, tmp_path):
    adapter = get_peft_model(load_causal_lm(base), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    trainer = make_trainer(str(tmp_path / "adapter"), tmp_path, completions(4), learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    trainer.train()
    assert all((p - before[n]).abs().max() > 0 for n, p in trainer.model.named_parameters() if n in before)


def test_qlora_runs_and_reloads(base, tmp_path):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": four_bit, "peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")}
    trainer = make_trainer(base, tmp_path, completions(4), completions(4), learning_rate=1e-2, **options)
    layers = [m for m in trainer.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    trainer.save_model()
    assert '"load_in_4bit": true' in (tmp_path / "out/lifecycle_adapter.json").read_text()
    again = make_trainer(str(tmp_path / "out"), tmp_path, completions(4), completions(4), quantization_config=four_bit)
    assert again.evaluate()["eval_loss"] == pytest.approx(after, abs=1e-3)


def test_unusable_rows_are_dropped_or_raise(base, tmp_path):
    rows = [*completions(2).to_list(), {"prompt": "a", "completion": " "}, *completions(1).to_list()]
    with pytest.warns(UserWarning, match=r"train_dataset: 1 of 4 rows .*empty completion.*the first is row 2"):
        assert len(make_trainer(base, tmp_path, Dataset.from_list(rows)).train_dataset) == 3
    with pytest.raises(ValueError, match="strict_data is on"):
        make_trainer(base, tmp_path, Dataset.from_list(rows), strict_data=True)
    silent = chats([ASK, ANSWER], [ASK, ASK])
    with pytest.warns(UserWarning, match="without an assistant turn"):
        make_trainer(base, tmp_path, silent, assistant_only_loss=True)


def test_rows_lost_to_truncation_are_told(base, tmp_path):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": " ", "completion": ""},
        {"prompt": "word " * 40, "completion": "b"},
    ]
    with pytest.warns(UserWarning) as caught:
        trainer = make_trainer(base, tmp_path, Dataset.from_list(rows), max_length=10)
    told = [str(w.message) for w in caught if "rows can't be used" in str(w.message)]
    assert "1 empty completion); the first is row 1" in told[0]
    assert "1 lost to max_length); the first is row 2" in told[1]
    assert len(trainer.train_dataset) == 1 and "_row" not in trainer.train_dataset.column_names
    with pytest.raises(ValueError, match="lost to max_length"):
        make_trainer(base, tmp_path, Dataset.from_list(rows[::2]), max_length=10, strict_data=True)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "train_dataset is missing"),
        ([{"promt": "a", "completion": "b"}], "misspelt 'prompt'"),
        ([{"prompt": "a"}], "is a prompt dataset"),
        ([{"text": ""}], "No row is left"),
    ],
)
def test_bad_data(base, tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(base, tmp_path, None if rows is None else Dataset.from_list(rows))
    with pytest.raises(ValueError, match="is empty"):
        make_trainer(base, tmp_path, completions(2).select([]))


def test_bad_tokenizers(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    cases = [
        ({"eos_token": None}, completions(2), "no EOS"),
        ({"chat_template": None}, chats([ASK, ANSWER]), "no chat template"),
        ({"pad_token": "<new>"}, completions(2), "not found in the vocabulary"),
    ]
    for change, dataset, words in cases:
        broken = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(broken, name, value)
        with pytest.raises(ValueError, match=words):
            make_trainer(base, tmp_path, dataset, processing_class=broken)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match="outside the vocabulary of 384 tokens"):
        make_trainer(base, tmp_path, completions(2), processing_class=tokenizer)


def test_prompt_and_completion_of_different_kinds(base, tmp_path):
    with pytest.raises(ValueError, match="different kinds"):
        make_trainer(base, tmp_path, Dataset.from_list([{"prompt": "a", "completion": [ANSWER]}]))
    rows = Dataset.from_list([{"prompt": None, "completion": "b"}, {"prompt": "a", "completion": "b"}])
    with pytest.warns(UserWarning, match="the first is row 0"):
        make_trainer(base, tmp_path, rows)


def test_chat_template_path(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    for path in (str(tmp_path / "chat.jinja"), base):
        tokenizer.chat_template = None
        options = {"processing_class": tokenizer, "chat_template_path": path, "assistant_only_loss": True}
        assert learnt(make_trainer(base, tmp_path, chats([ASK, ANSWER]), **options)) == "Paris<eos>"


def test_assistant_only_loss_of_plain_text(base, tmp_path):
    with pytest.raises(ValueError, match="needs chat messages"):
        make_trainer(base, tmp_path, completions(2), assistant_only_loss=True)


def test_packing_and_custom_columns(base, tmp_path):
    rows = Dataset.from_list([{"story": f"{word} " * 5} for word in WORDS])
    trainer = make_trainer(base, tmp_path, rows, dataset_text_field="story", packing=True, max_length=64)
    assert len(trainer.train_dataset) < 4
    trainer.train()


def test_card_tells_what_a_monitor_measured(base, tmp_path):
    monitor = TaxMonitor(lambda model, tokenizer: {"gold": 0.25}, None, {"gold": True})
    trainer = make_trainer(base, tmp_path, completions(8), completions(4), callbacks=[monitor])
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert trainer.tax_report.before == {"gold": 0.25} == trainer.tax_report.after
    assert trainer.tax_report.to_markdown() in (tmp_path / "out/README.md").read_text()


def test_card_tells_loss_before_and_after(base, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = make_trainer(base, tmp_path, completions(8), completions(4), **options)
    trainer.train()
    report = trainer.tax_report
    assert report.before["perplexity"] == pytest.approx(math.exp(report.before["loss"]))
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    assert "Supervised fine-tuning" in card and "perplexity" in card
