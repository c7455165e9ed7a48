"""Tasks by instruction: what is asked, and scores by hand."""

import json
import math

import numpy as np
import pytest
import torch

from lifecycle_hf.evaluation import bootstrap_interval
from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.instructions import (
    TaskRows,
    TaskScore,
    TaskScores,
    answer_text,
    evaluate_tasks,
    main_score,
    mean_of_tasks,
)
from lifecycle_hf.evaluation.metrics import completion_nll
from lifecycle_hf.evaluation.text import normalized_answer

HOME = "lifecycle_hf.evaluation.instructions"


def rows_of(count, answers=("five", "Paris"), word="question"):
    return [{"prompt": f"{word} {i}?", "completion": answers[i % len(answers)]} for i in range(count)]


@pytest.fixture
def said(tiny_llama, monkeypatch):
    """Decode by a table {the last part of a prompt: answer} instead of the model; the prompts asked are kept."""
    tokenizer, answers, asked = tiny_llama[1], {}, []

    def generate(model, prompt_ids, **options):
        assert options["temperature"] == 0 and options["stop_token_ids"] == [tokenizer.eos_token_id]
        prompts = [tokenizer.decode(ids) for ids in prompt_ids]
        asked.extend(prompts)
        texts = [next((text for end, text in answers.items() if prompt.endswith(end)), "none") for prompt in prompts]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]

    monkeypatch.setattr(f"{HOME}.generate", generate)
    return answers, asked


def test_normalized_answer_is_squads():
    assert normalized_answer("The  Eiffel-Tower, an old\tone!") == "eiffeltower old one"
    assert normalized_answer("a") == normalized_answer("?!") == ""
    assert normalized_answer("Athena") == "athena"


def test_answer_text():
    assert answer_text(" Business<|endoftext|>\n") == "Business"
    assert answer_text([{"role": "assistant", "content": "1"}, {"role": "assistant", "content": " 2 "}]) == "2"


def test_scores_by_hand(tiny_llama, said):
    """Of five answers two are right; ROUGE-L: 1, 1, 2·1/(3+1), 2·1/(2+1), 0. All rows have different answers."""
    make_model, tokenizer = tiny_llama
    answers, asked = said
    targets = ["the Red fox", "Paris", "seven", "goodbye", "hello"]
    rows = [{"prompt": f"question {i}", "completion": f"{text}<|endoftext|>"} for i, text in enumerate(targets)]
    said_ = ["red fox.", " Paris ", "two and seven", "goodbye user", "thanks"]
    answers.update({f"question {i}<|assistant|>": text for i, text in enumerate(said_)})
    (score,) = evaluate_tasks(make_model(), tokenizer, [{"name": "t", "rows": rows}], shots=[0], batch_size=2).tasks
    place = {target: i for i, target in enumerate(score.targets)}
    columns = {name: value.columns[:, 0] for name, value in score.scores.items()}
    assert sorted(score.targets) == sorted(targets) and set(columns) == {"exact_match", "rouge_l"}
    assert [columns["exact_match"][place[target]] for target in targets] == [1, 1, 0, 0, 0]
    expected = [4 / 5, 1, 2 / 4, 2 / 3, 0]  # the article counts for ROUGE-L: 2·2 / (2 + 3)
    assert [columns["rouge_l"][place[target]] for target in targets] == pytest.approx(expected)
    assert score.scores["exact_match"] == pytest.approx(2 / 5) and score.main == "exact_match"
    assert score.family == "t" and score.most_common == 1 / 5 and score.shown == 0
    assert score.predictions[place["seven"]] == "two and seven"
    assert sorted(asked) == [f"<bos><|user|>question {i}<|assistant|>" for i in range(5)]


def test_examples_come_before_the_row_as_turns_and_never_are_the_row(tiny_llama, said):
    """Of 12 rows 4 are asked, so that the examples are from the other 8; those of 2 shots are the first of 3."""
    make_model, tokenizer = tiny_llama
    _, asked = said
    tasks = [{"name": "t", "rows": rows_of(12)}]
    scores = evaluate_tasks(make_model(), tokenizer, tasks, shots=(0, 2, 3), rows=4, chat=True)
    assert [(item.shots, item.shown, len(item.targets)) for item in scores.tasks] == [(0, 0, 4), (2, 2, 4), (3, 3, 4)]
    turns = [prompt.removeprefix("<bos>").split("<|user|>")[1:] for prompt in asked]
    questions = {shots: {turn[-1]: turn[:-1] for turn in turns if len(turn) == shots + 1} for shots in (0, 2, 3)}
    assert len(questions[0]) == 4 and questions[0].keys() == questions[2].keys() == questions[3].keys()
    rendered = {f"{row['prompt']}<|assistant|>{row['completion']}<eos>" for row in rows_of(12)}
    for question, examples in questions[3].items():
        assert set(examples) <= rendered and len(set(examples)) == 3
        assert not {example.split("<|assistant|>")[0] for example in examples} & {
            asked_.split("<|assistant|>")[0] for asked_ in questions[0]
        }
        assert questions[2][question] == examples[:2]
    assert len({tuple(examples) for examples in questions[3].values()}) > 1


@pytest.mark.parametrize("rows", [3, 8])
def test_no_example_has_the_prompt_of_the_row(rows):
    """Each prompt stands twice, with two answers; with all rows asked the examples are from other asked rows."""
    given = [{"prompt": f"q{i % 4}", "completion": f"a{i}"} for i in range(8)]
    task = TaskRows.read({"name": "t", "rows": given}, rows=rows, seed=5)
    drawn = set()
    for row in range(task.asked):
        examples = task.examples(row, 4, seed=5)
        assert len(set(examples)) == 4 and all(task.prompts[i] != task.prompts[row] for i in examples)
        assert examples == task.examples(row, 4, seed=5)
        drawn.add(tuple(examples))
    assert len(drawn) == rows
    with pytest.raises(ValueError, match="task 't': 7 examples are wanted before a row, and 6 usable rows have"):
        task.examples(0, 7, seed=5)


def test_plain_text_has_blank_lines_between(tiny_llama, said):
    """An answer ends at the first blank line where one stands between examples, and only there."""
    make_model, tokenizer = tiny_llama
    answers, asked = said
    rows = [{"prompt": "Q: one\nA:", "completion": "1"}, {"prompt": "Q: two\nA:\n", "completion": "2"}]
    answers.update({"one\nA:": "1\n\nQ: three", "two\nA:\n": "2\n\nQ: three"})
    zero, one = evaluate_tasks(make_model(), tokenizer, [{"name": "t", "rows": rows}], shots=(0, 1), chat=False).tasks
    assert sorted(asked, key=len)[:2] == ["Q: one\nA:", "Q: two\nA:\n"]
    assert set(asked[2:]) == {"Q: one\nA: 1\n\nQ: two\nA:\n", "Q: two\nA:\n2\n\nQ: one\nA:"}
    assert zero.scores["exact_match"] == 0 and one.scores["exact_match"] == 1


def test_a_system_message_stands_once():
    system, other = ({"role": "system", "content": text} for text in ("be kind", "be brief"))
    user = [{"role": "user", "content": f"q{i}"} for i in range(2)]
    rows = [
        {"prompt": [system, user[0]], "completion": [{"role": "assistant", "content": "a0"}]},
        {"prompt": [other, user[1]], "completion": [{"role": "assistant", "content": "a1"}]},
    ]
    task = TaskRows.read({"name": "t", "rows": rows})
    for row in range(2):
        i = task.prompts[row][1]["content"][-1]
        shown = task.prompt(row, [1 - row])
        contents = [message["content"] for message in shown]
        assert contents == [["be kind", "be brief"][int(i)], f"q{1 - int(i)}", f"a{1 - int(i)}", f"q{i}"]
        assert [message["role"] for message in shown] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["yes", "no"] * 4, "multiple_choice"),
        (["a", "b", "c", "d", "e", "f", "g", "a"], "exact_match"),  # 7 different ones of 8 rows
        (["same"] * 8, "exact_match"),
        (["of four words each", "one of five words, long"] * 1, "rouge_l"),  # the median is 4.5 words
        (["one two three four five", "x", "one two three four"], "exact_match"),  # the median is 4 words
    ],
)
def test_main_score(answers, expected):
    rows = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(answers)]
    assert main_score({"name": "t", "rows": rows}) == expected
    assert main_score({"name": "t", "rows": rows, "choices": sorted(set(answers))}) == "multiple_choice"


@pytest.mark.parametrize(("chat", "end"), [(True, "\n"), (False, "\n"), (False, ":")])
def test_the_choice_of_the_highest_log_prob_per_character(tiny_llama, said, chat, end):
    """Against one forward pass for each choice; the choices of a row come before those of the task.

    A line break at the end of a text is no part of the choices.
    """
    make_model, tokenizer = tiny_llama
    model = make_model(initializer_range=0.5)
    choices = ["five", "a small red fox", "Paris", "thanks"]
    rows = [{"prompt": f"Tell me story {i}{end}", "completion": choices[i % 4]} for i in range(12)]
    rows += [{"prompt": f"Two and three make{end}", "completion": "five", "choices": ["five", "seven"]}]
    task = {"name": "t", "rows": rows, "choices": choices}
    (score,) = evaluate_tasks(model, tokenizer, [task], shots=[0], chat=chat).tasks
    read = TaskRows.read(task, chat=chat)
    expected = []
    for prompt, answer, own in zip(read.prompts, read.answers, read.choices):
        text = f"<bos><|user|>{prompt[0]['content']}<|assistant|>" if chat else prompt
        start = tokenizer(text, add_special_tokens=False)["input_ids"]
        values = []
        for choice in own:
            text = f" {choice}" if end == ":" else choice
            ids = torch.tensor(start + tokenizer(text, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
            values.append(logprobs[len(start) - 1 : -1].gather(1, ids[len(start) :, None]).sum().item() / len(choice))
        expected.append(own[int(np.argmax(values))] == answer)
    assert score.scores["multiple_choice"].columns[:, 0].tolist() == expected
    assert 0 < sum(expected) < 13 and score.main == "multiple_choice"


def test_completion_nll_shares_prompts_and_keeps_the_order(tiny_llama):
    model = tiny_llama[0](initializer_range=0.5).train()
    prompts, completions = [[5, 6, 7], [9], [5, 6, 7], [8, 8]], [[1, 2], [3], [4, 4, 4], [5]]
    got = completion_nll(model, prompts, completions, batch_size=2)
    assert model.training
    model.eval()
    for prompt, completion, nll in zip(prompts, completions, got):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        own = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
        assert nll == pytest.approx(-own.sum().item(), rel=1e-5)


def test_examples_without_room_are_left_out_first(tiny_llama, said):
    """One token less than a prompt with two examples holds one; one less than a bare prompt, not all of that."""
    make_model, tokenizer = tiny_llama
    rows = rows_of(6, answers=["five"])
    sizes = []
    for shots in (0, 1, 2):
        task = TaskRows.read({"name": "t", "rows": rows}, chat=True)
        chat = task.prompt(0, task.examples(0, 2, 0)[:shots])
        options = {"add_generation_prompt": True, "return_dict": True}
        sizes.append(len(tokenizer.apply_chat_template(chat, **options)["input_ids"]))
    options = {"shots": (0, 2), "max_new_tokens": 4}
    tasks = [{"name": "t", "rows": rows}]
    scores = evaluate_tasks(make_model(), tokenizer, tasks, max_length=sizes[2] + 3, **options)
    assert [item.shown for item in scores.tasks] == [0, 1]
    assert "2 (1.0 fit)" in scores.to_markdown()
    said[1].clear()
    scores = evaluate_tasks(make_model(), tokenizer, tasks, max_length=sizes[0] + 3, **options)
    assert [item.shown for item in scores.tasks] == [0, 0]
    assert all(prompt.endswith("<|assistant|>") and not prompt.startswith("<bos>") for prompt in said[1])


def scored(task, family, items, shots=0):
    return TaskScore(
        task, family, shots, shots, {"rouge_l": Measurement(items)}, "rouge_l", 0.0, [], [""] * len(items)
    )


def test_means_by_family_by_hand():
    """Family x: (1/2 + 1/4) / 2 = 3/8, whatever the numbers of rows; y: 1; the families: 11/16."""
    tasks = [scored("a", "x", [1, 0]), scored("b", "x", [1, 0, 0, 0]), scored("c", "y", [1, 1, 1])]
    scores = TaskScores([*tasks, scored("a", "x", [0, 0], shots=4)])
    values = scores.values()
    assert values["family/x/0-shot"] == pytest.approx(3 / 8) and values["mean/0-shot"] == pytest.approx(11 / 16)
    assert values["family/x/4-shot"] == values["mean/4-shot"] == values["task/a/4-shot"] == 0
    assert values["task/b/0-shot"] == 0.25 and values["family/y/0-shot"] == 1
    assert len(values["mean/0-shot"].columns) == 9
    table = scores.to_terminal()
    assert "family/x/0-shot" in table and "mean/4-shot" in table
    assert "family/" not in TaskScores(tasks[1:]).to_markdown()  # as many families as tasks


def test_the_interval_of_a_mean_is_that_of_its_tasks():
    """Var(mean of two tasks of n rows at p) = (p₁q₁ + p₂q₂) / 4n; nothing for the difference between the tasks."""
    parts = [Measurement(np.arange(200) < 180), Measurement(np.arange(200) < 20)]
    mean = mean_of_tasks(parts)
    low, high = bootstrap_interval(mean)
    error = math.sqrt(2 * 0.9 * 0.1 / (4 * 200))
    assert mean == pytest.approx(0.5) and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    better = mean_of_tasks([Measurement(np.arange(200) < 190), parts[1]])
    assert bootstrap_interval(better, mean)[0] > 0  # paired: 10 rows changed, and none for the worse


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        ([], {}, "must be there"),
        ([{"name": "t", "rows": []}], {}, "name='t' and 0 rows"),
        ([{"rows": rows_of(3)}], {}, "name=None and 3 rows"),
        ([{"name": "t", "rows": rows_of(3)}] * 2, {"shots": [0]}, "different names"),
        ([{"name": "t", "rows": rows_of(3)}], {"shots": []}, "shots=\\[\\] must not be empty"),
        ([{"name": "t", "rows": rows_of(3)}], {"shots": [0], "max_new_tokens": 256}, "must be below max_length, 256"),
        ([{"name": "t", "rows": rows_of(3)}], {"shots": [4]}, "'t': 4 examples are wanted before a row, and 2 usable"),
        ([{"name": "trec", "rows": rows_of(3, ["<|endoftext|>"])}], {}, "'trec': 3 of 3 .*3 empty completion.*No row"),
    ],
)
def test_what_cannot_be_asked_is_told_before(tiny_llama, monkeypatch, tasks, options, words):
    monkeypatch.setattr(f"{HOME}.generate", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(ValueError, match=words):
        evaluate_tasks(tiny_llama[0](), tiny_llama[1], tasks, **options)


def test_bad_rows_are_dropped_with_a_count():
    rows = [*rows_of(4, ["yes", "no"]), {"prompt": "x", "completion": ""}, {"prompt": None, "completion": "yes"}]
    rows += [{"prompt": "y", "completion": "maybe"}, {"completion": "yes"}]
    with pytest.warns(UserWarning, match=r"4 of 8 rows can't be used \(.*2 empty prompt.*first is row 4"):
        task = TaskRows.read({"name": "t", "rows": rows, "choices": ["yes", "no"]})
    assert len(task.answers) == 4 and task.asked == 4


def test_a_task_may_be_an_object(tiny_llama, said):
    class Task:
        name, family, rows = "t", "f", rows_of(3)

    (score,) = evaluate_tasks(tiny_llama[0](), tiny_llama[1], [Task()], shots=[1]).tasks
    assert (score.task, score.family, score.shots) == ("t", "f", 1)


def test_a_real_model_answers_real_tasks(tiny_llama, shared_data):
    """Greedy: the same answers whatever the batch; the model stays in its mode."""
    make_model, tokenizer = tiny_llama
    model = make_model(max_position_embeddings=2048).train()
    tasks = []
    for name in ("sciq_Direct_Question_Closed_Book_", "glue_mrpc_same_thing"):
        lines = (shared_data / "t0_tasks" / f"{name}.jsonl").read_text().splitlines()
        tasks.append({"name": name, "family": "f", "rows": [json.loads(line) for line in lines]})
    runs = [
        evaluate_tasks(model, tokenizer, tasks, shots=(0, 1), rows=3, max_new_tokens=4, batch_size=size)
        for size in (1, 8)
    ]
    assert model.training
    assert [item.predictions for item in runs[0].tasks] == [item.predictions for item in runs[1].tasks]
    assert [item.main for item in runs[0].tasks] == ["exact_match"] * 2 + ["multiple_choice"] * 2
    assert not any("<|endoftext|>" in target for item in runs[0].tasks for target in item.targets)
