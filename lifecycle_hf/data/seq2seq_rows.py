"""Rows of sequence to sequence: a prompt and the completion to generate, checked and tokenised."""

import warnings

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml
from trl.data_utils import common_prefix_length

from lifecycle_hf.data.chat import message_text, require_chat_template, text_problem
from lifecycle_hf.data.schemas import TEMPLATE_COLUMNS, is_messages
from lifecycle_hf.data.task_rows import require_columns, usable_pieces
from lifecycle_hf.data.tokenize import conversation_texts, encode_texts, require_eos, up_to_eos
from lifecycle_hf.data.usable import refuse

PAIR = "prompt", "completion"


def tokenize_seq2seq(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    max_target_length: int,
    where: str,
    columns: tuple[str, str] = PAIR,
    prefix: str = "",
    **options,
) -> Dataset:
    """Tokenise rows "prompt", "completion" (texts or messages); returns "input_ids" (the prompt's) and "labels".

    Of an encoder-decoder the two texts are tokenised apart, and EOS ends each. Of a decoder they are the two parts of
    prompt + completion + EOS. "prompt" and "completion" stay as texts; of messages the texts stand in lines.

    A prompt of an encoder-decoder with more than `max_length` tokens is cut at its end, which EOS takes. That of a
    decoder is dropped: it ends in what asks for the completion, and without that it would ask for something else.
    A completion with more than `max_target_length` tokens is cut too, so that it has no EOS. A warning counts both.

    Args:
        columns: other names of the two columns.
        prefix: written before each prompt that is text.
        options: `strict`, `num_proc` of [`usable_pieces`].

    Raises:
        ValueError: a column is missing, the tokenizer has no EOS token, messages have no chat template, or no row is
            usable (with `strict`, a row is not).
    """
    require_columns(dataset, columns, where)
    require_eos(tokenizer, where)
    read = [*columns, *(name for name in TEMPLATE_COLUMNS if name in dataset.column_names)]
    dataset = dataset.select_columns(read).rename_columns(dict(zip(columns, PAIR)))
    if is_messages(dataset[0]["prompt"]):
        require_chat_template(tokenizer, where)

    def pieces(row):
        row = maybe_convert_to_chatml(row)
        refuse(text_problem(row["prompt"], "prompt"))
        row["prompt"] = prefix + row["prompt"] if isinstance(row["prompt"], str) else row["prompt"]
        prompt, target = _encoded(tokenizer, row, encoder_decoder)
        long = len(prompt) > max_length
        refuse("" if prompt and target else f"{'completion' if prompt else 'prompt'} without a token")
        refuse(f"prompt longer than max_length={max_length} tokens" if long and not encoder_decoder else "")
        found = {"input_ids": prompt[: max_length - 1] + prompt[-1:] if long else prompt, "cut_prompt": long}
        found |= {"labels": target[:max_target_length], "cut_completion": len(target) > max_target_length}
        return [found | {name: _plain(row[name]) for name in PAIR}]

    ids, cuts = List(Value("int64")), {name: Value("bool") for name in ("cut_prompt", "cut_completion")}
    features = {"input_ids": ids, "labels": ids, "prompt": Value("string"), "completion": Value("string")}
    found = usable_pieces(dataset, pieces, features | cuts, where=where, **options)
    prompts, completions = (sum(found[name]) for name in cuts)
    if prompts or completions:
        warnings.warn(
            f"{where}: of {len(found)} rows {prompts} prompts are cut to max_length={max_length} tokens, and "
            f"{completions} completions to max_target_length={max_target_length}. Raise these to keep the ends.",
            stacklevel=2,
        )
    return found.remove_columns(list(cuts))


def _encoded(tokenizer, row: dict, encoder_decoder: bool) -> tuple[list[int], list[int]]:
    """Return the ids of a row's prompt and of its completion."""
    texts = conversation_texts(tokenizer, row)
    if encoder_decoder and not texts[0].chat:
        sides = tokenizer(row["prompt"]), tokenizer(text_target=row["completion"])
        return tuple(up_to_eos(tokenizer, texts[0], side["input_ids"]) for side in sides)
    prompt, whole = encode_texts(tokenizer, texts)
    whole = up_to_eos(tokenizer, texts[1], whole)
    shared = common_prefix_length(prompt, whole)
    return whole[:shared] + [tokenizer.eos_token_id] * encoder_decoder, whole[shared:]


def _plain(value: str | list[dict]) -> str:
    return value if isinstance(value, str) else "\n".join(message_text(message) or "" for message in value)
