"""Corpora to pretrain on: text files, folders, datasets; and a tokenizer for them where none is given."""

from collections.abc import Iterable
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lifecycle_hf.data.packing import read_text

END, PADDING = "<|endoftext|>", "<|padding|>"


def read_corpus(path: str | Path, *, separator: str | None = None, strict: bool = False) -> Dataset:
    """Documents, in the column "text", of a text file, or of every .txt and .md file below a folder.

    Raises:
        ValueError: no such file, no text in it, or (with `strict`) bytes that are not UTF-8.
    """
    path = Path(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path}: no text file is there. Give a .txt or .md file, or a folder that holds some.")
    texts = [text for file in files for text in read_text(file, separator=separator, strict=strict)]
    return Dataset.from_dict({"text": texts})


def text_corpus(name: str) -> Dataset | None:
    """The documents of a .txt or .md file, of a folder that holds some, or of "python"; None for other data."""
    if name == "python":
        return python_documentation()
    path = Path(name).expanduser()
    files = path.rglob("*") if path.is_dir() else [path]
    return read_corpus(path) if any(f.is_file() and f.suffix in (".txt", ".md") for f in files) else None


def python_documentation() -> Dataset:
    """The language reference that Python brings with it, 0.5 MB: real text on any machine."""
    return Dataset.from_dict({"text": [text for _, text in sorted(topics.topics.items())]})


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """Byte-pair encoding learnt from `texts`, in which any text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text can be encoded) with one token that ends documents and one that pads.

    Raises:
        ValueError: a `vocab_size` without room for the 256 bytes and these two.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer needs 258 tokens at least.")
    bpe = byte_level_bpe(texts, vocab_size, [END, PADDING])
    options = {"eos_token": END, "pad_token": PADDING, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


def encode_corpus(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, *, field: str = "text", where: str
) -> Dataset | IterableDataset:
    """`dataset` with token ids in the column "input_ids" and no other; what spells a special token stays text.

    Raises:
        ValueError: no row, or neither "input_ids" nor the column `field`.
    """
    if dataset is None or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{where} is an empty corpus: it has no document.")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return dataset.select_columns("input_ids")
    if field not in columns:
        raise ValueError(
            f"{where} has the columns {columns}: pretraining reads {field!r} (dataset_text_field) or 'input_ids'."
        )

    def encode(rows):
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return {"input_ids": tokenizer(rows[field], **options)["input_ids"]}

    return dataset.map(encode, batched=True, remove_columns=columns)


def split_tail(dataset: Dataset, share: float = 0.05) -> tuple[Dataset, Dataset]:
    """Train and held-out parts of a corpus: the last `share` of its documents, or of its text where it has few."""
    if len(dataset) * share >= 5:
        parts = dataset.train_test_split(test_size=share, seed=0)
        return parts["train"], parts["test"]
    cut = [round(len(text) * (1 - share)) for text in dataset["text"]]
    texts = list(zip(dataset["text"], cut, strict=True))
    heads, tails = [text[:end] for text, end in texts], [text[end:] for text, end in texts]
    return Dataset.from_dict({"text": heads}), Dataset.from_dict({"text": tails})
