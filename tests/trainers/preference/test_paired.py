"""DPO, IPO, ORPO and a new objective: numbers by hand, and TRL's where the definitions agree."""

import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from preference_setting import OPTIONS, PAIRS, logged, trainer
from transformers import BitsAndBytesConfig
from trl.experimental.orpo import ORPOConfig as PeerORPOConfig
from trl.experimental.orpo import ORPOTrainer as PeerORPOTrainer

from lifecycle_hf import BottleneckConfig, DPOTrainer, IPOTrainer, ORPOTrainer, PreferenceTrainer
from lifecycle_hf.trainers.preference import paired

close = torch.testing.assert_close
DOCS = Path(__file__).parents[3] / "docs" / "preference.md"
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)


@pytest.fixture
def simpo(monkeypatch):
    """The objective that docs/preference.md adds to the table, run from that page."""
    monkeypatch.setattr(paired, "OBJECTIVES", dict(paired.OBJECTIVES))
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(next(block for block in blocks if "simpo_loss" in block), {})


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def log_odds(p):
    return p - math.log(1 - math.exp(p))


# One row per objective: its value from sums of log-probs under policy and reference, lengths, the prompt's NLL.
EXPECTED = {
    "dpo": ({"label_smoothing": 0.1}, lambda c, r, rc, rr, nc, nr, x, nx: (
        -0.9 * log_sigmoid(0.3 * (c - rc - r + rr)) - 0.1 * log_sigmoid(-0.3 * (c - rc - r + rr)))),
    "ipo": ({}, lambda c, r, rc, rr, nc, nr, x, nx: ((c - rc) / nc - (r - rr) / nr - 1 / 0.6) ** 2),
    "ipo sums": ({"length_normalize": False}, lambda c, r, rc, rr, nc, nr, x, nx: (c - rc - r + rr - 1 / 0.6) ** 2),
    "orpo": ({}, lambda c, r, rc, rr, nc, nr, x, nx: -c / nc - 0.3 * log_sigmoid(log_odds(c / nc) - log_odds(r / nr))),
    "orpo prompt": ({"nll_on_prompt": True}, lambda c, r, rc, rr, nc, nr, x, nx: (
        -(c + x) / (nc + nx) - 0.3 * log_sigmoid(log_odds(c / nc) - log_odds(r / nr)))),
    "simpo": ({}, lambda c, r, rc, rr, nc, nr, x, nx: -log_sigmoid(0.3 * (c / nc - r / nr) - 0.5)),
}  # fmt: skip


def sums_by_hand(model, row):
    """log-probs of prompt (except its first token), chosen and rejected in float64, one unpadded row at a time."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        ids, start = row["prompt_ids"] + row[side], len(row["prompt_ids"])
        table = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [table[t - 1, ids[t]].item() for t in range(1, len(ids))]
        found.append((sum(each[: start - 1]), sum(each[start - 1 :])))
    (prompt, chosen), (_, rejected) = found
    return prompt, chosen, rejected


@pytest.mark.parametrize("name", EXPECTED)
def test_loss_is_that_of_the_formula(tiny_llama, tmp_path, simpo, name):
    make_model, _ = tiny_llama
    options, formula = EXPECTED[name]
    objective = name.split()[0]
    given = {"objective": objective, "eval_dataset": PAIRS}
    if paired.OBJECTIVES[objective].reference:
        given["ref_model"] = make_model(seed=1)
    run = trainer(
        tiny_llama, tmp_path, PreferenceTrainer, beta=0.3, learning_rate=0.0, trainer_options=given, **options
    )
    losses, margins = [], []
    for row in run.train_dataset:
        prompt, chosen, rejected = sums_by_hand(make_model(), row)
        _, ref_chosen, ref_rejected = sums_by_hand(make_model(seed=1), row)
        sizes = [len(row[column]) for column in ("chosen_ids", "rejected_ids", "prompt_ids")]
        losses.append(formula(chosen, rejected, ref_chosen, ref_rejected, *sizes[:2], prompt, sizes[2] - 1))
        h = (
            (chosen - ref_chosen, rejected - ref_rejected)
            if run.needs_reference
            else (chosen / sizes[0], rejected / sizes[1])
        )
        margins.append(0.3 * (h[0] - h[1]))
    run.train()
    assert sum(logged(run, "loss")) / 2 == pytest.approx(sum(losses) / 8, rel=1e-4)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / 8, rel=1e-3, abs=1e-6)
    assert metrics["eval_rewards/accuracies"] == sum(m > 0 for m in margins) / 8


@pytest.mark.parametrize("setting", ["full", "dropout", "lora", "bottleneck", "bf16", "checkpointing"])
def test_dpo_starts_at_ln_2_with_rewards_of_zero(tiny_llama, tmp_path, setting):
    make_model, _ = tiny_llama
    model = make_model(attention_dropout=0.5) if setting == "dropout" else None
    options = {"bf16": setting == "bf16", "activation_checkpointing": setting == "checkpointing"}
    given = {"peft_config": {"lora": LORA, "bottleneck": BottleneckConfig()}.get(setting)}
    run = trainer(tiny_llama, tmp_path, model=model, max_steps=1, trainer_options=given, **options)
    run.train()
    assert logged(run, "loss") == [pytest.approx(math.log(2), abs=1e-6)]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen_displacement"):
        assert logged(run, name) == [0.0]


def test_rejected_and_chosen_move_apart(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=8)
    run.train()
    assert logged(run, "rewards/margins")[-1] > 0.5 and logged(run, "rewards/accuracies")[-1] == 1


def peer_options(**options):
    options = OPTIONS | options
    options.pop("activation_checkpointing")
    return options | {"gradient_checkpointing": False, "bf16": False}


PEERS = {
    "dpo": (DPOTrainer, {"loss_type": "sigmoid"}, None),
    "dpo lora": (DPOTrainer, {"loss_type": "sigmoid"}, LoraConfig(r=4, target_modules="all-linear")),
    "ipo": (IPOTrainer, {"loss_type": "ipo"}, None),
}


@pytest.fixture
def base(tiny_llama, tmp_path):
    """The tiny Llama on disk: TRL loads its reference by name."""
    tiny_llama[0]().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("name", PEERS)
def test_losses_gradients_and_metrics_are_those_of_trl(tiny_llama, tmp_path, base, name):
    _, tokenizer = tiny_llama
    cls, options, peft = PEERS[name]
    shared = {
        "max_steps": 6,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    ours = trainer(tiny_llama, tmp_path, cls, trainer_options={"peft_config": peft}, **shared)
    theirs = trl.DPOTrainer(
        base, args=trl.DPOConfig(str(tmp_path), **peer_options(**shared, **options)), train_dataset=PAIRS,
        processing_class=tokenizer, peft_config=peft,
    )  # fmt: skip
    if peft is not None:  # the same random A
        weights = {n.replace(".default.", ".policy."): p for n, p in theirs.model.named_parameters() if "lora_" in n}
        for n, parameter in ours.model.policy.named_parameters():
            if "lora_" in n:
                parameter.data.copy_(weights[n].data)
    ours.train(), theirs.train()
    for metric in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert logged(ours, metric) == pytest.approx(logged(theirs, metric), rel=1e-4, abs=2e-6), metric
    # TRL's is the mean of the micro-batches' means, ours the mean over their tokens
    assert logged(ours, "entropy") == pytest.approx(logged(theirs, "entropy"), rel=1e-3)


@pytest.mark.parametrize("batch", [1, 4])
def test_orpo_is_that_of_trl_where_the_definitions_agree(tiny_llama, tmp_path, batch):
    """TRL's NLL is the mean over the tokens of a micro-batch, ours the mean over examples of their means."""
    make_model, tokenizer = tiny_llama
    data = PAIRS.map(lambda row: {"prompt": "<bos>" + row["prompt"]})  # TRL adds it if it is missing
    ours = trainer(
        tiny_llama, tmp_path, ORPOTrainer, dataset=data, per_device_train_batch_size=batch, nll_on_prompt=True
    )
    theirs = PeerORPOTrainer(
        make_model(),
        args=PeerORPOConfig(str(tmp_path), **peer_options(per_device_train_batch_size=batch)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    ours.train(), theirs.train()
    if batch == 1:
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
        assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-3)
    else:
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=0.05)


@pytest.mark.parametrize("cls", [DPOTrainer, ORPOTrainer])
def test_how_a_step_is_cut_up_plays_no_part(tiny_llama, tmp_path, cls):
    def losses(size, accumulation):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run = trainer(tiny_llama, tmp_path, cls, max_steps=6, **cut)
        run.train()
        return logged(run, "loss"), logged(run, "grad_norm")

    whole, single = losses(8, 1), losses(1, 8)
    assert single[0] == pytest.approx(whole[0], rel=1e-4)
    assert single[1] == pytest.approx(whole[1], rel=1e-4)


def test_a_last_smaller_micro_batch_counts_by_its_examples(tiny_llama, tmp_path):
    options = {"num_train_epochs": 1, "max_steps": -1, "learning_rate": 0.0, "beta": 0.5}
    given = {"ref_model": tiny_llama[0](seed=1)}
    whole = trainer(tiny_llama, tmp_path, per_device_train_batch_size=8, trainer_options=given, **options)
    ragged = trainer(
        tiny_llama,
        tmp_path,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        trainer_options=given,
        **options,
    )
    whole.train(), ragged.train()
    assert logged(ragged, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


# References


def test_reference_of_a_trained_adapter_is_its_frozen_copy(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    run = trainer(tiny_llama, tmp_path, model=model, max_steps=3)
    run.train()
    assert run.model.reference_role == "reference" and logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(run, "rewards/margins")[-1] > 0


@pytest.mark.parametrize(
    "peft",
    [None, LoraConfig(r=4, target_modules="all-linear"), BottleneckConfig()],
    ids=["full", "lora", "bottleneck"],
)
def test_cached_reference_gives_the_same_run_and_lets_go_of_the_model(tiny_llama, tmp_path, peft):
    given = {"peft_config": peft, "eval_dataset": PAIRS.select(range(3))}
    online = trainer(tiny_llama, tmp_path, max_steps=4, trainer_options=given)
    cached = trainer(tiny_llama, tmp_path, max_steps=4, precompute_ref_log_probs=True, trainer_options=given)
    assert cached.model.reference is None and cached.model.reference_role is None
    online.train(), cached.train()
    assert logged(cached, "loss") == pytest.approx(logged(online, "loss"), rel=1e-5)
    assert logged(cached, "rewards/margins") == pytest.approx(logged(online, "rewards/margins"), abs=1e-5)
    assert cached.evaluate()["eval_loss"] == pytest.approx(online.evaluate()["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="precompute_ref_log_probs removed the reference"):
        cached.evaluate(PAIRS.select([4]))


def test_kept_log_probs_are_read_again_and_belong_to_model_and_data(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    keep = {"precompute_ref_log_probs": True, "ref_log_probs_path": str(tmp_path / "kept")}
    first = trainer(tiny_llama, tmp_path, **keep)
    first.train()
    written = (tmp_path / "kept" / "train.safetensors").stat().st_mtime_ns
    again = trainer(
        tiny_llama, tmp_path, trainer_options={"peft_config": LoraConfig(r=2, target_modules="all-linear")}, **keep
    )
    assert (tmp_path / "kept" / "train.safetensors").stat().st_mtime_ns == written
    assert again.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    with pytest.raises(ValueError, match=r"belong to another run: model is '\w+' there and '\w+' here"):
        trainer(tiny_llama, tmp_path, model=make_model(seed=1), **keep)
    with pytest.raises(ValueError, match=r"belong to another run: data is '\w+' there and '\w+' here"):
        trainer(tiny_llama, tmp_path, dataset=PAIRS.select(range(7)), **keep)


def test_columns_that_the_data_brings_are_taken(tiny_llama, tmp_path):
    data = PAIRS.add_column("ref_chosen_logps", [-3.0] * 8).add_column("ref_rejected_logps", [-4.0] * 8)
    run = trainer(tiny_llama, tmp_path, dataset=data, learning_rate=0.0)
    assert run.model.reference is None
    run.train()
    expected = (sum(logged(run, "logps/chosen")) / 2 + 3) * 0.1
    assert sum(logged(run, "rewards/chosen")) / 2 == pytest.approx(expected, rel=1e-5)


# What every trainer has


def test_auxiliary_loss_is_added_once_per_step(tiny_llama, tmp_path):
    def run(weight, **cut):
        made = trainer(tiny_llama, tmp_path, max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=1e9, **cut)
        before = made.model.policy.lm_head.weight.detach().clone()
        if weight:
            made.add_auxiliary_loss("l2", lambda policy: policy.lm_head.weight.square().sum(), weight)
        made.train()
        return made, before, made.model.policy.lm_head.weight.detach()

    plain, before, after = run(0)
    for cut in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        mixed, _, with_l2 = run(0.25, **cut)
        close(after - with_l2, 0.1 * 0.25 * 2 * before, atol=1e-6, rtol=1e-4)  # the gradient of ¼‖W‖² is ½W
        assert logged(mixed, "loss/l2") == [pytest.approx(before.square().sum().item(), rel=1e-5)]
        assert logged(mixed, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(
            0.25 * before.square().sum().item(), rel=1e-4
        )
    with pytest.raises(ValueError, match="named 'l2' already"):
        mixed.add_auxiliary_loss("l2", lambda policy: 0)


def test_a_long_fall_of_the_chosen_likelihood_is_told_once(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=6, displacement_patience=3)
    run.log({"logps/chosen_displacement": 0.5})
    with pytest.warns(UserWarning, match="For 4 steps the chosen answers have been less likely") as seen:
        for step in range(0, 16, 2):  # logged every other step, below zero from step 0 on
            run.state.global_step = step
            run.log({"logps/chosen_displacement": -0.5})
    assert len([w for w in seen if "less likely" in str(w.message)]) == 1
    run.displacement.told = False
    run.log({"eval_loss": 1.0}), run.log({"train_runtime": 1.0})  # log lines without a displacement change nothing
    assert not run.displacement.told
    run.displacement.told, run.state.global_step = True, 17
    run.log({"logps/chosen_displacement": 0.5})
    assert run.displacement.state_dict() == {"baseline": None, "fallen_from": None, "told": True}


def test_displacement_without_a_reference_counts_from_what_was_logged_first(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, ORPOTrainer, max_steps=4, logging_steps=2, beta=0.5, per_device_train_batch_size=8
    )
    run.train()
    first, second = logged(run, "rewards/chosen")  # beta times the mean log-prob per token
    assert logged(run, "logps/chosen_displacement") == pytest.approx([0, 2 * (second - first)], abs=1e-6)


def test_reference_stays_in_eval_mode_with_dropout_on(tiny_llama, tmp_path):
    model = tiny_llama[0](attention_dropout=0.5)
    run = trainer(tiny_llama, tmp_path, model=model, max_steps=2, disable_dropout=False, learning_rate=0.0)
    run.train()
    assert run.model.policy.training and not run.model.reference.training
    assert logged(run, "loss")[0] != pytest.approx(math.log(2), abs=1e-4)  # dropout is on in the policy
    with pytest.raises(ValueError, match="ref_model is the model that trains"):
        trainer(tiny_llama, tmp_path, model=model, trainer_options={"ref_model": model})


def test_qlora_starts_at_ln_2_and_learns(tiny_llama, tmp_path):
    tiny_llama[0](hidden_size=64).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    given = {"quantization_config": nf4, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    run = trainer(tiny_llama, tmp_path, model=str(tmp_path / "base"), max_steps=8, trainer_options=given)
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(run, "rewards/margins")[-1] > 0.05 and logged(run, "tokens_saved")[0] > 0


def test_share_of_tokens_saved(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=1, per_device_train_batch_size=8)
    rows = run.train_dataset
    run.train()
    longest = max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)
    packed = sum(len(r[name]) for r in rows for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert logged(run, "tokens_saved") == [pytest.approx(1 - packed / (16 * longest))]


def test_metrics_of_several_held_out_sets_are_exact(tiny_llama, tmp_path):
    parts = {"a": PAIRS.select(range(5)), "b": PAIRS.select(range(5, 8))}
    given = {"ref_model": tiny_llama[0](seed=1), "eval_dataset": parts}
    run = trainer(tiny_llama, tmp_path, per_device_eval_batch_size=2, trainer_options=given)
    metrics = run.evaluate()
    whole = run.evaluate(PAIRS)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        mixed = (5 * metrics[f"eval_a_{name}"] + 3 * metrics[f"eval_b_{name}"]) / 8
        assert whole[f"eval_{name}"] == pytest.approx(mixed, rel=1e-5, abs=1e-6)


def test_simpo_is_one_function_and_one_row(tiny_llama, tmp_path, simpo):
    run = trainer(tiny_llama, tmp_path, PreferenceTrainer, trainer_options={"objective": "simpo"}, max_steps=6)
    run.train()
    assert run.model.reference is None and logged(run, "loss")[-1] < logged(run, "loss")[0]
    run.create_model_card()
    assert "2405.14734" in (tmp_path / "README.md").read_text()


def test_empty_and_identical_pairs_are_dropped(tiny_llama, tmp_path):
    bad = [{"prompt": "a", "chosen": "", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    with pytest.warns(UserWarning, match="2 of 10 rows can't be used"):
        run = trainer(tiny_llama, tmp_path, dataset=Dataset.from_list([*PAIRS, *bad]))
    assert len(run.train_dataset) == 8
