"""The dataset formats that this library reads: their columns, how to recognise them and how to convert them.

The names and layouts are TRL's: ``text | prompt-completion | preference | unpaired | prompt``, each plain (strings) or
chat (lists of ``{"role", "content"}`` messages). A message may hold ``"tool_calls"`` beside or instead of its content.
The columns ``tools`` and ``chat_template_kwargs`` go to the chat template.
"""

import difflib
import re

from datasets import Dataset, IterableDataset
from trl import maybe_extract_prompt

# For each schema, sets of columns. A dataset needs all columns of one set.
SCHEMAS = {
    "preference": [("chosen", "rejected")],
    "unpaired": [("prompt", "completion", "label")],
    "prompt-completion": [("prompt", "completion")],
    "text": [("text",), ("messages",), ("conversations",)],
    "prompt": [("prompt",)],
}
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected", "margin", *_LOGPS, *TEMPLATE_COLUMNS)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def check_train_dataset(dataset, trainer: str) -> None:
    """Check that there is a dataset and that it has a length.

    Raises:
        ValueError: there is no dataset, or it is streamed.
    """
    if dataset is None:
        raise ValueError(f"{trainer}: train_dataset is missing.")
    refuse_stream(dataset, f"{trainer}: train_dataset")
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"{trainer}: train_dataset is a {kind}; pass a datasets.Dataset (one split, not streamed).")


def refuse_stream(dataset, where: str) -> None:
    """Check that a dataset is not streamed.

    Raises:
        ValueError: it is; the message says why that is not possible and how to load the data.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{where} is streamed (IterableDataset), but its rows are all read, checked and counted before training. "
            "Only the train_dataset and eval_dataset of SFTTrainer and the train_dataset of PretrainingTrainer may be "
            "streamed. Load it without streaming=True, or take its first n rows: "
            "Dataset.from_list(list(dataset.take(n)))."
        )


def validate(dataset: Dataset, schema: str, where: str) -> None:
    """Check that `dataset` has the columns of `schema` and at least one row.

    Raises:
        ValueError: the dataset is empty, columns are missing (the message lists the columns found and a likely
            misspelling), or a column holds neither text nor messages. The message starts with `where`, e.g.
            ``"train_dataset"``.
    """
    columns = list(dataset.column_names or next(iter(dataset), {}))
    options = SCHEMAS[schema]
    found = next((option for option in options if set(option) <= set(columns)), None)
    if found is None:
        raise ValueError(_missing_columns(columns, options, f"{where}: a {schema} dataset"))
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{where} is empty: columns {columns}, but no row. Check the split and its filters.")
    for name in found:
        value = row[name]
        readable = value is None or value == [] or isinstance(value, str) or is_messages(value)
        if name not in ("label", "conversations") and not readable:
            raise ValueError(
                f"{where}: column '{name}' of row 0 holds {type(value).__name__} {repr(value)[:60]}; it must be a "
                "string or a list of {'role': ..., 'content': ...} messages."
            )


def _missing_columns(columns: list[str], options: list[tuple[str, ...]], what: str) -> str:
    def look(option):
        """Return the missing names of `option`, and for each the column with a similar name, if there is one."""
        missing = [name for name in option if name not in columns]
        close = {name: difflib.get_close_matches(name, set(columns) - set(option), n=1) for name in missing}
        return missing, {name: found[0] for name, found in close.items() if found}

    missing, alike = min(map(look, options), key=lambda seen: (len(seen[0]) - len(seen[1]), len(seen[0])))
    hints = [f"'{column}' looks like a misspelt '{name}'" for name, column in alike.items()]
    wanted = " or ".join(str(list(option)) for option in options)
    mend = "; ".join(hints) if hints else "rename your columns with dataset.rename_column(old, new)"
    if {"instruction", "output"} <= set(columns) and any("prompt" in option for option in options):
        mend = f"These are Alpaca's columns. Convert them by {_alpaca_line(columns)}"
    return f"{what} needs the columns {wanted}, but {missing} is missing. Columns found: {columns}. {mend}."


def _alpaca_line(columns: list[str]) -> str:
    """Return the code that makes prompt and completion of Alpaca's columns."""
    prompt, old = "row['instruction']", [name for name in ("instruction", "input", "output") if name in columns]
    if "input" in columns:
        prompt = "(row['instruction'] + '\\n\\n' + (row['input'] or '')).strip()"
    made = f"{{'prompt': {prompt}, 'completion': row['output']}}"
    return f"dataset = dataset.map(lambda row: {made}, remove_columns={old})"


def detect(dataset: Dataset, where: str) -> str:
    """Return the schema of `dataset`: the most specific one whose columns it has.

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
    """Return whether `value` is a non-empty list of chat messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def is_transcript(text) -> bool:
    r"""Return whether `text` is a transcript as in Anthropic's hh-rlhf: ``"\n\nHuman: ...\n\nAssistant: ..."``."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def transcript_to_messages(text: str) -> list[dict[str, str]]:
    r"""Return the chat messages of a transcript ``"\n\nHuman: ...\n\nAssistant: ..."``.

    Raises:
        ValueError: `text` is not such a transcript.
    """
    if not is_transcript(text):
        raise ValueError(f"not a 'Human: ... Assistant: ...' transcript: {str(text)[:60]!r}")
    parts = _TURN.split(text.strip())[1:]
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def to_preference(dataset: Dataset, where: str) -> Dataset:
    """Return `dataset` with the columns chosen, rejected[, prompt][, margin, ref_*_logps], transcripts as messages.

    A prompt column is kept only if chosen and rejected do not contain the prompt themselves. Values that can't be read
    become empty; tokenisation counts and drops their rows.

    Raises:
        ValueError: see `validate`.
    """
    validate(dataset, "preference", where)
    return _unify_preference(dataset.select_columns([n for n in _PREFERENCE_COLUMNS if n in dataset.column_names]))


def to_unpaired(dataset: Dataset, where: str) -> Dataset:
    """Return `dataset` with its columns prompt, completion and label; prompts that are transcripts become messages.

    Raises:
        ValueError: see `validate`.
    """
    validate(dataset, "unpaired", where)
    return _chats(dataset, "completion")


def to_targets(dataset: Dataset, where: str) -> Dataset:
    """Return `dataset` with its columns prompt and completion, and a label that is true for every row.

    Of chats in a column "messages" the completion is the last message, of preference pairs it is the chosen answer.

    Raises:
        ValueError: see `validate`; a chat that does not end with an answer, or has nothing before it.
    """
    columns = set(dataset.column_names)
    if "messages" in columns and "prompt" not in columns:
        chats = enumerate(dataset["messages"])
        wrong = next((i for i, chat in chats if len(chat) < 2 or chat[-1]["role"] != "assistant"), None)
        if wrong is not None:
            raise ValueError(f"{where}: the chat of row {wrong} does not end with an answer to a message: drop it.")
        dataset = dataset.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
    elif {"chosen", "rejected"} <= columns:
        dataset = to_preference(dataset, where)
        dataset = dataset if "prompt" in dataset.column_names else dataset.map(maybe_extract_prompt)
        dataset = dataset.rename_column("chosen", "completion").remove_columns("rejected")
    validate(dataset, "prompt-completion", where)
    return to_unpaired(dataset.add_column("label", [True] * len(dataset)), where)


def to_prompts(dataset: Dataset, where: str) -> Dataset:
    """Return `dataset` with a column "prompt" (text or messages) from prompt, prompt-completion or preference rows.

    The other columns are kept. For preference rows without a prompt, it is the common start of chosen and rejected
    (`trl.maybe_extract_prompt`), up to the last user turn.

    Raises:
        ValueError: the dataset is empty or has none of these schemas.
    """
    schema = detect(dataset, where)
    if schema == "text":
        raise ValueError(_missing_columns(dataset.column_names, [("prompt",), ("chosen", "rejected")], where))
    dataset = _unify_preference(dataset) if schema == "preference" else _chats(dataset)
    return dataset if "prompt" in dataset.column_names else dataset.map(_shared_prompt)


def _unify_preference(dataset: Dataset) -> Dataset:
    first = {name: first_value(dataset, name) for name in ("prompt", "chosen") if name in dataset.column_names}
    prompt, chosen = first.get("prompt"), first["chosen"]
    whole = is_transcript(chosen)
    holds_prompt = is_messages(chosen) and chosen[0]["role"] != "assistant" and isinstance(prompt, str)
    if "prompt" in first and (whole or holds_prompt or (prompt is None and isinstance(chosen, str))):
        dataset = dataset.remove_columns("prompt")
    if whole:
        return dataset.map(lambda row: {side: _messages_or_nothing(row[side]) for side in ("chosen", "rejected")})
    return _chats(dataset, "chosen", "rejected")


def first_value(dataset: Dataset, column: str):
    """Return the first non-empty value of a column, which shows its layout, or None if all are empty."""
    return next((value for value in dataset[column] if value), None)


def _messages_or_nothing(text) -> list[dict[str, str]]:
    return transcript_to_messages(text) if is_transcript(text) else []


def _chats(dataset: Dataset, *answers: str) -> Dataset:
    """Return `dataset` with prompts and the text columns `answers` as messages if its prompts are transcripts."""
    if "prompt" not in dataset.column_names or not is_transcript(first_value(dataset, "prompt")):
        return dataset

    def convert(row):
        prompt = _messages_or_nothing(row["prompt"])
        # An empty "Assistant:" turn at the end only asks for the answer. The chat template adds its own.
        prompt = prompt[:-1] if prompt and not prompt[-1]["content"] else prompt
        said = {name: (row[name] or "").strip() for name in answers}
        return {"prompt": prompt} | {name: [{"role": "assistant", "content": text}] for name, text in said.items()}

    return dataset.map(convert)


def _shared_prompt(row: dict) -> dict:
    if not row["chosen"] or not row["rejected"]:
        return {"prompt": type(row["chosen"] or row["rejected"] or "")()}
    prompt = maybe_extract_prompt(row)["prompt"]
    while is_messages(prompt) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return {"prompt": prompt}
