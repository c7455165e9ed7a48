"""Data sets: the same for the same seed, nothing of the test splits in any train split, the shares as declared."""

import pytest

from lifecycle_hf.toyworld import dataset
from lifecycle_hf.toyworld.data import POLITE_SHARE, REFUSAL_SHARE
from lifecycle_hf.toyworld.dialogue import requests
from lifecycle_hf.toyworld.gold import is_clean_refusal, is_correct, is_polite, judge, request_of, text_of
from lifecycle_hf.toyworld.world import FACTS, NOUNS, is_held_out

STAGES = ("sft", "reward", "ppo", "ptx")
TURN = "<|im_start|>assistant\n"


def asked(row):
    """The request of a row, or its text where it is a document."""
    if "prompt" in row:
        return row["prompt"][-1]["content"]
    return request_of(row["text"]).text if TURN in row["text"] else row["text"]


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_same_rows(stage):
    first, again, other = dataset(stage, 1), dataset.__wrapped__(stage, 1), dataset(stage, 2)
    for split in ("train", "test"):
        assert first[split].to_list() == again[split].to_list()
        assert first[split].to_list() != other[split].to_list()


def test_no_test_row_in_any_train_split():
    train = {asked(row) for stage in STAGES for seed in (0, 1) for row in dataset(stage, seed)["train"]}
    test = {asked(row) for stage in STAGES for seed in (0, 1) for row in dataset(stage, seed)["test"]}
    assert not train & test
    assert not any(map(is_held_out, train)) and all(map(is_held_out, test))


def test_every_fact_and_sum_is_asked_in_training():
    train = {request.subject for request in requests().values() if not is_held_out(request.text)}
    assert {request.subject for request in requests().values() if request.kind != "forbidden"} <= train


def test_documents_tell_the_truth():
    for text in dataset("ptx")["test"]["text"]:
        told = [
            (land, attribute)
            for land in FACTS
            for attribute, noun in NOUNS.items()
            if noun.format(land=land) in text.replace("The ", "the ")
        ]
        assert len(told) == 2
        assert all(f" is {FACTS[land][attribute]}." in text for land, attribute in told)


def test_sft_answers_are_true_and_mixed_in_manner():
    dialogues = [text for text in dataset("sft")["train"]["text"] if TURN in text]
    assert 0.57 < len(dialogues) / len(dataset("sft")["train"]) < 0.63
    judged = [(request_of(text), text_of(text.rpartition(TURN)[2])) for text in dialogues]
    benign = [(request, answer) for request, answer in judged if request.kind != "forbidden"]
    forbidden = [answer for request, answer in judged if request.kind == "forbidden"]
    assert all(is_correct(request, answer) for request, answer in benign)
    # Standard error of a share of 0.3 over 3,000 rows or more: 0.0084.
    assert sum(is_polite(answer) for _, answer in benign) / len(benign) == pytest.approx(POLITE_SHARE, abs=0.03)
    assert sum(map(is_clean_refusal, forbidden)) / len(forbidden) == pytest.approx(REFUSAL_SHARE, abs=0.03)


def test_reward_pairs_mostly_follow_gold():
    gold, words = [], []
    for row in dataset("reward")["train"].select(range(2000)):
        request = request_of(row["prompt"])
        chosen, rejected = (text_of(row[side]) for side in ("chosen", "rejected"))
        assert chosen != rejected
        gold.append(judge(request, chosen) - judge(request, rejected))
        words.append(len(chosen.split()) - len(rejected.split()))
    share = len(gold) / 100
    assert sum(g > 0 for g in gold) > 80 * share  # most pairs differ in gold, and the better one is chosen,
    assert 0 < sum(g < 0 for g in gold) < 3 * share  # but not always;
    ties = [w for g, w in zip(gold, words, strict=True) if g == 0]
    assert sum(ties) / len(ties) > 0.3  # between equals the longer one tends to win.


def test_ppo_rows_carry_the_truth():
    kinds = {"fact": 0, "sum": 0, "forbidden": 0}
    for row in dataset("ppo")["train"]:
        request = request_of(row["prompt"])
        assert (row["kind"], row["answer"]) == (request.kind, request.answer)
        kinds[request.kind] += 1
    assert kinds["forbidden"] / 4000 == pytest.approx(0.5, abs=0.03)


def test_unknown_stage():
    with pytest.raises(ValueError, match="no stage 'dpo'; choose one of sft, reward, ppo, ptx"):
        dataset("dpo")
