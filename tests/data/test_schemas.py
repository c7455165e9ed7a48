import pytest
from datasets import Dataset, load_dataset

from lifecycle_hf.data.schemas import (
    detect,
    is_transcript,
    to_preference,
    to_prompts,
    transcript_to_messages,
    validate,
)

ASK = [{"role": "user", "content": "Hi"}]


def say(text):
    return [{"role": "assistant", "content": text}]


ROWS = {
    "text": {"text": "a"},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "prompt": {"prompt": "a"},
}


@pytest.mark.parametrize("schema", ROWS)
def test_detect_and_validate_accept_each_schema(schema):
    dataset = Dataset.from_list([ROWS[schema]])
    assert detect(dataset, "train_dataset") == schema
    validate(dataset, schema, "train_dataset")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_detect_chat_text(column):
    assert detect(Dataset.from_list([{column: ASK}]), "train_dataset") == "text"


@pytest.mark.parametrize(
    ("row", "schema", "words"),
    [
        ({"promt": "a"}, "prompt", ["train_dataset", "['promt']", "'promt' looks like a misspelt 'prompt'"]),
        ({"chosen": "a", "rejcted": "b"}, "preference", ["['rejected'] is missing", "misspelt 'rejected'"]),
        ({"question": "a", "answer": "b"}, "prompt-completion", ["['question', 'answer']", "rename_column"]),
        ({"prompt": 3}, "prompt", ["column 'prompt' of row 0 holds int 3"]),
    ],
)
def test_validate_names_what_is_wrong(row, schema, words):
    with pytest.raises(ValueError) as error:
        validate(Dataset.from_list([row]), schema, "train_dataset")
    assert all(word in str(error.value) for word in words), error.value


def test_empty_dataset_is_an_error():
    empty = Dataset.from_list([{"prompt": "a"}]).select([])
    for check in (lambda: validate(empty, "prompt", "eval_dataset"), lambda: detect(empty, "eval_dataset")):
        with pytest.raises(ValueError, match="eval_dataset is empty"):
            check()


def test_detect_without_any_schema():
    with pytest.raises(ValueError, match=r"Columns found: \['x'\]"):
        detect(Dataset.from_list([{"x": "a"}]), "train_dataset")


def test_transcript_to_messages():
    text = "\n\nHuman: one\n\ntwo\n\nAssistant: three Human: no turn\n\nHuman: four\n\nAssistant: "
    assert is_transcript(text)
    assert transcript_to_messages(text) == [
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": "three Human: no turn"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": ""},
    ]
    with pytest.raises(ValueError, match="transcript"):
        transcript_to_messages("Hello")


PREFERENCES = [
    # (row, prompt, chosen) after unification
    (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        None,
        ASK + say("yes"),
    ),
    ({"prompt": "Hi", "chosen": ASK + say("yes"), "rejected": ASK + say("no")}, None, ASK + say("yes")),
    (
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": ASK + say("yes"), "rejected": ASK + say("no")},
        None,
        ASK + say("yes"),
    ),
    ({"prompt": ASK, "chosen": say("yes"), "rejected": say("no")}, ASK, say("yes")),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "yes", "rejected": "no"}, ASK, say("yes")),
    ({"prompt": "Hi ", "chosen": "yes", "rejected": "no"}, "Hi ", "yes"),
]


@pytest.mark.parametrize(("row", "prompt", "chosen"), PREFERENCES)
def test_to_preference_unifies(row, prompt, chosen):
    dataset = to_preference(Dataset.from_list([{**row, "margin": 0.5, "other": 1}]), "train_dataset")
    assert set(dataset.column_names) == {"chosen", "rejected", "margin"} | ({"prompt"} if prompt else set())
    assert dataset[0]["chosen"] == chosen
    assert dataset[0].get("prompt") == prompt


@pytest.mark.parametrize(("row", "prompt", "chosen"), PREFERENCES)
def test_to_prompts_of_preferences(row, prompt, chosen):
    dataset = to_prompts(Dataset.from_list([{**row, "other": 1}]), "train_dataset")
    assert dataset[0]["prompt"] == (prompt or ASK)
    assert dataset[0]["other"] == 1


def test_to_prompts_cuts_back_to_the_last_user_turn():
    chosen = [*ASK, *say("same"), {"role": "user", "content": "more"}]
    rejected = [*ASK, *say("same"), {"role": "user", "content": "less"}]
    assert to_prompts(Dataset.from_list([{"chosen": chosen, "rejected": rejected}]), "t")[0]["prompt"] == ASK


def test_to_prompts_keeps_the_row_of_an_empty_answer():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: no"}
    assert to_prompts(Dataset.from_list([row]), "t")[0]["prompt"] == ASK


def test_to_prompts_of_prompts():
    rows = [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "n": 1}, {"prompt": "no transcript", "n": 2}]
    dataset = to_prompts(Dataset.from_list(rows), "t")
    assert dataset["prompt"][0] == ASK
    assert not dataset["prompt"][1]
    assert list(dataset["n"]) == [1, 2]
    with pytest.raises(ValueError, match="Columns found"):
        to_prompts(Dataset.from_list([{"text": "a"}]), "t")


def test_real_transcripts(shared_data):
    dataset = load_dataset("json", data_files=str(shared_data / "hh_harmless_1500.jsonl.gz"), split="train")
    prompts = to_prompts(dataset, "hh")["prompt"]
    assert len(prompts) == 1500
    assert all(prompt[-1]["role"] == "user" and prompt[-1]["content"] for prompt in prompts)


@pytest.mark.parametrize("columns", [("instruction", "input", "output"), ("instruction", "output")])
def test_alpaca_columns_are_named_with_the_line_that_converts_them(columns):
    row = dict(zip(columns, ("Add.", "1 + 1", "2") if len(columns) == 3 else ("Add.", "2"), strict=True))
    dataset = Dataset.from_list([row, row | {"input": ""} if "input" in row else row])
    for check in (lambda data: detect(data, "train_dataset"), lambda data: to_prompts(data, "train_dataset")):
        with pytest.raises(ValueError, match="train_dataset.*These are Alpaca's columns") as error:
            check(dataset)
    names = {"dataset": dataset}
    exec(str(error.value).partition("Convert them by ")[2].removesuffix("."), names)
    prompts = ["Add.\n\n1 + 1", "Add."] if len(columns) == 3 else ["Add."] * 2
    assert names["dataset"].to_list() == [{"prompt": prompt, "completion": "2"} for prompt in prompts]
    with pytest.raises(ValueError) as error:
        to_preference(dataset, "train_dataset")
    assert "Alpaca" not in str(error.value)
