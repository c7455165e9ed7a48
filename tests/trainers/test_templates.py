"""All of TRL's chat templates on one tokenizer: every trainer trains on what the template renders as a whole."""

import pytest
from chat_runs import dpo, ppo, reward, sft
from chats_setting import TEMPLATES
from datasets import Dataset

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
THOUGHT = "the prompt to sample from opens a thought that the template leaves out of an answer without one"
CLOSED = "the prompt to sample from opens a thought with a line break, and an answer without one closes it at once"
# Templates whose prompt for sampling is no prefix of prompt and answer: what it has beyond the common start, and why.
NO_PREFIX = {
    **{
        f"{name}{kind}": ("<think>\n", THOUGHT)
        for name in ("deepseek_r1_distill", "deepseekv3")
        for kind in ("", "_training")
    },
    **{
        f"nemotron_3_{name}{kind}": ("\n", CLOSED)
        for name in ("5_lightning", "nano", "super", "ultra")
        for kind in ("", "_training")
    },
}
# Templates of vision models that read a list of parts; plain text they would leave out.
PARTS = {f"{name}{kind}" for name in ("idefics3", "llava_next", "smolvlm") for kind in ("", "_training")}
CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "<think>\nhello\n</think>\n\nSure."},
    {"role": "user", "content": "Why?"},
]
ANSWERS = [{"role": "assistant", "content": text} for text in ("Because.", "No idea.")]


def row(name):
    """The chat for this template, which goes to the trainers in a column."""
    prompt, answers = CHAT, ANSWERS
    if name in PARTS:
        prompt, answers = (
            [m | {"content": [{"type": "text", "text": m["content"]}]} for m in ms] for ms in (prompt, answers)
        )
    given = {"chat_template_kwargs": {"chat_template": (TEMPLATES / f"{name}.jinja").read_text()}}
    return {"prompt": prompt, "chosen": answers[:1], "rejected": answers[1:]} | given


def split(names):
    """Rows of plain text and rows of parts, which one column can't hold."""
    return [[name for name in names if (name in PARTS) == parts] for parts in (False, True)]


@pytest.fixture(scope="module")
def prepared(tiny_llama, tmp_path_factory):
    """{template: {trainer: tokenised row}}."""
    made = {name: {} for name in NAMES}
    for names in split(NAMES):
        rows = Dataset.from_list([row(name) for name in names])
        single = rows.remove_columns("rejected").rename_column("chosen", "completion")
        for make, data in ((dpo, rows), (reward, rows), (ppo, rows), (sft, single)):
            options = {} if make is ppo else {"max_length": 2048}
            run = make(tiny_llama, tmp_path_factory.mktemp("run"), data, strict_data=True, **options)
            for name, tokens in zip(names, run.train_dataset, strict=True):
                made[name][make.__name__] = tokens
    return made


@pytest.mark.parametrize("name", NAMES)
def test_all_trainers_agree_with_the_template(name, prepared, tiny_llama):
    tokenizer, given, made = tiny_llama[1], row(name), prepared[name]
    render = {"chat_template": given["chat_template_kwargs"]["chat_template"], "return_dict": True}
    whole, other = (
        list(tokenizer.apply_chat_template(given["prompt"] + given[side], **render)["input_ids"])
        for side in ("chosen", "rejected")
    )
    pair = made["dpo"]
    assert pair["prompt_ids"] + pair["chosen_ids"] == made["sft"]["input_ids"] == made["reward"]["chosen_ids"] == whole
    assert pair["prompt_ids"] + pair["rejected_ids"] == made["reward"]["rejected_ids"] == other
    assert "Because." in tokenizer.decode(pair["chosen_ids"]) and "Sure." in tokenizer.decode(pair["prompt_ids"])
    learnt = [token for token in made["sft"]["labels"] if token != -100]
    assert learnt == pair["chosen_ids"] and made["sft"]["labels"][-len(learnt) :] == learnt
    rest = made["ppo"]["prompt_ids"][len(pair["prompt_ids"]) :]
    assert made["ppo"]["prompt_ids"] == pair["prompt_ids"] + rest
    assert tokenizer.decode(rest) == NO_PREFIX.get(name, ("", ""))[0]
