"""Mixtures of tasks: shares, draws, passes, chains, held-out families, files, and what stops a run."""

import itertools
import math

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from lifecycle_hf import InstructionMixture, InstructionTask
from lifecycle_hf.data.mixing import mixing_rates


def task(name, rows, family=None, **columns):
    """A task whose n-th completion is the name and n; `columns` are lists or values of further columns."""
    made = [{"prompt": f"ask {i}", "completion": f"{name} {i}"} for i in range(rows)]
    for column, values in columns.items():
        values = values if isinstance(values, list) else [values] * rows
        made = [row | {column: value} for row, value in zip(made, values)]
    return InstructionTask(name, made, family)


def answers(examples):
    return [example["completion"][0]["content"] for example in examples]


def mixture(*sizes, **options):
    return InstructionMixture([task(f"t{n}", size) for n, size in enumerate(sizes)], **options)


def test_rates_by_hand():
    """Cap 400 makes 100, 400, 400 of 100, 400, 10,000. Square roots are 10, 20, 20."""
    sizes = [100, 400, 10_000]
    assert mixing_rates(sizes, cap=400) == pytest.approx([1 / 9, 4 / 9, 4 / 9])
    assert mixing_rates(sizes, cap=400, temperature=2) == pytest.approx([0.2, 0.4, 0.4])
    assert mixing_rates(sizes, cap=400, temperature=math.inf) == pytest.approx([1 / 3] * 3)
    assert mixing_rates(sizes, temperature=2) == pytest.approx([10 / 130, 20 / 130, 100 / 130])  # no cap
    # The cap comes first: roots of 1 and 4. Capping the roots, 1 and 4, would leave shares of 1/5 and 4/5.
    assert mixing_rates([1, 16], cap=4, temperature=2) == pytest.approx([1 / 3, 2 / 3])
    assert mixing_rates([10, 1000], temperature=1e-3).tolist() == [0, 1]  # 1000 ** 1000 is no float
    # An empty task is never drawn, also where 0 ** (1 / inf) = 1.
    assert mixing_rates([0, 5, 9], temperature=math.inf).tolist() == [0, 0.5, 0.5]


def test_a_mixture_takes_usable_rows_at_its_default_cap():
    """4,000 rows count as 3,000; of the other task's 1,500 rows 500 are empty."""
    empty = task("b", 1500, completion=["x"] * 1000 + [" "] * 500)
    with pytest.warns(
        UserWarning, match=r"task 'b': 500 of 1500 rows can't be used \(500 empty completion\); the first"
    ):
        mixed = InstructionMixture([task("a", 4000), empty])
    assert mixed.rates == pytest.approx([0.75, 0.25])
    assert mixed.sizes.tolist() == [4000, 1000]
    with pytest.warns(UserWarning, match="task 'b'"):
        assert InstructionMixture(mixed.tasks, weights={"a": 1, "b": 4}).rates == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("temperature", [1, 2, math.inf])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_of_draws_are_within_their_multinomial_error(temperature, seed):
    mixed = mixture(4, 30, 300, 70, temperature=temperature, seed=seed)
    counts = np.bincount(mixed.drawn(10_000)[0], minlength=4)
    assert stats.chisquare(counts, 10_000 * mixed.rates).pvalue > 0.001
    expected, deviation = 10_000 * mixed.rates, np.sqrt(10_000 * mixed.rates * (1 - mixed.rates))
    assert (abs(counts - expected) < 4 * deviation).all()


def test_a_task_of_weight_zero_is_not_drawn():
    assert set(mixture(5, 5, 5, weights={"t0": 0, "t1": 3, "t2": 0}).drawn(500)[0]) == {1}


def test_every_pass_over_a_task_has_each_row_once_in_another_order():
    tasks, rows = mixture(7, 40).drawn(3000)
    for number, size in ((0, 7), (1, 40)):
        drawn = rows[tasks == number]
        passes = drawn[: len(drawn) // size * size].reshape(-1, size)
        assert len(passes) > 30 and (np.sort(passes, axis=1) == np.arange(size)).all()
        assert len({tuple(order) for order in passes.tolist()}) > 30 * (1 if size > 7 else 0.9)


def test_max_rows_is_one_random_choice_for_all_passes():
    (tasks, rows), (_, others) = (mixture(50, max_rows=10, seed=seed).drawn(40) for seed in (0, 1))
    assert len(set(rows)) == len(set(others)) == 10 and set(rows) != set(others)
    assert all(set(part) == set(rows) for part in rows.reshape(4, 10))
    assert max(rows) > 10


def test_a_draw_depends_on_seed_and_number_alone():
    """Across the border of blocks; from any start; in a new mixture."""
    mixed = mixture(9, 2, 30)
    whole = mixed.drawn(5000)
    for start in (0, 1, 1023, 1024, 2500):
        for part, all_ in zip(mixture(9, 2, 30).drawn(1100, start), whole):
            assert (part == all_[start : start + 1100]).all()
    assert (mixed.drawn(1000)[0] != mixture(9, 2, 30, seed=1).drawn(1000)[0]).any()
    stream = answers(mixed.stream(50, start=1000))
    tasks, rows = whole
    assert stream == [f"t{t} {r}" for t, r in zip(tasks[1000:1050], rows[1000:1050])]
    assert stream == answers(mixed.dataset(50, start=1000)) == answers(itertools.islice(mixed.stream(start=1000), 50))


def test_templates_are_drawn_evenly():
    four = InstructionTask(
        "a", [{"x": "1"}], templates=[{"prompt": f"{n} {{x}}", "completion": "{x}"} for n in range(4)]
    )
    prompts = [row["prompt"][0]["content"] for row in InstructionMixture([four]).dataset(2000)]
    counts = [prompts.count(f"{n} 1") for n in range(4)]
    assert sum(counts) == 2000 and stats.chisquare(counts).pvalue > 0.001
    assert {row["prompt"][0]["content"] for row in InstructionMixture([four], templates=False).dataset(50)} == {"0 1"}


def test_templates_off_after_on():
    """The same task in two mixtures: a row that only a template makes usable is not usable without templates."""
    both = InstructionTask("a", [{"instruction": "", "input": "b", "output": "c"}] * 2, templates=["{input}"])
    assert answers(InstructionMixture([both]).dataset(1)) == ["c"]
    with pytest.raises(ValueError, match="no task has a usable row"), pytest.warns(UserWarning, match="instruction"):
        InstructionMixture([both], templates=False)
    assert len(both) == 2


def test_chains_are_shown_with_their_probability():
    """30 % of the rows that have a chain, none of the others: in 2,000 draws within four standard errors."""
    mixed = InstructionMixture(
        [task("a", 50, chain=["steps", None] * 25), task("b", 50)], cot_ratio=0.3, cot_cue="Why?", system_prompt="Be."
    )
    rows = mixed.dataset(2000)
    tasks, numbers = mixed.drawn(2000)
    can = (tasks == 0) & (numbers % 2 == 0)
    shown = np.array([text.startswith("steps\n") for text in answers(rows)])
    assert not shown[~can].any()
    assert abs(shown[can].mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / can.sum())
    first, other = rows[int(np.argmax(shown))], rows[int(np.argmin(shown))]
    assert [message["role"] for message in first["prompt"]] == ["system", "user"]
    assert first["prompt"][1]["content"].endswith("\nWhy?") and "Why?" not in other["prompt"][1]["content"]


def test_chains_are_five_percent_by_default():
    """Half of the draws are of `a`, and 4 in 10 of its rows have a chain: 0.05 / 0.2 = 0.25."""
    mixed = InstructionMixture([task("a", 10, chain=["s"] * 4 + [""] * 6), task("b", 10)])
    assert mixed.cot_ratio == pytest.approx(0.25)
    assert [row["chains"] for row in mixed.report(10)] == pytest.approx([0.1, 0])
    few = InstructionMixture([task("a", 100, chain=["s"] + [""] * 99)])
    assert few.cot_ratio == 1.0  # 1 % of the draws can have one
    assert mixture(5).cot_ratio == 1.0 and mixture(5, cot_ratio=0.0).cot_ratio == 0.0


def test_system_prompt_gives_way_to_one_that_is_there():
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    tasks = [InstructionTask("a", [{"messages": chat}]), InstructionTask("b", [{"messages": chat[1:]}])]
    mixed = InstructionMixture(tasks, system_prompt="Be brief.")
    found = {row["prompt"][0]["content"] for row in mixed.dataset(30)}
    assert found == {"system", "Be brief."} and {len(row["prompt"]) for row in mixed.dataset(30)} == {2}


def test_held_out_families_are_never_drawn():
    tasks = [task("a", 5, "sums"), task("b", 5, "facts"), task("c", 5, "sums"), task("d", 5)]
    mixed = InstructionMixture(tasks, held_out=["sums"])
    assert [held.name for held in mixed.held_out] == ["a", "c"]
    assert {answer[0] for answer in answers(mixed.dataset(200))} == {"b", "d"}
    shown = InstructionMixture(tasks, held_out=["sums"], system_prompt="Be.").example(mixed.held_out[0], 3)
    assert [message["content"] for message in shown["prompt"] + shown["completion"]] == ["Be.", "ask 3", "a 3"]


def test_report(tiny_llama):
    _, tokenizer = tiny_llama
    empty = task("c", 3, completion=["x", "", ""])
    with pytest.warns(UserWarning, match="task 'c': 2 of 3"):
        mixed = InstructionMixture(
            [task("a", 9, "one"), task("b", 6), empty], max_rows=6, weights={"a": 6, "b": 3, "c": 1}
        )
    report = mixed.report(120, tokenizer)
    expected = {
        "task": ["a", "b", "c"],
        "family": ["one", None, None],
        "rows": [9, 6, 3],
        "usable": [9, 6, 1],
        "used": [6, 6, 1],
        "share": pytest.approx([0.6, 0.3, 0.1]),
        "epochs": pytest.approx([12, 6, 12]),  # 72, 36 and 12 draws
        "chains": [0, 0, 0],
    }
    assert {name: [row[name] for row in report] for name in expected} == expected
    tokens = [row["tokens"] for row in report]
    for mean, held in zip(tokens, mixed.tasks):
        chats = [held.example(i) for i in range(len(held))]
        lengths = {len(tokenizer.apply_chat_template(c["prompt"] + c["completion"])["input_ids"]) for c in chats}
        assert {mean} == lengths  # all rows of a task are equally long
    whole = 0.6 * tokens[0] + 0.3 * tokens[1] + 0.1 * tokens[2]
    shares = [0.6 * tokens[0] / whole, 0.3 * tokens[1] / whole, 0.1 * tokens[2] / whole]
    assert [row["token_share"] for row in report] == pytest.approx(shares)


def test_file(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("sums", "facts", "poems"):
        Dataset.from_list([{"instruction": f"{name}?", "output": name}] * 4).to_json(
            tmp_path / "data" / f"{name}.jsonl"
        )
    (tmp_path / "own.yaml").write_text("maths:\n- 'Sum: {instruction}'\n")
    (tmp_path / "mixture.yaml").write_text(
        """
        temperature: .inf
        cap: 100
        cot_ratio: 0
        held_out: [generation]
        tasks:
        - {rows: data/sums.jsonl, family: maths, templates: own.yaml}
        - {name: trivia, rows: data/facts.jsonl, templates: ["Fact: {instruction}", "{instruction}"]}
        - {rows: data/poems.jsonl, family: generation}
        """
    )
    mixed = InstructionMixture.from_yaml(tmp_path / "mixture.yaml", seed=3, temperature=2)
    assert (mixed.seed, mixed.temperature, mixed.cap, mixed.cot_ratio) == (3, 2, 100, 0)
    assert [task.name for task in mixed.tasks] == ["sums", "trivia"] and mixed.held_out[0].name == "poems"
    assert {row["prompt"][0]["content"] for row in mixed.dataset(60)} == {"Sum: sums?", "Fact: facts?", "facts?"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "mixture.yaml: a mixture is a mapping of options"),
        ("tasks: []", "mixture.yaml: a mixture is a mapping of options"),
        ("tasks: [a.jsonl]", "of which 'tasks' is a list of mappings"),
        (
            "tasks: [{rows: none.jsonl}]",
            "mixture.yaml: task 'none': task 'none' has no rows: none.jsonl can't be read",
        ),
        ("tasks: [{name: a}]", "task 'a': .*'rows'. The options are name, rows, family, templates, chain"),
        (
            "tasks: [{rows: [{prompt: a, completion: b}], name: a}]\ntau: 2",
            "mixture.yaml: .*'tau'. The options are tasks",
        ),
        (
            "tasks: [{rows: [{prompt: a, completion: b}], name: a, templates: ['{context}']}]",
            "task 'a': template '{context}' names context, output, but the columns are completion, prompt",
        ),
        ("tasks: [{rows: [{prompt: a, completion: b}], name: a}]\ntemperature: 0", "mixture.yaml: temperature=0.0"),
    ],
)
def test_files_that_are_refused(tmp_path, text, problem):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=problem):
        InstructionMixture.from_yaml(tmp_path / "mixture.yaml")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 0}, "temperature=0.0 and cap=3000 must be positive"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"cap": 0}, "cap=0 must be positive"),
        ({"max_rows": 0}, "max_rows=0 must be positive"),
        ({"weights": {"t0": 0, "t1": 0}}, "their sum must be positive"),
        ({"weights": {"t0": -1, "t1": 2}}, "none may be negative"),
        ({"weights": {"t0": float("nan"), "t1": 2}}, "none may be negative"),
        ({"weights": {"t0": 1, "t2": 2}}, "weights: each task needs a weight.*missing: t1; unknown: t2"),
        ({"cot_ratio": 1.5}, "cot_ratio=1.5 must lie between 0 and 1"),
        ({"cot_ratio": 0.5}, "some rows must have a chain of thought; 0% of the draws"),
        ({"held_out": ["sums"]}, r"held_out=\['sums'\] must be a list of families; the tasks have \[\]"),
    ],
)
def test_options_that_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        mixture(3, 3, **options)


def test_tasks_that_are_refused():
    with pytest.raises(ValueError, match="tasks: several have the name 'a'"):
        InstructionMixture([task("a", 2), task("a", 3)])
    with pytest.raises(ValueError, match="tasks: of 0 none is left"):
        InstructionMixture([])
    with pytest.raises(ValueError, match="tasks: of 1 none is left"):
        InstructionMixture([task("a", 2, "sums")], held_out=["sums"])
    with pytest.raises(ValueError, match=r"held_out='sums' must be a list of families; the tasks have \['sums'\]"):
        InstructionMixture([task("a", 2, "sums"), task("b", 2)], held_out="sums")


def test_tasks_without_usable_rows():
    bad, good = task("bad", 2, completion=""), task("good", 2)
    told = r"task 'bad': 2 of 2 rows can't be used \(2 empty completion\); the first is row 0."
    with pytest.warns(UserWarning, match=f"{told} No row is left, so the task is not drawn"):
        mixed = InstructionMixture([bad, good])
    assert mixed.rates.tolist() == [0, 1] and [row["usable"] for row in mixed.report(10)] == [0, 2]
    with pytest.raises(ValueError, match=f"{told} strict_data is on"):
        InstructionMixture([bad, good], strict_data=True)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="weights: bad has no usable row. Set its weight to 0"),
    ):
        InstructionMixture([bad, good], weights={"bad": 1, "good": 1})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no task has a usable row"):
        InstructionMixture([bad])


def test_real_tasks(shared_data):
    """T0's 16 files: 3,008 rows, of which all 200 of trec are empty; no completion keeps its end-of-text token."""
    tasks = [InstructionTask(file.stem, file) for file in sorted((shared_data / "t0_tasks").glob("*.jsonl"))]
    with pytest.warns(UserWarning, match="task 'trec_trec1': 200 of 200 rows") as told:
        mixed = InstructionMixture(tasks, temperature=2)
    assert len(told) == 1 and int(sum(mixed.sizes)) == 2808
    # 14 tasks of 200 rows, one of 8: √200 = 5 √8.
    assert sorted(set(mixed.rates.round(6))) == pytest.approx([0, 1 / 71, 5 / 71], abs=1e-6)
    texts = answers(mixed.dataset(500))
    assert all(text.strip() and "<|endoftext|>" not in text for text in texts)
