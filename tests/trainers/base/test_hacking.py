"""Test the alarm for reward hacking: its metrics by hand, its findings, and both on recorded runs of the toy world."""

import gzip
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from ppo_setting import count_e, logged, trainer

from lifecycle_hf.trainers.base.hacking import HackingDetector, RolloutLook, look_at

RECORDED = Path(__file__).parents[2] / "fixtures" / "rollouts" / "toyworld_ppo.json.gz"


def test_shares_of_texts_by_hand():
    texts = ["No.", "No.", "It is 4.", "It is 5."]
    look = look_at(["a", "b", "c", "d"], texts, [2, 2, 4, 4], [1.0, 1.0, 2.0, 4.0], {})
    assert (look.prompts, look.distinct, look.most_common) == (4, 3 / 4, 1 / 2)
    assert look.distinct_first_half == 2 / 4  # 22 characters / 4 texts / 2: the first 3, "No." and "It "
    assert look.shared == {"No.": 1 / 2} and look.length == 3.0 and look.score == 2.0
    assert look.score_error == pytest.approx(math.sqrt(6 / 4) / 2)  # deviations -1, -1, 0, 2


def test_several_completions_of_a_prompt_may_be_alike():
    """An answer that is repeated for its own prompt is no collapse; the same for two prompts is one."""
    prompts, numbers = ["a"] * 2 + ["b"] * 2, [1] * 4
    own = look_at(prompts, ["A", "A", "B", "B"], numbers, numbers, {})
    assert (own.distinct, own.most_common, own.shared) == (1.0, 0.5, {})
    one = look_at(prompts, ["A", "A", "A", "B"], numbers, numbers, {})
    assert (one.distinct, one.most_common) == (2 / 3, 3 / 4)  # pairs: (a, A), (b, A), (b, B)
    assert one.shared == {"A": 3 / 4} and "reward/length_correlation" not in one.metrics  # both are constant


def test_correlations_are_pearsons():
    scores, lengths, gold = [0.5, 2.0, -1.0, 3.0], [3, 9, 4, 5], [1.0, 0.0, 0.5, 0.25]
    look = look_at(list("abcd"), list("wxyz"), lengths, scores, {"gold": gold})
    assert look.metrics["reward/length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    assert look.metrics["reward/gold/correlation"] == pytest.approx(np.corrcoef(scores, gold)[0, 1])
    assert look.held_out == {"gold": 0.4375} and look.held_out_error["gold"] == pytest.approx(np.std(gold) / 2)


def look(texts, score=0.0, length=10.0, correlation=0.0, **held_out):
    """What a rollout with one prompt for each text looks like; every error of a mean is 0.1."""
    base = look_at(list(map(str, range(len(texts)))), texts, [1] * len(texts), [0.0] * len(texts), {})
    numbers = {"score": score, "score_error": 0.1, "length": length, "length_correlation": correlation}
    errors = dict.fromkeys(held_out, 0.1)
    return RolloutLook(**(vars(base) | numbers | {"held_out": held_out, "held_out_error": errors}))


def told(looks, detector=None):
    """(number of the rollout, sentence) of all findings."""
    detector = detector or HackingDetector()
    return [(i, said) for i, item in enumerate(looks, 1) for said in detector.check(item, 8 * (i - 1))]


DIFFERENT = [f"answer {i}" for i in range(20)]


def mostly(text, n):
    return [text] * n + DIFFERENT[n:]


def test_answers_that_were_alike_at_the_start_may_be_alike():
    assert told([look(["yes"] * 12 + ["no"] * 8)] * 3 + [look(["no"] * 14 + ["yes"] * 6)] * 9) == []
    refusals = [look(mostly("I can't.", 2))] * 3 + [look(mostly("I can't.", n)) for n in (4, 8, 12)]
    assert told(refusals) == []


def test_a_new_text_for_many_prompts_is_told_once_and_again_when_it_is_twice_as_bad():
    shares = [look(mostly("It is blue.", n)) for n in (0, 1, 0, 2, 3, 5, 3, 5, 6, 11)]
    found = told(shares)
    # of 20 prompts, in the mean of two rollouts: (3 + 5) / 2, then (6 + 11) / 2
    assert [i for i, _ in found] == [6, 10]
    assert found[1][1] == '55% of the completions are one text that no two prompts shared at the start: "It is blue."'
    two = told([look(DIFFERENT)] * 3 + [look(["A"] * 4 + ["B"] * 3 + DIFFERENT[7:])])
    assert two == [
        (4, '35% of the completions are 2 texts that no two prompts shared at the start; 20% are this one: "A"')
    ]


def test_all_prompts_getting_the_usual_refusal_is_a_collapse():
    found = told([look(mostly("I can't.", 4))] * 3 + [look(mostly("I can't.", n)) for n in (14, 15, 16, 18)])
    assert found == [
        (
            6,  # 5 of 20 texts are different: less than a third of 17; 3 of 20 are not half of that
            "only 25% of the completions are different ones, 85% at the start; 80% are one text, 20% at the start: "
            '"I can\'t."',
        )
    ]


@pytest.mark.parametrize(
    ("scores", "gold", "found"),
    [
        ((0, 0, 0, 2, 2, 2), (1, 1, 1, 0, 0, 0), [6]),
        ((0, 0, 0, 2, 2, 2), (1, 1, 1, 1, 1, 1), []),
        ((2, 2, 2, 0, 0, 0), (1, 1, 1, 0, 0, 0), []),  # both fall
        ((0, 0, 0, 0.2, 0.2, 0.2), (1, 1, 1, 0, 0, 0), []),  # 0.2 < 3 · √2 · 0.1 / √3 = 0.245
        ((0, 0, 0, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 0, 0, 0), [6]),
    ],
)
def test_a_held_out_score_that_falls_as_the_trained_one_rises(scores, gold, found):
    looks = [look(DIFFERENT, score=s, gold=g) for s, g in zip(scores, gold, strict=True)]
    assert [i for i, _ in told(looks)] == found
    if scores[-1] == 2 and found:
        said = "since step 16 the trained score rose from 0 to 2, and the held-out score 'gold' fell from 1 to 0"
        assert told(looks)[0][1] == said


def test_length_is_told_only_when_it_grows_and_pays():
    start = [look(DIFFERENT, correlation=0.1)] * 3
    pays = look(DIFFERENT, length=14.0, correlation=0.9)
    (first,) = told([*start, pays, pays, pays, pays])
    # Means of three rollouts, the fourth: 11.3 tokens; the fifth: 12.7, and a correlation of (0.1 + 0.9 + 0.9) / 3.
    # atanh 0.633 - atanh 0.1 = 0.646 is above 3 errors of √(2 / 3 / (20 - 3)) = 0.198.
    said = "completions have 13 tokens, 10 at the start, and the trained score is correlated with their length by 0.63"
    assert first == (5, f"{said}, 0.10 at the start")
    for other in (look(DIFFERENT, length=14.0), look(DIFFERENT, correlation=0.9), look(DIFFERENT, 0.0, 14.0, -0.9)):
        assert told([*start, *[other] * 4]) == []
    assert told([*start, *[look(DIFFERENT, 0.0, 14.0, math.nan)] * 4]) == []


def test_a_detector_continues_from_its_state():
    looks = [look(mostly("It is blue.", n), score=n, gold=-n) for n in (0, 1, 0, 2, 3, 5, 3, 5, 6, 11)]
    whole = told(looks)
    for cut in range(len(looks)):
        first, second = HackingDetector(), HackingDetector()
        before = told(looks[:cut], first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [(i + 1, said) for i in range(cut, len(looks)) for said in second.check(looks[i], 8 * i)]
        assert before + after == whole and len(whole) > 2


# In the trainer


def test_a_reward_of_weight_0_is_logged_and_not_trained_on(tiny_llama, tmp_path):
    def gold(prompts, completions):
        return [float(len(text)) for text in completions]

    def run(name, **options):
        made = trainer(tiny_llama, tmp_path / name, **options)
        made.train()
        return made, [p.detach().clone() for p in made.model.parameters()]

    (plain, without), (watched, with_held_out) = (
        run("plain"), run("watched", reward_funcs=[gold, count_e], reward_weights=[0.0, 1.0]),
    )  # fmt: skip
    assert all(map(torch.equal, without, with_held_out)) and logged(plain, "score") == logged(watched, "score")
    assert len(logged(watched, "reward/gold")) == 2 and min(logged(watched, "reward/gold")) > 0
    assert all(-1 <= x <= 1 for x in logged(watched, "reward/gold/correlation"))


def test_a_value_function_starts_from_no_held_out_reward_model(tiny_llama, tmp_path):
    from transformers import LlamaForSequenceClassification

    make_model, _ = tiny_llama
    config = make_model().config
    config.num_labels = 1
    held_out, trained = LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)
    run = trainer(tiny_llama, tmp_path, reward_funcs=[held_out, trained], reward_weights=[0.0, 1.0])
    assert torch.equal(run.model.value_model.score.weight, trained.score.weight)


@pytest.fixture
def alike(tiny_llama):
    """Make a run of 20 prompts in which the answers of step 3 are all one text that is new."""

    def make(folder, **options):
        run = trainer(
            tiny_llama, folder, dataset=Dataset.from_dict({"prompt": [f"Tell me {i}" for i in range(20)]}),
            per_device_train_batch_size=20, ppo_epochs=2, max_steps=10, max_completion_length=3, **options,
        )  # fmt: skip
        sample = run.rollouts.sampler.sample

        def one_text(*args):
            samples, ids = sample(*args)
            if run.state.global_step == 6:
                samples.texts[:] = ["It is blue."] * 20
            return samples, ids

        run.rollouts.sampler.sample = one_text
        return run

    return make


WARNING = r'Step 6: 100% of the completions are one text .*: "It is blue."\. Raise kl_coef or lower learning_rate'


def test_a_warning_is_given_and_the_run_goes_on(alike, tmp_path):
    run = alike(tmp_path)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        run.train()
    assert sum("It is blue" in str(item.message) for item in caught) == 2  # new repeats, and few different texts
    assert run.state.global_step == 10
    assert logged(run, "completions/most_common")[3] == 1.0 == 20 * logged(run, "completions/distinct")[3]
    assert logged(run, "completions/new_repeats") == [0.0, 1.0, 0.0]  # from the third rollout on


def test_stop_ends_the_run_with_a_checkpoint_from_which_it_goes_on(alike, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1}
    run = alike(tmp_path / "run", on_hacking="stop", **options)
    with pytest.warns(UserWarning, match=rf"{WARNING}.*Training stops \(on_hacking\); checkpoint-7 holds the run"):
        run.train()
    assert run.state.global_step == 7
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-7"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole = alike(tmp_path / "whole")
        whole.train()
    shutil.copytree(tmp_path / "run" / "checkpoint-7", tmp_path / "kept")
    resumed = alike(tmp_path / "run", on_hacking="stop", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what was told is not told again
        resumed.train(resume_from_checkpoint=str(tmp_path / "kept"))
    assert resumed.state.global_step == 10
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    states = [json.dumps(run.alarm.detector.state_dict()) for run in (resumed, whole)]  # of text, as NaN ≠ NaN
    assert states[0] == states[1]


# On recorded runs (tests/fixtures/README.md)


def recorded():
    """{run: its rollouts as arguments of `look_at` and their steps}."""
    kept = json.loads(gzip.decompress(RECORDED.read_bytes()))
    for name, run in kept["runs"].items():
        rollouts = []
        for row in run["rollouts"]:
            prompts, texts = ([kept[kind][i] for i in row[kind]] for kind in ("prompts", "completions"))
            rollouts.append((row["step"], (prompts, texts, row["lengths"], row["scores"]), row["gold"]))
        yield name, rollouts


FIRST = {  # by run: the step of the first finding by completions, and by a held-out score
    "bad0": (112, 136), "bad1": (216, 224), "bad2": (88, 96),
    "tuned0": (None, None), "tuned1": (None, None), "tuned2": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("held_out", [False, True])
def test_recorded_runs_that_go_bad_are_told_and_good_ones_are_not(held_out):
    first, repeats = dict.fromkeys(FIRST), {}
    for name, rollouts in recorded():
        detector, repeats[name] = HackingDetector(), [0.0]
        for step, columns, gold in rollouts:
            seen = look_at(*columns, {"gold": gold} if held_out else {})
            found = [said for said in detector.check(seen, step) if ("held-out" in said) == held_out]
            first[name] = step if found and first[name] is None else first[name]
            if detector.start:
                repeats[name].append(sum(detector.new_repeats(seen).values()))
    assert first == {name: steps[held_out] for name, steps in FIRST.items()}
    most = {name: max(shares) for name, shares in repeats.items()}  # the threshold is 0.1
    assert max(most[name] for name in most if "tuned" in name) <= 0.05
    assert min(most[name] for name in most if "bad" in name) >= 0.15
