"""Tasks: layouts of rows, templates that fit, chains of thought, rows that can't be used."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from lifecycle_hf import InstructionTask
from lifecycle_hf.data.templates import Template

ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5", "chain": "2 + 3 = 5"},
    {"instruction": "Name a colour.", "input": "", "output": "red", "chain": None},
]
ASK, ANSWER = {"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris"}


def said(example):
    """(the user's text, the assistant's text) of an example of two messages."""
    (ask,), (answer,) = example["prompt"], example["completion"]
    assert (ask["role"], answer["role"]) == ("user", "assistant")
    return ask["content"], answer["content"]


def texts(task, number, choices=8, **options):
    """All pairs of texts of a row over the whole range of choices."""
    return {said(task.example(number, i / choices, **options)) for i in range(choices)}


def test_layouts_without_templates():
    assert said(InstructionTask("a", ALPACA).example(0)) == ("Add.\n\n2 and 3", "5")
    assert said(InstructionTask("a", ALPACA).example(1)) == ("Name a colour.", "red")
    assert said(InstructionTask("b", [{"instruction": "Go.", "output": "Gone."}]).example(0)) == ("Go.", "Gone.")
    assert said(InstructionTask("c", [{"prompt": " Hi", "completion": " you"}]).example(0)) == (" Hi", " you")


def test_chats_are_taken_as_they_are():
    system, thanks = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Thanks."}
    whole = InstructionTask("a", [{"messages": [system, ASK, ANSWER]}]).example(0)
    assert whole == {"prompt": [system, ASK], "completion": [ANSWER]}
    halves = InstructionTask("a", [{"prompt": [ASK], "completion": [ANSWER, thanks, ANSWER]}]).example(0)
    assert halves == {"prompt": [ASK, ANSWER, thanks], "completion": [ANSWER]}


def test_a_family_has_the_own_templates():
    task = InstructionTask("sums", ALPACA, "maths")
    found = texts(task, 0, 5)
    assert len(found) == 5 and ("Problem: Add.\n2 and 3\nSolution:", "5") in found
    assert ("Write a maths problem whose answer is: 5", "Add.\n2 and 3") in found
    assert texts(task.without_templates(), 0) == {("Add.\n\n2 and 3", "5")}


def test_templates_that_need_an_empty_column_are_not_drawn():
    given = [
        "{input}: {instruction}",
        {"prompt": "{output}!", "completion": "{input}", "inverted": True},
        "{instruction}",
    ]
    task = InstructionTask("a", ALPACA, templates=given)
    assert texts(task, 0) == {("2 and 3: Add.", "5"), ("5!", "2 and 3"), ("Add.", "5")}
    assert texts(task, 1) == {("Name a colour.", "red")}
    assert task.checked[1] == {} and len(task) == 2


def test_templates_name_any_columns():
    rows = [{"question": "Sky?", "choices": ["red", "blue"], "label": 1}]
    with pytest.raises(ValueError, match="task 'a': it needs the columns .* Columns found: .'question'"):
        InstructionTask("a", rows)
    template = Template("{{ question }} {{ choices | join(' or ') }}?", "{{ choices[label] }}")
    task = InstructionTask("a", rows, templates=[template])
    assert said(task.example(0)) == said(task.without_templates().example(0)) == ("Sky? red or blue?", "blue")


def test_chain_before_the_answer():
    task = InstructionTask("a", ALPACA)
    assert said(task.example(0, cue="Steps.")) == ("Add.\n\n2 and 3\nSteps.", "2 + 3 = 5\n5")
    assert said(task.example(0, cue="")) == ("Add.\n\n2 and 3", "2 + 3 = 5\n5")
    assert said(task.example(1, cue="Steps.")) == ("Name a colour.", "red")  # no chain
    assert task.checked[2] == 1
    chat = InstructionTask("b", [{"messages": [ASK, ANSWER], "why": "It is."}], chain="why")
    assert said(chat.example(0, cue="Steps.")) == ("Capital of France?\nSteps.", "It is.\nParis")
    assert said(chat.example(0)) == ("Capital of France?", "Paris")


def test_no_chain_before_an_inverted_answer():
    """The row has three templates, of which the inverted one is not drawn with a chain."""
    inverted = {"prompt": "{output}?", "completion": "{input}", "inverted": True}
    task = InstructionTask("a", ALPACA[:1], templates=[inverted, "{input}", "{instruction}"])
    assert texts(task, 0, cue="") == {("2 and 3", "2 + 3 = 5\n5"), ("Add.", "2 + 3 = 5\n5")}
    assert ("5?", "2 and 3") in texts(task, 0)
    assert texts(InstructionTask("a", ALPACA[:1], templates=[inverted]), 0, cue="") == {("5?", "2 and 3")}


def test_unusable_rows_are_counted_and_passed_over():
    end = "<|endoftext|>"
    rows = [("a", f"1{end}"), ("b", end), (" ", "2"), ("d", f"3{end}"), (None, " "), ("f", "4")]
    task = InstructionTask("a", [{"prompt": p, "completion": c} for p, c in rows])
    bad, problems, _ = task.checked
    assert bad.tolist() == [1, 2, 4]
    assert problems == {"empty completion": 1, "empty prompt": 1, "empty completion and prompt": 1}
    assert [said(task.example(i)) for i in range(len(task))] == [("a", "1"), ("d", "3"), ("f", "4")]


def test_unusable_chats():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    empty = {"role": "assistant", "content": "<|endoftext|>"}
    chats = [[ASK, ANSWER], [ANSWER], [ASK, ANSWER, ASK], [ASK, call], [ASK, empty], []]
    task = InstructionTask("a", [{"messages": chat} for chat in chats])
    assert task.checked[0].tolist() == [1, 2, 3, 4, 5]
    assert task.checked[1] == {
        "chat that does not end with an answer to a message": 2,
        "chat with a message without text": 1,
        "empty answer": 1,
        "chat without messages": 1,
    }


def test_an_empty_rendering_can_not_be_used():
    template = Template("{{ instruction }}", "{% if output == '5' %}five{% endif %}")
    task = InstructionTask("a", ALPACA, templates=[template])
    assert task.checked[0].tolist() == [1] and task.checked[1] == {"empty answer": 1}


def test_a_row_that_jinja_can_not_render_is_named():
    task = InstructionTask(
        "a", ALPACA, templates=[Template("{{ instruction }}", "{{ output | int / (output | int) }}")]
    )
    with pytest.raises(ValueError, match="task 'a', row 1: template '{{ instruction }}': division by zero"):
        len(task)


def test_every_template_is_tried_before_training():
    """The second template is tried on row 1, with or without a chain."""
    wrong = Template("{{ instruction }}", "{{ output + 1 }}", name="sum")
    for rows in (ALPACA, [row | {"chain": ""} for row in ALPACA]):
        with pytest.raises(ValueError, match="task 'a', row 1: template 'sum': can only concatenate str"):
            len(InstructionTask("a", rows, templates=["{instruction}", wrong]))


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError,
        match="task 'a': template 'ask' names contxt, but the columns are chain, input, instruction, output",
    ):
        InstructionTask("a", ALPACA, templates=[Template("{contxt} {instruction}", name="ask")])
    with pytest.raises(ValueError, match="names output, but the columns are completion, prompt. Correct"):
        InstructionTask("a", [{"prompt": "a", "completion": "b"}], templates=["{prompt}"])


def test_sources(tmp_path):
    data = Dataset.from_list(ALPACA)
    data.to_json(tmp_path / "rows.jsonl")
    data.save_to_disk(tmp_path / "saved")
    for rows in (data, DatasetDict(train=data), str(tmp_path / "rows.jsonl"), tmp_path / "saved"):
        assert said(InstructionTask("a", rows).example(0)) == ("Add.\n\n2 and 3", "5")


def test_sources_that_are_refused(tmp_path):
    for text in ("", "no JSON"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(ValueError, match="task 'a' has no rows: .*rows.jsonl can't be read"):
            InstructionTask("a", tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="task 'a' has no rows"):
        InstructionTask("a", [])
    with pytest.raises(ValueError, match="task 'a' has no rows: .* can't be read .dataset_name: there is no file"):
        InstructionTask("a", str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="task 'a': there is no split 'train', but test"):
        InstructionTask("a", DatasetDict(test=Dataset.from_list(ALPACA)))
    with pytest.raises(ValueError, match="task 'a' is streamed"):
        InstructionTask("a", IterableDataset.from_generator(lambda: iter(ALPACA)))
    with pytest.raises(ValueError, match="task 'a': its rows are chats, which take no templates"):
        InstructionTask("a", [{"messages": [ASK, ANSWER]}], templates=["{messages}"])
