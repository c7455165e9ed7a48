"""SFT on a stream: the same training as on the same rows in memory, and unusable rows counted as they come."""

import warnings

import pytest
from datasets import Dataset, IterableDataset
from trainer_setting import TEXTS, stage

from lifecycle_hf import SFTConfig, SFTTrainer

GOOD, EMPTY, HALF = TEXTS[0], {"prompt": "a", "completion": ""}, {"prompt": None, "completion": "b"}


def sft(tiny_llama, tmp_path, data, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 2} | options
    return stage(SFTTrainer, SFTConfig, tiny_llama[0](), data, tiny_llama, tmp_path, options)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def losses(run):
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_stream_trains_as_the_rows_in_memory(tiny_llama, tmp_path):
    """The unusable row is skipped in both, once in each epoch. No shuffling, since a stream is not shuffled."""
    rows = [*TEXTS.to_list()[:3], EMPTY]
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        whole = sft(tiny_llama, tmp_path, Dataset.from_list(rows), train_sampling_strategy="sequential")
    with pytest.warns(UserWarning, match=r"1 of the first 4 rows can't be used \(1 empty completion\)"):
        streamed = losses(sft(tiny_llama, tmp_path, stream(rows)))
    assert streamed == pytest.approx(losses(whole), abs=1e-6) and len(streamed) == 2


def test_unusable_rows_are_counted_at_powers_of_ten(tiny_llama, tmp_path):
    """Rows 0, 2, 4, ... can't be used; several passes over the stream count them once."""
    rows = [row for good in TEXTS.to_list() * 2 for row in (EMPTY if len(good["prompt"]) else GOOD, good)]
    rows[2] = HALF
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = sft(tiny_llama, tmp_path, stream(rows), max_steps=12)
        run.train()
    told = [str(w.message) for w in caught if "rows can't be used" in str(w.message)]
    assert told == [
        "train_dataset: 1 of the first 1 rows can't be used (1 empty completion). They are dropped.",
        "train_dataset: 10 of the first 19 rows can't be used (9 empty completion, 1 empty prompt). They are dropped.",
    ]


def test_streams_that_stop_the_run(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="is streamed and has no length, so set max_steps"):
        sft(tiny_llama, tmp_path, stream([GOOD]), max_steps=-1)
    with pytest.raises(ValueError, match="the first is row 1. strict_data is on"):
        sft(tiny_llama, tmp_path, stream([GOOD, EMPTY]), strict_data=True).train()
    with (
        pytest.warns(UserWarning, match="empty completion"),
        pytest.raises(ValueError, match="train_dataset: no row of the stream is usable"),
    ):
        sft(tiny_llama, tmp_path, stream([EMPTY] * 3))
    with (
        pytest.warns(UserWarning, match="empty completion"),
        pytest.raises(ValueError, match="1000 of 1000 rows can't be used.*No row is left"),
    ):
        sft(tiny_llama, tmp_path, stream([EMPTY] * 1001))
    with pytest.raises(ValueError, match="misspelt 'prompt'"):
        sft(tiny_llama, tmp_path, stream([{"promt": "a", "completion": "b"}]))


def test_held_out_data_may_be_streamed(tiny_llama, tmp_path):
    def held_out(data):
        return sft(tiny_llama, tmp_path, TEXTS, trainer_options={"eval_dataset": data}).evaluate()["eval_loss"]

    assert held_out(stream(TEXTS.to_list())) == pytest.approx(held_out(TEXTS), abs=1e-6)
