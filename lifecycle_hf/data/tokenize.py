"""Turn rows into token ids and loss masks, with one function per schema."""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml, maybe_extract_prompt
from trl.data_utils import common_prefix_length

from lifecycle_hf.data.chat import (
    MEND,
    has_generation_markers,
    kinds_problem,
    render,
    require_chat_template,
    template_options,
    text_problem,
)
from lifecycle_hf.data.schemas import detect, first_value, is_messages, refuse_stream, validate
from lifecycle_hf.data.usable import Unusable, refuse, usable_rows

Plan = tuple[list["Text"], Callable[..., dict]]
"""The texts of a row to tokenise, and a function of their ids that returns the new columns of the row."""


class Text(NamedTuple):
    """Hold a text to tokenise; in the text of a chat the special tokens are written already."""

    text: str
    chat: bool = False


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


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[list[int]]:
    """Return the ids of each text: those of `tokenizer(text)`, but a part that several chats share is encoded once.

    The parts of a chat begin at its special tokens, since a tokenizer encodes what stands between these by itself.
    """
    plain = list(dict.fromkeys(text for text, chat in texts if not chat))
    known = dict(zip(plain, tokenizer(plain)["input_ids"], strict=True)) if plain else {}
    chats = dict.fromkeys(text for text, chat in texts if chat)
    border = _borders(tokenizer) if chats else None
    parts = {text: border.split(text) if border else [text] for text in chats}
    unique = list(dict.fromkeys(part for split in parts.values() for part in split if part))
    options = {"add_special_tokens": False, "return_attention_mask": False}
    ids = dict(zip(unique, tokenizer(unique, **options)["input_ids"], strict=True)) if unique else {}
    chats = {text: [token for part in split if part for token in ids[part]] for text, split in parts.items()}
    return [chats[text] if chat else known[text] for text, chat in texts]


def _borders(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """Return a pattern that matches before each special token that neither changes nor depends on its neighbours."""
    tokens = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
    names = {token.content for token in tokens}
    safe = [t.content for t in tokens if t.special and not (t.lstrip or t.rstrip or t.single_word or t.normalized)]
    safe = [name for name in safe if not any(name in other for other in names - {name})]
    if not safe or tokenizer.split_special_tokens:
        return None
    return re.compile(f"(?={'|'.join(map(re.escape, safe))})")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], **options) -> Text:
    """Return the text that `encode_prompt` encodes, for a row's `template_options`."""
    if isinstance(prompt, str):
        return Text(prompt)
    open_turn = prompt[-1]["role"] == "assistant"
    options |= {"add_generation_prompt": not open_turn, "continue_final_message": open_turn}
    return Text(render(tokenizer, prompt, len(prompt), "prompt", **options), chat=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], **options) -> list[int]:
    """Return the ids of a prompt: of plain text, or of messages in the chat template, up to the start of the answer.

    If the last message is the assistant's, its turn is not closed, so that the model continues it.

    Raises:
        ValueError: the chat template refuses a message or leaves it out.
    """
    return encode_texts(tokenizer, [prompt_text(tokenizer, prompt, **options)])[0]


def complete_text(tokenizer, text: str | list[dict], name: str = "conversation", **options) -> Text:
    """Return the text that `encode_complete` encodes, for a row's `template_options`."""
    return Text(text) if isinstance(text, str) else Text(render(tokenizer, text, len(text), name, **options), True)


def up_to_eos(tokenizer, text: Text, ids: list[int]) -> list[int]:
    """Return the ids of a finished text up to its EOS, see [`encode_complete`]."""
    eos = tokenizer.eos_token_id
    if not text.chat:
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
    end = len(ids) - ids[::-1].index(eos) if eos in ids else len(ids)
    return ids[:end] if end < len(ids) and not tokenizer.decode(ids[end:]).strip() else ids


def encode_complete(tokenizer: PreTrainedTokenizerBase, text: str | list[dict], **options) -> list[int]:
    """Return the ids of a finished text or conversation up to its EOS: the ids of prompt + sampled completion.

    EOS is appended to plain text that does not end with it. If the chat template writes white space after the last
    EOS, it is cut off, because sampling stops at the EOS.

    Raises:
        ValueError: the chat template refuses a message or leaves it out.
    """
    whole = complete_text(tokenizer, text, **options)
    return up_to_eos(tokenizer, whole, encode_texts(tokenizer, [whole])[0])


def _check(dataset: Dataset, schema: str, column: str, tokenizer, where: str) -> None:
    """Check the columns of the schema, the EOS token, and, if `column` holds messages, the chat template."""
    validate(dataset, schema, where)
    require_eos(tokenizer, where)
    if is_messages(first_value(dataset, column)):
        require_chat_template(tokenizer, where)


def tokenize_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, **options
) -> Dataset:
    """Return `dataset` with a column "prompt_ids" (see `encode_prompt`).

    Rows whose prompt is empty, neither text nor messages, refused by the chat template, or longer than `max_length`
    tokens are dropped with one warning. So are text prompts whose answers ("chosen" or "completion") are messages.

    Args:
        options: `strict` and `num_proc`, see `map_usable`.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; messages without a chat template.
    """
    validate(dataset, "prompt", where)
    if any(is_messages(prompt) for prompt in dataset["prompt"]):
        require_chat_template(tokenizer, where)

    def plan(row):
        prompt = row["prompt"]
        refuse(text_problem(prompt, "prompt"))
        answers = [row[name] for name in ("chosen", "completion") if is_messages(row.get(name))]
        refuse(kinds_problem(prompt, *answers) if isinstance(prompt, str) else "")

        def finish(ids):
            _check_length("prompt", max_length, ids)
            return {"prompt_ids": ids}

        return [prompt_text(tokenizer, prompt, **template_options(row))], finish

    return map_usable(dataset, tokenizer, plan, {"prompt_ids": []}, dataset.column_names, where=where, **options)


def tokenize_preference(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, **options
) -> Dataset:
    """Return the columns "chosen_ids" and "rejected_ids" (with prompt, see `encode_complete`) and "margin" if present.

    A row is dropped, with one warning for all, if chosen or rejected is empty, refused by the chat template or longer
    than `max_length` tokens, or if both are the same.

    Args:
        options: `strict` and `num_proc`, see `map_usable`.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def plan(row):
        _check_pair(row)
        sides = {name: row[name] for name in ("chosen", "rejected")}
        prompt = row.get("prompt") or type(row["chosen"])()
        refuse(kinds_problem(prompt, *sides.values()))
        given = template_options(row)
        texts = [complete_text(tokenizer, prompt + said, name, **given) for name, said in sides.items()]
        _check_differ(*texts)

        def finish(*whole):
            chosen, rejected = (up_to_eos(tokenizer, text, ids) for text, ids in zip(texts, whole, strict=True))
            _check_length("pair", max_length, chosen, rejected)
            return {"chosen_ids": chosen, "rejected_ids": rejected}

        return texts, finish

    nothing = {"chosen_ids": [], "rejected_ids": []}
    return map_usable(dataset, tokenizer, plan, nothing, ["margin"], where=where, **options)


def tokenize_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, **options
) -> Dataset:
    """Return the columns "prompt_ids", "prompt_key", "chosen_ids" and "rejected_ids".

    The tokens are the same as in TRL's DPOTrainer. Two rows have the same "prompt_key" only if they have the same
    prompt. Without a prompt column, the prompt is the common start of chosen and rejected. Completions are cut to
    `max_length` tokens with their prompt. A row is dropped, with one warning for all, if a completion is empty or
    refused by the chat template, if the prompt leaves no room for it, or if chosen and rejected are the same, before
    or after the cut. The columns "ref_chosen_logps" and "ref_rejected_logps" are kept.

    Args:
        options: `strict` and `num_proc`, see `map_usable`.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "preference", "chosen", tokenizer, where)

    def plan(row):
        _check_pair(row)
        given = template_options(row)
        row = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        row = row if "prompt" in row else maybe_extract_prompt(row)
        texts = _texts_after(tokenizer, row, ("chosen", "rejected"), given)
        _check_differ(*texts[1:])

        def finish(*ids):
            prompt, chosen, rejected = _split(tokenizer, texts, ids, max_length)
            if chosen == rejected:
                raise Unusable(f"the same chosen and rejected once cut to {max_length} tokens")
            key = _key(texts[0])
            return {"prompt_ids": prompt, "prompt_key": key, "chosen_ids": chosen, "rejected_ids": rejected}

        return texts, finish

    nothing = {"prompt_ids": [], "prompt_key": "", "chosen_ids": [], "rejected_ids": []}
    keep = ["ref_chosen_logps", "ref_rejected_logps"]
    return map_usable(dataset, tokenizer, plan, nothing, keep, where=where, **options)


def tokenize_unpaired(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, **options
) -> Dataset:
    """Return the columns "prompt_ids", "prompt_key", "completion_ids" and "label" (true: desirable).

    The tokens are the same as in TRL's KTOTrainer. Two rows have the same "prompt_key" only if they have the same
    prompt. A row is dropped, with one warning for all, if the completion is empty or refused by the chat template, if
    the prompt leaves no room for it, or if the label is missing or neither true nor false. A column "ref_logps" is
    kept.

    Args:
        options: `strict` and `num_proc`, see `map_usable`.

    Raises:
        ValueError: no row is usable; `strict` and one row is not; no EOS; messages without a chat template.
    """
    _check(dataset, "unpaired", "completion", tokenizer, where)
    dataset = dataset.rename_column("label", "_label")  # It can have any type; the new column holds booleans.

    def plan(row):
        if row["_label"] not in (True, False):
            raise Unusable("missing label" if row["_label"] is None else "label that is neither true nor false")
        refuse(text_problem(row["completion"], "completion"))
        texts = _texts_after(tokenizer, row, ("completion",), template_options(row))

        def finish(*ids):
            prompt, completion = _split(tokenizer, texts, ids, max_length)
            key, label = _key(texts[0]), bool(row["_label"])
            return {"prompt_ids": prompt, "prompt_key": key, "completion_ids": completion, "label": label}

        return texts, finish

    nothing = {"prompt_ids": [], "prompt_key": "", "completion_ids": [], "label": False}
    return map_usable(dataset, tokenizer, plan, nothing, ["ref_logps"], where=where, **options)


def _key(prompt: Text) -> str:
    """Return a hash of a prompt. Its ids can't identify it, since they may differ with its completion."""
    return hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]


def _texts_after(tokenizer, row: dict, names: Sequence[str], given: dict) -> list[Text]:
    """Return the texts of a row's prompt and of the prompt with each of its finished completions."""
    prompt, completions = row["prompt"], {name: row[name] for name in names}
    refuse("empty prompt" if prompt is None else kinds_problem(prompt, *completions.values()))
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        return [Text(prompt), *(Text(prompt + (c if c.endswith(eos) else c + eos)) for c in completions.values())]
    refuse(text_problem(prompt, "prompt"))
    texts = [render(tokenizer, prompt, len(prompt), "prompt", add_generation_prompt=True, **given)]
    texts += [render(tokenizer, prompt + c, len(c), name, **given) for name, c in completions.items()]
    return [Text(text, chat=True) for text in texts]


def _split(tokenizer, texts: list[Text], ids: Sequence[list[int]], max_length: int | None) -> list[list[int]]:
    """Return the ids of a prompt and of each completion after it, cut to `max_length` tokens together.

    The prompt ends at the first token at which it differs from a prompt with completion, since a tokenizer may merge
    the end of a prompt with the start of a completion.
    """
    prompt, *whole = ids
    if not texts[0].text:  # An empty prompt is the BOS alone, if the tokenizer writes one.
        prompt = whole[0][:1] if whole[0][:1] == [tokenizer.bos_token_id] else []
    shared = min(len(prompt) if ids[: len(prompt)] == prompt else common_prefix_length(prompt, ids) for ids in whole)
    refuse("" if shared else "prompt without a token")
    if max_length is not None and shared >= max_length:
        raise Unusable(f"prompt that fills max_length={max_length}")
    encoded = [prompt[:shared], *(ids[shared:max_length] for ids in whole)]
    refuse("" if all(encoded) else "completion without a token")
    return encoded


def _check_pair(row: dict) -> None:
    refuse(text_problem(row["chosen"], "chosen") or text_problem(row["rejected"], "rejected"))
    refuse("identical chosen and rejected" if row["chosen"] == row["rejected"] else "")


def _check_differ(chosen: Text, rejected: Text) -> None:
    alike = f"chosen and rejected that the chat template renders alike\n{MEND}"
    refuse("" if chosen != rejected else alike if chosen.chat else "identical chosen and rejected")


def tokenize_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, where: str, **options
) -> Dataset:
    """Return the columns "input_ids" and "loss_mask" (1: the token counts in the loss), cut to `max_length` tokens.

    Plain text: EOS is appended, and the loss is on all tokens. Prompt-completion: the loss is on the completion.
    Messages: the loss is on the assistant's tokens if the chat template has ``{% generation %}`` markers, else on all
    tokens. Rows without a token in the loss are dropped with one warning.

    Args:
        options: `strict` and `num_proc`, see `map_usable`.

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
    plan = partial(_plan_with_mask, tokenizer, max_length)
    return map_usable(dataset, tokenizer, plan, {"input_ids": [], "loss_mask": []}, [], where=where, **options)


def _plan_with_mask(tokenizer, max_length: int | None, row: dict) -> Plan:
    row = maybe_convert_to_chatml(dict(row))
    texts, assistants, messages = conversation_texts(tokenizer, row), None, row.get("messages")
    if is_messages(messages) and has_generation_markers(tokenizer):
        mask = {"return_dict": True, "return_assistant_tokens_mask": True}
        assistants = tokenizer.apply_chat_template(messages, **mask, **template_options(row))

    def finish(*ids):
        whole = up_to_eos(tokenizer, texts[-1], ids[-1])
        prompt = common_prefix_length(ids[0], whole) if len(ids) > 1 and texts[0].text else 0
        mask = [0] * prompt + [1] * (len(whole) - prompt)
        if assistants is not None:
            whole, mask = list(assistants["input_ids"]), list(assistants["assistant_masks"])
        refuse("" if any(mask[:max_length]) else "no token to learn from (empty, or lost to max_length)")
        return {"input_ids": whole[:max_length], "loss_mask": mask[:max_length]}

    return texts, finish


def conversation_texts(tokenizer, row: dict, text_field: str = "text") -> list[Text]:
    """Return the text of a row of text or messages, or the texts of its prompt and of prompt and completion.

    Raises:
        Unusable: the row has no text, its prompt and completion are of different kinds, or its template refuses it.
    """
    given = template_options(row)
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        refuse(text_problem(completion, "completion") or ("empty prompt" if prompt is None else ""))
        refuse(kinds_problem(prompt, completion))
        before = [prompt_text(tokenizer, prompt, **given) if prompt else Text("")]
        return [*before, complete_text(tokenizer, prompt + completion, "completion", **given)]
    name = text_field if text_field in row else "messages"
    refuse(text_problem(row[name], name))
    return [complete_text(tokenizer, row[name], name, **given)]


def _check_length(name: str, max_length: int | None, *sequences: list[int]) -> None:
    refuse("" if all(sequences) else f"{name} without a token")
    if max_length is not None and max(map(len, sequences)) > max_length:
        raise Unusable(f"{name} longer than {max_length} tokens")


def map_usable(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    plan: Callable[[dict], Plan],
    nothing: dict,
    keep: Sequence[str],
    *,
    where: str,
    strict: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise rows in batches, in `num_proc` processes, and drop those that are `Unusable` (see `usable_rows`).

    Args:
        plan: returns the texts of a row and a function that makes the new columns from their ids.
        nothing: an empty row, which names the new columns and shows their types.
        keep: columns of the dataset that stay.
        strict: raise on a row that can't be used.
    """

    def encode(batch):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        plans = [_try(plan, row) for row in rows]
        wanted = [[] if isinstance(planned, Unusable) else planned[0] for planned in plans]
        ids = iter(encode_texts(tokenizer, [text for texts in wanted for text in texts]))
        done = []
        for planned, texts in zip(plans, wanted, strict=True):
            found = [next(ids) for _ in texts]
            out = planned if isinstance(planned, Unusable) else _try(planned[1], *found)
            done.append(nothing | {"_problem": str(out)} if isinstance(out, Unusable) else out | {"_problem": ""})
        return {name: [row[name] for row in done] for name in (*nothing, "_problem")}

    refuse_stream(dataset, where)
    keep = [name for name in keep if name in dataset.column_names and name not in nothing]
    types = {list: List(Value("int64")), str: Value("string"), bool: Value("bool")}
    features = Features({name: dataset.features[name] for name in keep})
    features |= {name: types[type(value)] for name, value in nothing.items()} | {"_problem": Value("string")}
    options = {"remove_columns": [name for name in dataset.column_names if name not in keep], "num_proc": num_proc}
    options["new_fingerprint"] = None if dataset.cache_files else generate_random_fingerprint()  # a hash takes 0.2 s
    dataset = dataset.map(encode, batched=True, features=features, desc=f"Tokenizing {where}", **options)
    kept = usable_rows(dataset["_problem"], where=where, strict=strict)
    dataset = dataset.select_columns([*nothing, *keep])
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _try(function: Callable, *args):
    """Return the result of a function, or the `Unusable` that it raises."""
    try:
        return function(*args)
    except Unusable as problem:
        return problem
