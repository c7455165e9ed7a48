"""Pretraining by every objective: losses by hand, accumulation, resuming, and errors for bad input."""

import math
import warnings

import pytest
import torch
from datasets import Dataset
from ppo_setting import KeepGradients, logged
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lifecycle_hf import (
    LifecycleConfig,
    LifecycleForCausalLM,
    LifecycleForMaskedLM,
    PretrainingConfig,
    PretrainingTrainer,
)
from lifecycle_hf.data.corpora import python_documentation, read_corpus, train_tokenizer

TEXTS = python_documentation().select(range(6))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENTION = {"causal": "causal", "prefix": "prefix", "span_corruption": "prefix", "ul2": "prefix"}


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS["text"], 300)


@pytest.fixture
def tokenizer(bpe):
    return type(bpe)(tokenizer_object=bpe.backend_tokenizer, eos_token=bpe.eos_token, pad_token=bpe.pad_token)


def model_for(objective, vocab_size=300):
    torch.manual_seed(0)
    if objective == "masked":
        return LifecycleForMaskedLM(LifecycleConfig(vocab_size=vocab_size, attention="bidirectional", **SIZES))
    return LifecycleForCausalLM(LifecycleConfig(vocab_size=vocab_size, attention=ATTENTION[objective], **SIZES))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0,
                 pad_token_id=0, dropout_rate=0.0)
    )  # fmt: skip


def trainer(
    tmp_path, tokenizer, objective="causal", model=None, dataset=TEXTS, callbacks=None, evaluated=None, **options
):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "max_length": 96, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = PretrainingConfig(str(tmp_path), objective=objective, **(defaults | options))
    model = model_for(objective) if model is None else model
    return PretrainingTrainer(model, args, dataset, evaluated, tokenizer, callbacks=callbacks)


@pytest.mark.parametrize("objective", ["causal", "masked", "prefix", "span_corruption", "ul2"])
def test_loss_by_hand(tmp_path, tokenizer, objective):
    run = trainer(tmp_path, tokenizer, objective, max_steps=1)
    rows = [run.train_dataset[i] for i in range(8)]
    batch = run.collate(rows)
    run.metrics["train"].sums.clear()
    loss = run.compute_loss(run.model.train(), dict(batch))
    total, count, kinds = 0.0, 0, {}
    for row in rows:
        given = {"input_ids": torch.tensor(row["input_ids"])[None]}
        if "prefix_length" in row:
            given["prefix_lengths"] = torch.tensor([row["prefix_length"]])
        logprobs = run.model.double()(**given).logits[0].double().log_softmax(-1)
        shift = 0 if objective == "masked" else 1
        for t, label in enumerate(row["labels"]):
            if label != -100 and t >= shift:
                nll = -logprobs[t - shift, label].item()
                total, count = total + nll, count + 1
                kind = kinds.setdefault(run.kinds[row.get("denoiser", 0)], [0.0, 0])
                kind[0] += nll
                kind[1] += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    means = run.reduced_metrics("train")
    assert means["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    for name, (nll, n) in kinds.items():
        assert means[f"loss/{name}"] == pytest.approx(nll / n, rel=1e-5), name
    assert len(kinds) >= (3 if objective == "ul2" else 1)


class WholeHead(LifecycleForCausalLM):
    """A model without an argument that names the columns for its head."""

    def forward(self, input_ids, **given):
        return super().forward(input_ids, **given)


@pytest.mark.parametrize("objective", ["prefix", "span_corruption", "ul2"])
def test_the_head_reads_the_columns_that_have_targets(tmp_path, tokenizer, objective):
    run = trainer(tmp_path, tokenizer, objective)
    rows = [run.train_dataset[i] for i in range(4)]
    batch = run.collate(rows)
    targets = {t - 1 for row in batch["labels"].tolist() for t, label in enumerate(row) if t and label != -100}
    read = []
    run.model.lm_head.register_forward_hook(lambda head, given, logits: read.append(logits.shape))
    loss = run.compute_loss(run.model.eval(), dict(batch))
    assert read == [(4, len(targets), run.model.config.vocab_size)]
    assert len(targets) < batch["labels"].shape[1] - 1
    whole = trainer(tmp_path, tokenizer, objective, WholeHead(run.model.config))
    whole.model.load_state_dict(run.model.state_dict())
    other = whole.compute_loss(whole.model.eval(), whole.collate(rows))
    run._joins_batches = True  # where accelerate joins the batches of all processes, the columns are found later
    del batch["logits_to_keep"]
    assert torch.equal(run.collate(rows)["labels"], batch["labels"]) and run.collate(rows).keys() == batch.keys()
    assert run.compute_loss(run.model.eval(), dict(batch)).item() == loss.item()
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward(), other.backward()
    for (name, one), two in zip(run.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.parametrize("objective", ["causal", "masked", "ul2"])
def test_one_times_eight_equals_eight_times_one(tmp_path, tokenizer, objective):
    steps, losses = [], []
    for batch, accumulation in ((8, 1), (1, 8)):
        keep = KeepGradients()
        run = trainer(
            tmp_path, tokenizer, objective, per_device_train_batch_size=batch, callbacks=[keep],
            gradient_accumulation_steps=accumulation, max_steps=3, max_grad_norm=0.0,
        )  # fmt: skip
        run.train()
        steps.append(keep.steps), losses.append(logged(run, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*steps, strict=True):
        for name, gradient in one.items():
            torch.testing.assert_close(other[name], gradient, atol=2e-6, rtol=1e-3)


def test_a_resumed_run_sees_the_same_noise(tmp_path, tokenizer):
    data = TEXTS.select(range(2))
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "dataset": data, "max_length": 128,
               "per_device_train_batch_size": 12}  # fmt: skip
    whole = trainer(tmp_path, tokenizer, "ul2", **options)
    assert 5 < len(whole.train_dataset) // 12 < 10  # step 5 is in the first epoch, step 12 in the second
    whole.train()
    resumed = trainer(tmp_path, tokenizer, "ul2", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("objective", ["span_corruption", "ul2", "prefix"])
def test_an_encoder_decoder_model_learns(tmp_path, tokenizer, objective):
    run = trainer(tmp_path, tokenizer, objective, t5(), max_steps=40, learning_rate=3e-3, target_length=96)
    run.train()
    losses = logged(run, "loss")
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), rel=0.5) and losses[-1] < losses[0] - 1
    row = run.train_dataset[0]
    assert row["input_ids"][-1] == tokenizer.eos_token_id and "prefix_length" not in row


def test_evaluation_is_exact_and_its_noise_stays(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, "ul2", per_device_eval_batch_size=3, eval_strategy="no")
    first = run.evaluate(run.train_dataset)
    total, count = 0.0, 0
    for i in range(len(run.train_dataset)):
        batch = run.collate([run.train_dataset[i]])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += run.compute_loss(run.model.eval(), batch).item() * targets
        count += targets
    assert first["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    run.metrics["eval"].sums.clear()
    assert run.evaluate(run.train_dataset)["eval_loss"] == first["eval_loss"]


def test_documents_that_are_kept_apart(tmp_path, tokenizer):
    data = Dataset.from_dict({"text": ["one two three four five six"] * 200})
    run = trainer(tmp_path, tokenizer, dataset=data, across_documents=False, max_steps=1)
    batch = run.collate([run.train_dataset[i] for i in range(2)])
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 4
    for parameter in run.model.parameters():  # new blocks are the identity: they read no other token
        torch.nn.init.normal_(parameter, std=0.3)
    total, count = 0.0, 0
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        for document in ids.tensor_split((positions == 0).nonzero()[:, 0])[1:]:
            logprobs = run.model(input_ids=document[None]).logits[0].double().log_softmax(-1)
            total -= logprobs[:-1].gather(1, document[1:, None]).sum().item()
            count += len(document) - 1
    assert run.compute_loss(run.model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_a_saved_model_reloads_with_its_tokens(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, "ul2", max_steps=1)
    run.train()
    run.save_model()
    again = LifecycleForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention == "prefix" and again.vocab_size == len(tokenizer) > 300
    assert again.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_causal_models_take_denoising_with_a_word(tmp_path, tokenizer):
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES))
    with pytest.warns(UserWarning, match="reads from left to right"):
        run = trainer(tmp_path, tokenizer, "ul2", llama)
    run.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, tokenizer, "ul2")


@pytest.mark.parametrize(
    ("objective", "make", "options", "message"),
    [
        ("masked", lambda: model_for("causal"), {}, "objective='masked' can't train LifecycleForCausalLM"),
        ("causal", lambda: model_for("masked"), {}, "objective='causal' can't train LifecycleForMaskedLM"),
        ("causal", t5, {}, "objective='causal' can't train T5ForConditionalGeneration"),
        ("mlm", None, {}, "objective='mlm' is unknown"),
        ("causal", None, {"denoiser_weights": [1.0]}, "one kind of row"),
        ("ul2", None, {"max_length": 32}, "64"),
        ("causal", None, {"dataset": Dataset.from_dict({"text": []})}, "train_dataset is an empty corpus"),
        ("prefix", None, {"dataset": Dataset.from_dict({"text": ["a"]})}, "train_dataset: the corpus has 2 tokens"),
        ("causal", None, {"evaluated": Dataset.from_dict({"text": ["a"]})}, "eval_dataset: the corpus has 2 tokens"),
        ("causal", None, {"dataset": Dataset.from_dict({"body": ["a"]})}, r"columns \['body'\]"),
    ],
)
def test_what_can_not_be(tmp_path, tokenizer, objective, make, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer, objective, make() if make else model_for("ul2"), **options)


def test_corpora_from_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("second")
    (tmp_path / "blank.txt").write_text(" \n")
    assert read_corpus(tmp_path)["text"] == ["first", "second"]
    (tmp_path / "b" / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"latin.txt is left out, since it is not UTF-8 \(byte 0xf6 at offset 2\)"):
        assert read_corpus(tmp_path)["text"] == ["first", "second"]
    with pytest.raises(ValueError, match="no text file is there"):
        read_corpus(tmp_path / "nothing.txt")


def test_tokenizer_keeps_any_text(bpe):
    text = "naïve ≠ \t\n日本語 \x00"
    assert bpe.decode(bpe(text)["input_ids"]) == text
    assert len(bpe) == 300 and bpe.eos_token_id != bpe.pad_token_id
    with pytest.raises(ValueError, match="vocab_size=200"):
        train_tokenizer(["a"], 200)
