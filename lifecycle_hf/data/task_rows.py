"""Rows of classification and of question answering: read their labels and answers, check them, and tokenise them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from transformers import PreTrainedTokenizerBase

from lifecycle_hf.data.usable import Unusable, refuse, usable_rows

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""Kinds of classification, by transformers' names."""
_IDS = List(Value("int64"))
_PROBLEM = "_problem"
_KIND_OF = {bool: "int", int: "int", str: "str", float: "float", list: "list"}


def usable_pieces(
    dataset: Dataset,
    pieces: Callable[[dict], list[dict]],
    features: dict,
    *,
    where: str,
    strict: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Return the rows that `pieces` makes of each row, with the number of that row as "row" and their own as "index".

    Rows for which `pieces` raises [`Unusable`] are dropped with a count, see `usable_rows`.

    Args:
        features: the types of the columns that `pieces` makes; a piece need not have all.
        strict: raise on a row that can't be used.
    """

    def encode(batch, rows):
        made = []
        for row, values in zip(rows, zip(*batch.values(), strict=True), strict=True):
            try:
                found, problem = pieces(dict(zip(batch, values, strict=True))), ""
            except Unusable as reason:
                found, problem = [{}], str(reason)
            made += [piece | {"row": row, _PROBLEM: problem} for piece in found]
        return {name: [piece.get(name) for piece in made] for name in (*features, "row", _PROBLEM)}

    types = Features(features | {"row": Value("int64"), _PROBLEM: Value("string")})
    options = {"remove_columns": dataset.column_names, "features": types, "num_proc": num_proc}
    options["new_fingerprint"] = None if dataset.cache_files else generate_random_fingerprint()  # a hash takes 0.2 s
    made = dataset.map(encode, batched=True, with_indices=True, desc=f"Tokenizing {where}", **options)
    problems = dict(zip(made["row"], made[_PROBLEM]))
    usable_rows([problems[row] for row in range(len(dataset))], where=where, strict=strict)
    made = made.select([i for i, problem in enumerate(made[_PROBLEM]) if not problem]).remove_columns(_PROBLEM)
    return made.add_column("index", list(range(len(made))))


def require_columns(dataset: Dataset, names: Sequence[str], where: str) -> None:
    """Check that a dataset has some rows and these columns.

    Raises:
        ValueError: it has not.
    """
    if missing := [name for name in names if name not in dataset.column_names]:
        raise ValueError(
            f"{where} lacks the column {missing[0]!r} and has {dataset.column_names}: rename one, "
            f"dataset.rename_column(OLD, {missing[0]!r})."
        )
    if not len(dataset):
        raise ValueError(f"{where} is empty: check the split and its filters.")


def text_of(row: dict, name: str) -> str:
    """Return the text in a column of a row.

    Raises:
        Unusable: it is empty or no text.
    """
    value = row[name]
    refuse("" if value is None or isinstance(value, str) else f"{name} that is not text")
    refuse("" if value and value.strip() else f"empty {name}")
    return value


@dataclass(frozen=True)
class Labels:
    """Hold how the labels of a classification dataset are read.

    Attributes:
        kind: [`SINGLE`], [`MULTI`] or [`REGRESSION`].
        names: of the classes, in the order of their indices; ("value",) in regression.
    """

    kind: str
    names: tuple[str, ...]

    def read(self, value):
        """Return a row's label: the index of a class, whether each class holds [C], or a number.

        Raises:
            Unusable: the label is missing, of another kind, or none of the classes.
        """
        refuse("without a label" if value is None else "")
        wanted = {SINGLE: ("int", "str"), MULTI: ("list",), REGRESSION: ("int", "float")}[self.kind]
        kind = _KIND_OF.get(type(value), type(value).__name__)
        refuse("" if kind in wanted else f"with a label of the kind {kind}, not {' or '.join(wanted)}")
        if self.kind == REGRESSION:
            refuse("" if math.isfinite(value) else "with a label that is not finite")
            return float(value)
        if self.kind == SINGLE:
            return self._index(value)
        held = {self._index(item) for item in value}
        return [float(index in held) for index in range(len(self.names))]

    def _index(self, value: int | str) -> int:
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        inside = not isinstance(value, str) and value is not None and 0 <= value < len(self.names)
        mend = f"The classes are {_some(self.names)}: write one of them, or its index."
        refuse("" if inside else f"with the label {value!r}, which is no class\n{mend}")
        return int(value)


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:8]), "..."] if len(names) > 8 else map(repr, names))


def find_labels(dataset: Dataset, where: str, names: Sequence[str] | None = None) -> Labels:
    """Read from the column "label" what is to be learnt: whole numbers or strings are classes, lists hold all classes
    of a row, other numbers are values to predict.

    Args:
        names: of the classes, in order; by default those of a `ClassLabel` column, else the strings that occur,
            sorted, else the numbers from 0 to the highest one.

    Raises:
        ValueError: there is no such column, no row has a label, or labels of several kinds are mixed.
    """
    require_columns(dataset, ("text", "label"), where)
    column = [value.tolist() if hasattr(value, "tolist") else value for value in dataset["label"]]
    given = [(row, value) for row, value in enumerate(column) if value is not None]
    if not given:
        raise ValueError(f"{where} has no row with a label: fill the column 'label'.")
    kind = _one_kind(given, where)
    if kind == "float":
        return Labels(REGRESSION, ("value",))
    items = given
    if kind == "list":
        items = [(row, item) for row, values in given for item in values]
        of = _one_kind(items, where) if items else "int"
    else:
        of = kind
    if names is None:
        feature = getattr(dataset.features["label"], "feature", dataset.features["label"])
        values = {value for _, value in items}
        if isinstance(feature, ClassLabel):
            names = feature.names
        else:
            names = sorted(values - {""}) if of == "str" else map(str, range(max(values, default=0) + 1))
    names = tuple(names)
    if len(names) < 2 and kind != "list":
        raise ValueError(f"{where} has the labels {_some(names)} alone: a classifier needs two classes or more.")
    return Labels(MULTI if kind == "list" else SINGLE, names)


def _one_kind(values: list[tuple[int, object]], where: str) -> str:
    """Return the kind of (row, label) pairs, which must all be of one kind."""
    kinds = [(row, _KIND_OF.get(type(value), type(value).__name__)) for row, value in values]
    first = kinds[0][1]
    other = next(((row, kind) for row, kind in kinds if kind != first), None)
    if other is not None and {first, other[1]} != {"int", "float"}:
        raise ValueError(
            f"{where}: labels of several kinds are mixed: that of row {kinds[0][0]} is of the kind {first}, that of "
            f"row {other[0]} of the kind {other[1]}. Write all in one way."
        )
    if first not in ("int", "str", "float", "list"):
        raise ValueError(f"{where}: the label of row {kinds[0][0]} is of the kind {first}: write int, str or list.")
    return first if other is None else "float"


def encode_pair(tokenizer: PreTrainedTokenizerBase, first: str, second: str | None = None, **options):
    """Return the tokenizer's encoding of one text or two; a line break stands between two without special tokens."""
    if second is None:
        return tokenizer(first, **options)
    separated = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    return tokenizer(first if separated else f"{first}\n", second, **options)


def tokenize_classification(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, labels: Labels, *, max_length: int, where: str, **options
) -> Dataset:
    """Tokenise rows "text"[, "text_pair"], "label"; returns "input_ids", "label" and what the tokenizer adds.

    A text is cut to `max_length` tokens (of two the longer one), and ends with the EOS token if there is one.

    Args:
        options: `strict`, `num_proc` of [`usable_pieces`].

    Raises:
        ValueError: a column is missing, or no row is usable (with `strict`, a row is not).
    """
    require_columns(dataset, ("text", "label"), where)
    pairs, eos = "text_pair" in dataset.column_names, tokenizer.eos_token_id

    def pieces(row):
        texts = [text_of(row, name) for name in ("text", "text_pair")[: 1 + pairs]]
        label = labels.read(row["label"])
        ends = eos is None or tokenizer("a")["input_ids"][-1:] == [eos]
        encoded = encode_pair(tokenizer, *texts, truncation=True, max_length=max_length - (not ends))
        ids, types = encoded["input_ids"], encoded.get("token_type_ids")
        refuse("" if ids else "text without a token")
        if not ends:
            ids, types = ids + [eos], types and types + types[-1:]
        return [{"input_ids": ids, "token_type_ids": types, "label": label}]

    kinds = {SINGLE: Value("int64"), MULTI: List(Value("float64")), REGRESSION: Value("float64")}
    features = {"input_ids": _IDS, "token_type_ids": _IDS, "label": kinds[labels.kind]}
    return usable_pieces(dataset, pieces, features, where=where, **options)


def tokenize_questions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    unanswerable: bool,
    where: str,
    **options,
) -> Dataset:
    """Tokenise rows "question", "context", "answers" into windows of at most `max_length` tokens.

    A window is the question and a part of the context; each part begins `stride` tokens before the last one ended.
    Its columns are "input_ids"[, "token_type_ids"], "offsets" (two numbers for each token: where it starts and ends in
    the context, −1 for others), "start" and "end" (the tokens of the first answer, 0 if it is not wholly in the
    window), "context" and "answers" (the texts of all right answers).

    Args:
        unanswerable: whether questions without an answer are usable.
        options: `strict`, `num_proc` of [`usable_pieces`].

    Raises:
        ValueError: a column is missing, the tokenizer has no offsets, or no row is usable (with `strict`, a row is
            not).
    """
    require_columns(dataset, ("question", "context", "answers"), where)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} can't tell where tokens stand in a text: use a fast tokenizer.")

    def pieces(row):
        question, context = (text_of(row, name) for name in ("question", "context"))
        answers = row["answers"] or {}
        texts, starts = (list(answers.get(name) or []) for name in ("text", "answer_start"))
        _check_answers(context, texts, starts, unanswerable)
        room = encode_pair(tokenizer, question.strip(), "", add_special_tokens=True)["input_ids"]
        refuse(f"question with {len(room)} tokens, which leaves no room" if len(room) + stride >= max_length else "")
        encoded = encode_pair(
            tokenizer, question.strip(), context, truncation="only_second", max_length=max_length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        found = []
        for i, ids in enumerate(encoded["input_ids"]):
            of_context = [part == 1 for part in encoded.sequence_ids(i)]
            offsets = [pair if inside else (-1, -1) for pair, inside in zip(encoded["offset_mapping"][i], of_context)]
            start, end = answer_tokens(offsets, texts[0], starts[0]) if texts else (0, 0)
            window = {"input_ids": ids, "offsets": [place for pair in offsets for place in pair]}
            window |= {"token_type_ids": encoded["token_type_ids"][i]} if "token_type_ids" in encoded else {}
            found.append(window | {"start": start, "end": end, "context": context, "answers": texts})
        return found

    lists, texts = dict.fromkeys(("input_ids", "token_type_ids", "offsets"), _IDS), Value("string")
    features = lists | {"start": Value("int64"), "end": Value("int64"), "context": texts, "answers": List(texts)}
    return usable_pieces(dataset, pieces, features, where=where, **options)


def _check_answers(context: str, texts: list, starts: list, unanswerable: bool) -> None:
    """Raise `Unusable` if answers are missing or do not stand where they should."""
    mend = "Set null_threshold to train and decode questions without an answer."
    refuse("" if texts or unanswerable else f"question without an answer\n{mend}")
    refuse("" if len(texts) == len(starts) else "answers with other numbers of text and answer_start")
    for text, start in zip(texts, starts):
        stands = isinstance(text, str) and text.strip() and isinstance(start, int) and start >= 0
        found = stands and context[start : start + len(text)] == text
        refuse("" if found else "answer that is not in its context at answer_start")


def answer_tokens(offsets: Sequence[tuple[int, int]], text: str, start: int) -> tuple[int, int]:
    """Return the first and the last token of an answer in a window, or (0, 0) if it is not wholly there.

    Args:
        offsets: (start, end) of each token in the context; negative for tokens of the question and special ones.
        text, start: the answer and its first character's place; blanks at its ends are left out.
    """
    start, text = start + len(text) - len(text.lstrip()), text.strip()
    end = start + len(text)
    first = next((i for i, (low, high) in enumerate(offsets) if low <= start < high), None)
    last = next((i for i, (low, high) in enumerate(offsets) if low < end <= high), None)
    return (0, 0) if first is None or last is None else (first, last)
