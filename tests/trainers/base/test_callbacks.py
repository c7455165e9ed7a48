import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.trainers.base.callbacks import TaxMonitor


class Line(torch.nn.Module):
    """y = w x with dropout, so that the mode and the random numbers of the run matter."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.dropout = torch.nn.Dropout(0.5)
        self.frozen = torch.nn.Dropout(0.5)

    def forward(self, x, labels):
        return {"loss": ((self.dropout(self.w * x) - labels) ** 2).mean()}


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = Line()

    def forward(self, x, labels):
        return self.policy(x, labels)


DATA = [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(1, 9)]


def measure(model, tokenizer):
    assert type(model) is Line and not model.training and not torch.is_grad_enabled()
    torch.rand(3)  # a metric that samples
    return {"w": model.w.item()}


def make_trainer(folder, monitor=None, model=None, attach=False, **options):
    options = {"max_steps": 6, "learning_rate": 0.01, "logging_steps": 100, "save_strategy": "no"} | options
    args = TrainingArguments(folder, report_to="none", use_cpu=True, disable_tqdm=True, **options)
    trainer = Trainer(model or Line(), args, train_dataset=DATA, eval_dataset=DATA)
    if monitor is not None:
        monitor.attach(trainer) if attach else trainer.add_callback(monitor)
    return trainer


@pytest.mark.parametrize("attach", [False, True])
def test_measures_before_during_and_after(tmp_path, attach):
    monitor = TaxMonitor(measure, every=4, higher_is_better={"w": True})
    trainer = make_trainer(tmp_path, monitor, attach=attach)
    trainer.train()
    assert [row["step"] for row in monitor.history] == [0, 4, 6]
    assert monitor.before == {"w": 0.0} and monitor.after == {"w": trainer.model.w.item()}
    logged = [(entry["step"], entry["tax/w"]) for entry in trainer.state.log_history if "tax/w" in entry]
    assert logged == [(row["step"], row["w"]) for row in monitor.history]
    assert monitor.report().rows()[0]["tax"] == -monitor.after["w"]


def test_measures_only_the_ends_without_every(tmp_path):
    monitor = TaxMonitor(measure, every=None, higher_is_better={"w": True})
    make_trainer(tmp_path, monitor).train()
    assert [row["step"] for row in monitor.history] == [0, 6]


def test_a_watched_run_ends_where_an_unwatched_one_does(tmp_path):
    ends = []
    for monitor in (None, TaxMonitor(measure, every=1, higher_is_better={"w": True})):
        model = Line()
        model.frozen.eval()
        trainer = make_trainer(tmp_path, monitor, model)
        trainer.train()
        ends.append(model.w.item())
    assert ends[0] == ends[1] != 0


def test_module_modes_come_back_one_by_one():
    model = Line()
    model.train()
    model.frozen.eval()
    monitor = TaxMonitor(measure, every=None, higher_is_better={"w": True})
    state = type("State", (), {"log_history": [], "global_step": 0, "epoch": 0.0})()
    monitor.on_train_begin(None, state, None, model=model)
    assert model.training and model.dropout.training and not model.frozen.training


def test_the_policy_inside_a_wrapper_is_measured(tmp_path):
    monitor = TaxMonitor(measure, every=None, higher_is_better={"w": True})
    trainer = make_trainer(tmp_path, monitor, Wrapper())
    trainer.train()
    assert monitor.after == {"w": trainer.model.policy.w.item()}


def test_measurements_survive_resume(tmp_path):
    watched = {"every": 2, "higher_is_better": {"w": True}}
    whole = TaxMonitor(measure, **watched)
    make_trainer(tmp_path / "whole", whole).train()
    make_trainer(tmp_path / "cut", TaxMonitor(measure, **watched), save_strategy="steps", save_steps=3).train()
    resumed = TaxMonitor(measure, **watched)
    trainer = make_trainer(tmp_path / "cut", resumed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert resumed.history == whole.history and [row["step"] for row in whole.history] == [0, 2, 4, 6]


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="every=0 optimizer steps"):
        TaxMonitor(measure, every=0, higher_is_better={"w": True})
    with pytest.raises(ValueError, match=r"only one of metrics and higher_is_better names \['v', 'w'\]"):
        make_trainer(tmp_path, TaxMonitor(measure, every=None, higher_is_better={"v": True})).train()


def test_a_measurement_leaves_the_log_line_of_its_step(tmp_path):
    trainer = make_trainer(
        tmp_path, TaxMonitor(measure, every=2, higher_is_better={"w": True}), attach=True, logging_steps=1
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


GOLD = [0.0, 1.0, 3.0, 2.0, 3.0, 9.0]  # before training and after each evaluation


def gold_monitor(seen):
    def gold(model, tokenizer):
        seen.append(model.w.item())
        return {"gold": GOLD[len(seen) - 1]}

    return TaxMonitor(gold, every=None, higher_is_better={"gold": True})


BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6,
    "load_best_model_at_end": True, "metric_for_best_model": "tax/gold", "greater_is_better": True,
}  # fmt: skip


def test_a_gold_metric_stops_the_run_and_gives_its_best_weights_back(tmp_path):
    seen = []
    monitor = gold_monitor(seen)
    trainer = make_trainer(tmp_path, monitor, **BEST)
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    # 3 at step 2 is the best; 2, and 3 again, are no better: two evaluations without improvement end it at step 4
    assert trainer.state.global_step == 4 and len(seen) == 6
    assert trainer.state.best_metric == 3.0 and trainer.state.best_global_step == 2
    assert trainer.model.w.item() == seen[2] == seen[5] != seen[4]  # the table is of the model that is kept
    assert monitor.after == {"gold": GOLD[5]} and [row["step"] for row in monitor.history] == [0, 1, 2, 3, 4]


def test_an_evaluation_within_a_metric_measures_no_more(tmp_path):
    calls, runs = [], []

    def gold(model, tokenizer):
        calls.append(runs[0].evaluate()["eval_loss"])
        return {"gold": float(len(calls))}

    monitor = TaxMonitor(gold, every=None, higher_is_better={"gold": True})
    runs.append(make_trainer(tmp_path, monitor, **BEST | {"max_steps": 2}))
    runs[0].train()
    assert len(calls) == 3 and runs[0].state.best_metric == 3.0


def test_keeping_the_worst_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, gold_monitor([]), **BEST | {"greater_is_better": False})
    with pytest.raises(ValueError, match="greater_is_better=False would keep the worst model.*higher_is_better=True"):
        trainer.train()


def test_items_reach_the_table_and_numbers_the_log(tmp_path):
    def sampled(model, tokenizer):
        return {"w": Measurement([model.w.item() + i / 100 for i in range(20)])}

    monitor = TaxMonitor(sampled, every=None, higher_is_better={"w": True})
    trainer = make_trainer(tmp_path, monitor, save_strategy="steps", save_steps=6)
    trainer.train()
    gain = trainer.model.w.item()
    row = monitor.report().rows()[0]
    assert row["interval"] == pytest.approx([-gain, -gain], abs=1e-6) and row["verdict"] == "gain"
    assert [type(entry["tax/w"]) for entry in trainer.state.log_history if "tax/w" in entry] == [float, float]
