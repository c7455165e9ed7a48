import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from lifecycle_hf.data.collators import pad_sequences
from lifecycle_hf.evaluation.calibration import expected_calibration_error
from lifecycle_hf.models.heads import RewardModel
from lifecycle_hf.models.loading import load_reward_model, merge_adapter
from lifecycle_hf.trainers.supervised.reward import RewardConfig, RewardTrainer

GOOD, BAD = ["Of course! Here is the answer.", "The capital is Paris.", "hello"], ["no", "I am sorry, no.", "bye bye"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def pairs(number, chat=True, **columns):
    rows = []
    for i in range(number):
        question, good, bad = f"question {i}", f"{GOOD[i % 3]} {i}", f"{BAD[i % 3]} {i} " * (1 + i % 2)
        ask = [{"role": "user", "content": question}] if chat else f"{question}: "
        said = [[{"role": "assistant", "content": text}] if chat else text for text in (good, bad)]
        rows.append({"prompt": ask, "chosen": said[0], "rejected": said[1]} | {k: v[i] for k, v in columns.items()})
    return Dataset.from_list(rows)


@pytest.fixture
def base(tiny_llama, tmp_path):
    """Path of a causal LM whose pad token is its EOS token, as in SmolLM2."""
    make_model, tokenizer = tiny_llama
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    make_model(pad_token_id=tokenizer.eos_token_id, hidden_size=64).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def make_trainer(model, tmp_path, train=None, evaluation=None, **options):
    trainer_options = {k: options.pop(k) for k in list(options) if k in ("peft_config", "quantization_config")}
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
    }
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2}
    args = RewardConfig(str(tmp_path / "out"), **{**defaults, **quiet, "gradient_checkpointing": False, **options})
    train = pairs(16) if train is None else train
    evaluation = pairs(7) if evaluation is None else evaluation
    return RewardTrainer(model, args, train, evaluation, **trainer_options)


def token_rows(trainer):
    """Chosen, then rejected sequences of the held-out pairs."""
    return list(trainer.eval_dataset["chosen_ids"]) + list(trainer.eval_dataset["rejected_ids"])


def by_ours(reward, rows):
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        return reward.score(pad_sequences(rows, reward.tokenizer.pad_token_id), lengths)


def by_transformers(model, rows, pad, side="right"):
    mask = pad_sequences([[1] * len(row) for row in rows], 0, side=side)
    with torch.no_grad():
        return model.eval()(pad_sequences(rows, pad, side=side), attention_mask=mask).logits[:, 0].float()


def test_bf16_is_off_without_an_accelerator():
    assert RewardConfig("x", use_cpu=True).bf16 is False
    assert RewardConfig("x", use_cpu=True, bf16=True).bf16 is True


@pytest.mark.parametrize("chat", [True, False])
def test_trainer_loader_and_transformers_give_the_same_scores(base, tmp_path, chat):
    trainer = make_trainer(base, tmp_path, pairs(16, chat), pairs(7, chat))
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    eos, rows = tokenizer.eos_token_id, token_rows(trainer)
    assert all(row[-1] == eos for row in rows), "the last real token is the EOS"
    assert tokenizer.pad_token_id != eos
    stock = AutoModelForSequenceClassification.from_pretrained(out)
    assert stock.config.num_labels == 1 and stock.config.pad_token_id == tokenizer.pad_token_id
    raw = by_transformers(stock, rows, tokenizer.pad_token_id)
    torch.testing.assert_close(by_transformers(stock, rows, tokenizer.pad_token_id, "left"), raw, atol=1e-5, rtol=1e-5)
    evaluated = torch.cat(trainer._held_out)[:, :2].T.reshape(-1).float()
    torch.testing.assert_close(evaluated, raw, atol=1e-5, rtol=1e-5)
    reward = load_reward_model(str(out))
    centred = by_ours(reward, rows)
    torch.testing.assert_close(centred + reward.config.reward_center, raw, atol=1e-5, rtol=1e-5)
    assert abs(centred.mean().item()) < 1e-5
    assert abs(raw.mean().item()) > 1e-3, "the centre is not trivial"


def test_held_out_metrics_are_exact(base, tmp_path):
    """7 pairs in batches of 3, 3 and 1: compute every metric a second time, from the scores alone."""
    trainer = make_trainer(base, tmp_path)
    metrics = trainer.evaluate()
    scores = by_ours(RewardModel(trainer.model, trainer.processing_class), token_rows(trainer)).double()
    chosen, rejected = (scores + trainer.model.config.reward_center).chunk(2)
    difference = chosen - rejected
    expected = {
        "eval_loss": sum(math.log(1 + math.exp(-d)) for d in difference.tolist()) / 7,
        "eval_accuracy": sum(d > 0 for d in difference.tolist()) / 7,
        "eval_margin": difference.mean().item(),
        "eval_mean_reward": (chosen + rejected).mean().item() / 2,
        "eval_reward_center": (chosen + rejected).mean().item() / 2,
        "eval_ece": expected_calibration_error(torch.sigmoid(difference.abs()), difference > 0),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_training_learns_and_logs(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=20, eval_strategy="steps", eval_steps=10, eval_on_start=True)
    trainer.train()
    metrics = trainer.finalize()
    assert metrics["eval_accuracy"] == 1.0
    logged = [entry for entry in trainer.state.log_history if "accuracy" in entry]
    assert all({"accuracy", "margin", "mean_reward", "loss"} <= entry.keys() for entry in logged)
    assert all(entry["accuracy"] * 8 == round(entry["accuracy"] * 8) for entry in logged), "a share of 2 × 4 pairs"
    report = trainer.tax_report
    assert report.after["accuracy"] == 1.0 and report.before["loss"] == pytest.approx(math.log(2), abs=0.2)
    summary = json.loads((tmp_path / "out/calibration.json").read_text())
    assert summary["pairs"] == 7 and summary["accuracy"] == 1.0
    assert (tmp_path / "out/calibration.png").stat().st_size > 1000


def test_loss_of_a_step_and_margins(base, tmp_path):
    """Loss by hand from the scores: mean of −log σ(r_w − r_l − m)."""
    margins = [0.5, 0.0, 2.0, 1.0]
    trainer = make_trainer(base, tmp_path, pairs(4, margin=margins), max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    reward = RewardModel(trainer.model, trainer.processing_class)
    rows = list(trainer.train_dataset["chosen_ids"]) + list(trainer.train_dataset["rejected_ids"])
    chosen, rejected = by_ours(reward, rows).chunk(2)
    logits = (chosen - rejected - torch.tensor(margins)).tolist()
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in logits) / 4, abs=1e-5)
    without = make_trainer(base, tmp_path, pairs(4), max_steps=1)
    assert "margin" not in without.train_dataset.column_names


def test_accumulation_equals_one_batch(base, tmp_path):
    def trained(size, steps):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = make_trainer(base, tmp_path, optim="sgd", max_grad_norm=0.0, learning_rate=0.1, **options)
        trainer.train()
        norms = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return norms, {name: p.detach() for name, p in trainer.model.named_parameters()}

    losses, parameters = trained(8, 1)
    split_losses, split = trained(1, 8)
    assert split_losses == pytest.approx(losses, abs=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(split[name], parameter, atol=1e-6, rtol=1e-4)


def test_lora_checkpoint_reloads_and_merges(base, tmp_path):
    trainer = make_trainer(base, tmp_path, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer.train()
    trainer.save_model()
    out, rows = str(tmp_path / "out"), token_rows(trainer)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    reward = load_reward_model(out)
    centred = by_ours(reward, rows)
    assert abs(centred.mean().item()) < 1e-5
    evaluated = torch.cat(trainer._held_out)[:, :2].T.reshape(-1).float()
    torch.testing.assert_close(centred + reward.config.reward_center, evaluated, atol=1e-5, rtol=1e-5)
    pad = reward.tokenizer.pad_token_id
    stock = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1, pad_token_id=pad)
    torch.testing.assert_close(by_transformers(stock, rows, pad), evaluated, atol=1e-5, rtol=1e-5)
    merge_adapter(out, tmp_path / "merged")
    torch.testing.assert_close(
        by_ours(load_reward_model(str(tmp_path / "merged")), rows), centred, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="no trained reward head"):
        load_reward_model(base)


@pytest.mark.parametrize("bf16", [False, True])
def test_qlora_trains_the_score_head_and_reloads(base, tmp_path, bf16):
    options = {"quantization_config": BitsAndBytesConfig(**NF4), "peft_config": LoraConfig(r=4), "bf16": bf16}
    trainer = make_trainer(base, tmp_path, **options)
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    head = next(name for name in parameters if "score" in name)
    before = parameters[head].detach().clone()
    trainer.train()
    assert (parameters[head] - before).abs().min() > 1e-4
    trainer.save_model()
    reward = load_reward_model(str(tmp_path / "out"), quantization_config=BitsAndBytesConfig(**NF4))
    evaluated = torch.cat(trainer._held_out)[:, :2].T.reshape(-1).float()
    raw = by_ours(reward, token_rows(trainer)) + reward.config.reward_center
    torch.testing.assert_close(raw, evaluated, atol=0.05 if bf16 else 1e-5, rtol=0.05 if bf16 else 1e-5)


def test_adapter_on_a_bf16_base_trains_in_fp32(base, tmp_path):
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True, "peft_config": LoraConfig(r=4)}
    trainer = make_trainer(base, tmp_path, **options)
    assert trainer.model.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert trainer.finalize()["eval_accuracy"] > 0.5


def test_all_linear_lora_leaves_the_score_head_whole(base, tmp_path):
    trainer = make_trainer(base, tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    heads = [name for name, p in trainer.model.named_parameters() if "score" in name and p.requires_grad]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]


def test_unusable_rows_are_dropped_or_raise(base, tmp_path):
    rows = [*pairs(4).to_list(), *pairs(1).to_list()]
    rows[1]["rejected"] = rows[1]["chosen"]
    with pytest.warns(UserWarning, match=r"train_dataset: 1 of 5 rows .*identical.*the first is row 1"):
        assert len(make_trainer(base, tmp_path, Dataset.from_list(rows)).train_dataset) == 4
    with pytest.raises(ValueError, match="strict_data is on"):
        make_trainer(base, tmp_path, Dataset.from_list(rows), strict_data=True)
    with pytest.raises(ValueError, match="No row is left"):
        make_trainer(base, tmp_path, max_length=3)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "train_dataset is missing"),
        ([{"chosen": "a", "rejcted": "b"}], "misspelt 'rejected'"),
        ({"train": []}, "one split"),
    ],
)
def test_bad_data(base, tmp_path, rows, words):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    with pytest.raises(ValueError, match=words):
        RewardTrainer(base, RewardConfig(str(tmp_path)), dataset)


def test_bad_tokenizers(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for change, words in [
        ({"eos_token": None, "pad_token": None}, "no EOS"),
        ({"chat_template": None}, "no chat template"),
    ]:
        broken = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(broken, name, value)
        with pytest.raises(ValueError, match=words):
            RewardTrainer(base, RewardConfig(str(tmp_path)), pairs(4), processing_class=broken)
    with pytest.raises(ValueError, match="<nothing>"):
        RewardTrainer(base, RewardConfig(str(tmp_path), eos_token="<nothing>"), pairs(4))


def test_chat_template_path(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    expected = list(make_trainer(base, tmp_path).train_dataset["chosen_ids"])
    for path in (str(tmp_path / "chat.jinja"), base):
        tokenizer.chat_template = None
        args = RewardConfig(str(tmp_path / "out"), chat_template_path=path, use_cpu=True)
        trainer = RewardTrainer(base, args, pairs(16), processing_class=tokenizer)
        assert list(trainer.train_dataset["chosen_ids"]) == expected


def test_evaluate_takes_raw_and_named_datasets(base, tmp_path):
    trainer = make_trainer(base, tmp_path, evaluation={"a": pairs(3), "b": pairs(5)})
    metrics = trainer.evaluate()
    assert {"eval_a_accuracy", "eval_b_ece", "eval_reward_center"} <= metrics.keys()
    center = trainer.model.config.reward_center
    assert "eval_accuracy" in trainer.evaluate(pairs(2))
    assert trainer.model.config.reward_center == center


def test_checkpoint_resumes(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    whole = make_trainer(base, tmp_path, **options)
    whole.train()
    again = make_trainer(base, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5, msg=name)


def test_card_names_base_data_and_measurements(base, tmp_path):
    trainer = make_trainer(base, tmp_path, eval_strategy="steps", eval_steps=3, eval_on_start=True)
    trainer.dataset_name = "toyworld"
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out/README.md").read_text()
    for words in ("Bradley–Terry", "2203.02155", "toyworld", "accuracy", "learning_rate", "RewardTrainer"):
        assert words in card, words
