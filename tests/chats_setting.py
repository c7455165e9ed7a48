"""Chats in which a model calls a tool, and TRL's chat templates to render them with."""

import copy
import json
from pathlib import Path

import trl
from datasets import Dataset

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ASK = {"role": "user", "content": "How warm is it in Paris?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
}
RESULT = {"role": "tool", "name": "weather", "content": "21 degrees"}
ANSWER, WRONG = {"role": "assistant", "content": "It is 21."}, {"role": "assistant", "content": "I am sorry."}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PLACE}}]
GIVEN = {"tools": json.dumps(TOOLS), "chat_template_kwargs": {"enable_thinking": False}}
PROMPT = [ASK, CALL, RESULT]


def templated(tokenizer, name):
    """A copy of a tokenizer with TRL's chat template of this name."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def rendered(tokenizer, messages, **options):
    """The ids of a chat as TRL's trainers ask for them, with the options of `GIVEN`."""
    options = {"tools": TOOLS, "enable_thinking": False, **options}
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def dataset(*rows):
    return Dataset.from_list([row | GIVEN for row in rows])


PAIRS = dataset(
    {"prompt": PROMPT, "chosen": [ANSWER], "rejected": [WRONG]},
    {"prompt": [ASK], "chosen": [CALL], "rejected": [WRONG]},
    {"prompt": [ASK], "chosen": [CALL, RESULT, ANSWER], "rejected": [WRONG]},
)
ANSWERS = dataset(
    {"prompt": PROMPT, "completion": [ANSWER], "label": True},
    {"prompt": [ASK], "completion": [CALL], "label": True},
    {"prompt": [ASK], "completion": [WRONG], "label": False},
)
CHATS = dataset({"messages": [*PROMPT, ANSWER]}, {"messages": [ASK, CALL]})
