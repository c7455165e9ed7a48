"""Metrics of a trainer: sums and counts, gathered from all processes and divided once; the seconds of its steps."""

import time
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object

TAX_PREFIX = "tax/"
"""Stands before the metrics of a `TaxMonitor` in the log."""


class MetricAccumulator:
    """Collect the mean of each metric over everything that was added on every rank: Σ totals / Σ counts.

    Tensors are summed on their device, in fp64, and read when the means are: to add one waits for no GPU.
    """

    def __init__(self):
        self.sums: dict[str, list[float | torch.Tensor]] = {}

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1.0) -> None:
        """Add `total`, the sum of `count` values of the metric `name`."""
        sums = self.sums.setdefault(name, [0.0, 0.0])
        for i, value in enumerate((total, count)):
            sums[i] = sums[i] + (value.detach().double() if isinstance(value, torch.Tensor) else value)

    def add_masked(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the entries of `values` where `mask` (same shape) is true."""
        self.add(name, (values.detach().double() * mask).sum(), mask.sum())

    def read(self) -> dict[str, list[float]]:
        """Return name -> [Σ totals, Σ counts] of this rank."""
        return {name: [float(value) for value in pair] for name, pair in self.sums.items()}

    def reduce(self, accelerator=None) -> dict[str, float]:
        """Return name -> mean over all ranks, and start again from nothing. Every rank must call it."""
        sums, self.sums = self.read(), {}
        gathered = gather_object([sums]) if accelerator is not None and accelerator.num_processes > 1 else [sums]
        means = {}
        for name in sorted({name for rank in gathered for name in rank}):
            total, count = (sum(rank.get(name, (0.0, 0.0))[i] for rank in gathered) for i in (0, 1))
            if count > 0:
                means[name] = total / count
        return means


class StepClock:
    """Add up the tokens and the seconds of steps; on CUDA by events, so that a step need not be waited for."""

    def __init__(self, device: torch.device):
        self.cuda, self.tokens, self.seconds, self.events = device.type == "cuda", 0, 0.0, []

    @contextmanager
    def step(self, tokens: int):
        """Measure what runs in this context, a step of so many tokens."""
        self.tokens += tokens
        if self.cuda:
            self.events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            self.events[-1][0].record()
        start = time.perf_counter()
        yield
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - start

    def read(self) -> tuple[int, float]:
        """Return the tokens and the seconds of all steps since the last call."""
        if self.events:
            self.events[-1][1].synchronize()
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        tokens, self.tokens, self.seconds, self.events = self.tokens, 0, 0.0, []
        return tokens, seconds


class MetricsMixin:
    """Give a trainer `self.metrics["train" | "eval"]`, two [`MetricAccumulator`]s.

    `log` merges the training metrics into each training log line, and an evaluation merges its own into its result.
    """

    def __init__(self, *args, **kwargs):
        self.metrics = {"train": MetricAccumulator(), "eval": MetricAccumulator()}
        super().__init__(*args, **kwargs)

    def reduced_metrics(self, kind: str) -> dict[str, float]:
        """Return the means of "train" or "eval" over all ranks, and start to collect them again."""
        return self.metrics[kind].reduce(self.accelerator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with the training metrics in each line of the training loop."""
        of_training = not any(key.startswith("eval_") for key in logs)
        if of_training and not all(key.startswith(TAX_PREFIX) for key in logs):
            logs.update(self.reduced_metrics("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in transformers, with the evaluation metrics in the result."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.reduced_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output
