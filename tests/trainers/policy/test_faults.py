"""Test training faults: the effect of each with `on_fault`, its message, and the files that are kept."""

import json
import shutil
import threading
import time
import warnings

import pytest
import torch
from peft import LoraConfig
from ppo_setting import count_e, logged, trainer

from lifecycle_hf.completions.rewards import CallableReward, KeptScores, Samples
from lifecycle_hf.trainers.policy.faults import TrainingFault


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def broken_at(run, step, kind):
    """Add an auxiliary loss that is NaN, or has a NaN gradient, in one optimizer step."""

    def loss(model):
        parameter = next(p for p in model.parameters() if p.requires_grad)
        if run.state.global_step + 1 not in step:
            return 0.0 * parameter.sum()
        return parameter.sum() * float("nan") if kind == "loss" else (0.0 * parameter.sum()).sqrt()

    run.add_auxiliary_loss("broken", loss)
    return run


@pytest.mark.parametrize(("kind", "message"), [("loss", "the loss is nan"), ("gradient", "the gradient has norm nan")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_it_reaches_a_weight(tiny_llama, tmp_path, kind, message):
    run = trainer(
        tiny_llama, tmp_path, max_steps=4, ppo_epochs=2, save_strategy="steps", save_steps=2, on_fault="stop"
    )
    broken_at(run, {3}, kind)
    with pytest.raises(TrainingFault, match=rf"step 3 \(update 2\): {message}.*good checkpoint is .*checkpoint-2:"):
        run.train()
    assert all(p.isfinite().all() for p in run.model.parameters())
    healthy = trainer(tiny_llama, tmp_path, max_steps=4, ppo_epochs=2)
    healthy.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert healthy.state.global_step == 4


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_moves_neither_weights_nor_moments(tiny_llama, tmp_path, kind):
    run, seen = trainer(tiny_llama, tmp_path, max_steps=4, weight_decay=0.1, on_fault="skip"), {}
    broken_at(run, {3}, kind)

    class Look(type(run.guard).__mro__[1]):
        def on_step_end(self, args, state, control, **kwargs):
            moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
            seen[state.global_step] = (weights(run), moments)

    run.add_callback(Look())
    with pytest.warns(UserWarning, match="Step 3 is skipped"):
        run.train()
    assert same(seen[2][0], seen[3][0]) and not same(seen[3][0], seen[4][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[2][1], seen[3][1], strict=True))
    assert logged(run, "faults/skipped_steps") == [0.0, 0.0, 1.0, 0.0]


def test_a_gradient_of_overflowing_norm_is_seen_though_clipping_makes_it_nought(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=1)
    run.add_auxiliary_loss("huge", lambda model: 1e25 * next(p for p in model.parameters() if p.requires_grad).sum())
    with pytest.raises(TrainingFault, match="the gradient has norm inf"):
        run.train()


def test_faults_in_a_row_stop_the_run(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=9, on_fault="skip", max_faults=3)
    broken_at(run, {2, 4, 5, 6}, "loss")
    with pytest.raises(TrainingFault, match=r"step 6.*fault 3 in a row \(max_faults\)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()


def test_loss_names_its_bad_part(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_steps=1)
    head = run.model.value_model.score
    head.register_forward_hook(lambda module, inputs, out: out * float("inf") if torch.is_grad_enabled() else out)
    with torch.no_grad():
        head.weight.fill_(1.0)
    with pytest.raises(TrainingFault, match=r"the loss is (nan|inf) \(value: (nan|inf)\)"):
        run.train()


def sharp_model(tiny_llama, token, logit=50.0):
    """A policy that gives one token (almost) all probability."""
    make_model, tokenizer = tiny_llama
    model = make_model()
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_(), model.lm_head.bias.fill_(-logit)
        model.lm_head.bias[token] = logit
    return model


def test_collapsed_policies_stop_the_run_before_they_train_on(tiny_llama, tmp_path):
    _, tokenizer = tiny_llama
    run = trainer(tiny_llama, tmp_path, sharp_model(tiny_llama, 60))
    before = weights(run)
    with pytest.raises(TrainingFault, match="policy has collapsed: its entropy of .* is below min_entropy=0.0001"):
        run.train()
    assert same(before, weights(run))
    run = trainer(tiny_llama, tmp_path, sharp_model(tiny_llama, tokenizer.eos_token_id, 8.0))
    with pytest.raises(TrainingFault, match="policy has collapsed: every completion is a single token"):
        run.train()


def test_answers_of_one_token_may_be_meant(tiny_llama, tmp_path):
    _, tokenizer = tiny_llama
    run = trainer(tiny_llama, tmp_path, sharp_model(tiny_llama, tokenizer.eos_token_id, 8.0), min_entropy=0.0)
    run.train()
    assert run.state.global_step == 2 and logged(run, "completions/length") == [1.0, 1.0]


def test_a_faulty_rollout_is_skipped_with_all_its_steps(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, sharp_model(tiny_llama, 60), on_fault="skip", ppo_epochs=2, max_steps=4, weight_decay=0.1
    )
    before = weights(run)
    with pytest.warns(UserWarning, match="Step 1 is skipped: the policy has collapsed"):
        run.train()
    assert same(before, weights(run))
    assert logged(run, "faults/skipped_steps") == [1.0] * 4


def test_a_rollout_that_is_nan_counts_once_and_leaves_the_kl_control_as_it_was(tiny_llama, tmp_path):
    run = trainer(
        tiny_llama, tmp_path, on_fault="skip", max_faults=2, ppo_epochs=3, max_steps=9, kl_control="adaptive"
    )
    make, made = run.rollouts.make, []

    def second_is_nan(*args, **options):
        batches = make(*args, **options)
        made.append(batches)
        if len(made) == 2:
            run.rollouts.means["kl"] = float("nan")
            for batch in batches:
                batch["logprobs"] = batch["logprobs"] * float("nan")
        return batches

    run.rollouts.make = second_is_nan
    with pytest.warns(UserWarning, match="Step 4 is skipped: the rollout has KL nan"):
        run.train()
    assert logged(run, "faults/skipped_steps") == [0.0] * 3 + [1.0] * 3 + [0.0] * 3
    assert 0 < run.kl_control.kl_coef < 0.05  # lower than 0.05, because two rollouts had a KL near 0
    assert all(p.isfinite().all() for p in run.model.parameters())


def kl_above_limit_from(run, rollout):
    """Give every rollout from this one on (the first is 1) a KL that is too large."""
    make, made = run.rollouts.make, []

    def far(*args, **options):
        made.append(make(*args, **options))
        if len(made) >= rollout:
            run.rollouts.means["kl"] = 99.0
        return made[-1]

    run.rollouts.make = far
    return run


def test_the_checkpoint_named_is_of_a_step_whose_samples_were_good(tiny_llama, tmp_path):
    options = {"max_kl": 9.0, "ppo_epochs": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    run = kl_above_limit_from(trainer(tiny_llama, tmp_path, **options), 3)
    with pytest.raises(TrainingFault, match=r"step 5 \(update 3\).*last good checkpoint is .*checkpoint-2: .*-2\. "):
        run.train()
    assert (tmp_path / "checkpoint-4").is_dir() and run.guard.state_dict()["good_step"] == 2
    resumed = kl_above_limit_from(trainer(tiny_llama, tmp_path, **options), 1)  # resumes within the second rollout
    with pytest.raises(TrainingFault, match=r"step 5 \(update 3\).*last good checkpoint is .*checkpoint-2:"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_that_only_later_samples_could_vouch_for_is_called_doubtful(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, max_kl=9.0, ppo_epochs=2, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingFault, match=r"The last checkpoint .*checkpoint-2 may hold the fault"):
        run.args.max_steps = 4
        kl_above_limit_from(run, 2).train()
    shutil.rmtree(tmp_path / "checkpoint-1"), shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(TrainingFault, match="There is no checkpoint yet"):
        kl_above_limit_from(trainer(tiny_llama, tmp_path, max_kl=9.0), 1).train()


def test_kl_far_over_its_target_stops_the_run(tiny_llama, tmp_path):
    run = trainer(tiny_llama, tmp_path, learning_rate=0.1, max_steps=6, max_kl=1.0)
    with pytest.raises(TrainingFault, match=r"rollout's KL of .* is above 1 \(max_kl\): raise kl_coef"):
        run.train()
    assert max(logged(run, "kl")) <= 1.0  # the rollout with a larger KL is not trained on
    adaptive = trainer(tiny_llama, tmp_path, kl_control="adaptive", kl_target=3.0)
    assert adaptive.args.kl_limit == 30.0 and trainer(tiny_llama, tmp_path).args.kl_limit is None


def test_a_skipped_rollout_is_still_skipped_after_a_resume(tiny_llama, tmp_path):
    def run():
        adapter = {"peft_config": LoraConfig(target_modules=["q_proj"])}
        return trainer(
            tiny_llama, tmp_path, sharp_model(tiny_llama, 60), on_fault="skip", ppo_epochs=4, max_steps=4,
            save_strategy="steps", save_steps=2, trainer_options=adapter,
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run().train()
    resumed = run()
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(before, weights(resumed)) and resumed.guard.in_a_row["rollout"] == 1


def test_a_reward_that_raises_names_its_prompts_and_what_was_scored_is_used_again(tiny_llama, tmp_path):
    calls = {"counted": 0}

    def counted(prompts, completions, **columns):
        calls["counted"] += 1
        return count_e(prompts, completions)

    def judge(prompts, completions):
        raise ConnectionError("the judge is away")

    def run(second):
        return trainer(
            tiny_llama, tmp_path, reward_funcs=[counted, second], max_steps=3, save_strategy="steps", save_steps=1
        )

    with pytest.raises(ValueError, match=r"'judge' raised ConnectionError: the judge is away.*4 prompts.*Tell me"):
        run(judge).train()
    path = tmp_path / "_unscored_rollout_rank0.jsonl"  # a push to the Hub leaves out names with an underscore first
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4 and all(set(row["scores"]) == {"counted"} for row in rows)
    assert [row["scores"]["counted"] for row in rows] == count_e(None, [row["completion"] for row in rows])

    def judge(prompts, completions):
        return [0.0] * len(prompts)

    calls["counted"] = 0
    again = run(judge)
    again.train()
    assert calls["counted"] == 2 and not path.exists()  # three rollouts, the first scored before
    assert logged(again, "reward/counted")[0] == sum(row["scores"]["counted"] for row in rows) / 4


def test_a_reward_that_hangs_is_left_after_its_timeout(tiny_llama, tmp_path):
    release = threading.Event()

    def hanging(prompts, completions):
        release.wait(60)
        return [0.0] * len(prompts)

    run, start = trainer(tiny_llama, tmp_path, reward_funcs=hanging, reward_timeout=0.2), time.monotonic()
    with pytest.raises(ValueError, match=r"'hanging' took longer than 0.2 s \(reward_timeout\).*4 prompts"):
        run.train()
    assert time.monotonic() - start < 20
    release.set()


def test_a_reward_with_a_timeout_runs_as_it_would_without():
    def probe(prompts, completions):
        seen.append(torch.is_grad_enabled())
        return [0.0]

    seen, samples = [], Samples(["a"], ["b"])
    for timeout in (None, 5.0):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                CallableReward(probe, timeout)(samples)
    assert seen == [True, False, True, False]


def test_a_reward_that_exits_its_thread_says_so():
    def leaving(prompts, completions):
        raise SystemExit("no key")

    with pytest.raises(ValueError, match="'leaving' raised SystemExit: no key"):
        CallableReward(leaving, 5.0)(Samples(["a"], ["b"]))


def test_kept_scores_are_whole_or_none_and_only_of_their_own_completions(tmp_path, monkeypatch):
    samples, scores = Samples(["a", "b"], ["line\u2028break \x85", "ü"]), {"r": torch.tensor([1.0, 2.0])}
    kept = KeptScores(tmp_path / "_kept.jsonl")
    kept.write(samples, scores)
    assert torch.equal(kept.read(samples)["r"], scores["r"]) and not kept.read(Samples(["a", "b"], ["x", "ü"]))
    whole = kept.path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):

        def replace(self, target):
            raise OSError("killed")

        patch.setattr(type(kept.path), "replace", replace)
        kept.write(samples, {})
    assert kept.path.read_bytes() == whole and all(path.name.startswith("_") for path in tmp_path.iterdir())
    for broken in (whole[:-5], whole[:40], b"\xff\xfe", b"[1]\n[2]\n", whole.replace(b"2.0", b'"?"')):
        kept.path.write_bytes(broken)
        assert kept.read(samples) == {}


def test_a_score_that_is_no_number_leaves_the_scores_before_it(tiny_llama, tmp_path):
    def wordy(prompts, completions):
        return [0.0, "good", 0.0, 0.0]

    run = trainer(tiny_llama, tmp_path, reward_funcs=[count_e, wordy])
    with pytest.raises(ValueError, match="'wordy' returned good for row 1.*1 of 2 columns of scores are in"):
        run.train()
    rows = [json.loads(line) for line in (tmp_path / "_unscored_rollout_rank0.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(set(row["scores"]) == {"count_e"} for row in rows)


def test_a_reward_is_asked_again_as_often_as_it_may_be(tiny_llama, tmp_path):
    calls = []

    def moody(prompts, completions):
        calls.append(len(prompts))
        if len(calls) % 3:
            raise RuntimeError("not now")
        return [float("nan")] if len(calls) == 1 else [1.0] * len(prompts)

    with pytest.warns(UserWarning, match="not now.*Trying again, 1 times at most"):
        trainer(tiny_llama, tmp_path, reward_funcs=moody, reward_retries=2, max_steps=1).train()
    assert len(calls) == 3
    with pytest.raises(ValueError, match="not now"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tiny_llama, tmp_path, reward_funcs=moody, reward_retries=1, max_steps=1).train()


def test_a_reward_model_that_is_not_finite_stops_before_training(tiny_llama, tmp_path):
    from transformers import LlamaForSequenceClassification

    make_model, _ = tiny_llama
    config = make_model().config
    config.num_labels = 1
    reward = LlamaForSequenceClassification(config)
    with torch.no_grad():
        reward.score.weight.fill_(float("inf"))
    run = trainer(tiny_llama, tmp_path, reward_funcs=reward)
    before = weights(run)
    with pytest.raises(ValueError, match="The reward model 'reward' gave (nan|-?inf) for the completion"):
        run.train()
    assert same(before, weights(run))
