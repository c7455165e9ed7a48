"""Render chats by the tokenizer's chat template, and say why a row can't be rendered and how to mend it."""

import json
import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.data.schemas import is_messages
from lifecycle_hf.data.usable import Unusable, refuse

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
MEND = (
    "Change these messages to what the chat template takes (a system message can become the start of the first user "
    "message; templates of vision models read each content as [{'type': 'text', 'text': ...}]), or set another "
    "tokenizer.chat_template, for tool calls one that renders them."
)
KINDS = (
    "Make the prompt messages by dataset.map(lambda row: {'prompt': [{'role': 'user', 'content': row['prompt']}]}), "
    "or the answers text."
)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that the tokenizer can turn chat messages into text.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} holds chat messages, but the tokenizer has no chat template. Set tokenizer.chat_template (or "
            "chat_template_path), use an instruction-tuned tokenizer, or turn the messages into plain text."
        )


def has_generation_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template marks assistant turns by ``{% generation %}``."""
    template = tokenizer.chat_template or ""
    return bool(_GENERATION_MARKER.search(template["default"] if isinstance(template, dict) else template))


def text_problem(value, name: str) -> str:
    """Return why a text or a list of messages can't be used, or an empty string if it can.

    A message holds text (a string, or parts with a "text"), tool calls, or both. The last one must not be empty,
    unless it is what a tool returned.
    """
    if isinstance(value, str):
        return "" if value.strip() else f"empty {name}"
    if not is_messages(value):
        return f"empty {name}" if value is None or value == [] else f"{name} that is neither text nor messages"
    if any(message_text(message) is None and not message.get("tool_calls") for message in value):
        return f"{name} with a message that has neither text nor tool calls"
    last = value[-1]
    said = (message_text(last) or "").strip() or last.get("tool_calls") or last["role"] == "tool"
    return "" if said else f"empty {name}"


def kinds_problem(prompt, *answers) -> str:
    """Return what is wrong if the answers are not of the prompt's kind (text, messages), or an empty string."""
    kinds = ["text" if isinstance(value, str) else "messages" for value in (prompt, *answers)]
    other = next((kind for kind in kinds if kind != kinds[0]), None)
    if other is None:
        return ""
    mend = KINDS if kinds[0] == "text" else "Write the answers as [{'role': 'assistant', 'content': ...}]."
    return f"prompt and completion of different kinds (prompt: {kinds[0]}, completion: {other})\n{mend}"


def message_text(message: dict) -> str | None:
    """Return the text of a message, whose content is a string or a list of parts; None if it has none."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else None


def template_options(row: dict) -> dict:
    """Return what a row gives to the chat template, as in TRL: "tools" (or their JSON) and "chat_template_kwargs".

    Raises:
        Unusable: tools that are no JSON.
    """
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise Unusable("tools that are neither a list nor JSON\nWrite them by json.dumps.") from error
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], new: int, name: str, **options) -> str:
    """Return the text of messages in the chat template, with `options` of `apply_chat_template`.

    Args:
        new: number of messages, counted from the last one, whose text and tool calls must be in the result.
        name: what these are, for the error.

    Raises:
        Unusable: the template refuses the messages, or leaves one of the new ones out.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except _FAULTS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unusable(f"{name} that the chat template refuses ({lines[0][:100]})\n{MEND}") from error
    for place in range(len(messages) - new, len(messages)):
        message, said = messages[place], (message_text(messages[place]) or "").strip()
        if said and said not in text:
            longer = message | {"content": _longer(message["content"])}
            left_out = _with(tokenizer, messages, place, longer, options) == text
            refuse(f"{name} whose {message['role']} text the chat template leaves out\n{MEND}" if left_out else "")
        if message.get("tool_calls"):
            silent = {"role": message["role"], "content": message.get("content") or ""}
            left_out = _with(tokenizer, messages, place, silent, options) == text
            refuse(f"{name} whose tool calls the chat template leaves out\n{MEND}" if left_out else "")
    return text


def _longer(content):
    return [*content, {"type": "text", "text": "."}] if isinstance(content, list) else f"{content}."


def _with(tokenizer, messages: list[dict], place: int, message: dict, options: dict) -> str | None:
    """Return the text of `messages` with another message at `place`; None if the template refuses that."""
    try:
        changed = [*messages[:place], message, *messages[place + 1 :]]
        return tokenizer.apply_chat_template(changed, tokenize=False, **options)
    except _FAULTS:
        return None
