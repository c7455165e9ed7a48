"""Test that a KL budget is kept: an update that exceeds it is undone."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig
from ppo_setting import count_e, logged, trainer

from lifecycle_hf.trainers.base.callbacks import TaxMonitor
from lifecycle_hf.trainers.base.metrics import MetricAccumulator

BUDGET = {"kl_control": "budget", "kl_budget": 0.5, "kl_coef": 0.0}


def train(run, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run.train(**options)
    return run


def measured(run, rollouts=32):
    """Return the mean KL of the policy on new samples, and the deviation of that mean."""
    torch.manual_seed(1)
    values, rows = [], [run.train_dataset[i] for i in range(8)]
    for _ in range(rollouts):
        run.rollouts.make(rows, MetricAccumulator())
        values.append(run.rollouts.means["kl"])
    values = torch.tensor(values)
    return values.mean().item(), values.std().item() / math.sqrt(rollouts)


def test_a_run_ends_within_its_budget(tiny_llama, tmp_path):
    options = {"max_steps": 24, "ppo_epochs": 2, "learning_rate": 0.03, "per_device_train_batch_size": 8}
    free = train(trainer(tiny_llama, tmp_path, kl_coef=0.0, **options))
    assert measured(free)[0] > 1.0  # the KL without a budget
    run = train(trainer(tiny_llama, tmp_path, **options, **BUDGET))
    (end,) = logged(run, "kl_budget/kl")
    assert end <= 0.5 and sum(logged(run, "kl_budget/rejected")) > 0
    kl, error = measured(run)
    one_rollout = error * math.sqrt(32)  # of the eight completions on which the weights were accepted
    assert kl <= 0.5 + 3 * one_rollout
    assert kl < measured(free)[0] / 2


def with_kl(run, values, then=lambda: None):
    """Give the rollouts these KLs in turn and call `then` at each; return the weights at each rollout."""
    make, values, made = run.rollouts.make, list(values), []

    def told(*args, **options):
        batches = make(*args, **options)
        run.rollouts.means["kl"] = values[len(made)]
        made.append({name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad})
        then()
        return batches

    run.rollouts.make = told
    return made


def test_an_update_above_the_budget_is_taken_back_with_beta_raised(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=3, **BUDGET)
    made = with_kl(run, [0.0, 0.4, 2.5, 0.6, 0.1])
    with pytest.warns(UserWarning, match=r"Step 2: .* taken back, its KL of 2.5 .*kl_budget=0.5; the KL is 0.4 again"):
        run.train()
    policy = [name for name in made[0] if name.startswith("policy.")]
    assert any(not torch.equal(made[1][n], made[2][n]) for n in policy)
    assert all(torch.equal(made[1][n], made[3][n]) for n in policy)  # the rollout that was made again
    assert any(not torch.equal(made[1][n], made[3][n]) for n in made[0] if n not in policy)  # the critic is not undone
    assert logged(run, "kl_budget/rejected") == [0.0, 0.0, 1.0, 0.0]
    assert logged(run, "kl_coef") == pytest.approx([0.0, 0.0, 0.1 * 2.0])  # kl_rate × (2.5 − 0.5)
    assert logged(run, "kl_budget/kl") == [0.1] and run.budget.kl == 0.1


def test_the_last_update_is_measured_and_taken_back_too(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, **BUDGET)
    made = with_kl(run, [0.0, 0.3, math.nan])
    train(run)
    here = dict(run.model.named_parameters())
    assert all(torch.equal(made[1][n], here[n]) for n in made[1] if n.startswith("policy."))
    assert logged(run, "kl_budget/kl") == [0.3] and logged(run, "kl_budget/rejected") == [0.0, 0.0, 1.0]


def test_of_adapters_only_the_policys_goes_back(tiny_llama, tmp_path):
    """Policy and value train as two adapters of one base; the weights at 0.4 are those at 2.5 taken back."""
    peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
    run = trainer(tiny_llama, tmp_path, max_steps=3, trainer_options=peft, **BUDGET)
    logits, ids = [], torch.arange(10, 20)[None]
    made = with_kl(run, [0.0, 0.4, 2.5, 0.6, 0.1], lambda: logits.append(run.model.policy(ids).logits.detach()))
    train(run)
    policy = [name for name in made[0] if ".policy." in name]
    value = [name for name in made[0] if name not in policy]
    assert len(policy) == 8 and any(".value." in name for name in value)
    assert any(not torch.equal(made[1][n], made[2][n]) for n in policy)
    assert all(torch.equal(made[1][n], made[3][n]) for n in policy)
    assert torch.equal(logits[1], logits[3]) and not torch.equal(logits[1], logits[2])
    assert all(torch.equal(made[2][n], made[3][n]) for n in value)
    assert any(not torch.equal(made[1][n], made[3][n]) for n in value if ".value." in n)
    assert run.budget.kept.keys() == set(policy)


def test_scores_of_a_rollout_that_is_taken_back_leave_no_trace_in_their_scale(tiny_llama, tmp_path):
    scores = []

    def rewards(prompts, completions):
        scores.append([float(len(scores) + i) for i in range(len(prompts))])  # different in each rollout
        return scores[-1]

    run = trainer(tiny_llama, tmp_path, reward_funcs=rewards, reward_normalization="running", **BUDGET)
    with_kl(run, [0.0, 3.0, 0.2, 0.1])
    train(run)
    trained = torch.tensor([scores[0], scores[2]])  # the second was rejected, the last is the measurement at the end
    moments = run.rollouts.reward_moments
    assert len(scores) == 4 and moments.count == trained.numel()
    assert moments.mean == trained.mean().item() and moments.std == trained.std(correction=0).item()


@pytest.mark.parametrize("stop", [4, 5])  # between two updates, and within one
def test_a_resumed_run_takes_back_the_same(tiny_llama, tmp_path, stop):
    def run():
        return trainer(
            tiny_llama, tmp_path, max_steps=8, ppo_epochs=2, learning_rate=0.05, save_strategy="steps",
            save_steps=stop, **BUDGET,
        )  # fmt: skip

    whole = train(run())
    resumed = train(run(), resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert sum(logged(whole, "kl_budget/rejected")) > 0
    for name in ("kl_budget/rejected", "kl_coef", "kl_budget/kl"):
        assert logged(resumed, name) == logged(whole, name)


def test_what_can_not_be_kept_is_refused(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, **BUDGET)
    with_kl(run, [3.0])
    with pytest.raises(ValueError, match="starts with a KL of 3 nats to the reference, above kl_budget=0.5"):
        run.train()
    with pytest.raises(ValueError, match="kl_control='budget' and kl_budget=None"):
        trainer(tiny_llama, tmp_path, kl_control="budget")
    with pytest.raises(ValueError, match="kl_control='fixed' and kl_budget=2.0"):
        trainer(tiny_llama, tmp_path, kl_budget=2.0)
    with pytest.raises(ValueError, match="kl_coef=2.0 is above kl_coef_max=1.0"):
        trainer(tiny_llama, tmp_path, **(BUDGET | {"kl_coef": 2.0}))
    run.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="does not run on DeepSpeed and FSDP: use DDP"):
        type(run.budget)(run)


def test_scores_are_asked_for_once_per_rollout_that_is_made(tiny_llama, tmp_path):
    calls = []

    def counted(prompts, completions):
        calls.append(len(prompts))
        return count_e(prompts, completions)

    run = trainer(tiny_llama, tmp_path, reward_funcs=counted, **BUDGET)
    with_kl(run, [0.0, 3.0, 0.0, 0.0])
    train(run)
    assert calls == [4] * 4  # two updates, one made again, and the measurement at the end


def test_the_table_is_of_the_weights_that_are_kept(tiny_llama, tmp_path):
    def metrics(model, tokenizer):
        return {"sum": sum(p.double().sum().item() for p in model.parameters())}

    monitor = TaxMonitor(metrics, None, {"sum": True})
    run = trainer(tiny_llama, tmp_path, trainer_options={"callbacks": [monitor]}, **BUDGET)
    with_kl(run, [0.0, 0.3, math.nan])  # the last update is undone at the end of training
    train(run)
    assert float(run.tax_report.after["sum"]) == metrics(run.model.policy, None)["sum"]
