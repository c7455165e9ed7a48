"""Texts as a loss: what it is by hand, which rows come when, and that it serves any trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from ppo_setting import trainer as ppo_trainer

from lifecycle_hf import SFTConfig, SFTTrainer
from lifecycle_hf.trainers.base.capability import CapabilityLoss

TEXTS = Dataset.from_dict({"text": [f"word {i}" + " more" * (i % 3) for i in range(8)]})
PAIRS = Dataset.from_dict({"prompt": ["Tell me a story", "hello"], "completion": [" about a fox", " there"]})


def rows_of(loss, position):
    """The token lists of the batch at `position`."""
    texts, _ = loss.rows.batch(position, None)
    lengths = (texts.prompt_lengths + texts.completion_lengths).tolist()
    return [tuple(row[:n]) for row, n in zip(texts.input_ids.tolist(), lengths, strict=True)]


def test_mean_nll_per_token_by_hand(tiny_llama):
    make_model, tokenizer = tiny_llama
    model, total, count = make_model(), 0.0, 0
    for row in PAIRS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(row["prompt"])["input_ids"])
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))
        count += len(ids) - start
    loss = CapabilityLoss(PAIRS, tokenizer, batch_size=2)(model)
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rows_are_fixed_by_the_seed_and_disjoint_between_ranks(tiny_llama):
    def rows(seed=0, rank=0, world_size=1, positions=range(2)):
        loss = CapabilityLoss(TEXTS, tiny_llama[1], batch_size=2, seed=seed, rank=rank, world_size=world_size)
        return [row for i in positions for row in rows_of(loss, i)]

    assert rows() == rows() != rows(seed=1)
    one, two = rows(rank=0, world_size=2), rows(rank=1, world_size=2)
    assert len(set(one) | set(two)) == 8  # an epoch of two ranks is each row once
    alone = rows(positions=range(4))
    assert one[:2] + two[:2] + one[2:] + two[2:] == alone


def test_a_resumed_loss_goes_on_with_the_next_rows(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    whole, resumed = (CapabilityLoss(TEXTS, tokenizer, batch_size=3) for _ in range(2))
    values = [whole(model).item() for _ in range(5)]
    resumed.load_state_dict({"position": 3})
    assert [resumed(model).item() for _ in range(2)] == values[3:] and len(set(values)) == 5


def test_what_holds_nothing_to_learn_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="the capability dataset has no row with a token to predict"):
        CapabilityLoss(TEXTS, tiny_llama[1], max_length=1)
    with pytest.raises(ValueError, match="batch_size=0"):
        CapabilityLoss(TEXTS, tiny_llama[1], batch_size=0)


def test_mixed_into_a_trainer_it_resumes_with_it(tiny_llama, tmp_path):
    def run():
        args = SFTConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
            save_steps=2, report_to="none", disable_tqdm=True, learning_rate=1e-2, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(tiny_llama[0](), args=args, train_dataset=PAIRS, processing_class=tiny_llama[1])
        trainer.add_auxiliary_loss("capability", CapabilityLoss(TEXTS, tiny_llama[1], batch_size=3), 0.5)
        return trainer

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.stateful["loss_capability"].position == 8
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_beside_other_roles_on_one_base_it_is_the_policys(tiny_llama, tmp_path):
    seen, peft = [], LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    run = ppo_trainer(tiny_llama, tmp_path, max_steps=1, trainer_options={"peft_config": peft})
    loss = CapabilityLoss(TEXTS, tiny_llama[1])

    def look(policy):
        seen.append(run.model.shared.role_in_force)
        return loss(policy)

    run.add_auxiliary_loss("capability", look)
    run.train()
    assert seen == [run.model.policy_role] and run.model.value == "adapter"
