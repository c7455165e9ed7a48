"""Load data by name: a registered source, a local file or folder, or a dataset of the Hub."""

from collections.abc import Callable, Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from lifecycle_hf.data.corpora import split_tail, text_corpus

LOADER_OF_SUFFIX = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_SEED = 0.05, 500, 0
SOURCES: dict[str, Callable[[str], Mapping[str, Dataset]]] = {}
"""For each name a function that takes a stage ("pretrain", "sft", "reward", "ppo", "ptx") and returns its splits.

`lifecycle_hf.toyworld` adds itself here when it is imported."""


def load_splits(
    name: str, stage: str, *, config: str | None = None, train_split: str = "train", test_split: str = "test"
) -> tuple[Dataset, Dataset | None]:
    """Load the splits (train, test) of a dataset by its name.

    If there is no split named `test`, 5 % of the train split (1 to 500 rows, always the same) are held out as test
    split; with a train split of one row, the test split is None. For the stage `pretrain`, a text file is one document
    (`text_corpus`), and `split_tail` holds out the test split.

    Args:
        name: a name in [`SOURCES`], a local file or folder, or a dataset of the Hub.
        stage: the stage of training that the data is for.
        config: configuration of a dataset of the Hub.

    Raises:
        ValueError: nothing is found under the name, or it does not have one of the splits.
    """
    splits = find_splits(name, stage, config)
    wanted = [train_split] if test_split == "test" else [train_split, test_split]
    for option, split in zip(("dataset_train_split", "dataset_test_split"), wanted):
        if split not in splits:
            raise ValueError(f"{option}: {name} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    train = splits[train_split]
    if test_split in splits:
        return train, splits[test_split]
    if len(train) < 2:
        return train, None
    size = min(max(1, round(HELD_OUT_SHARE * len(train))), HELD_OUT_MOST)
    parts = train.train_test_split(test_size=size, seed=HELD_OUT_SEED)
    return parts["train"], parts["test"]


def load_test(name: str, stage: str) -> Dataset:
    """Load the split `test` of a dataset by its name, or its only split, with all rows.

    Raises:
        ValueError: nothing is found under the name, or there are several splits and none is `test`.
    """
    splits = find_splits(name, stage)
    if "test" not in splits and len(splits) > 1:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, none is named test: give the one to measure on.")
    return splits["test"] if "test" in splits else next(iter(splits.values()))


def first_rows(dataset: Dataset | None, rows: int) -> Dataset | None:
    """Return the first `rows` rows of a dataset, or None if `dataset` is None."""
    return None if dataset is None else dataset.select(range(min(len(dataset), rows)))


def find_splits(name: str, stage: str, config: str | None = None) -> Mapping[str, Dataset]:
    """Return all splits of the dataset of this name. Arguments and errors are those of [`load_splits`]."""
    if name in SOURCES:
        return SOURCES[name](stage)
    if stage == "pretrain" and (corpus := text_corpus(name)):
        return dict(zip(("train", "test"), split_tail(corpus)))
    path = Path(name).expanduser()
    suffix = next((s for s in reversed(path.suffixes) if s in LOADER_OF_SUFFIX), None)
    if path.is_file():
        if suffix is None:
            readable = " ".join(LOADER_OF_SUFFIX)
            raise ValueError(
                f"dataset_name: cannot read {path}; give a file ending in {readable} (or these with .gz)."
            )
        return load_dataset(LOADER_OF_SUFFIX[suffix], data_files=str(path))
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
        return load_dataset(str(path), name=config)
    if suffix or path.is_absolute() or name.startswith("."):
        raise ValueError(f"dataset_name: there is no file or folder {path} (looked from {Path.cwd()}).")
    try:
        return load_dataset(name, name=config)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset_name: {name!r} is neither a local file or folder nor found on the Hub ({error}). "
            "Check the spelling and the connection; HF_HUB_OFFLINE=1 allows cached datasets only."
        ) from error
