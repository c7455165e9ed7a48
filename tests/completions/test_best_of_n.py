"""Best-of-N: the curve against all subsets, and samples that a killed run does not lose."""

import json
import sys
from itertools import combinations

import pytest
import torch
from datasets import Dataset

from lifecycle_hf.completions import Samples, best_of_n, expected_best, kl_bound
from lifecycle_hf.completions.best_of_n import BestOfN
from lifecycle_hf.data.json_lines import read_samples

close = torch.testing.assert_close
TEXTS = ["Tell me", "The capital", "Please", "Two and", "hello"]
PROMPTS = Dataset.from_dict({"prompt": TEXTS, "extra": [1, 2, 3, 4, 5]})


def test_the_curve_is_the_mean_over_all_subsets():
    draw = torch.Generator().manual_seed(0)
    for size in range(1, 9):
        scores = torch.randint(0, 4, (3, size), generator=draw).double()  # with ties
        gold = torch.rand(3, size, generator=draw, dtype=torch.float64)
        for values in (scores, gold):
            expected = torch.zeros(3, size, dtype=torch.float64)
            for n in range(1, size + 1):
                subsets = list(combinations(range(size), n))
                for row in range(3):
                    best = [max(subset, key=lambda i, row=row: (scores[row, i], -i)) for subset in subsets]
                    expected[row, n - 1] = values[row, best].mean()
            close(expected_best(scores, values), expected)
    close(expected_best(torch.tensor([[2.0, 0.0, 1.0]])), torch.tensor([[1.0, 5 / 3, 2.0]], dtype=torch.float64))


def test_the_bound_of_the_kl_by_hand():
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(1.3862944 - 0.75)


def count_e(prompts, completions, extra):
    assert len(extra) == len(prompts)
    return [float(text.count("e")) for text in completions]


def run(tiny_llama, folder, rewards=count_e, **options):
    make_model, tokenizer = tiny_llama
    options = {"n": 3, "max_completion_length": 8, "batch_size": 2} | options
    return best_of_n(make_model(), tokenizer, PROMPTS, rewards, output_dir=folder, **options)


def test_the_best_is_the_first_of_the_highest_and_all_is_kept(tiny_llama, tmp_path):
    found = run(tiny_llama, tmp_path)
    assert [row["index"] for row in found.rows] == [0, 1, 2, 3, 4] and found.total.shape == (5, 3)
    for row, best in zip(found.rows, found.best, strict=True):
        assert row["scores"]["count_e"] == [text.count("e") for text in row["completions"]] == row["total"]
        assert best == row["total"].index(max(row["total"]))
    assert read_samples(tmp_path / "samples_0.jsonl") == found.rows
    winners = found.winners()
    ended = [row["ended"][i] for row, i in zip(found.rows, found.best, strict=True)]
    assert len(winners) == sum(ended) and set(winners.column_names) == {"prompt", "completion"}


def test_a_killed_run_goes_on_and_gives_the_same(tiny_llama, tmp_path):
    whole = run(tiny_llama, tmp_path / "whole")
    calls = []

    def dies(prompts, completions, extra):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return count_e(prompts, completions, extra)

    dies.__name__ = "count_e"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "cut", dies)
    path = tmp_path / "cut" / "samples_0.jsonl"
    second = json.dumps(whole.rows[2] | {"completions": ["of the killed call"] * 3})
    with path.open("a") as file:
        file.write(f'{second}\n{{"index": 3, "prom')  # as a kill within a write of two rows leaves it
    resumed = run(tiny_llama, tmp_path / "cut", dies)
    assert resumed.rows == whole.rows and calls == [6, 6, 6, 3]


def test_samples_whose_scoring_failed_are_kept_and_used_again(tiny_llama, tmp_path):
    broken = [True]

    def second(prompts, completions, **columns):
        if broken[0]:
            raise OSError("no connection")
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="'second' raised OSError: no connection"):
        run(tiny_llama, tmp_path, [count_e, second])
    kept = [json.loads(line) for line in (tmp_path / "_unscored_rank0.jsonl").read_text().splitlines()]
    assert len(kept) == 6 and set(kept[0]["scores"]) == {"count_e"}
    broken[0] = False
    found = run(tiny_llama, tmp_path, [count_e, second])
    assert [row["completion"] for row in kept] == [text for row in found.rows[:2] for text in row["completions"]]
    assert not (tmp_path / "_unscored_rank0.jsonl").exists()


def test_two_processes_share_the_prompts(tiny_llama, tmp_path):
    parts = [run(tiny_llama, tmp_path, rank=rank, world_size=2).rows for rank in (0, 1)]
    rows = sorted(parts[0] + parts[1], key=lambda row: row["index"])
    assert [row["index"] for row in parts[1]] == [2, 3]
    assert rows == run(tiny_llama, tmp_path / "one").rows


def test_a_held_out_score_is_not_chosen_by():
    rows = [{"prompt": "a", "completions": ["x", "y"], "ended": [True, False], "scores": {"r": [1, 2], "g": [5, 3]}}]
    rows[0]["total"] = [1.0, 2.0]
    found = BestOfN(rows, {"r": 1.0, "g": 0.0})
    curves = found.curves()
    close(curves["score"], torch.tensor([[1.5, 2.0]], dtype=torch.float64))
    close(curves["g"], torch.tensor([[4.0, 3.0]], dtype=torch.float64))
    assert len(found.winners()) == 0  # the best was cut off


def test_a_completion_without_a_stop_token_pays_a_penalty(tiny_llama, monkeypatch, tmp_path):
    stops = list(range(0, 1000, 2))  # half of the vocabulary ends a completion
    monkeypatch.setattr(sys.modules[best_of_n.__module__], "stop_token_ids", lambda *_: stops)
    options = {"max_completion_length": 1}
    without = run(tiny_llama, tmp_path / "0", **options).rows
    found = run(tiny_llama, tmp_path / "5", missing_eos_penalty=5.0, **options)
    assert {ended for row in without for ended in row["ended"]} == {True, False}
    for before, row in zip(without, found.rows, strict=True):
        assert row["completions"] == before["completions"] and row["scores"] == before["scores"]
        paid = [0.0 if ended else 5.0 for ended in row["ended"]]
        assert row["total"] == [score - price for score, price in zip(before["total"], paid, strict=True)]
    assert len(found.winners()) == sum(any(row["ended"]) for row in found.rows)  # no token has five e


def test_a_reward_model_scores_as_it_does_alone(tiny_llama, tmp_path, reward_model):
    make_model, tokenizer = tiny_llama
    found = run(tiny_llama, tmp_path, [reward_model, count_e], reward_weights=[1.0, 0.0])
    row = found.rows[0]
    for text, score in zip(row["completions"], row["scores"]["reward"], strict=True):
        ids = torch.tensor(Samples([row["prompt"]], [text]).encode(tokenizer))
        close(reward_model(ids, torch.tensor([ids.shape[1]])).item(), score, rtol=1e-4, atol=1e-5)
    assert row["total"] == row["scores"]["reward"]


def test_what_can_not_be(tiny_llama, tmp_path):
    run(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match="holds samples made with n=3, and this run has 4"):
        run(tiny_llama, tmp_path, n=4)
    with pytest.raises(ValueError, match="n=0: at least one"):
        run(tiny_llama, tmp_path, n=0)
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1"):
        run(tiny_llama, tmp_path / "new", reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        run(tiny_llama, tmp_path / "new", [])
