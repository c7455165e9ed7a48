"""Chats with tools render as in TRL; what a template refuses or leaves out is told with the row and a mend."""

import copy
import json

import pytest
import trl
from chats_setting import ANSWERS, CALL, CHATS, PAIRS, PROMPT, RESULT, TOOLS, rendered, templated
from datasets import Dataset

from lifecycle_hf.data.chat import text_problem
from lifecycle_hf.data.schemas import to_preference, to_prompts, to_unpaired
from lifecycle_hf.data.tokenize import (
    encode_complete,
    tokenize_pairs,
    tokenize_preference,
    tokenize_prompts,
    tokenize_texts,
    tokenize_unpaired,
)

OPTIONS = {"max_length": None, "where": "train_dataset"}
HI, YES, NO = (
    {"role": role, "content": text} for role, text in [("user", "Hi"), ("assistant", "Yes"), ("assistant", "No")]
)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def qwen(tokenizer):
    return templated(tokenizer, "qwen3")


def pairs(rows, tokenizer, **options):
    return tokenize_pairs(to_preference(Dataset.from_list(rows), "t"), tokenizer, **(OPTIONS | options))


def test_pairs_with_tools_are_those_of_trl(qwen, tiny_llama, tmp_path):
    """Also with tools as a list."""
    tiny_llama[0]().save_pretrained(tmp_path / "base")
    args = trl.DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    peer = trl.DPOTrainer(str(tmp_path / "base"), args=args, train_dataset=PAIRS, processing_class=qwen).train_dataset
    got = tokenize_pairs(to_preference(PAIRS, "t"), qwen, **OPTIONS)
    assert got.select_columns(names).to_list() == peer.select_columns(names).to_list()
    assert "weather" in qwen.decode(got[0]["prompt_ids"]) and "weather" in qwen.decode(got[1]["chosen_ids"])
    rows = [row | {"tools": TOOLS} for row in PAIRS.to_list()]
    assert pairs(rows, qwen).to_list() == got.to_list()


def test_every_schema_gives_tools_and_options_to_the_template(qwen):
    """A reasoning template closes the thought where it is told not to think."""
    asked = rendered(qwen, PROMPT, add_generation_prompt=True)
    assert qwen.decode(asked).endswith("<think>\n\n</think>\n\n") and "weather" in qwen.decode(asked)
    assert tokenize_prompts(to_prompts(PAIRS, "t"), qwen, **OPTIONS)[0]["prompt_ids"] == asked
    chosen = encode_complete(qwen, [*PROMPT, PAIRS[0]["chosen"][0]], tools=TOOLS, enable_thinking=False)
    whole = rendered(qwen, [*PROMPT, PAIRS[0]["chosen"][0]])
    assert chosen == whole[: len(chosen)] and len(whole) - len(chosen) <= 1
    assert tokenize_preference(to_preference(PAIRS, "t"), qwen, **OPTIONS)[0]["chosen_ids"] == chosen
    assert tokenize_texts(CHATS, qwen, **OPTIONS)[0]["input_ids"] == chosen
    row = tokenize_unpaired(to_unpaired(ANSWERS, "t"), qwen, **OPTIONS)[0]
    assert row["prompt_ids"] + row["completion_ids"] == whole


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([HI, CALL], ""),
        ([HI, CALL, RESULT], ""),
        ([HI, CALL | {"content": None}, RESULT | {"content": ""}], ""),
        ([HI, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}], ""),
        ([HI, {"role": "assistant", "content": None, "tool_calls": []}], "chat with a message that has neither"),
        ([HI, {"role": "assistant"}, HI], "chat with a message that has neither"),
        ([HI, {"role": "assistant", "content": [{"type": "text", "text": " "}]}], "empty chat"),
        ([HI, {"role": "assistant", "content": "", "tool_calls": None}], "empty chat"),
    ],
)
def test_only_a_message_without_text_and_tool_calls_is_unusable(messages, problem):
    assert text_problem(messages, "chat").startswith(problem) and bool(problem) == bool(text_problem(messages, "chat"))


def test_tools_that_are_no_json(qwen):
    row = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}
    with pytest.warns(UserWarning, match="1 tools that are neither a list nor JSON.*row 1.*json.dumps"):
        pairs([row | {"tools": json.dumps(TOOLS)}, row | {"tools": "weather"}], qwen)


GOOD = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(
    ("template", "bad", "reason", "mend"),
    [
        ("gemma", {"prompt": [SYSTEM, HI]}, r"prompt .* refuses \(System role not supported\)", "first user message"),
        (
            "gemma",
            {"chosen": [CALL]},
            "chosen whose tool calls the chat template leaves out",
            "for tool calls one that renders them",
        ),
        ("gemma", {"prompt": [HI, YES, {"role": "user", "content": "Why?"}, HI]}, "must alternate", "Change these"),
    ],
)
def test_a_row_that_the_template_refuses_is_told(tokenizer, template, bad, reason, mend):
    tokenizer = templated(tokenizer, template)
    with pytest.warns(UserWarning, match=f"1 of 2 rows .*{reason}.*the first is row 1.*dropped.*{mend}"):
        assert len(pairs([GOOD, GOOD | bad], tokenizer)) == 1
    with pytest.raises(ValueError, match=f"the first is row 1. strict_data is on.*{mend}"):
        pairs([GOOD, GOOD | bad], tokenizer, strict=True)
    with pytest.raises(ValueError, match=f"train_dataset: 2 of 2 rows .*{reason}.*No row is left.*{mend}"):
        pairs([GOOD | bad] * 2, tokenizer)


@pytest.mark.parametrize("template", ["llava_next", "idefics3", "smolvlm"])
def test_a_vision_template_of_plain_text_is_told(tokenizer, template):
    """It reads a list of parts. Parts are tokenised as they are."""
    tokenizer = templated(tokenizer, template)
    whole = [{"chosen": [HI, YES], "rejected": [HI, NO]}]
    texts = Dataset.from_list([{"messages": [HI, YES]}])
    for tokenize, data in [
        (tokenize_pairs, Dataset.from_list([GOOD])),
        (tokenize_preference, Dataset.from_list(whole)),
        (tokenize_prompts, Dataset.from_list([{"prompt": [HI]}])),
        (tokenize_texts, texts),
    ]:
        with pytest.raises(ValueError, match=r"(leaves out|refuses).*'type': 'text'"):
            tokenize(data, tokenizer, **OPTIONS)
    parts = [copy.deepcopy(m) | {"content": [{"type": "text", "text": m["content"]}]} for m in (HI, YES, NO)]
    row = {"prompt": parts[:1], "chosen": parts[1:2], "rejected": parts[2:]}
    assert "Yes" in tokenizer.decode(pairs([row], tokenizer)[0]["chosen_ids"])


def test_a_template_that_leaves_the_answer_out(tokenizer):
    """An earlier thought that a template drops is no fault, since the rest of the message is there."""
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="1 chosen whose assistant text the chat template leaves out"):
        pairs([GOOD], tokenizer)
    qwen = templated(tokenizer, "qwen3")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSure."}
    got = pairs([GOOD | {"prompt": [HI, thought, HI]}], qwen)[0]
    assert "Sure." in qwen.decode(got["prompt_ids"]) and "hm" not in qwen.decode(got["prompt_ids"])


def test_answers_that_render_alike(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    with pytest.raises(ValueError, match="1 chosen and rejected that the chat template renders alike"):
        pairs([GOOD | {"rejected": [{"role": "assistant", "content": " Yes"}]}], tokenizer)


@pytest.mark.parametrize(
    ("tokenize", "row"),
    [
        (tokenize_pairs, {"prompt": "Hi", "chosen": [YES], "rejected": [NO]}),
        (tokenize_preference, {"prompt": "Hi", "chosen": [YES], "rejected": [NO]}),
        (tokenize_prompts, {"prompt": "Hi", "chosen": [YES], "rejected": [NO]}),
        (tokenize_prompts, {"prompt": "Hi", "completion": [YES]}),
        (tokenize_unpaired, {"prompt": "Hi", "completion": [YES], "label": True}),
        (tokenize_texts, {"prompt": "Hi", "completion": [YES]}),
    ],
)
def test_a_text_prompt_with_message_answers_is_told_and_mended(tokenize, row, tokenizer):
    prepare = (
        to_prompts if tokenize is tokenize_prompts else to_preference if "chosen" in row else lambda data, _: data
    )
    data = Dataset.from_list([row])
    with pytest.raises(ValueError) as error:
        tokenize(prepare(data, "train_dataset"), tokenizer, **OPTIONS)
    assert "prompt and completion of different kinds (prompt: text, completion: messages)" in str(error.value)
    line = str(error.value).partition("Make the prompt messages by ")[2].partition(", or the answers")[0]
    mended = eval(line, {"dataset": data})
    assert len(tokenize(prepare(mended, "train_dataset"), tokenizer, **OPTIONS)) == 1


def test_reasons_that_differ_by_row_are_cut(tokenizer):
    tokenizer.chat_template = "{{ raise_exception(messages[0].content) }}"
    rows = [GOOD | {"prompt": [{"role": "user", "content": f"word {i}"}]} for i in range(9)]
    with pytest.raises(ValueError) as error:
        pairs(rows, tokenizer)
    assert str(error.value).count("refuses") == 5 and ", ...)" in str(error.value)
