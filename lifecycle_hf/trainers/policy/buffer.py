"""What PPO iterates over: prompts in rollout order, and the rollout in hand; both resumable."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from lifecycle_hf.data.collators import shuffled


class RolloutSampler(Sampler):
    """Row indices such that every micro-step of an update is handed the update's prompts.

    Each epoch shuffles the rows anew and cuts them into rollouts of `rollout_size` (over all processes); the last one
    is topped up from the epoch's start, so that a dataset smaller than a rollout works, too. Each rollout is yielded
    `repeats` times, once per micro-step.
    """

    def __init__(self, rows: int, *, rollout_size: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.rollout_size, self.repeats = rows, rollout_size, repeats
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return -(-self.rows // self.rollout_size) * self.rollout_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = shuffled(self.rows, self.seed + self.epoch())
        for start in range(0, self.rows, self.rollout_size):
            rollout = [order[i % self.rows] for i in range(start, start + self.rollout_size)]
            for _ in range(self.repeats):
                yield from rollout


class RolloutBuffer:
    """The scored rollout of one process: micro-batches of tensors, and their order for every optimizer step.

    Micro-batches keep their rows over all epochs, and with them their shapes, so that new log-probs are computed as
    the old ones were; what is shuffled anew in each epoch is which micro-batches make a mini-batch.

    Args:
        layout: the options, by name, that say how a rollout is cut up; saved with it.
    """

    def __init__(self, layout: dict[str, int]):
        self.layout = layout
        self.batches: list[dict[str, torch.Tensor]] = []
        self.schedule: list[list[int]] = []
        self.micro_step = 0

    @staticmethod
    def draw_schedule(batches: int, *, epochs: int, mini_batches: int, seed: int) -> list[list[int]]:
        """`epochs` × `mini_batches` lists of micro-batches, one for each optimizer step."""
        per_step, schedule = batches // mini_batches, []
        for epoch in range(epochs):
            order = shuffled(batches, seed * epochs + epoch)
            schedule += [order[i * per_step : (i + 1) * per_step] for i in range(mini_batches)]
        return schedule

    def fill(self, batches: list[dict[str, torch.Tensor]], schedule: list[list[int]]) -> None:
        """Takes a new rollout and the schedule that was drawn for it."""
        self.batches, self.schedule, self.micro_step = batches, schedule, 0

    @property
    def micro_steps(self) -> int:
        return sum(len(step) for step in self.schedule)

    @property
    def exhausted(self) -> bool:
        return self.micro_step >= self.micro_steps

    @property
    def step_batches(self) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of the optimizer step in hand."""
        return [self.batches[i] for i in self.schedule[self.micro_step // len(self.schedule[0])]]

    @property
    def in_step(self) -> int:
        """Index of the next micro-batch within its optimizer step."""
        return self.micro_step % len(self.schedule[0])

    def state_dict(self) -> dict[str, Any]:
        """Empty where the rollout is used up."""
        if self.exhausted:
            return {}
        tensors = {f"{i}.{name}": x.cpu() for i, batch in enumerate(self.batches) for name, x in batch.items()}
        rest = {"schedule": self.schedule, "micro_step": self.micro_step, "size": len(self.batches)}
        return tensors | rest | {"layout": self.layout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rollout of a checkpoint in hand.

        Raises:
            ValueError: if it was cut up in another way than `layout` says, which would weigh its losses wrongly.
        """
        layout = state.get("layout", self.layout)
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
