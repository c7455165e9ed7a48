"""SFT on a mixture of tasks: loss on the answer only, resuming, ranks and workers, packing."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from trainer_setting import stage

from lifecycle_hf import InstructionMixture, InstructionTask, SFTConfig, SFTTrainer


@pytest.fixture
def mixture():
    """Three tasks of 5, 10 and 20 rows; the answers say the task."""
    sizes = {"red": 5, "blue": 10, "green": 20}
    rows = {name: [{"prompt": f"{n} ?", "completion": name} for n in range(size)] for name, size in sizes.items()}
    return InstructionMixture([InstructionTask(name, made) for name, made in rows.items()], system_prompt="Tell.")


def sft(tiny_llama, folder, data, **options):
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2} | options
    return stage(SFTTrainer, SFTConfig, tiny_llama[0](), data, tiny_llama, folder, options)


def numbers(rows):
    return [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows]


def test_loss_is_on_the_answer_only(tiny_llama, tmp_path, mixture):
    trainer, tokenizer = sft(tiny_llama, tmp_path, mixture.stream()), tiny_llama[1]
    batch = next(iter(trainer.get_train_dataloader()))
    for labels, ids, row in zip(batch["labels"], batch["input_ids"], mixture.dataset(2), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == row["completion"][0]["content"] + "<eos>"
        assert tokenizer.decode(ids).startswith(
            f"<bos><|system|>Tell.<|user|>{row['prompt'][1]['content']}<|assistant|>"
        )


def test_a_resumed_run_is_the_same_to_the_bit(tiny_llama, tmp_path, mixture):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = sft(tiny_llama, tmp_path, mixture.stream(), **options)
    whole.train()
    resumed = sft(tiny_llama, tmp_path, mixture.stream(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    start = tiny_llama[0]().state_dict()
    for (name, expected), found in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(found, expected), name
    assert any(not torch.equal(found, start[name]) for name, found in whole.model.state_dict().items())


def test_ranks_share_the_stream(mixture):
    """As accelerate and as datasets divide it: nothing twice, nothing left out."""
    whole = numbers(mixture.stream(40))
    shards = [IterableDatasetShard(mixture.stream(40), batch_size=4, num_processes=2, process_index=r) for r in (0, 1)]
    first, second = map(numbers, shards)
    assert [*first[:4], *second[:4], *first[4:8]] == whole[:12] and len(first) == len(second) == 20
    nodes = [numbers(split_dataset_by_node(mixture.stream(40), rank, 2)) for rank in (0, 1)]
    assert nodes == [whole[::2], whole[1::2]]


def test_workers_draw_nothing_twice(mixture):
    loader = DataLoader(mixture.stream(40), batch_size=None, num_workers=2)
    assert numbers(loader) == numbers(mixture.stream(40))


@pytest.mark.parametrize("streamed", [False, True])
def test_packing_keeps_the_weights(tiny_llama, tmp_path, mixture, streamed):
    """Packed rows hold every drawn example once, whatever their order."""
    data, tokenizer = (mixture.stream(200) if streamed else mixture.dataset(200)), tiny_llama[1]
    packed = list(sft(tiny_llama, tmp_path, data, packing=True, max_length=128).train_dataset)
    assert len(packed) < 100
    answers = Counter()
    for row in packed:
        parts = tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != -100])
        answers.update(parts.removesuffix("<eos>").split("<eos>"))
    assert answers == Counter(answer for _, answer in numbers(mixture.dataset(200)))
