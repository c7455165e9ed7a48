import pytest
from datasets import Dataset, load_dataset

from lifecycle_hf.data.chat import has_generation_markers
from lifecycle_hf.data.tokenize import (
    Text,
    encode_complete,
    encode_prompt,
    encode_texts,
    require_eos,
    tokenize_preference,
    tokenize_prompts,
    tokenize_texts,
)

ASK = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Yes"}]


def words(tokenizer, ids):
    return tokenizer.decode(ids)


def test_encode_prompt(tokenizer):
    assert words(tokenizer, encode_prompt(tokenizer, ASK)) == "<bos><|user|>Hi<|assistant|>"
    assert encode_prompt(tokenizer, "Hi there") == tokenizer("Hi there")["input_ids"]


def test_encode_prompt_leaves_a_last_assistant_turn_open(chatml):
    assert words(chatml, encode_prompt(chatml, ASK + ANSWER)) == "<|user|>Hi<eos>\n<|assistant|>Yes"


def test_encode_complete_ends_at_the_eos(chatml):
    ids = encode_complete(chatml, ASK + ANSWER)
    assert words(chatml, ids) == "<|user|>Hi<eos>\n<|assistant|>Yes<eos>"
    sampled = chatml("Yes")["input_ids"] + [chatml.eos_token_id]
    assert ids == encode_prompt(chatml, ASK) + sampled
    plain = chatml("Yes")["input_ids"]
    assert encode_complete(chatml, "Yes") == encode_complete(chatml, "Yes<eos>") == [*plain, chatml.eos_token_id]


def test_encode_complete_of_a_template_without_eos(chatml):
    chatml.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    assert words(chatml, encode_complete(chatml, ASK + ANSWER)) == "Hi\nYes\n"


def test_rows_of_a_file_are_tokenised_once_and_rows_in_memory_without_a_hash(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "there"}\n')
    data = {"data_files": str(tmp_path / "rows.jsonl"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    rows = load_dataset("json", **data)
    tokenize_prompts(rows, tokenizer, where="rows", max_length=8)  # after its first call a tokenizer has another hash
    (first,), (second,) = (tokenize_prompts(rows, tokenizer, where="rows", max_length=8).cache_files for _ in range(2))
    assert first == second and "cache-" in first["filename"]
    monkeypatch.delattr("datasets.arrow_dataset.update_fingerprint")
    in_memory = Dataset.from_dict({"prompt": ["Hi", "there"]})
    assert (
        tokenize_prompts(in_memory, tokenizer, where="rows", max_length=8)["prompt_ids"][0]
        == tokenizer("Hi")["input_ids"]
    )
    with pytest.raises(NameError, match="update_fingerprint"):
        tokenize_prompts(rows, tokenizer, where="rows", max_length=8)


def test_tokenize_prompts_drops_with_one_warning(tokenizer):
    rows = [{"prompt": text, "n": n} for n, text in enumerate(["Hi", "  ", "long " * 40, "there", ""])]
    with pytest.warns(UserWarning) as caught:
        dataset = tokenize_prompts(Dataset.from_list(rows), tokenizer, max_length=10, where="train_dataset")
    assert [str(w.message) for w in caught] == [
        "train_dataset: 3 of 5 rows can't be used (2 empty prompt, 1 prompt longer than 10 tokens); the first is row "
        "1. They are dropped."
    ]
    assert list(dataset["n"]) == [0, 3]
    assert list(dataset["prompt_ids"]) == [tokenizer(text)["input_ids"] for text in ("Hi", "there")]


def test_tokenize_prompts_strict_and_nothing_left(tokenizer):
    dataset = Dataset.from_list([{"prompt": "Hi"}, {"prompt": ""}])
    with pytest.raises(ValueError, match="the first is row 1. strict_data is on"):
        tokenize_prompts(dataset, tokenizer, max_length=10, where="train_dataset", strict=True)
    with pytest.raises(ValueError, match="No row is left"):
        tokenize_prompts(dataset, tokenizer, max_length=0, where="train_dataset")


def test_chat_without_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    cases = [(tokenize_prompts, {"prompt": ASK}), (tokenize_texts, {"messages": ASK})]
    cases.append((tokenize_preference, {"chosen": ASK + ANSWER, "rejected": ASK + ASK}))
    for tokenize, row in cases:
        with pytest.raises(
            ValueError, match="train_dataset holds chat messages, but the tokenizer has no chat template"
        ):
            tokenize(Dataset.from_list([row]), tokenizer, max_length=None, where="train_dataset")


def test_tokenizer_without_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="PPOTrainer: the tokenizer has no EOS token"):
        require_eos(tokenizer, "PPOTrainer")
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize_texts(Dataset.from_list([{"text": "a"}]), tokenizer, max_length=None, where="ptx_dataset")


def test_tokenize_preference(tokenizer):
    rows = [
        {"prompt": "Q ", "chosen": "yes", "rejected": "no", "margin": 1.0},
        {"prompt": "Q ", "chosen": "same", "rejected": "same", "margin": 2.0},
        {"prompt": "Q ", "chosen": "", "rejected": "no", "margin": 3.0},
        {"prompt": "Q ", "chosen": "word " * 30, "rejected": "no", "margin": 4.0},
    ]
    with pytest.warns(UserWarning, match=r"3 of 4 rows .*identical.*empty chosen.*longer than 20"):
        dataset = tokenize_preference(Dataset.from_list(rows), tokenizer, max_length=20, where="train_dataset")
    eos = tokenizer.eos_token_id
    assert dataset.to_list() == [
        {
            "chosen_ids": [*tokenizer("Q yes")["input_ids"], eos],
            "rejected_ids": [*tokenizer("Q no")["input_ids"], eos],
            "margin": 1.0,
        }
    ]


def test_tokenize_preference_drops_empty_answers(tokenizer):
    empty = [{"role": "assistant", "content": ""}]
    rows = [{"chosen": ASK + ANSWER, "rejected": ASK + empty}, {"chosen": ASK + ANSWER, "rejected": ASK + ASK}]
    with pytest.warns(UserWarning, match="1 empty rejected"):
        assert len(tokenize_preference(Dataset.from_list(rows), tokenizer, max_length=None, where="t")) == 1


def test_tokenize_texts_plain(tokenizer):
    dataset = tokenize_texts(Dataset.from_list([{"text": "Hi there"}]), tokenizer, max_length=None, where="t")
    ids = [*tokenizer("Hi there")["input_ids"], tokenizer.eos_token_id]
    assert dataset.to_list() == [{"input_ids": ids, "loss_mask": [1] * len(ids)}]


def test_tokenize_texts_prompt_completion(tokenizer):
    rows = [
        {"prompt": "Q:", "completion": " yes"},
        {"prompt": "Q:", "completion": ""},
        {"prompt": None, "completion": "x"},
    ]
    with pytest.warns(UserWarning, match="2 of 3 rows"):
        dataset = tokenize_texts(Dataset.from_list(rows), tokenizer, max_length=None, where="t")
    prompt, full = tokenizer("Q:")["input_ids"], tokenizer("Q: yes")["input_ids"]
    expected = [0] * len(prompt) + [1] * (len(full) - len(prompt) + 1)
    assert dataset.to_list() == [{"input_ids": [*full, tokenizer.eos_token_id], "loss_mask": expected}]


def test_tokenize_texts_messages_mask_by_generation_markers(tokenizer):
    assert has_generation_markers(tokenizer)
    row = tokenize_texts(Dataset.from_list([{"messages": ASK + ANSWER}]), tokenizer, max_length=None, where="t")[0]
    learned = [token for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag]
    assert words(tokenizer, learned) == "Yes<eos>"


def test_tokenize_texts_messages_without_markers(chatml):
    assert not has_generation_markers(chatml)
    row = tokenize_texts(Dataset.from_list([{"messages": ASK + ANSWER}]), chatml, max_length=None, where="t")[0]
    assert all(row["loss_mask"])
    assert row["input_ids"] == encode_complete(chatml, ASK + ANSWER)


def test_tokenize_texts_from_value_layout(tokenizer):
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]
    row = tokenize_texts(Dataset.from_list([{"conversations": turns}]), tokenizer, max_length=None, where="t")[0]
    assert words(tokenizer, row["input_ids"]) == "<bos><|user|>Hi<|assistant|>Yes<eos>"


def test_tokenize_texts_truncates_and_drops_what_truncation_took(tokenizer):
    rows = [{"prompt": "Q:", "completion": " yes"}, {"prompt": "word " * 30, "completion": " yes"}]
    with pytest.warns(UserWarning, match="no token to learn from"):
        dataset = tokenize_texts(Dataset.from_list(rows), tokenizer, max_length=5, where="t")
    assert [len(row) for row in dataset["input_ids"]] == [5]


def test_tokenize_texts_of_another_schema(tokenizer):
    with pytest.raises(ValueError, match="ptx_dataset is a prompt dataset"):
        tokenize_texts(Dataset.from_list([{"prompt": "a"}]), tokenizer, max_length=None, where="ptx_dataset")


def test_parts_between_special_tokens_are_encoded_alone(tokenizer):
    """The ids are those of the whole text, also beside tokens that take in white space or are no special tokens."""
    from tokenizers import AddedToken

    extra = [AddedToken("<left>", lstrip=True, special=True), AddedToken("<right>", rstrip=True, special=True)]
    tokenizer.add_special_tokens({"additional_special_tokens": [*extra, AddedToken("<|user|>s", special=True)]})
    tokenizer.add_tokens(["fox"])
    texts = [
        "<bos><|user|>Hi <|user|>s<|user|> fox<eos>\n",
        "a <left> <|user|> <right>  <eos>  b",
        "no token",
        "",
        "<eos>",
    ]
    chats = [Text(text, chat=True) for text in texts]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert encode_texts(tokenizer, chats) == expected
    assert encode_texts(tokenizer, [*chats[::-1], Text("Hi"), *chats])[-5:] == expected
    tokenizer.split_special_tokens = True
    assert encode_texts(tokenizer, chats) == tokenizer(texts, add_special_tokens=False)["input_ids"] != expected


def test_batches_and_processes_make_the_same_rows(tokenizer):
    """Rows 1,000 and up are in a second batch; the first batch may hold no usable row."""
    rows = [{"prompt": ""}] * 1001 + [{"prompt": "Hi"}] * 3
    options = {"max_length": None, "where": "t"}
    with pytest.warns(UserWarning, match="1001 of 1004 rows"):
        got = tokenize_prompts(Dataset.from_list(rows), tokenizer, **options)
    with pytest.warns(UserWarning, match="1001 of 1004 rows"):
        again = tokenize_prompts(Dataset.from_list(rows), tokenizer, num_proc=2, **options)
    assert got.to_list() == again.to_list() == [{"prompt": "Hi", "prompt_ids": tokenizer("Hi")["input_ids"]}] * 3
