"""The data of PPO's loop: prompts in the order of rollouts, and the present rollout; both can be resumed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from lifecycle_hf.data.collators import shuffled
from lifecycle_hf.trainers.policy.config import PPOConfig

LAYOUT = (
    "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "ppo_epochs",
    "num_generations",
)  # fmt: skip
"""Options that must stay the same when a run resumes within a rollout."""


class RolloutSampler(Sampler):
    """Draw row indices such that every micro-step of an update gets the update's prompts.

    Each epoch shuffles the rows anew and cuts them into rollouts over all processes. The last one is filled up from
    the epoch's start, so a dataset may be smaller than a rollout. Each rollout is repeated for every micro-step.

    Args:
        rows: size of the dataset.
        epoch: returns the number of the present epoch.
    """

    def __init__(self, rows: int, args: PPOConfig, epoch: Callable[[], int]):
        self.rows, self.rollout_size = rows, args.local_prompts * args.world_size
        self.repeats = args.steps_per_update * args.gradient_accumulation_steps
        self.seed, self.epoch = args.seed if args.data_seed is None else args.data_seed, epoch

    def __len__(self) -> int:
        return -(-self.rows // self.rollout_size) * self.rollout_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.rows, self.seed + self.epoch())
        for start in range(0, self.rows, self.rollout_size):
            rollout = [order[i % self.rows] for i in range(start, start + self.rollout_size)]
            for _ in range(self.repeats):
                yield from rollout


class RolloutBuffer:
    """Hold the scored rollout of one process: micro-batches of tensors, and their order for every optimizer step.

    Micro-batches keep their rows, and so their shapes, over all epochs, so that new log-probs are computed in the same
    way as the old ones. Each epoch draws anew which micro-batches make a mini-batch.
    """

    def __init__(self, args: PPOConfig):
        self.seed, self.layout = args.seed, {name: getattr(args, name) for name in LAYOUT}
        self.batches: list[dict[str, torch.Tensor]] = []
        self.schedule: list[list[int]] = []
        self.micro_step = 0

    def draw_schedule(self, update: int) -> list[list[int]]:
        """Return the micro-batches of each optimizer step of the update, `ppo_epochs` × `num_mini_batches` lists."""
        epochs, per_step, schedule = self.layout["ppo_epochs"], self.layout["gradient_accumulation_steps"], []
        batches = per_step * self.layout["num_mini_batches"]
        for epoch in range(epochs):
            order = shuffled(batches, (self.seed * 1_000_003 + update) * epochs + epoch)
            schedule += [order[i : i + per_step] for i in range(0, batches, per_step)]
        return schedule

    def fill(self, batches: list[dict[str, torch.Tensor]], schedule: list[list[int]]) -> None:
        """Take a new rollout and the schedule that was drawn for it."""
        self.batches, self.schedule, self.micro_step = batches, schedule, 0

    @property
    def exhausted(self) -> bool:
        """Whether every micro-step of the rollout was made."""
        return self.micro_step >= sum(map(len, self.schedule))

    @property
    def step_batches(self) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of the present optimizer step."""
        return [self.batches[i] for i in self.schedule[self.micro_step // len(self.schedule[0])]]

    @property
    def in_step(self) -> int:
        """Index of the next micro-batch within its optimizer step."""
        return self.micro_step % len(self.schedule[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the rollout; nothing, if every micro-step was made."""
        if self.exhausted:
            return {}
        parts = {f"{i}.{name}": x for i, batch in enumerate(self.batches) for name, x in batch.items()}
        tensors = {name: x.cpu() for name, x in parts.items() if isinstance(x, torch.Tensor)}
        rest = {"schedule": self.schedule, "micro_step": self.micro_step, "size": len(self.batches)}
        return tensors | rest | {"layout": self.layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rollout of a checkpoint.

        Raises:
            ValueError: the options of the rollout's layout differ, so that its losses would be weighed wrongly.
        """
        layout = {"num_generations": 1} | state.get("layout", self.layout)  # older rollouts have no groups
        if layout != self.layout:
            was, now = (", ".join(f"{name}={value}" for name, value in x.items()) for x in (layout, self.layout))
            raise ValueError(
                f"The checkpoint was written within a rollout of {was}, and this run has {now}: resume with the "
                "options that wrote it, or from a checkpoint between two rollouts."
            )
        self.batches = [{} for _ in range(state.get("size", 0))]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                index, name = key.split(".", 1)
                self.batches[int(index)][name] = value
        self.schedule, self.micro_step = state.get("schedule", []), state.get("micro_step", 0)
