"""Turn rows into token ids and loss masks, with one function per schema."""

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
    """Return the id of the tokenizer's EOS (end-of-sequence) token.

    Raises:
        ValueError: there is no EOS token, so a model could not learn where a completion ends.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{where}: the tokenizer has no EOS token, so the end of a completion can't be marked. Set one that is in "
            "its vocabulary, e.g. tokenizer.eos_token = '</s>', and pass it as processing_class."
        )
    return tokenizer.eos_token_id


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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Return the ids of a prompt: of plain text, or of messages in the chat template, up to the start of the answer.

    If the last message is the assistant's, its turn is not closed, so that the model continues it.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    open_turn = prompt[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not open_turn, "continue_final_message": open_turn, "return_dict": True}
    return list(tokenizer.apply_chat_template(prompt, **options)["input_ids"])


def encode_complete(tokenizer: PreTrainedTokenizerBase, text: str | list[dict]) -> list[int]:
    """Return the ids of a finished text or conversation up to its EOS: the ids of prompt + sampled completion.

    EOS is appended to plain text that does not end with it. If the chat template writes white space after the last
    EOS, it is cut off, because sampling stops at the EOS.
    """
    eos = tokenizer.eos_token_id
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    ids = list(tokenizer.apply_chat_template(text, return_dict=True)["input_ids"])
    end = len(ids) - ids[::-1].index(eos) if eos in ids else len(ids)
    return ids[:end] if not tokenizer.decode(ids[end:]).strip() else ids


def _check(dataset: Dataset, schema: str, column: str, tokenizer, where: str) -> None:
    """Check the columns of the schema, the EOS token, and, if `column` holds messages, the chat template."""
    validate(dataset, schema, where)
    require_eos(tokenizer, where)
    if is_messages(first_value(dataset, column)):
        require_chat_template(tokenizer, where)


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Return `dataset` with a column "prompt_ids" (see `encode_prompt`).

    Rows whose prompt is empty, neither text nor messages, or longer than `max_length` tokens are dropped with one
    warning.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; messages without a chat template.
    """
    validate(dataset, "prompt", where)
    if any(is_messages(prompt) for prompt in dataset["prompt"]):
        require_chat_template(tokenizer, where)

    def encode(row):
        _refuse(text_problem(row["prompt"], "prompt"))
        ids = encode_prompt(tokenizer, row["prompt"])
        _check_length("prompt", max_length, ids)
        return {"prompt_ids": ids}

    return map_usable(dataset, encode, {"prompt_ids": []}, dataset.column_names, where=where, strict=strict)


def tokenize_preference(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Return the columns "chosen_ids" and "rejected_ids" (with prompt, see `encode_complete`) and "margin" if present.

    A row is dropped, with one warning for all, if chosen or rejected is empty or longer than `max_length` tokens, or
    if both are the same.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def encode(row):
        _check_pair(row)
        prompt = row.get("prompt") or type(row["chosen"])()
        chosen, rejected = (encode_complete(tokenizer, prompt + row[side]) for side in ("chosen", "rejected"))
        _check_length("pair", max_length, chosen, rejected)
        return {"chosen_ids": chosen, "rejected_ids": rejected}

    nothing = {"chosen_ids": [], "rejected_ids": []}
    return map_usable(dataset, encode, nothing, ["margin"], where=where, strict=strict)


def tokenize_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Return the columns "prompt_ids", "prompt_key", "chosen_ids" and "rejected_ids".

    The tokens are the same as in TRL's DPOTrainer. Two rows have the same "prompt_key" only if they have the same
    prompt. Without a prompt column, the prompt is the common start of chosen and rejected. Completions are cut to
    `max_length` tokens with their prompt. A row is dropped, with one warning for all, if a completion is empty, if the
    prompt leaves no room for it, or if chosen and rejected are the same, before or after the cut. The columns
    "ref_chosen_logps" and "ref_rejected_logps" are kept.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def encode(row):
        _check_pair(row)
        row = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        row = row if "prompt" in row else maybe_extract_prompt(row)
        prompt, chosen, rejected = _encode_after(tokenizer, max_length, row["prompt"], row["chosen"], row["rejected"])
        if chosen == rejected:
            raise _Unusable(f"the same chosen and rejected once cut to {max_length} tokens")
        key = _key(row["prompt"])
        return {"prompt_ids": prompt, "prompt_key": key, "chosen_ids": chosen, "rejected_ids": rejected}

    nothing = {"prompt_ids": [], "prompt_key": "", "chosen_ids": [], "rejected_ids": []}
    keep = ["ref_chosen_logps", "ref_rejected_logps"]
    return map_usable(dataset, encode, nothing, keep, where=where, strict=strict)


def tokenize_unpaired(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Return the columns "prompt_ids", "prompt_key", "completion_ids" and "label" (true: desirable).

    The tokens are the same as in TRL's KTOTrainer. Two rows have the same "prompt_key" only if they have the same
    prompt. A row is dropped, with one warning for all, if the completion is empty, if the prompt leaves no room for
    it, or if the label is missing or neither true nor false. A column "ref_logps" is kept.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "unpaired", "completion", tokenizer, where)
    dataset = dataset.rename_column("label", "_label")  # It can have any type; the new column holds booleans.

    def encode(row):
        if row["_label"] not in (True, False):
            raise _Unusable("missing label" if row["_label"] is None else "label that is neither true nor false")
        _refuse(text_problem(row["completion"], "completion"))
        prompt, ids = _encode_after(tokenizer, max_length, row["prompt"], row["completion"])
        key, label = _key(row["prompt"]), bool(row["_label"])
        return {"prompt_ids": prompt, "prompt_key": key, "completion_ids": ids, "label": label}

    nothing = {"prompt_ids": [], "prompt_key": "", "completion_ids": [], "label": False}
    return map_usable(dataset, encode, nothing, ["ref_logps"], where=where, strict=strict)


def _key(prompt) -> str:
    """Return a hash of a prompt. Its ids can't identify it, since they may differ with its completion."""
    return hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]


def _encode_after(tokenizer, max_length: int | None, prompt, *completions) -> list[list[int]]:
    """Return the ids of a prompt and of each finished completion after it, cut to `max_length` tokens together.

    The prompt ends at the first token at which it differs from a prompt with completion, since a tokenizer may merge
    the end of a prompt with the start of a completion.
    """
    if prompt is None:
        raise _Unusable("empty prompt")
    if any(type(prompt) is not type(completion) for completion in completions):
        raise _Unusable("prompt and completion of different kinds (text, messages)")
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        prompt_ids = tokenizer(prompt)["input_ids"] if prompt else []
        texts = [c if c.endswith(eos) else c + eos for c in completions]
        whole = [tokenizer(prompt + text)["input_ids"] for text in texts]
        if not prompt_ids:  # An empty prompt is the BOS alone, if the tokenizer writes one.
            prompt_ids = whole[0][:1] if whole[0][:1] == [tokenizer.bos_token_id] else []
    else:
        _refuse(text_problem(prompt, "prompt"))
        template = tokenizer.apply_chat_template
        prompt_ids = list(template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        whole = [list(template(prompt + c, return_dict=True)["input_ids"]) for c in completions]
    shared = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    if not shared:
        raise _Unusable("prompt without a token")
    if max_length is not None and shared >= max_length:
        raise _Unusable(f"prompt that fills max_length={max_length}")
    encoded = [prompt_ids[:shared], *(ids[shared:max_length] for ids in whole)]
    _refuse("" if all(encoded) else "completion without a token")
    return encoded


def _check_pair(row: dict) -> None:
    _refuse(text_problem(row["chosen"], "chosen") or text_problem(row["rejected"], "rejected"))
    _refuse("identical chosen and rejected" if row["chosen"] == row["rejected"] else "")


def tokenize_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, strict: bool = False
) -> Dataset:
    """Return the columns "input_ids" and "loss_mask" (1: the token counts in the loss), cut to `max_length` tokens.

    Plain text: EOS is appended, and the loss is on all tokens. Prompt-completion: the loss is on the completion.
    Messages: the loss is on the assistant's tokens if the chat template has ``{% generation %}`` markers, else on all
    tokens. Rows without a token in the loss are dropped with one warning.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template; a dataset
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
        _refuse("" if any(mask[:max_length]) else "no token to learn from (empty, or lost to max_length)")
        return {"input_ids": ids[:max_length], "loss_mask": mask[:max_length]}

    return map_usable(dataset, encode, {"input_ids": [], "loss_mask": []}, [], where=where, strict=strict)


def _encode_with_mask(tokenizer, row: dict, schema: str) -> tuple[list[int], list[int]]:
    if schema == "prompt-completion":
        if text_problem(row["completion"], "completion") or not isinstance(row["prompt"], str | list):
            return [], []
        ids = encode_complete(tokenizer, row["prompt"] + row["completion"])
        prompt_ids = encode_prompt(tokenizer, row["prompt"]) if row["prompt"] else []
        start = common_prefix_length(prompt_ids, ids)
        return ids, [0] * start + [1] * (len(ids) - start)
    text = row["text"] if "text" in row else row["messages"]
    if text_problem(text, "text"):
        return [], []
    if is_messages(text) and has_generation_markers(tokenizer):
        out = tokenizer.apply_chat_template(text, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), list(out["assistant_masks"])
    ids = encode_complete(tokenizer, text)
    return ids, [1] * len(ids)


def text_problem(value, name: str) -> str:
    """Return why a text or a list of messages can't be used, or an empty string if it can."""
    if isinstance(value, str):
        return "" if value.strip() else f"empty {name}"
    if is_messages(value):
        if not all(isinstance(message.get("content"), str) for message in value):
            return f"{name} with a message that has no text"
        return "" if value[-1]["content"].strip() else f"empty {name}"
    return f"empty {name}" if value is None or value == [] else f"{name} that is neither text nor messages"


def _check_length(name: str, max_length: int | None, *sequences: list[int]) -> None:
    _refuse("" if all(sequences) else f"{name} without a token")
    if max_length is not None and max(map(len, sequences)) > max_length:
        raise _Unusable(f"{name} longer than {max_length} tokens")


class _Unusable(Exception):
    """The reason why a row can't be used."""


def _refuse(problem: str) -> None:
    """Raise `_Unusable` if there is a problem."""
    if problem:
        raise _Unusable(problem)


def map_usable(
    dataset: Dataset, encode: Callable[[dict], dict], nothing: dict, keep: Sequence[str], *, where: str, strict: bool
) -> Dataset:
    """Map `encode` over the rows and drop the rows for which it raises `_Unusable` (see `usable_rows`).

    The columns of the result are those of `nothing`, an empty row, and the columns of the dataset that `keep` names.
    """

    def attempt(row):
        try:
            return encode(row) | {"_problem": ""}
        except _Unusable as problem:
            return nothing | {"_problem": str(problem)}

    keep = [name for name in keep if name in dataset.column_names and name not in nothing]
    dataset = dataset.map(attempt, desc=f"Tokenizing {where}")
    kept = usable_rows(dataset["_problem"], where=where, strict=strict)
    dataset = dataset.select_columns([*nothing, *keep])
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def usable_rows(problems: Sequence[str], *, where: str, strict: bool) -> list[int]:
    """Return the indices of the rows without a problem, and report the others in one warning.

    Raises:
        ValueError: no row is left, or `strict` is set and a row has a problem.
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
