"""A micro-step makes the host wait for nothing that a GPU computes, so its kernels are queued ahead."""

import pytest
import torch
from host_syncs import HostSyncs
from peft import LoraConfig
from preference_setting import trainer as preference_trainer
from trainer_setting import MAKE as MAKE_EACH
from trainer_setting import TEXTS

from lifecycle_hf import ORPOTrainer

MAKE = MAKE_EACH | {"orpo": lambda *given, **options: preference_trainer(*given, ORPOTrainer, **options)}
LORA = {"trainer_options": {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}}
PTX = {"trainer_options": {"ptx_dataset": TEXTS}, "ptx_coef": 0.5}
CASES = {
    "dpo": ("dpo", {}),
    "dpo, LoRA": ("dpo", LORA),
    "dpo, PTX": ("dpo", PTX),
    "dpo, EWC": ("dpo", {"trainer_options": {"ptx_dataset": TEXTS}, "ewc_coef": 1.0}),
    "orpo on prompts": ("orpo", {"nll_on_prompt": True}),
    "kto": ("kto", {}),
    "kto, running mean": ("kto", {"reference_point": "running_mean"}),
    "ppo": ("ppo", {}),
    "ppo, LoRA, entropy": ("ppo", LORA | {"entropy_coef": 0.01}),
    "ppo, head": ("ppo", {"value": "head"}),
    "ppo, PTX": ("ppo", PTX),
    "causal": ("pretraining", {}),
}
WAITS = {
    # The running mean takes in the log-ratios of all ranks once in an optimizer step.
    "kto, running mean": ([], ["tolist"]),
    # transformers looks for packed sequences in the positions whenever it makes a mask itself.
    "causal": (["aten._local_scalar_dense.default"],) * 2,
}
"""What the two micro-steps of an optimizer step wait for, where that is something."""


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: bool((x > 1).any()), "aten._local_scalar_dense.default"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: (x > 1).nonzero(), "aten.nonzero.default"),
        (lambda x: x[x > 1], "aten.index.Tensor"),
    ],
)
def test_what_waits_is_counted(call, name):
    with HostSyncs() as syncs:
        call(torch.arange(3))
    assert syncs.found == [name]


@pytest.mark.parametrize("case", CASES)
def test_a_micro_step_reads_nothing_back(tiny_llama, tmp_path, case, monkeypatch):
    name, options = CASES[case]
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | options
    run = MAKE[name](tiny_llama, tmp_path, **options)
    step, syncs, found = run.training_step, HostSyncs(), []

    def counted(*args, **kwargs):
        if run.state.global_step < 1:  # models are probed in the first step
            return step(*args, **kwargs)
        with syncs:
            loss = step(*args, **kwargs)
        found.append(syncs.found)
        syncs.found = []
        return loss

    monkeypatch.setattr(run, "training_step", counted)
    if name == "ppo":
        sample = run._new_rollout

        def unwatched(rows):  # the host must read the tokens that are sampled
            syncs.paused = True
            sample(rows)
            syncs.paused = False

        monkeypatch.setattr(run, "_new_rollout", unwatched)
    run.train()
    assert found == [*WAITS.get(case, ([], []))] * 2
