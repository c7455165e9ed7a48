"""Every trainer gives tools and template options to the chat template, and tells what a template refuses."""

import pytest
from chat_runs import dpo, kto, ppo, reward, sft
from chats_setting import ANSWER, ANSWERS, CHATS, PAIRS, PROMPT, TOOLS, WRONG, rendered, templated
from datasets import Dataset

from lifecycle_hf.completions.rewards import Samples

SYSTEM, HI = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}


def whole(row):
    """All ids of a row, whichever trainer made it."""
    return row.get("input_ids") or row.get("prompt_ids", []) + (
        row.get("completion_ids") or row.get("chosen_ids") or []
    )


@pytest.mark.parametrize(
    ("make", "data", "messages"),
    [
        (sft, CHATS, [*PROMPT, ANSWER]),
        (sft, ANSWERS.remove_columns("label"), [*PROMPT, ANSWER]),
        (reward, PAIRS, [*PROMPT, ANSWER]),
        (dpo, PAIRS, [*PROMPT, ANSWER]),
        (kto, ANSWERS, [*PROMPT, ANSWER]),
        (ppo, PAIRS, PROMPT),
    ],
)
def test_tools_reach_the_template(make, data, messages, tiny_llama, tmp_path):
    qwen = templated(tiny_llama[1], "qwen3")
    run = make((tiny_llama[0], qwen), tmp_path, data, dataset_num_proc=1)
    expected = rendered(qwen, messages, add_generation_prompt=make is ppo)
    got = whole(run.train_dataset[0])
    assert got == expected[: len(got)] and len(expected) - len(got) <= 1  # a line break behind the last EOS
    assert len(run.train_dataset) == len(data)


def test_template_options_of_the_config(tiny_llama, tmp_path):
    """The column, where there is one, has precedence. Reward models read the same."""
    qwen = templated(tiny_llama[1], "qwen3")
    rows = [{"prompt": PROMPT, "tools": TOOLS}, {"prompt": PROMPT, "tools": TOOLS}]
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    run = ppo((tiny_llama[0], qwen), tmp_path, Dataset.from_list(rows), **options)
    expected = rendered(qwen, PROMPT, add_generation_prompt=True)
    assert run.train_dataset[0]["prompt_ids"] == expected
    assert qwen.decode(expected).endswith("<think>\n\n</think>\n\n")
    rows = [row | {"chat_template_kwargs": given} for row, given in zip(rows, (None, {"enable_thinking": True}))]
    run = ppo((tiny_llama[0], qwen), tmp_path, Dataset.from_list(rows), **options)
    thinking = rendered(qwen, PROMPT, add_generation_prompt=True, enable_thinking=True)
    assert list(run.train_dataset["prompt_ids"]) == [expected, thinking] and thinking != expected
    row = run.train_dataset[0]
    columns = {name: [row[name]] for name in ("tools", "chat_template_kwargs")}
    (ids,) = Samples([row["prompt"]], ["It is 21."], columns).encode(qwen)
    assert ids == rendered(qwen, [*PROMPT, ANSWER])[: len(ids)]


@pytest.mark.parametrize(("make", "data"), [(sft, CHATS), (reward, PAIRS), (dpo, PAIRS), (kto, ANSWERS)])
def test_template_options_that_some_rows_lack(make, data, tiny_llama, tmp_path):
    qwen = templated(tiny_llama[1], "qwen3")
    rows = [row | {"chat_template_kwargs": None if i else {"enable_thinking": False}} for i, row in enumerate(data)]
    ids = [whole(row) for row in make((tiny_llama[0], qwen), tmp_path, Dataset.from_list(rows)).train_dataset]
    assert len(ids) == len(rows) > 1
    full = whole(make((tiny_llama[0], qwen), tmp_path, data.remove_columns("chat_template_kwargs")).train_dataset[1])
    assert ids[1] == full


REFUSED = {"prompt": [SYSTEM, HI], "chosen": [ANSWER], "rejected": [WRONG], "completion": [ANSWER], "label": True}


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (sft, ["prompt", "completion"]),
        (reward, ["prompt", "chosen", "rejected"]),
        (dpo, ["prompt", "chosen", "rejected"]),
        (kto, ["prompt", "completion", "label"]),
        (ppo, ["prompt"]),
    ],
)
def test_what_a_template_refuses_is_told(make, columns, tiny_llama, tmp_path):
    gemma = (tiny_llama[0], templated(tiny_llama[1], "gemma"))
    bad = {name: REFUSED[name] for name in columns}
    with pytest.raises(
        ValueError, match=r"train_dataset: 2 of 2 rows .*System role not supported.*first user message"
    ):
        make(gemma, tmp_path, Dataset.from_list([bad, bad]))
    good = bad | {"prompt": [HI]}
    rows = [good, bad, good | {"prompt": [HI, WRONG, HI]} | ({"label": False} if make is kto else {})]
    with pytest.warns(UserWarning, match=r"1 of 3 rows .*refuses \(System role.*the first is row 1.*dropped"):
        assert len(make(gemma, tmp_path, Dataset.from_list(rows)).train_dataset) == 2
    with pytest.raises(ValueError, match="the first is row 1. strict_data is on"):
        make(gemma, tmp_path, Dataset.from_list(rows), strict_data=True)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "ppo"])
def test_a_streamed_dataset_is_refused_with_the_reason(name, tiny_llama, tmp_path):
    make = {"dpo": dpo, "kto": kto, "reward": reward, "ppo": ppo}[name]
    data = {"kto": ANSWERS}.get(name, PAIRS).to_iterable_dataset()
    with pytest.raises(ValueError, match="is streamed.*read, checked and counted before training.*take"):
        make(tiny_llama, tmp_path, data)
