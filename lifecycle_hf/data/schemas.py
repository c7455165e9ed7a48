"""The dataset formats this library reads: what columns they have, how to tell them apart, how to convert them.

The names and layouts are TRL's: ``text | prompt-completion | preference | unpaired | prompt``, each plain (strings) or
chat (lists of ``{"role", "content"}`` messages).
"""

import difflib
import re

from datasets import Dataset
from trl import maybe_extract_prompt

# Per schema the sets of columns of which one must be complete.
SCHEMAS = {
    "preference": [("chosen", "rejected")],
    "unpaired": [("prompt", "completion", "label")],
    "prompt-completion": [("prompt", "completion")],
    "text": [("text",), ("messages",), ("conversations",)],
    "prompt": [("prompt",)],
}
_PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected", "margin", "ref_chosen_logps", "ref_rejected_logps")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def check_train_dataset(dataset, trainer: str) -> None:
    """Check that there is a dataset with a length.

    Raises:
        ValueError: no dataset, or a streamed one.
    """
    if dataset is None:
        raise ValueError(f"{trainer}: train_dataset is missing.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{trainer}: train_dataset is a {type(dataset).__name__}; give a datasets.Dataset (one split, not "
            "streamed), since rows that can't be used are counted and reported before training."
        )


def validate(dataset: Dataset, schema: str, where: str) -> None:
    """Check that `dataset` has the columns of `schema` and at least one row.

    Raises:
        ValueError: empty dataset, missing columns (the message lists the columns found and the likely misspelling),
            or a column that holds neither text nor messages; `where` is named, e.g. ``"train_dataset"``.
    """
    columns = list(dataset.column_names or next(iter(dataset), {}))
    options = SCHEMAS[schema]
    found = next((option for option in options if set(option) <= set(columns)), None)
    if found is None:
        raise ValueError(_missing_columns(columns, options, f"{where}: a {schema} dataset"))
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"{where} is empty: it has the columns {columns} but no row. Check the split and its filters."
        )
    for name in found:
        value = row[name]
        if name not in ("label", "conversations") and not (
            value is None or isinstance(value, str) or is_messages(value) or value == []
        ):
            raise ValueError(
                f"{where}: column '{name}' of row 0 holds {type(value).__name__} {repr(value)[:60]}; it must be a "
                "string or a list of {'role': ..., 'content': ...} messages."
            )


def _missing_columns(columns: list[str], options: list[tuple[str, ...]], what: str) -> str:
    def look(option):
        """(names that are missing, {missing name: column that looks like it})"""
        missing = [name for name in option if name not in columns]
        close = {name: difflib.get_close_matches(name, set(columns) - set(option), n=1) for name in missing}
        return missing, {name: found[0] for name, found in close.items() if found}

    missing, alike = min(map(look, options), key=lambda seen: (len(seen[0]) - len(seen[1]), len(seen[0])))
    hints = [f"'{column}' looks like a misspelt '{name}'" for name, column in alike.items()]
    wanted = " or ".join(str(list(option)) for option in options)
    mend = "; ".join(hints) if hints else "rename your columns with dataset.rename_column(old, new)"
    return f"{what} needs the columns {wanted}, but {missing} is missing. Columns found: {columns}. {mend}."


def detect(dataset: Dataset, where: str) -> str:
    """The schema of `dataset` by its columns, the most specific first.

    Raises:
        ValueError: no schema fits, or the dataset is empty.
    """
    columns = set(dataset.column_names or next(iter(dataset), {}))
    for schema, options in SCHEMAS.items():
        if any(set(option) <= columns for option in options):
            validate(dataset, schema, where)
            return schema
    options = [option for schema_options in SCHEMAS.values() for option in schema_options]
    raise ValueError(_missing_columns(sorted(columns), options, f"{where}: a dataset"))


def is_messages(value) -> bool:
    """Whether `value` is a non-empty list of chat messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def is_transcript(text) -> bool:
    r"""Whether `text` is a transcript as in Anthropic's hh-rlhf: ``"\n\nHuman: ...\n\nAssistant: ..."``."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def transcript_to_messages(text: str) -> list[dict[str, str]]:
    r"""Chat messages of a ``"\n\nHuman: ...\n\nAssistant: ..."`` transcript.

    Raises:
        ValueError: `text` is no such transcript.
    """
    if not is_transcript(text):
        raise ValueError(f"not a 'Human: ... Assistant: ...' transcript: {str(text)[:60]!r}")
    parts = _TURN.split(text.strip())[1:]
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def to_preference(dataset: Dataset, where: str) -> Dataset:
    """`dataset` with the columns chosen, rejected[, prompt][, margin, ref_*_logps]; transcripts become messages.

    A prompt column is kept only where chosen and rejected do not contain the prompt themselves. Values that can't be
    read become empty, which tokenisation counts and drops.

    Raises:
        ValueError: as `validate`.
    """
    validate(dataset, "preference", where)
    return _unify_preference(dataset.select_columns([n for n in _PREFERENCE_COLUMNS if n in dataset.column_names]))


def to_unpaired(dataset: Dataset, where: str) -> Dataset:
    """`dataset` with its columns prompt, completion, label; a prompt that is a transcript becomes messages.

    Raises:
        ValueError: as `validate`.
    """
    validate(dataset, "unpaired", where)
    if not is_transcript(first_value(dataset, "prompt")):
        return dataset
    return dataset.map(
        lambda row: {"prompt": _prompt_messages(row["prompt"]), "completion": _answer(row["completion"])}
    )


def to_prompts(dataset: Dataset, where: str) -> Dataset:
    """`dataset` with a column "prompt" (text or messages), taken from prompt, prompt-completion or preference rows.

    The other columns stay. Of preference rows without a prompt it is what chosen and rejected share
    (`trl.maybe_extract_prompt`), cut back to the last user turn.

    Raises:
        ValueError: the dataset is empty or has none of these schemas.
    """
    schema = detect(dataset, where)
    if schema == "text":
        raise ValueError(_missing_columns(dataset.column_names, [("prompt",), ("chosen", "rejected")], where))
    if schema == "preference":
        dataset = _unify_preference(dataset)
    elif is_transcript(first_value(dataset, "prompt")):
        dataset = dataset.map(lambda row: {"prompt": _prompt_messages(row["prompt"])})
    return dataset if "prompt" in dataset.column_names else dataset.map(_shared_prompt)


def _unify_preference(dataset: Dataset) -> Dataset:
    first = {name: first_value(dataset, name) for name in ("prompt", "chosen") if name in dataset.column_names}
    whole = is_transcript(first["chosen"])
    if "prompt" in first and (whole or isinstance(first["prompt"], str) != isinstance(first["chosen"], str)):
        dataset = dataset.remove_columns("prompt")
    if whole:
        return dataset.map(lambda row: {side: _messages_or_nothing(row[side]) for side in ("chosen", "rejected")})
    if is_transcript(first.get("prompt")):
        return dataset.map(
            lambda row: {
                "prompt": _prompt_messages(row["prompt"]),
                **{side: _answer(row[side]) for side in ("chosen", "rejected")},
            }
        )
    return dataset


def first_value(dataset: Dataset, column: str):
    """The first value of a column that is not empty, by which its layout is told; None where all are."""
    return next((value for value in dataset[column] if value), None)


def _answer(text) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": (text or "").strip()}]


def _messages_or_nothing(text) -> list[dict[str, str]]:
    return transcript_to_messages(text) if is_transcript(text) else []


def _prompt_messages(text) -> list[dict[str, str]]:
    messages = _messages_or_nothing(text)
    # A last "Assistant:" without words invites the answer, as the chat template's generation prompt does.
    return messages[:-1] if messages and not messages[-1]["content"] else messages


def _shared_prompt(row: dict) -> dict:
    if not row["chosen"] or not row["rejected"]:
        return {"prompt": type(row["chosen"] or row["rejected"] or "")()}
    prompt = maybe_extract_prompt(row)["prompt"]
    while is_messages(prompt) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return {"prompt": prompt}
