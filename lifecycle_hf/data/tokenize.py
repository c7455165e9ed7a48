"""Rows to token ids and loss masks, one function per schema."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml, maybe_extract_prompt
from trl.data_utils import common_prefix_length

from lifecycle_hf.data.schemas import detect, first_value, is_messages, validate

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_eos(tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """The id of the tokenizer's end-of-sequence token.

    Raises:
        ValueError: it has none, so nothing would tell a model where a completion ends.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{where}: the tokenizer has no EOS token, so the end of a completion can't be marked. Set one that is in "
            "its vocabulary, e.g. tokenizer.eos_token = '</s>', and pass it as processing_class."
        )
    return tokenizer.eos_token_id


def require_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that chat data can be rendered.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} holds chat messages, but the tokenizer has no chat template. Set tokenizer.chat_template (or "
            "chat_template_path), use an instruction-tuned tokenizer, or turn the messages into plain text."
        )


def has_generation_markers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks assistant turns by ``{% generation %}``."""
    template = tokenizer.chat_template or ""
    return bool(_GENERATION_MARKER.search(template["default"] if isinstance(template, dict) else template))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Ids of a prompt: plain text as it is, messages through the chat template up to where the answer begins.

    Messages that end with an assistant turn are left open, so that the model goes on with that turn.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    open_turn = prompt[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=not open_turn, continue_final_message=open_turn, return_dict=True
    )["input_ids"]
    return list(ids)


def encode_complete(tokenizer: PreTrainedTokenizerBase, text: str | list[dict]) -> list[int]:
    """Ids of a finished text or conversation, ended at its EOS: the same ids as prompt + sampled completion.

    Plain text gets an EOS if it has none. Of a conversation, white space that the template puts behind the last EOS
    is cut off, since a model that samples stops at the EOS.
    """
    eos = tokenizer.eos_token_id
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    ids = list(tokenizer.apply_chat_template(text, return_dict=True)["input_ids"])
    end = len(ids) - ids[::-1].index(eos) if eos in ids else len(ids)
    return ids[:end] if not tokenizer.decode(ids[end:]).strip() else ids


def _check(dataset: Dataset, schema: str, column: str, tokenizer, where: str) -> None:
    """What all rows need: the columns of the schema, an EOS, and a chat template where `column` holds messages."""
    validate(dataset, schema, where)
    require_eos(tokenizer, where)
    if is_messages(first_value(dataset, column)):
        require_chat_template(tokenizer, where)


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """`dataset` with a column "prompt_ids" (see `encode_prompt`).

    Rows whose prompt is empty, neither text nor messages, or longer than `max_length` tokens are dropped with one
    warning.

    Raises:
        ValueError: no usable row; an unusable row under `strict`; messages without a chat template.
    """
    validate(dataset, "prompt", where)
    if any(is_messages(prompt) for prompt in dataset["prompt"]):
        require_chat_template(tokenizer, where)

    def encode(row):
        problem = text_problem(row["prompt"], "prompt")
        if problem:
            return {"prompt_ids": [], "_problem": problem}
        ids = encode_prompt(tokenizer, row["prompt"])
        return {"prompt_ids": ids, "_problem": _length_problem("prompt", max_length, ids)}

    return map_usable(dataset, encode, where=where, strict=strict)


def tokenize_preference(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Columns "chosen_ids" and "rejected_ids" (prompt included, see `encode_complete`) and "margin" if there is one.

    Rows with an empty or identical pair, or a side longer than `max_length` tokens, are dropped with one warning.

    Raises:
        ValueError: no usable row; an unusable row under `strict`; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def encode(row):
        problem = _pair_problem(row)
        if problem:
            return {"chosen_ids": [], "rejected_ids": [], "_problem": problem}
        prompt = row.get("prompt") or type(row["chosen"])()
        chosen, rejected = (encode_complete(tokenizer, prompt + row[side]) for side in ("chosen", "rejected"))
        problem = _length_problem("pair", max_length, chosen, rejected)
        return {"chosen_ids": chosen, "rejected_ids": rejected, "_problem": problem}

    return map_usable(dataset, encode, where=where, strict=strict, keep=("chosen_ids", "rejected_ids", "margin"))


def tokenize_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Columns "prompt_ids", "chosen_ids" and "rejected_ids", the same tokens as TRL's DPOTrainer makes, and
    "prompt_key", which is the same for the same prompt only.

    What chosen and rejected share is the prompt where there is no column for it. Completions are cut to `max_length`
    tokens with their prompt. Rows are dropped with one warning where a completion is empty, has no room left behind
    its prompt, or is the same for chosen and rejected, cut or not. Columns "ref_chosen_logps" and "ref_rejected_logps"
    stay.

    Raises:
        ValueError: no usable row; an unusable row under `strict`; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def encode(row):
        nothing = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "prompt_key": ""}
        problem = _pair_problem(row)
        if problem:
            return nothing | {"_problem": problem}
        row = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        row = row if "prompt" in row else maybe_extract_prompt(row)
        prompt, completions, problem = _encode_behind(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        if not problem:
            completions, problem = _cut(prompt, completions, max_length)
        if not problem and completions[0] == completions[1]:
            problem = f"the same chosen and rejected once cut to {max_length} tokens"
        if problem:
            return nothing | {"_problem": problem}
        ids = {"prompt_ids": prompt, "chosen_ids": completions[0], "rejected_ids": completions[1]}
        return ids | {"prompt_key": _key(row["prompt"]), "_problem": ""}

    keep = ("prompt_ids", "prompt_key", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    return map_usable(dataset, encode, where=where, strict=strict, keep=keep)


def tokenize_unpaired(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Columns "prompt_ids", "completion_ids" and "label" (true: desirable), the tokens those of TRL's KTOTrainer, and
    "prompt_key", which is the same for the same prompt only.

    Rows are dropped with one warning where the completion is empty or has no room left behind its prompt, or the label
    is missing or neither true nor false. A column "ref_logps" stays.

    Raises:
        ValueError: no usable row; an unusable row under `strict`; no EOS; messages without a chat template.
    """
    _check(dataset, "unpaired", "completion", tokenizer, where)
    dataset = dataset.rename_column("label", "_label")  # of whatever type: the new column is one of booleans

    def encode(row):
        prompt, completions, problem = [], [[]], text_problem(row["completion"], "completion")
        if row["_label"] not in (True, False):
            problem = "missing label" if row["_label"] is None else "label that is neither true nor false"
        if not problem:
            prompt, completions, problem = _encode_behind(tokenizer, row["prompt"], row["completion"])
        if not problem:
            completions, problem = _cut(prompt, completions, max_length)
        label = not problem and bool(row["_label"])
        ids = {"prompt_ids": prompt, "completion_ids": completions[0], "prompt_key": _key(row["prompt"])}
        return ids | {"label": label, "_problem": problem}

    keep = ("prompt_ids", "prompt_key", "completion_ids", "label", "ref_logps")
    return map_usable(dataset, encode, where=where, strict=strict, keep=keep)


def _key(prompt) -> str:
    """A prompt's identity, which its ids are not: they may end earlier under one completion than under another."""
    return hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]


def _encode_behind(tokenizer, prompt, *completions) -> tuple[list[int], list[list[int]], str]:
    """Ids of a prompt and of finished completions behind it, and why they can't be used.

    The prompt ends where its tokens and those of prompt and completion part, as they do where a tokenizer merges
    across the border.
    """
    if prompt is None:
        return [], [[]], "empty prompt"
    if any(type(prompt) is not type(completion) for completion in completions):
        return [], [[]], "prompt and completion of different kinds (text, messages)"
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        prompt_ids = tokenizer(prompt)["input_ids"] if prompt else []
        texts = [c if c.endswith(eos) else c + eos for c in completions]
        whole = [tokenizer(prompt + text)["input_ids"] for text in texts]
        if not prompt_ids:  # an implicit prompt of no character is the BOS alone, where there is one
            prompt_ids = whole[0][:1] if whole[0][:1] == [tokenizer.bos_token_id] else []
    else:
        if problem := text_problem(prompt, "prompt"):
            return [], [[]], problem
        template = tokenizer.apply_chat_template
        prompt_ids = list(template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        whole = [list(template(prompt + c, return_dict=True)["input_ids"]) for c in completions]
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    return prompt_ids[:shared], [ids[shared:] for ids in whole], "" if shared else "prompt without a token"


def _cut(prompt: list[int], completions: list[list[int]], max_length: int | None) -> tuple[list[list[int]], str]:
    """Completions cut to what `max_length` leaves them behind the prompt, and why they can't be used."""
    if max_length is not None and len(prompt) >= max_length:
        return completions, f"prompt that fills max_length={max_length}"
    cut = [ids if max_length is None else ids[: max_length - len(prompt)] for ids in completions]
    return cut, "" if all(cut) else "completion without a token"


def _pair_problem(row: dict) -> str:
    return (
        text_problem(row["chosen"], "chosen")
        or text_problem(row["rejected"], "rejected")
        or ("identical chosen and rejected" if row["chosen"] == row["rejected"] else "")
    )


def tokenize_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Columns "input_ids" and "loss_mask" (1 where the token counts in the loss), cut to `max_length` tokens.

    Plain text: EOS appended, loss on all tokens. Prompt-completion: loss on the completion. Messages: loss on the
    assistant's tokens if the chat template has ``{% generation %}`` markers, else on all tokens. Rows with nothing to
    learn from are dropped with one warning.

    Raises:
        ValueError: no usable row; an unusable row under `strict`; no EOS; messages without a chat template; a dataset
            that is neither text, messages nor prompt-completion.
    """
    schema = detect(dataset, where)
    if schema not in ("text", "prompt-completion"):
        raise ValueError(
            f"{where} is a {schema} dataset (columns {dataset.column_names}); a language-modelling loss reads the "
            "columns 'text', 'messages' or 'prompt' and 'completion'."
        )
    require_eos(tokenizer, where)
    first = maybe_convert_to_chatml(dict(dataset[0]))
    if any(is_messages(first.get(name)) for name in ("messages", "prompt")):
        require_chat_template(tokenizer, where)

    def encode(row):
        ids, mask = _encode_with_mask(tokenizer, maybe_convert_to_chatml(dict(row)), schema)
        ids, mask = ids[:max_length], mask[:max_length]
        problem = "" if any(mask) else "no token to learn from (empty, or lost to max_length)"
        return {"input_ids": ids, "loss_mask": mask, "_problem": problem}

    return map_usable(dataset, encode, where=where, strict=strict, keep=("input_ids", "loss_mask"))


def _encode_with_mask(tokenizer, row: dict, schema: str) -> tuple[list[int], list[int]]:
    if schema == "prompt-completion":
        if text_problem(row["completion"], "completion") or not isinstance(row["prompt"], str | list):
            return [], []
        ids = encode_complete(tokenizer, row["prompt"] + row["completion"])
        prompt_ids = encode_prompt(tokenizer, row["prompt"]) if row["prompt"] else []
        start = common_prefix_length(prompt_ids, ids)
        return ids, [0] * start + [1] * (len(ids) - start)
    text = row.get("text") if "text" in row else row["messages"]
    if text_problem(text, "text"):
        return [], []
    if is_messages(text) and has_generation_markers(tokenizer):
        out = tokenizer.apply_chat_template(text, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), list(out["assistant_masks"])
    ids = encode_complete(tokenizer, text)
    return ids, [1] * len(ids)


def text_problem(value, name: str) -> str:
    """Why a text or a list of messages can't be used, or an empty string if it can."""
    if isinstance(value, str):
        return "" if value.strip() else f"empty {name}"
    if is_messages(value):
        if not all(isinstance(message.get("content"), str) for message in value):
            return f"{name} with a message that has no text"
        return "" if value[-1]["content"].strip() else f"empty {name}"
    return f"empty {name}" if value is None or value == [] else f"{name} that is neither text nor messages"


def _length_problem(name: str, max_length: int | None, *sequences: list[int]) -> str:
    if any(not ids for ids in sequences):
        return f"{name} without a token"
    too_long = max_length is not None and any(len(ids) > max_length for ids in sequences)
    return f"{name} longer than {max_length} tokens" if too_long else ""


def map_usable(
    dataset: Dataset, encode: Callable[[dict], dict], *, where: str, strict: bool, keep: tuple[str, ...] | None = None
) -> Dataset:
    """Map `encode` over the rows, drop those for which it returns a non-empty "_problem" (see `usable_rows`), and of
    the columns all that are not in `keep`."""
    dataset = dataset.map(encode, desc=f"Tokenizing {where}")
    kept = usable_rows(dataset["_problem"], where=where, strict=strict)
    columns = [name for name in dataset.column_names if name != "_problem"]
    dataset = dataset.select_columns([name for name in keep or columns if name in columns])
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def usable_rows(problems: Sequence[str], *, where: str, strict: bool) -> list[int]:
    """Indices of the rows without a problem; the others are told in one warning, with count and first index.

    Raises:
        ValueError: no row is left, or `strict` and there is a problem.
    """
    problems = list(problems)
    bad = [index for index, problem in enumerate(problems) if problem]
    if not bad:
        return list(range(len(problems)))
    reasons = Counter(problems[index] for index in bad)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    told = f"{where}: {len(bad)} of {len(problems)} rows can't be used ({listed}); the first is row {bad[0]}"
    if strict:
        raise ValueError(f"{told}. strict_data is on: mend or remove these rows, raise the length, or turn it off.")
    if len(bad) == len(problems):
        raise ValueError(f"{told}. No row is left: mend the data or raise the length.")
    warnings.warn(f"{told}. They are dropped.", UserWarning, stacklevel=3)
    return [index for index, problem in enumerate(problems) if not problem]
