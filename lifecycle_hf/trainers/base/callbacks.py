"""The callback that measures the alignment tax while a model trains."""

from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.models.loading import unsharded
from lifecycle_hf.trainers.base.metrics import TAX_PREFIX


class TaxMonitor(TrainerCallback):
    """Measure a model before training, every few optimizer steps, and after.

    Args:
        metrics: `f(model, tokenizer) -> {name: value}`; called on every process, with the model in eval mode. Values
            that are a `Measurement` give the table intervals, unless the run was resumed since: logs keep numbers.
        every: optimizer steps between measurements; None measures before and after only.
        higher_is_better: {name: whether more is better}, one entry per metric.

    After training the model is measured as it is kept: anew where `load_best_model_at_end` or a KL budget has changed
    it since the last step. Measuring neither consumes the run's random numbers nor changes which modules are in train
    mode. Of a model that wraps a `policy`, the policy is measured. The values go to the trainer's log as `tax/NAME`
    once `attach(trainer)` was called, and to its log history in any case: checkpoints carry them there, so that a
    resumed run keeps the measurements of its first start.

    With `metric_for_best_model="tax/NAME"` every evaluation of the trainer has them too, as `eval_tax/NAME`, measured
    then if they were not at this step: so they drive transformers' `load_best_model_at_end` and, where it comes after
    this callback, `EarlyStoppingCallback(patience)`.

    Attributes: `before`, `after` ({name: value}, the first and the latest), `history` (rows with `step`).
    """

    def __init__(self, metrics, every, higher_is_better):
        if every is not None and every < 1:
            raise ValueError(
                f"TaxMonitor: every={every} optimizer steps; give at least 1, or None (before and after only)."
            )
        self.metrics = metrics
        self.every = every
        self.higher_is_better = dict(higher_is_better)
        self.history = []
        self._log, self._measuring, self._weights = None, False, None

    def attach(self, trainer):
        """Add this callback to `trainer` and log through it."""
        trainer.add_callback(self)
        self._log = trainer.log
        return self

    @property
    def before(self) -> dict[str, float]:
        return self._values(0)

    @property
    def after(self) -> dict[str, float]:
        return self._values(-1)

    def report(self, **labels) -> TaxReport:
        """Return the table of `before` and `after`; keyword arguments as for `TaxReport`."""
        return TaxReport(self.before, self.after, self.higher_is_better, **labels)

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        best = self._best(args)
        if best is not None and args.greater_is_better != self.higher_is_better[best]:
            raise ValueError(
                f"metric_for_best_model={args.metric_for_best_model!r} and greater_is_better={args.greater_is_better} "
                f"would keep the worst model: TaxMonitor has higher_is_better={self.higher_is_better[best]}."
            )
        self.history = [_row(entry) for entry in state.log_history if any(key.startswith(TAX_PREFIX) for key in entry)]
        if not self.history:
            self._measure(state, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            due = control.should_log, control.should_evaluate  # which a measurement's own lines would turn off
            self._measure(state, model, processing_class)
            control.should_log, control.should_evaluate = due

    def on_evaluate(self, args, state, control, model=None, processing_class=None, metrics=None, **kwargs):
        if self._best(args) is None or self._measuring:  # a metric may be an evaluation itself
            return
        if not self.history or self.history[-1]["step"] != state.global_step:
            self._measure(state, model, processing_class)
        metrics.update({f"eval_{TAX_PREFIX}{name}": value for name, value in self.after.items()})

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self.history[-1]["step"] == state.global_step:
            with _policy(model) as policy:
                if self._weights in (None, _fingerprint(policy)):
                    return
            self.history.pop()
        self._measure(state, model, processing_class)

    def _best(self, args):
        """The metric of this monitor that chooses the best model, or None."""
        named = (getattr(args, "metric_for_best_model", None) or "").removeprefix("eval_")
        return next((name for name in self.higher_is_better if TAX_PREFIX + name == named), None)

    def _measure(self, state, model, tokenizer):
        with _policy(model) as policy, _undisturbed(policy):
            self._measuring, self._weights = True, _fingerprint(policy)
            measured = self.metrics(policy, tokenizer).items()
            values = {name: value if isinstance(value, Measurement) else float(value) for name, value in measured}
            self._measuring = False
            unknown = values.keys() ^ self.higher_is_better.keys()
            if unknown:
                raise ValueError(f"TaxMonitor: only one of metrics and higher_is_better names {sorted(unknown)}.")
            self.history.append({"step": state.global_step} | values)
            entry = {TAX_PREFIX + name: float(value) for name, value in values.items()}
            if self._log is None:
                state.log_history.append(entry | {"epoch": state.epoch, "step": state.global_step})
            else:
                self._log(entry)

    def _values(self, index):
        return {name: self.history[index][name] for name in self.higher_is_better} if self.history else {}


def _row(entry):
    values = {key.removeprefix(TAX_PREFIX): value for key, value in entry.items() if key.startswith(TAX_PREFIX)}
    return {"step": entry["step"]} | values


@contextmanager
def _policy(model):
    """The policy of a trainer's model, with whole weights inside the block."""
    whole = extract_model_from_parallel(model)
    policy = getattr(whole, "policy", whole)
    with nullcontext() if policy is whole else unsharded(whole):
        yield policy


@torch.no_grad()
def _fingerprint(model):
    sums = [p.double().sum() for p in model.parameters() if p.requires_grad]
    return sum(float(total.full_tensor() if hasattr(total, "full_tensor") else total) for total in sums)


@contextmanager
def _undisturbed(model):
    """Eval mode and no gradients inside the block; module modes and random states are restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
