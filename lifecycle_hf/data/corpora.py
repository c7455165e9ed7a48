"""Text corpora for pretraining (files, folders, datasets), and training a tokenizer on them."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END, PADDING = "<|endoftext|>", "<|padding|>"


def read_corpus(path: str | Path) -> Dataset:
    """Return the text file at `path`, or every .txt and .md file below this folder, as documents in the column "text".

    Blank files are left out. A file that is not UTF-8 is left out with a warning.

    Raises:
        ValueError: the file does not exist, or the folder holds no text file.
    """
    path = Path(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path}: no text file is there. Give a .txt or .md file, or a folder that holds some.")
    texts = map(_read_text, files)
    return Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def _read_text(file: Path) -> str:
    """Return the text of a UTF-8 file; warn and return an empty string where it is not UTF-8."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        fault = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        warnings.warn(f"{file} is left out, since it is not UTF-8 ({fault}). Convert it.", UserWarning, stacklevel=2)
        return ""


def text_corpus(name: str) -> Dataset | None:
    """Return the documents of a .txt or .md file, of a folder with such files, or of "python"; None for other data."""
    if name == "python":
        return python_documentation()
    path = Path(name).expanduser()
    files = path.rglob("*") if path.is_dir() else [path]
    return read_corpus(path) if any(f.is_file() and f.suffix in (".txt", ".md") for f in files) else None


def python_documentation() -> Dataset:
    """Return the language reference that is installed with Python: 0.5 MB of real text, without a download."""
    return Dataset.from_dict({"text": [text for _, text in sorted(topics.topics.items())]})


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer on `texts`. It can encode any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, with an EOS token and a padding token.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and these two tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer needs 258 tokens at least.")
    options = {"eos_token": END, "pad_token": PADDING, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(texts, vocab_size, [END, PADDING]), **options)


def encode_corpus(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, *, field: str = "text", where: str
) -> Dataset | IterableDataset:
    """Return `dataset` with the column "input_ids" alone; text that looks like a special token is encoded as text.

    Raises:
        ValueError: there is no row, or neither a column "input_ids" nor a column `field`.
    """
    if dataset is None or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{where} is an empty corpus: it has no document.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return dataset.select_columns("input_ids")
    if field not in columns:
        raise ValueError(f"{where} has the columns {columns}, not {field!r} (dataset_text_field) or 'input_ids'.")

    def encode(rows):
        tokens = tokenizer(rows[field], add_special_tokens=False, split_special_tokens=True)
        return {"input_ids": tokens["input_ids"]}

    return dataset.map(encode, batched=True, remove_columns=columns)


def split_tail(dataset: Dataset, share: float = 0.05) -> tuple[Dataset, Dataset]:
    """Split a corpus into a train part and a held-out part.

    A random `share` of the documents is held out (always the same). If that is fewer than 5 documents, the last
    `share` of the text of each document is held out instead.
    """
    if len(dataset) * share >= 5:
        parts = dataset.train_test_split(test_size=share, seed=0)
        return parts["train"], parts["test"]
    texts = [(text, round(len(text) * (1 - share))) for text in dataset["text"]]
    heads, tails = [text[:end] for text, end in texts], [text[end:] for text, end in texts]
    return Dataset.from_dict({"text": heads}), Dataset.from_dict({"text": tails})
