"""Pairs and labelled answers become the tokens that TRL makes of them; rows that can't be used are dropped aloud."""

import pytest
import trl
from datasets import Dataset

from lifecycle_hf.data.schemas import to_preference, to_unpaired
from lifecycle_hf.data.tokenize import tokenize_pairs, tokenize_unpaired

ASK = [{"role": "user", "content": "Hi"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
TRL_ARGS = {"report_to": "none", "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


def say(text):
    return [{"role": "assistant", "content": text}]


LONGER = ASK + say("Hello") + [{"role": "user", "content": "Why?"}]
PAIRS = {
    "plain, prompt": [
        {"prompt": "Tell me", "chosen": " a story", "rejected": " no"},
        {"prompt": "", "chosen": "hello", "rejected": "no"},
        {"prompt": "The capital", "chosen": " is Paris.<eos>", "rejected": " is a small red fox"},
    ],
    "plain, no prompt": [
        {"chosen": "Tell me a story", "rejected": "Tell me the answer"},
        {"chosen": "Two and three", "rejected": "Two and three make five"},
    ],
    "chat, prompt": [
        {"prompt": ASK, "chosen": say("Yes"), "rejected": say("No")},
        {"prompt": SYSTEM + LONGER, "chosen": say("a small red fox"), "rejected": say("no")},
    ],
    "chat, no prompt": [
        {"chosen": ASK + say("Yes"), "rejected": ASK + say("No")},
        {"chosen": SYSTEM + LONGER + say("a small red fox"), "rejected": SYSTEM + LONGER + say("no")},
    ],
    "merged across the border": [
        {"prompt": "I can", "chosen": "not", "rejected": " hello"},
        {"prompt": "I ca", "chosen": "nnot", "rejected": " hello"},
    ],
}


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    make_model, tokenizer = tiny_llama
    path = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(path), tokenizer.save_pretrained(path)
    return str(path)


def pairs(rows, tokenizer, max_length=None, strict=False):
    dataset = to_preference(Dataset.from_list(rows), "train_dataset")
    return tokenize_pairs(dataset, tokenizer, max_length=max_length, where="train_dataset", strict=strict)


def unpaired(rows, tokenizer, max_length=None, strict=False):
    dataset = to_unpaired(Dataset.from_list(rows), "train_dataset")
    return tokenize_unpaired(dataset, tokenizer, max_length=max_length, where="train_dataset", strict=strict)


def trl_pairs(rows, tokenizer, base, tmp_path, **options):
    args = trl.DPOConfig(str(tmp_path), **TRL_ARGS, **options)
    return trl.DPOTrainer(base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def trl_unpaired(rows, tokenizer, base, tmp_path, **options):
    args = trl.KTOConfig(str(tmp_path), **TRL_ARGS, **options)
    return trl.KTOTrainer(base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def ids(dataset, *names):
    return dataset.select_columns(list(names)).to_list()


PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_those_of_trl(kind, tokenizer, base, tmp_path):
    rows = [row for row in PAIRS[kind] if row.get("prompt") != ""]
    peer = trl_pairs(rows, tokenizer, base, tmp_path).train_dataset
    assert ids(pairs(rows, tokenizer), *PAIR_IDS) == ids(peer, *PAIR_IDS)


@pytest.mark.parametrize("kind", ["chat, prompt", "chat, no prompt"])
def test_pairs_of_a_template_that_goes_on_behind_the_eos(kind, chatml, base, tmp_path):
    peer = trl_pairs(PAIRS[kind], chatml, base, tmp_path).train_dataset
    got = pairs(PAIRS[kind], chatml)
    assert ids(got, *PAIR_IDS) == ids(peer, *PAIR_IDS)
    assert chatml.decode(got[0]["prompt_ids"]) == "<|user|>Hi<eos>\n<|assistant|>"
    assert chatml.decode(got[0]["chosen_ids"]) == "Yes<eos>\n"


def answers(rows):
    """Labelled answers of rows with an explicit prompt, alternately chosen and rejected."""
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(rows)
        if row["prompt"] != ""
    ]


@pytest.mark.parametrize("kind", ["plain, prompt", "chat, prompt", "merged across the border"])
def test_unpaired_are_those_of_trl(kind, tokenizer, base, tmp_path):
    rows = answers(PAIRS[kind])
    peer = trl_unpaired(rows, tokenizer, base, tmp_path).train_dataset
    columns = ("prompt_ids", "completion_ids", "label")
    assert ids(unpaired(rows, tokenizer), *columns) == ids(peer, *columns)


def test_tokens_by_hand(tokenizer):
    """One EOS ends a plain completion; a chat's prompt ends with the invitation to answer."""
    got = pairs(PAIRS["plain, prompt"][2:], tokenizer)[0]
    assert [tokenizer.decode(got[name]) for name in PAIR_IDS] == [
        "The capital",
        " is Paris.<eos>",
        " is a small red fox<eos>",
    ]
    got = pairs(PAIRS["chat, no prompt"], tokenizer)[1]
    assert [tokenizer.decode(got[name]) for name in PAIR_IDS] == [
        "<bos><|system|>Be brief.<|user|>Hi<|assistant|>Hello<eos><|user|>Why?<|assistant|>",
        "a small red fox<eos>",
        "no<eos>",
    ]


def test_merge_across_the_border_shortens_the_prompt(tokenizer):
    """Both sides have the prompt that the two share, and all the text is there."""
    assert tokenizer.tokenize("I ca") == ["I", "Ġc", "a"] and tokenizer.tokenize("I cannot") == ["I", "Ġcanno", "t"]
    got = pairs(PAIRS["merged across the border"], tokenizer)[1]
    assert got["prompt_ids"] == tokenizer("I")["input_ids"]
    assert tokenizer.decode(got["prompt_ids"] + got["chosen_ids"]) == "I cannot<eos>"
    assert tokenizer.decode(got["prompt_ids"] + got["rejected_ids"]) == "I ca hello<eos>"


@pytest.mark.parametrize("max_length", [4, 6, 9])
def test_pairs_are_cut_as_trl_cuts_them(max_length, tokenizer, base, tmp_path):
    """TRL cuts in its collator; a pair that is the same once cut has nothing to learn from and is left out here."""
    rows = [
        {"prompt": "Tell me", "chosen": " a story about a small red fox", "rejected": " no"},
        {"prompt": "hello", "chosen": " a small red fox", "rejected": " seven is a prime number"},
    ]
    peer = trl_pairs(rows, tokenizer, base, tmp_path, max_length=max_length)
    collated = peer.data_collator(list(peer.train_dataset))
    expected, n = [], len(peer.train_dataset)
    for side in range(2):
        for row in range(n):
            kept = collated["attention_mask"][side * n + row].bool()
            sequence, learned = (collated[k][side * n + row][kept] for k in ("input_ids", "completion_mask"))
            expected.append((sequence[~learned.bool()].tolist(), sequence[learned.bool()].tolist()))
    expected = [
        {"prompt_ids": expected[row][0], "chosen_ids": expected[row][1], "rejected_ids": expected[n + row][1]}
        for row in range(n)
    ]
    expected = [row for row in expected if row["chosen_ids"] != row["rejected_ids"]]
    assert ids(pairs(rows, tokenizer, max_length), *PAIR_IDS) == expected != []
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in expected) == max_length


def test_unpaired_are_cut_at_the_end(tokenizer):
    whole = [*tokenizer("Tell me a story")["input_ids"], tokenizer.eos_token_id]
    rows = [{"prompt": "Tell me", "completion": " a story", "label": True}]
    for max_length in (5, 6, len(whole), None):
        got = unpaired(rows, tokenizer, max_length)[0]
        assert got["prompt_ids"] == whole[:4] and got["completion_ids"] == whole[4:max_length]


@pytest.mark.parametrize(
    "rows",
    [
        [{"chosen": HH + " Yes", "rejected": HH + " No"}],
        [{"prompt": HH, "chosen": "Yes", "rejected": "No"}],
        [{"prompt": "ignored", "chosen": HH + " Yes", "rejected": HH + " No"}],
    ],
)
def test_transcripts_become_chats(rows, tokenizer):
    expected = pairs([{"prompt": LONGER, "chosen": say("Yes"), "rejected": say("No")}], tokenizer).to_list()
    assert pairs(rows, tokenizer).to_list() == expected


def test_unpaired_transcripts_become_chats(tokenizer):
    got = unpaired([{"prompt": HH, "completion": "Yes", "label": False}], tokenizer).to_list()
    expected = pairs([{"prompt": LONGER, "chosen": say("Yes"), "rejected": say("No")}], tokenizer)[0]
    assert got == [
        {
            "prompt_ids": expected["prompt_ids"],
            "prompt_key": expected["prompt_key"],
            "completion_ids": expected["chosen_ids"],
            "label": False,
        }
    ]


def test_a_prompt_of_no_character_is_the_bos(tokenizer, base, tmp_path):
    """Where the tokenizer puts one; without it there is nothing to predict the first token from."""
    from tokenizers.processors import TemplateProcessing

    rows = [{"prompt": "", "chosen": "hello", "rejected": "no"}]
    with pytest.raises(ValueError, match="1 prompt without a token"):
        pairs(rows, tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    got = pairs(rows, tokenizer)
    assert got[0]["prompt_ids"] == [tokenizer.bos_token_id]
    assert ids(got, *PAIR_IDS) == ids(trl_pairs(rows, tokenizer, base, tmp_path).train_dataset, *PAIR_IDS)


def test_log_probs_of_the_reference_stay(tokenizer):
    row = {
        "prompt": "Tell me",
        "chosen": " yes",
        "rejected": " no",
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.0,
    }
    got = pairs([row | {"margin": 1.0}, row | {"chosen": " no"}, row], tokenizer)
    assert got.column_names == [PAIR_IDS[0], "prompt_key", *PAIR_IDS[1:], "ref_chosen_logps", "ref_rejected_logps"]
    assert (list(got["ref_chosen_logps"]), list(got["ref_rejected_logps"])) == ([-1.5] * 2, [-2.0] * 2)


PLAIN = {"prompt": "Tell me", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": ASK, "chosen": say("Yes"), "rejected": say("No")}
LABELLED = {"prompt": "Tell me", "completion": " yes", "label": True}
SPOKEN = {"prompt": ASK, "completion": say("Yes"), "label": True}
SILENT = [{"role": "user", "content": None}]
# reason, a good row, what makes it bad, max_length
BAD_PAIRS = [
    ("empty chosen", PLAIN, {"chosen": None}, None),
    ("empty rejected", PLAIN, {"rejected": None}, None),
    ("empty chosen", PLAIN, {"chosen": ""}, None),
    ("empty rejected", PLAIN, {"rejected": " \n\t "}, None),
    ("identical chosen and rejected", PLAIN, {"rejected": " yes"}, None),
    ("the same chosen and rejected once cut to 12 tokens", PLAIN, {"chosen": " no" * 8, "rejected": " no" * 9}, 12),
    ("prompt that fills max_length=20", PLAIN, {"prompt": "hello " * 30}, 20),
    ("prompt without a token", PLAIN, {"prompt": ""}, None),
    ("empty chosen", CHAT, {"chosen": []}, None),
    ("empty prompt", CHAT, {"prompt": []}, None),
    ("empty rejected", CHAT, {"rejected": say("  ")}, None),
    ("identical chosen and rejected", CHAT, {"rejected": say("Yes")}, None),
    ("chosen with a message that has neither text nor tool calls", CHAT, {"chosen": say(None)}, None),
    ("prompt with a message that has neither text nor tool calls", CHAT, {"prompt": SILENT + ASK}, None),
    ("prompt that fills max_length=20", CHAT, {"prompt": ASK * 10}, 20),
]
BAD_UNPAIRED = [
    ("empty completion", LABELLED, {"completion": None}, None),
    ("empty completion", LABELLED, {"completion": ""}, None),
    ("empty completion", LABELLED, {"completion": " \n"}, None),
    ("missing label", LABELLED, {"label": None}, None),
    ("label that is neither true nor false", LABELLED | {"label": 1}, {"label": 2}, None),
    ("label that is neither true nor false", LABELLED | {"label": 0.0}, {"label": 0.5}, None),
    ("prompt that fills max_length=20", LABELLED, {"prompt": "hello " * 30}, 20),
    ("prompt without a token", LABELLED, {"prompt": ""}, None),
    ("empty completion", SPOKEN, {"completion": []}, None),
    ("empty prompt", SPOKEN, {"prompt": []}, None),
    ("completion with a message that has neither text nor tool calls", SPOKEN, {"completion": say(None)}, None),
    ("prompt with a message that has neither text nor tool calls", SPOKEN, {"prompt": SILENT}, None),
]
BAD_ROWS = [(pairs, *case) for case in BAD_PAIRS] + [(unpaired, *case) for case in BAD_UNPAIRED]


@pytest.mark.parametrize(("tokenize", "reason", "good", "change", "max_length"), BAD_ROWS)
def test_bad_rows_are_dropped_with_one_warning(tokenize, reason, good, change, max_length, tokenizer):
    rows = [good, good, good | change, good, good | change]
    with pytest.warns(UserWarning) as caught:
        got = tokenize(rows, tokenizer, max_length)
    assert [str(warning.message) for warning in caught] == [
        f"train_dataset: 2 of 5 rows can't be used (2 {reason}); the first is row 2. They are dropped."
    ]
    assert got.to_list() == tokenize([good] * 3, tokenizer, max_length).to_list()
    with pytest.raises(ValueError, match="the first is row 2. strict_data is on"):
        tokenize(rows, tokenizer, max_length, strict=True)
    with pytest.raises(ValueError, match=f"2 of 2 rows .*{reason}.*No row is left"):
        tokenize([good | change] * 2, tokenizer, max_length)


def test_reasons_are_counted(tokenizer):
    changes = [{}, {"chosen": ""}, {"rejected": " yes"}, {"chosen": None}, {"prompt": "hello " * 30}]
    with pytest.warns(UserWarning) as caught:
        assert len(pairs([PLAIN | change for change in changes], tokenizer, 20)) == 1
    (warning,) = caught
    assert (
        "4 of 5 rows can't be used (2 empty chosen, 1 identical chosen and rejected, 1 prompt that fills "
        "max_length=20); the first is row 1."
    ) in str(warning.message)


@pytest.mark.parametrize(
    ("tokenize", "row"),
    [
        (pairs, {"prompt": ASK, "chosen": say("Yes"), "rejected": "No"}),
        (pairs, {"chosen": ASK + say("Yes"), "rejected": "No"}),
        (unpaired, {"prompt": "Hi", "completion": say("Yes"), "label": True}),
        (unpaired, {"prompt": ASK, "completion": "Yes", "label": True}),
    ],
)
def test_prompt_and_completion_of_different_kinds(tokenize, row, tokenizer):
    with pytest.raises(ValueError, match="1 prompt and completion of different kinds"):
        tokenize([row], tokenizer)


def test_text_prompt_beside_whole_chats_is_not_read(tokenizer):
    """As in UltraFeedback, where chosen and rejected hold the prompt and a column repeats it as text."""
    rows = [{"prompt": "Hi", "chosen": ASK + say("Yes"), "rejected": ASK + say("No")}]
    assert pairs(rows, tokenizer).to_list() == pairs([CHAT], tokenizer).to_list()


@pytest.mark.parametrize("good", [PLAIN, CHAT, {"prompt": HH, "chosen": " Yes", "rejected": " No"}])
@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_a_first_row_without_a_value_changes_no_other(good, side, tokenizer):
    with pytest.warns(UserWarning, match="1 of 3 rows .*the first is row 0"):
        got = pairs([good | {side: None}, good, good], tokenizer)
    assert got.to_list() == pairs([good, good], tokenizer).to_list()


@pytest.mark.parametrize("good", [LABELLED, SPOKEN, {"prompt": HH, "completion": " Yes", "label": True}])
@pytest.mark.parametrize("name", ["prompt", "completion", "label"])
def test_a_first_answer_without_a_value_changes_no_other(good, name, tokenizer):
    with pytest.warns(UserWarning, match="1 of 3 rows .*the first is row 0"):
        got = unpaired([good | {name: None}, good, good], tokenizer)
    assert got.to_list() == unpaired([good, good], tokenizer).to_list()


def test_labels_of_whole_numbers_are_booleans(tokenizer):
    got = unpaired([LABELLED | {"label": label} for label in (0, 1, 1)], tokenizer)
    assert list(got["label"]) == [False, True, True] and got.features["label"].dtype == "bool"
    with pytest.raises(ValueError, match="2 label that is neither true nor false.*No row is left"):
        unpaired([LABELLED | {"label": label} for label in ("yes", "no")], tokenizer)


@pytest.mark.parametrize(
    ("tokenize", "row", "message"),
    [
        (pairs, {"prompt": "a", "chosen": "b", "reject": "c"}, r"\['rejected'\].*'reject' looks like.*'rejected'"),
        (pairs, {"prompt": "a", "choosen": "b", "rejected": "c"}, r"\['chosen'\].*'choosen' looks like.*'chosen'"),
        (unpaired, {"prompt": "a", "completion": "b", "lable": True}, r"\['label'\].*'lable' looks like.*'label'"),
        (unpaired, {"prompt": "a", "completions": "b", "label": True}, "'completions' looks like.*'completion'"),
        (unpaired, {"prompt": "a", "answer": "b", "label": True}, r"\['completion'\].*rename_column"),
    ],
)
def test_a_missing_column_is_named_with_the_likely_misspelling(tokenize, row, message, tokenizer):
    with pytest.raises(ValueError, match=f"train_dataset.*{message}"):
        tokenize([row], tokenizer)


@pytest.mark.parametrize(("tokenize", "row"), [(pairs, CHAT), (unpaired, SPOKEN)])
def test_tokenizers_that_lack_something(tokenize, row, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="train_dataset holds chat messages, but the tokenizer has no chat template"):
        tokenize([row], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="train_dataset: the tokenizer has no EOS token"):
        tokenize([row], tokenizer)
