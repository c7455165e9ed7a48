import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_setting import PROMPTS, KeepGradients, config, count_e, logged, trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from lifecycle_hf import BottleneckConfig, RewardEnsemble
from lifecycle_hf.completions.rewards import Samples
from lifecycle_hf.data.collators import length_mask
from lifecycle_hf.models.loading import load_reward_model
from lifecycle_hf.trainers.policy.ppo import PPOTrainer

close = torch.testing.assert_close
TEXTS = Dataset.from_dict({"text": ["The capital of France is Paris.", "Two and three make five.", "hello", "a fox"]})


def mask_of(batch):
    return length_mask(batch["completion_lengths"], batch["logprobs"].shape[1])


def lora(**options):
    return LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("peft", [None, lora(), BottleneckConfig()], ids=["full", "lora", "bottleneck"])
def test_ratio_is_exactly_one_while_nothing_was_learnt(tiny_llama, tmp_path, peft):
    make_model, _ = tiny_llama
    run = trainer(
        tiny_llama, tmp_path, make_model(attention_dropout=0.5), learning_rate=0.0, temperature=0.7, ppo_epochs=3,
        num_mini_batches=2, per_device_train_batch_size=2, max_steps=12, gradient_accumulation_steps=2,
        trainer_options={"peft_config": peft},
    )  # fmt: skip
    run.train()
    assert logged(run, "policy/approx_kl") == [0.0] * 12
    assert logged(run, "policy/ratio_error_at_start") == [0.0, 0.0]
    assert logged(run, "kl") == [0.0, 0.0]


def test_ratio_is_one_at_the_first_step_of_each_rollout(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, learning_rate=1e-2, ppo_epochs=2, max_steps=6)
    run.train()
    assert logged(run, "policy/ratio_error_at_start") == [0.0] * 3
    assert logged(run, "policy/approx_kl")[1] > 0


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
def test_gradient_does_not_depend_on_micro_batches(tiny_llama, tmp_path, ptx_coef):
    runs = {}
    for size in (8, 1):
        keep = KeepGradients()
        options = {"callbacks": [keep], "ptx_dataset": TEXTS if ptx_coef else None}
        run = trainer(
            tiny_llama, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            entropy_coef=0.01, ptx_coef=ptx_coef, missing_eos_penalty=1.0, trainer_options=options,
        )  # fmt: skip
        run.train()
        runs[size] = (logged(run, "loss"), logged(run, "grad_norm"), keep.steps[0], logged(run, "completions/length"))
    assert runs[8][3] == runs[1][3]
    assert runs[8][0] == pytest.approx(runs[1][0], rel=1e-5) and runs[8][1] == pytest.approx(runs[1][1], rel=1e-4)
    for name, gradient in runs[8][2].items():
        close(runs[1][2][name], gradient, atol=2e-6, rtol=1e-4)


def test_pretraining_gradient_is_added_as_a_mean_per_token(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    gradients = {}
    for coef in (0.0, 0.5):
        keep = KeepGradients()
        options = {"callbacks": [keep], "ptx_dataset": TEXTS if coef else None}
        trainer(tiny_llama, tmp_path, ptx_coef=coef, max_steps=1, max_grad_norm=0.0, trainer_options=options).train()
        gradients[coef] = {n.removeprefix("policy."): g for n, g in keep.steps[0].items() if n.startswith("policy.")}
    model, total, tokens = make_model(), 0.0, 0
    for text in TEXTS["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        total = total + model(ids, labels=ids).loss * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    (total / tokens).backward()
    for name, parameter in model.named_parameters():
        close(gradients[0.5][name] - gradients[0.0][name], 0.5 * parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_optimizer_steps_per_rollout_whatever_the_accumulation(tiny_llama, tmp_path, accumulation):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        return count_e(prompts, completions)

    run = trainer(
        tiny_llama, tmp_path, reward_funcs=reward, ppo_epochs=3, num_mini_batches=2, max_steps=12,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    run.train()
    assert calls == [4 * accumulation] * 2 and run.state.global_step == 12


def test_gradient_clipping_applies(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.01)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    moved = sum((p.detach() - before[n]).square().sum() for n, p in run.model.named_parameters() if n in before)
    assert logged(run, "grad_norm")[0] > 0.01
    assert moved.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_advantages_are_white_over_all_tokens_and_returns_are_not(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    run.train()
    batches = run.buffer.batches
    white = torch.cat([b["advantages"][mask_of(b)] for b in batches])
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    # γ = 1, β·KL = 0 on the first rollout and V = 0 (zero head): every return of λ=.95 decays from the score
    returns = torch.cat([b["returns"][mask_of(b)] for b in batches])
    scores = [b["returns"][i, n - 1] for b in batches for i, n in enumerate(b["completion_lengths"])]
    first = [b["returns"][i, 0] / 0.95 ** (n - 1) for b in batches for i, n in enumerate(b["completion_lengths"])]
    close(torch.stack(first), torch.stack(scores), atol=1e-5, rtol=1e-5)
    assert abs(returns.mean()) > 1e-3


def test_reinforce_has_no_critic_and_takes_the_mean_return_off(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, advantage_estimator="reinforce", whiten_advantages=False, max_steps=1, kl_coef=0.0
    )
    assert not any("value" in name for name, _ in run.model.named_parameters())
    run.train()
    batch = run.buffer.batches[0]
    mask = mask_of(batch)
    # γ = 1 and no KL: each token's return is its completion's score
    texts = run.processing_class.batch_decode(
        [
            ids[p : p + n]
            for ids, p, n in zip(batch["input_ids"], batch["prompt_lengths"], batch["completion_lengths"])
        ],
        skip_special_tokens=True,
    )
    scores = torch.tensor(count_e(None, texts))[:, None].expand_as(mask)
    expected = torch.where(mask, scores - scores[mask].mean(), 0.0)
    close(batch["advantages"], expected)


def test_everything_is_sampled_and_scored_in_eval_mode(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, disable_dropout=False, max_steps=1)
    modes = []
    run.model.policy.model.register_forward_hook(lambda m, *_: modes.append((torch.is_grad_enabled(), m.training)))
    run.train()
    assert (False, False) in modes and (True, True) in modes
    assert {training for grad, training in modes if not grad} == {False}


def test_missing_eos_penalty_asks_for_the_stop_token_in_force(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    stop = tokenizer.convert_tokens_to_ids("<|user|>")
    model = make_model()
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    scores = {}
    for wanted in (stop, tokenizer.eos_token_id):
        with torch.no_grad():
            model.lm_head.weight.zero_(), model.lm_head.bias.fill_(-50.0)
            model.lm_head.bias[wanted] = 50.0
        run = trainer(
            tiny_llama, tmp_path, model, reward_funcs=lambda prompts, completions: [2.0] * len(prompts),
            stop_tokens=["<|user|>"], missing_eos_penalty=5.0, max_steps=1, learning_rate=0.0, on_fault="skip",
        )  # fmt: skip
        run.train()
        scores[wanted] = (logged(run, "score"), logged(run, "completions/no_eos"), logged(run, "completions/length"))
    assert scores[stop] == ([2.0], [0.0], [1.0])
    assert scores[tokenizer.eos_token_id] == ([-3.0], [1.0], [6.0])


def test_truncated_completions_bootstrap_with_the_value_after_the_last_token(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    value = LlamaForSequenceClassification(make_model().config)
    value.config.num_labels = 1
    value.score = torch.nn.Linear(32, 1, bias=False)
    run = trainer(
        tiny_llama, tmp_path, bootstrap_truncated=True, max_steps=1, lam=1.0, kl_coef=0.0, learning_rate=0.0,
        reward_funcs=lambda prompts, completions: [0.0] * len(prompts), max_completion_length=3,
        trainer_options={"value_model": value},
    )  # fmt: skip
    run.train()
    batch = run.buffer.batches[0]
    for i, (p, n) in enumerate(zip(batch["prompt_lengths"], batch["completion_lengths"], strict=True)):
        ids = batch["input_ids"][i, : p + n]
        ended = ids[-1] == tokenizer.eos_token_id
        after = value.score(value.model(ids[None]).last_hidden_state[0, -1])[0]
        # λ = γ = 1 and no reward: the return of every token is the bootstrap value alone
        expected = torch.zeros(n) if ended else after.expand(n)
        close(batch["returns"][i, :n], expected.detach(), atol=1e-5, rtol=1e-4)


def test_rewards_are_weighted_normalised_and_clipped(tiny_llama, tmp_path):
    def ramp(prompts, completions, **columns):
        return [float(i) for i in range(len(prompts))]  # mean 1.5, deviation sqrt(1.25)

    def one(prompts, completions):
        return [1.0] * len(prompts)

    run = trainer(
        tiny_llama, tmp_path, reward_funcs=[ramp, one], reward_weights=[2.0, -1.0], max_steps=1,
        reward_normalization="batch", reward_clip=1.0,
    )  # fmt: skip
    weighted = 2 * torch.arange(4.0) - 1
    shaped = run.rollouts._shape(weighted, torch.ones(4, dtype=torch.bool), training=True)
    expected = (torch.arange(4.0) - 1.5) / math.sqrt(1.25)
    close(shaped, expected.clamp(-1, 1))
    run.train()
    assert logged(run, "reward/ramp") == [1.5] and logged(run, "reward/one") == [1.0]
    assert run.rollouts.look.score == 2 * 1.5 - 1


def test_reward_callables_get_the_datasets_columns(tiny_llama, tmp_path):
    seen = {}

    def named(prompts, completions, answer):
        seen["named"] = answer
        return [0.0] * len(prompts)

    def everything(prompts, completions, **columns):
        seen["all"] = sorted(columns)
        return [0.0] * len(prompts)

    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    data = Dataset.from_dict({"prompt": chat, "answer": [*"abcdefgh"], "level": [*range(8)]})
    trainer(tiny_llama, tmp_path, reward_funcs=[named, everything], dataset=data, max_steps=1).train()
    assert set(seen["named"]) <= set("abcdefgh") and seen["all"] == ["answer", "level"]


def test_reward_model_scores_as_it_does_alone(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    config_ = make_model().config
    config_.num_labels, config_.reward_center = 1, 0.25
    reward = LlamaForSequenceClassification(config_)
    reward.save_pretrained(tmp_path / "reward"), tokenizer.save_pretrained(tmp_path / "reward")
    run = trainer(tiny_llama, tmp_path, reward_funcs=str(tmp_path / "reward"), max_steps=1)
    run.train()
    alone, batch = load_reward_model(str(tmp_path / "reward")), run.buffer.batches[0]
    lengths = batch["prompt_lengths"] + batch["completion_lengths"]
    expected = []
    for ids, n, p in zip(batch["input_ids"], lengths, batch["prompt_lengths"], strict=True):
        text = tokenizer.decode(ids[:p]) + tokenizer.decode(ids[p:n], skip_special_tokens=True)
        row = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        expected.append(alone.score(row, torch.tensor([row.shape[1]])))
    assert logged(run, "reward/reward") == pytest.approx([torch.cat(expected).mean().item()], abs=1e-5)
    # the value model starts as a copy of the reward model
    values = {n for n, p in run.model.value_model.named_parameters() if p.requires_grad}
    assert "score.weight" in values and not any(p.requires_grad for p in run.model.rewards.parameters())


def test_reference_of_a_trained_adapter_is_its_frozen_copy(tiny_llama, tmp_path):
    make_model, _ = tiny_llama
    model = get_peft_model(make_model(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    run = trainer(tiny_llama, tmp_path, model, max_steps=3, learning_rate=1e-2)
    run.train()
    kl = logged(run, "kl")
    assert kl[0] == 0.0 and kl[-1] != 0.0  # against the bare base the first would be far from 0
    names = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert any(".default." in n for n in names) and any(".value." in n for n in names)
    assert not any(".reference." in n for n in names)


def test_separate_learning_rates(tiny_llama, tmp_path):
    for peft in (None, lora()):
        run = trainer(tiny_llama, tmp_path, value_learning_rate=0.5, trainer_options={"peft_config": peft})
        named = {id(p): n for n, p in run.model.named_parameters()}
        rates = {named[id(p)]: g["lr"] for g in run.create_optimizer().param_groups for p in g["params"]}
        assert len(rates) == sum(p.requires_grad for p in run.model.parameters())
        for name, rate in rates.items():
            assert rate == (0.5 if "value" in name else 1e-3), name


def test_kl_coefficient_moves_as_its_controller_says(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama,
        tmp_path,
        kl_control="adaptive",
        kl_coef=0.1,
        kl_target=1.0,
        kl_horizon=40,
        max_steps=2,
        kl_rate=0.0,
    )
    run.train()
    # KL of the first rollout is 0: error clipped to −1, n = 4 completions, horizon 40
    assert logged(run, "kl_coef") == pytest.approx([0.1, 0.1 * math.exp(-0.03 * 4 / 40)])


def test_policy_reloads_without_this_package_and_values_with_it(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path)
    run.train()
    run.save_model()
    ids = torch.tensor([[7, 8, 9, 10]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(policy(ids).logits, run.model.policy.eval()(ids).logits)
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    close(value.model(ids).last_hidden_state, run.model.value_model.eval().model(ids).last_hidden_state)
    close(value.score.weight, run.model.value_model.score.weight)


def test_adapter_policy_and_its_value_head_reload(tiny_llama, tmp_path):
    from peft import AutoPeftModelForCausalLM

    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")

    def make(model, **options):
        return PPOTrainer(
            str(model), count_e, config(tmp_path / "out", learning_rate=1e-2),
            Dataset.from_dict({"prompt": PROMPTS}), **options,
        )  # fmt: skip

    run = make(tmp_path / "base", peft_config=lora())
    run.train()
    run.save_model()
    ids = torch.tensor([[7, 8, 9, 10]])
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    close(reloaded.eval()(ids).logits, run.model.policy.eval()(ids).logits)
    again = make(tmp_path / "out", value_model=str(tmp_path / "out" / "value"))
    close(again.model.value_head.linear.weight, run.model.value_head.linear.weight)
    for name, tensor in run.model.policy.state_dict().items():
        if ".value." in name:
            close(again.model.policy.state_dict()[name], tensor)
    assert run.model.value_head.linear.weight.abs().sum() > 0


def test_evaluation_reports_the_metrics_of_a_rollout(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, per_device_eval_batch_size=4,
        trainer_options={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
    )  # fmt: skip
    metrics = run.evaluate()
    assert metrics["eval_kl"] == 0.0 and metrics["eval_score"] == metrics["eval_reward/count_e"]
    assert run.buffer.exhausted and run.kl_control.kl_coef == 0.05


def test_best_checkpoint_is_what_is_left_in_the_model(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3,
        per_device_eval_batch_size=4, load_best_model_at_end=True, metric_for_best_model="kl", greater_is_better=False,
        learning_rate=1e-2, trainer_options={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS})},
    )  # fmt: skip
    run.train()
    best = AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint)
    for name, tensor in best.state_dict().items():
        close(run.model.policy.state_dict()[name], tensor)


def test_evaluation_keeps_the_scale_of_the_rewards(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, reward_normalization="running", reward_clip=0.1)
    raw, ended = {"r": torch.tensor([3.0, 5.0])}, torch.ones(2, dtype=torch.bool)
    close(run.rollouts._shape(raw["r"], ended, training=False), raw["r"])
    assert run.rollouts.reward_moments.count == 0


def test_value_model_is_no_copy_of_a_reward_model_with_another_vocabulary(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|more|>"])
    reward = LlamaForSequenceClassification(make_model(vocab_size=len(other)).config)
    reward.config.num_labels = 1
    reward.score = torch.nn.Linear(32, 1, bias=False)
    run = trainer(
        tiny_llama, tmp_path, reward_funcs=reward, trainer_options={"reward_processing_classes": other}, max_steps=1
    )
    assert run.model.value_model.config.vocab_size == len(tokenizer)
    assert run.model.value_model.score.weight.abs().sum() == 0
    run.train()


def test_reward_models_vocabulary_need_not_hold_the_policys_pad_token(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    policys = copy.deepcopy(tokenizer)
    policys.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    samples = Samples(["hello", "Tell me"], ["a", "bcd"])
    rows = samples.encode(tokenizer)
    reward = LlamaForSequenceClassification(make_model(vocab_size=max(map(max, rows)) + 1).config)
    reward.config.num_labels = 1
    reward.score = torch.nn.Linear(32, 1, bias=False)
    assert reward.config.vocab_size <= policys.pad_token_id
    run = trainer(
        (make_model, policys), tmp_path, reward_funcs=reward, trainer_options={"reward_processing_classes": tokenizer}
    )
    with torch.no_grad():
        (scores,) = run.rollouts.raw_scores(samples, 2).values()
        alone = [reward.score(reward.model(torch.tensor([row])).last_hidden_state[0, -1]) for row in rows]
    close(scores, torch.cat(alone))


def test_an_ensemble_is_a_reward_like_any_other(tiny_llama, tmp_path, reward_model):
    make_model, _ = tiny_llama
    other = copy.deepcopy(reward_model)
    torch.nn.init.normal_(other.model.score.weight, std=2.0)
    ensemble = RewardEnsemble([reward_model, other]).fit([[7, 8, 9], [10, 11], [12]])
    ensemble.save_pretrained(tmp_path / "ensemble")
    scores = []
    for given in (ensemble, str(tmp_path / "ensemble")):
        run = trainer(tiny_llama, tmp_path / "run", reward_funcs=given, max_steps=1)
        run.train()
        samples = Samples(["Tell me", "Please"], [" Paris", " a fox"])
        scores += list(run.rollouts.raw_scores(samples, 2).values())
    ids = samples.encode(run.processing_class)
    alone = torch.cat([ensemble(torch.tensor([row]), torch.tensor([len(row)])) for row in ids])
    for found in scores:
        close(found, alone, rtol=1e-4, atol=1e-5)
