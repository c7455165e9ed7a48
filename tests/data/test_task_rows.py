"""Labels and answers are read by row: what is learnt of them, and what is told of rows that can't be used."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset

from lifecycle_hf.data.task_rows import (
    MULTI,
    REGRESSION,
    SINGLE,
    Labels,
    answer_tokens,
    find_labels,
    tokenize_classification,
    tokenize_questions,
)


def rows(labels, features=None, **columns):
    texts = [f"text {i}" for i in range(len(labels))]
    features = features and Features({"text": Value("string"), "label": features})
    return Dataset.from_dict({"text": texts, "label": labels} | columns, features=features)


@pytest.mark.parametrize(
    ("labels", "features", "kind", "names"),
    [
        (["b", "a", "b", None], None, SINGLE, ("a", "b")),
        ([0, 2, 1], None, SINGLE, ("0", "1", "2")),
        ([True, False], None, SINGLE, ("0", "1")),
        ([1, 0], ClassLabel(names=["no", "yes"]), SINGLE, ("no", "yes")),
        ([0.5, 2.0], None, REGRESSION, ("value",)),
        ([["x"], [], ["y", "x"]], None, MULTI, ("x", "y")),
        ([[0], [2]], None, MULTI, ("0", "1", "2")),
        ([[0], [1]], List(ClassLabel(names=["no", "yes"])), MULTI, ("no", "yes")),
    ],
)
def test_what_is_learnt_is_told_by_the_labels(labels, features, kind, names):
    assert find_labels(rows(labels, features), "train_dataset") == Labels(kind, names)


def test_labels_are_read():
    assert Labels(SINGLE, ("a", "b")).read("b") == Labels(SINGLE, ("a", "b")).read(1) == 1
    assert Labels(MULTI, ("a", "b", "c")).read(["c", "a"]) == [1.0, 0.0, 1.0]
    assert Labels(REGRESSION, ("value",)).read(2) == 2.0


def test_mixed_labels_are_told_by_row(tmp_path):
    lines = [{"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": "yes"}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mixed = load_dataset("json", data_files=str(tmp_path / "mixed.jsonl"), cache_dir=str(tmp_path))["train"]
    with pytest.raises(ValueError, match="that of row 0 is of the kind int, that of row 2 of the kind str"):
        find_labels(mixed, "train_dataset")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": ["x"]}), "lacks the column 'label'"),
        (rows([None, None]), "no row with a label"),
        (rows(["a", "a"]), "'a' alone: a classifier needs two"),
        (rows([{"a": 1}]), "the label of row 0 is of the kind dict"),
        (rows([]), "train_dataset is empty"),
    ],
)
def test_what_holds_nothing_to_learn(dataset, message):
    with pytest.raises(ValueError, match=message):
        find_labels(dataset, "train_dataset")


def test_bad_rows_are_dropped_with_a_count_and_the_first(tiny_llama):
    given = Dataset.from_dict({"text": ["a", " ", "b", None, "c", "d"], "label": [0, 1, 5, 0, -1, None]})
    options = {"labels": Labels(SINGLE, ("no", "yes")), "max_length": 8, "where": "train_dataset"}
    with pytest.warns(UserWarning, match=r"5 of 6 rows can't be used \(.*2 empty text.*the first is row 1") as told:
        found = tokenize_classification(given, tiny_llama[1], **options)
    assert found["row"][:] == [0] and "with the label 5, which is no class" in str(told[0].message)
    assert "The classes are 'no', 'yes'" in str(told[0].message)
    with pytest.raises(ValueError, match="strict_data is on"):
        tokenize_classification(given, tiny_llama[1], **options, strict=True)
    with pytest.raises(ValueError, match="label of the kind str, not list"):
        tokenize_classification(rows(["a"]), tiny_llama[1], **options | {"labels": Labels(MULTI, ("a",))})
    with pytest.raises(ValueError, match="not finite"):
        tokenize_classification(
            rows([float("inf")]), tiny_llama[1], **options | {"labels": Labels(REGRESSION, ("v",))}
        )


def test_a_text_ends_with_eos_also_where_it_is_cut(tiny_llama):
    tokenizer, labels = tiny_llama[1], Labels(SINGLE, ("0", "1"))
    given = rows([0, 1], text_pair=["so", "a long text that must be cut " * 3])
    found = tokenize_classification(given, tokenizer, labels, max_length=12, where="train_dataset")
    assert [row[-1] for row in found["input_ids"]] == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(found[0]["input_ids"]) == "text 0\nso<eos>"
    assert len(found[1]["input_ids"]) == 12


def test_tokens_of_an_answer():
    offsets = [(-1, -1), (0, 4), (4, 8), (8, 9)]  # "The| fox|."
    assert answer_tokens(offsets, "fox", 5) == (2, 2) == answer_tokens(offsets, " fox", 4)
    assert answer_tokens(offsets, "The fox", 0) == (1, 2)
    assert answer_tokens(offsets, "e f", 2) == (1, 2)  # the tokens that hold it
    assert answer_tokens(offsets, "fox", 9) == (0, 0)


CONTEXT = "The capital of France is Paris. Please tell me a story about a small red fox."


def question(text, start, context=CONTEXT, asked="question"):
    return {"question": asked, "context": context, "answers": {"text": text, "answer_start": start}}


def windows(tokenizer, *given, **options):
    options = {"max_length": 24, "stride": 4, "unanswerable": True, "where": "train_dataset"} | options
    return tokenize_questions(Dataset.from_list(list(given)), tokenizer, **options)


def test_windows_cover_the_context_and_point_at_the_answer(tiny_llama):
    tokenizer = tiny_llama[1]
    found = windows(tokenizer, question(["fox"], [CONTEXT.index("fox")]))
    assert len(found) > 1 and found["row"][:] == [0] * len(found) and found["index"][:] == list(range(len(found)))
    covered, holders = set(), 0
    for window in found:
        places = [tuple(window["offsets"][i : i + 2]) for i in range(0, len(window["offsets"]), 2)]
        assert len(places) == len(window["input_ids"]) <= 24 and places[0] == (-1, -1)
        inside = [place for place in places if place[0] >= 0]
        covered.update(i for low, high in inside for i in range(low, high))
        whole = inside[0][0] <= CONTEXT.index("fox") and inside[-1][1] >= CONTEXT.index("fox") + 3
        if whole:
            holders += 1
            low, high = places[window["start"]][0], places[window["end"]][1]
            assert CONTEXT[low:high].strip() == "fox"
        else:
            assert (window["start"], window["end"]) == (0, 0)
    assert covered == set(range(len(CONTEXT))) and 0 < holders < len(found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (question(["Rome"], [0]), "answer that is not in its context at answer_start"),
        (question(["Paris"], [CONTEXT.index("Paris") + 1]), "answer that is not in its context"),
        (question([""], [0]), "answer that is not in its context"),
        (question(["fox"], []), "other numbers of text and answer_start"),
        (question(["The"], [0], asked=" "), "empty question"),
        (question(["The"], [0], context=""), "empty context"),
        (question(["The"], [0], asked="word " * 30), "question with .* leaves no room"),
    ],
)
def test_bad_questions_are_told_by_row(tiny_llama, row, message):
    good = question(["Paris"], [CONTEXT.index("Paris")])
    with pytest.warns(UserWarning, match=rf"{message}.*the first is row 1"):
        found = windows(tiny_llama[1], good, row)
    assert set(found["row"]) == {0}
    with pytest.raises(ValueError, match="strict_data is on"):
        windows(tiny_llama[1], good, row, strict=True)


def test_questions_without_an_answer_need_a_threshold(tiny_llama):
    good = question(["Paris"], [CONTEXT.index("Paris")])
    found = windows(tiny_llama[1], good, question([], []))
    assert set(found["row"]) == {0, 1} and {row["start"] for row in found if row["row"] == 1} == {0}
    with pytest.warns(UserWarning, match="question without an answer.*Set null_threshold"):
        windows(tiny_llama[1], good, question([], []), unanswerable=False)
