"""Sequence to sequence: losses by hand and against SFT, how steps are cut up, generation, metrics and bad rows."""

import json

import pytest
import torch
from datasets import Dataset
from lifecycle_setting import SIZES
from peft import LoraConfig, PrefixTuningConfig
from transformers import (
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM, Seq2SeqConfig, Seq2SeqTrainer, SFTConfig, SFTTrainer
from lifecycle_hf.completions.beams import beam_search
from lifecycle_hf.models.loading import load_classifier
from lifecycle_hf.trainers.supervised.tasks import TaskLoss

QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1,
         "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3,
         "generation_max_length": 6}  # fmt: skip
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}
ROWS = Dataset.from_dict(
    {
        "prompt": ["the capital of France is", "tell me a story about a small red fox", "two and three", "hello"],
        "completion": [" Paris", " a small red fox said hello and goodbye", " make five", " user"],
    }
)
SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
KINDS = ("t5", "causal", "prefix")


def new_model(tokenizer, kind, std=0.3):
    """A model with large random weights, so that its predictions depend on what it reads."""
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        sizes = SIZES | {"vocab_size": len(tokenizer), "attention": kind}
        model = LifecycleForCausalLM(LifecycleConfig(**sizes | ends))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def make(tiny_llama, tmp_path, kind="t5", train=ROWS, evaluation=None, **options):
    given = {name: options.pop(name) for name in ("peft_config", "ptx_dataset") if name in options}
    given["processing_class"] = tokenizer = options.pop("processing_class", tiny_llama[1])
    args = Seq2SeqConfig(str(tmp_path / "out"), **QUIET | options)
    model = new_model(tokenizer, kind) if kind in KINDS else kind
    return Seq2SeqTrainer(model, args, train, evaluation, **given)


def logprobs(run, row):
    """log p of every word of the vocabulary for each token of a row's completion alone, [T, V], and its tokens."""
    prompt, target = row["input_ids"], row["labels"]
    with torch.no_grad():
        if run.is_seq2seq:
            before = [run.model.config.decoder_start_token_id, *target[:-1]]
            given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([before])}
            logits = run.model.eval()(**given).logits[0]
        else:
            given = {"prefix_lengths": torch.tensor([len(prompt)])} if run.takes_prefix else {}
            logits = run.model.eval()(torch.tensor([prompt + target]), **given).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1), torch.tensor(target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_mean_over_tokens(tiny_llama, tmp_path, kind, smoothing):
    run = make(tiny_llama, tmp_path, kind, evaluation=ROWS, label_smoothing_factor=smoothing)
    rows, total, plain, count = list(run.train_dataset), 0.0, 0.0, 0
    for row in rows:
        table, target = logprobs(run, row)
        nll = -table.gather(1, target[:, None]).sum().item()
        total += (1 - smoothing) * nll - smoothing * table.mean(1).sum().item()
        plain, count = plain + nll, count + len(target)
        assert row["labels"][-1] == tiny_llama[1].eos_token_id
    loss = run.compute_loss(run.model.train(), run.collate(rows)).item()
    assert loss == pytest.approx(total / count, rel=1e-5)
    metrics = run.evaluate()  # in batches of 3 and 1
    assert metrics["eval_loss"] == pytest.approx(plain / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(2.718281828459045 ** (plain / count), rel=1e-5)


def test_a_model_that_shifts_its_labels_itself(tiny_llama, tmp_path):
    tokenizer = tiny_llama[1]
    tokens = {"decoder_start_token_id": tokenizer.bos_token_id, "bos_token_id": tokenizer.bos_token_id}
    tokens |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIDE.items()}
    config = BlenderbotConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **tokens, d_model=16, dropout=0.0
    )
    run = make(tiny_llama, tmp_path, BlenderbotForConditionalGeneration(config), evaluation=ROWS)
    assert not hasattr(run.model, "prepare_decoder_input_ids_from_labels")
    values = [logprobs(run, row) for row in run.train_dataset]
    total = -sum(table.gather(1, target[:, None]).sum().item() for table, target in values)
    expected = total / sum(len(target) for _, target in values)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_an_encoder_reads_the_prompt_and_its_end(tiny_llama, tmp_path):
    tokenizer = tiny_llama[1]
    run = make(tiny_llama, tmp_path)
    for row, text in zip(run.train_dataset, ROWS, strict=True):
        assert row["input_ids"] == [*tokenizer(text["prompt"])["input_ids"], tokenizer.eos_token_id]
        assert row["labels"] == [*tokenizer(text["completion"])["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["causal", "prefix"])
def test_a_decoders_loss_is_that_of_sft_on_completions(tiny_llama, tmp_path, kind, chat):
    data = ROWS
    if chat:
        sides = {"prompt": "user", "completion": "assistant"}
        data = ROWS.map(lambda row: {k: [{"role": role, "content": row[k]}] for k, role in sides.items()})
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False}
    sft = SFTTrainer(new_model(tiny_llama[1], kind), SFTConfig(str(tmp_path), **options), data, data,
                     processing_class=tiny_llama[1])  # fmt: skip
    options = {"predict_with_generate": False, "generation_max_length": None}
    run = make(tiny_llama, tmp_path, kind, data, data, **options)
    assert run.evaluate()["eval_loss"] == pytest.approx(sft.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["t5", "causal"])
def test_a_step_does_not_depend_on_how_it_is_cut(tiny_llama, tmp_path, kind):
    def trained(batch):
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        run = make(tiny_llama, tmp_path, kind, max_steps=4, **SGD | {"learning_rate": 2e-3}, **cut)
        run.train()
        return run.model.state_dict(), [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    (whole, losses), (cut, others) = trained(4), trained(1)
    assert others == pytest.approx(losses, rel=1e-4)
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-5, rtol=1e-4)


class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["t5", "prefix"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny_llama, tmp_path, kind):
    def run(folder):
        mitigations = {"ptx_coef": 0.5, "ptx_dataset": ROWS, "ptx_batch_size": 1, "label_smoothing_factor": 0.1}
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 1}
        return make(tiny_llama, tmp_path / folder, kind, **mitigations, **options)

    whole, killed, resumed = run("whole"), run("killed"), run("killed")
    whole.train()
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed.train(resume_from_checkpoint=True)
    losses = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_predictions_of_a_batch_are_those_of_each_row_alone(tiny_llama, tmp_path, kind, beams):
    options = {} if beams == 1 else {"generation_num_beams": beams, "generation_length_penalty": 0.5}
    run = make(tiny_llama, tmp_path, kind, evaluation=ROWS, **options)
    tokenizer, expected = tiny_llama[1], []
    config = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    config |= {"length_penalty": 0.5} if beams > 1 else {}
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if kind == "t5" else {}
    config = GenerationConfig(**config, **start, pad_token_id=tokenizer.pad_token_id)
    for row in run.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            found = run.model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(tokenizer.decode(found[0, 1 if kind == "t5" else ids.shape[1] :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    run.finalize()
    assert [row["prediction"] for row in run.predictions] == [text.strip() for text in expected]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert lines == run.predictions and [{k: row[k] for k in ROWS.column_names} for row in lines] == ROWS.to_list()


def test_beams_find_what_a_search_of_everything_finds(tiny_llama):
    """All texts of at most 2 tokens, by the mean log p of their tokens."""
    tokenizer = tiny_llama[1]
    model = new_model(tokenizer, "t5")
    prompt, eos, pad, words = [5, 6, 7], tokenizer.eos_token_id, tokenizer.pad_token_id, torch.arange(len(tokenizer))
    with torch.no_grad():
        before = torch.stack([torch.full_like(words, pad), words], dim=1)
        table = model(torch.tensor([prompt] * len(words)), decoder_input_ids=before).logits.log_softmax(-1)
    scores = (table[0, 0, :, None] + table[:, 1]) / 2  # [first word, second word]
    scores[eos] = -torch.inf
    best = list(divmod(scores.argmax().item(), len(words)))
    assert scores.max() > table[0, 0, eos]  # which is the text that ends at once
    options = {"max_new_tokens": 2, "stop_token_ids": [eos], "pad_token_id": pad}
    assert beam_search(model, [prompt], **options, num_beams=64) == [best]
    assert beam_search(model, [prompt], **options) == [[table[0, 0].argmax(), table[table[0, 0].argmax(), 1].argmax()]]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_rows_by_heart(tiny_llama, tmp_path, kind):
    run = make(tiny_llama, tmp_path, new_model(tiny_llama[1], kind, std=0.1), evaluation=ROWS, max_steps=90,
               learning_rate=1e-2, eval_on_start=True, eval_strategy="steps", eval_steps=90, logging_steps=90,
               generation_max_length=30)  # fmt: skip
    run.train()
    run.save_model(), run.create_model_card()
    metrics = run.finalize()
    assert [row["prediction"] for row in run.predictions] == [text.strip() for text in ROWS["completion"]]
    assert metrics["eval_exact_match"] == metrics["eval_rouge_l"] == 1 and len(metrics["eval_bleu_interval"]) == 2
    table = run.tax_report.to_json()
    assert table["rouge_l"]["after"] == 1 > table["rouge_l"]["before"] and "lead_rouge_l" in table
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"AutoModelFor{'Seq2SeqLM' if kind == 't5' else 'CausalLM'}" in card and "exact match ↑" in card
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    assert load_classifier(str(tmp_path / "out"), task=task).config.is_encoder_decoder == (kind == "t5")


@pytest.mark.parametrize("kind", ["t5", "causal"])
@pytest.mark.parametrize("virtual", [False, True])
def test_adapters_train_and_generate(tiny_llama, tmp_path, kind, virtual):
    tokenizer = tiny_llama[1]
    new_model(tokenizer, kind).save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    peft = PrefixTuningConfig(num_virtual_tokens=3) if virtual else LoraConfig(r=4, target_modules="all-linear")
    run = make(tiny_llama, tmp_path, str(tmp_path / "base"), evaluation=ROWS, peft_config=peft, max_steps=20,
               learning_rate=0.05, generation_max_length=3)  # fmt: skip
    before = run.evaluate()["eval_loss"]
    said = [row["prediction"] for row in run.predictions]
    run.train()
    after = run.evaluate()
    assert (
        after["eval_loss"] < before - (0.05 if virtual else 0.5)
        and [row["prediction"] for row in run.predictions] != said
    )
    run.save_model()
    if virtual:  # which PEFT does not train further
        return
    again = load_classifier(str(tmp_path / "out"), task=run.task_type)
    assert make(tiny_llama, tmp_path, again, evaluation=ROWS).evaluate()["eval_loss"] == pytest.approx(
        after["eval_loss"], rel=1e-4
    )


@pytest.mark.parametrize(("kind", "reduction"), [("t5", "mean"), ("causal", "sum")])
def test_mitigations_read_rows_of_the_same_columns(tiny_llama, tmp_path, kind, reduction):
    run = make(tiny_llama, tmp_path, kind, ptx_coef=0.5, ptx_dataset=ROWS, ptx_batch_size=4)
    assert isinstance(run._auxiliary["ptx"][0], TaskLoss)
    loss = run.protected_loss(ROWS, None, seed=0, batch_size=4, where="rows", reduction=reduction)
    values = [logprobs(run, row) for row in run.train_dataset]
    total = -sum(table.gather(1, target[:, None]).sum().item() for table, target in values)
    count = sum(len(target) for _, target in values)
    assert loss(run.model).item() == pytest.approx(total if reduction == "sum" else total / count, rel=1e-5)


def test_texts_protect_a_decoder_alone(tiny_llama, tmp_path):
    texts = Dataset.from_dict({"text": ["the capital of France is Paris"]})
    run = make(tiny_llama, tmp_path, "causal", ptx_coef=0.5, ptx_dataset=texts, ptx_max_length=4)
    assert not isinstance(run._auxiliary["ptx"][0], TaskLoss)
    with pytest.raises(ValueError, match="ptx_dataset lacks the column 'prompt'"):
        make(tiny_llama, tmp_path, "t5", ptx_coef=0.5, ptx_dataset=texts)
    with pytest.raises(ValueError, match="ptx_max_length=4 has no effect on rows of prompts"):
        make(tiny_llama, tmp_path, "causal", ptx_coef=0.5, ptx_dataset=ROWS, ptx_max_length=4)


def bad(**changes):
    """ROWS with other values in some rows, as {column: {row: value}}."""
    columns = {name: list(ROWS[name]) for name in ROWS.column_names}
    for name, values in changes.items():
        for row, value in values.items():
            columns[name][row] = value
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("kind", "data", "options", "message"),
    [
        ("t5", bad(prompt={1: "  "}), {}, r"train_dataset: 1 of 4 .*1 empty prompt\); the first is row 1"),
        ("causal", bad(completion={2: ""}), {}, r"1 of 4 .*1 empty completion\); the first is row 2"),
        ("causal", bad(completion={0: None}), {}, r"1 of 4 .*1 empty completion\); the first is row 0"),
        (
            "t5",
            Dataset.from_dict({"prompt": [1], "completion": ["a"]}),
            {},
            "prompt that is neither text nor messages",
        ),
        ("causal", ROWS, {"max_length": 9}, r"1 prompt longer than max_length=9 tokens\); the first is row 1"),
        ("t5", ROWS.rename_column("completion", "summary"), {}, "lacks the column 'completion'"),
        ("t5", ROWS, {"label_smoothing_factor": 1.0}, r"label_smoothing_factor=1.0 must lie in \[0, 1\)"),
        ("t5", ROWS, {"generation_num_beams": 0}, "generation_num_beams=0 must be at least 1"),
        ("t5", ROWS, {"generation_length_penalty": 2.0}, "no effect on one beam: set generation_num_beams"),
        ("t5", ROWS, {"predict_with_generate": False}, "generation_max_length: predict_with_generate=False"),
        ("head", ROWS, {}, "LlamaForSequenceClassification can't generate text"),
    ],
)
def test_what_can_not_be(tiny_llama, tmp_path, kind, data, options, message):
    if kind == "head":
        from transformers import LlamaForSequenceClassification

        kind = LlamaForSequenceClassification(tiny_llama[0]().config)
    with pytest.raises(ValueError, match=message):
        make(tiny_llama, tmp_path, kind, data, strict_data=True, **options)


def test_long_texts_are_cut_with_a_count(tiny_llama, tmp_path):
    tokenizer = tiny_llama[1]
    with pytest.warns(UserWarning, match=r"of 4 rows 1 prompts are cut to max_length=10 .* 1 completions .*length=5"):
        run = make(tiny_llama, tmp_path, max_length=10, max_target_length=5)
    whole = make(tiny_llama, tmp_path).train_dataset
    for cut, row in zip(run.train_dataset, whole, strict=True):
        long = len(row["input_ids"]) > 10
        assert cut["input_ids"] == (row["input_ids"][:9] + [tokenizer.eos_token_id] if long else row["input_ids"])
        assert cut["labels"] == row["labels"][:5] and cut["completion"] == row["completion"]


def test_columns_of_other_names_and_a_prefix(tiny_llama, tmp_path):
    names = {"prompt": "dialogue", "completion": "summary"}
    options = {"prompt_column": "dialogue", "completion_column": "summary", "prompt_prefix": "tell me "}
    run = make(tiny_llama, tmp_path, train=ROWS.rename_columns(names), **options)
    same = make(tiny_llama, tmp_path, train=ROWS.map(lambda row: {"prompt": "tell me " + row["prompt"]}))
    assert run.train_dataset.to_list() == same.train_dataset.to_list()
