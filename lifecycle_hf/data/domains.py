"""Corpora of several domains: a column that names each document's domain, weights by name, and rows drawn by them."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset
from torch.utils.data import Dataset as MapDataset

from lifecycle_hf.data.packing import Epoch
from lifecycle_hf.data.permutation import permuted, random_integers, uniform

GOLDEN_RATIO = (5**0.5 - 1) / 2
_DOMAIN, _ROW = range(2)  # what a random number is for


def join_domains(domains: Mapping[str, Iterable[str]]) -> Dataset:
    """Return {name of a domain: texts} as a dataset with the columns "text" and "domain".

    Raises:
        ValueError: a domain has no text.
    """
    columns = {"text": [], "domain": []}
    for name, texts in domains.items():
        found = list(texts)
        if not found:
            raise ValueError(f"domain {name!r} has no row. Give it texts, or leave it out.")
        columns["text"] += found
        columns["domain"] += [name] * len(found)
    return Dataset.from_dict(columns)


def split_domains(dataset: Dataset, where: str) -> dict[str, Dataset]:
    """Return the rows of each domain by its name, sorted by names.

    Raises:
        ValueError: the dataset is streamed, has no column "domain", or a row does not name its domain.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{where} is a {type(dataset).__name__}: domains are drawn from a dataset in memory alone.")
    if "domain" not in dataset.column_names:
        raise ValueError(f"{where} has the columns {dataset.column_names}: add 'domain', the domain of each document.")
    given = list(dataset["domain"])
    if nameless := [row for row, name in enumerate(given) if name in (None, "")]:
        raise ValueError(f"{where}: {len(nameless)} rows have no domain, the first is row {nameless[0]}: name it.")
    names, numbers = np.unique(np.array(given, dtype=str), return_inverse=True)
    return {str(name): dataset.select(np.flatnonzero(numbers == k)) for k, name in enumerate(names)}


def shares_of(weights: Mapping[str, float] | str | Path, names: Sequence[str], where: str) -> np.ndarray:
    """Return the shares of `names` [K] in proportion to their weights.

    Args:
        weights: {name: weight}, or a YAML file with this mapping as `weights`, as DoReMi writes it.
        where: starts the messages, such as "weights: each task".

    Raises:
        ValueError: a weight is missing, unknown, negative or no number, or all are 0.
    """
    given = weights
    if isinstance(weights, str | Path):
        read = yaml.safe_load(Path(weights).read_text(encoding="utf-8"))
        given = read.get("weights") if isinstance(read, dict) else None
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {weights} must hold a mapping 'weights' of names to numbers.")
    given = {str(name): value for name, value in given.items()}
    missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
    if missing or unknown:
        odd = {"missing": missing, "unknown": unknown}
        told = "; ".join(f"{kind}: {', '.join(found)}" for kind, found in odd.items() if found)
        raise ValueError(f"{where} needs a weight, and nothing else has one; {told}.")
    rates = np.array([given[name] if isinstance(given[name], Real) else np.nan for name in names], dtype=float)
    if not (rates >= 0).all() or not 0 < rates.sum() < np.inf:
        told = f"{where} needs a number, not {given}"
        raise ValueError(f"{told}: none may be negative, and their sum must be positive and finite.")
    return rates / rates.sum()


class DomainRows(Epoch, MapDataset):
    """Draw each row's domain by `shares`, then the next row of a permutation of the domain's rows.

    Row i is of the domain whose interval of [0, 1) holds the fractional part of u + i·(√5 − 1) / 2, so that any
    window of rows has nearly these shares. An epoch has as many rows as all domains together. Each pass over a domain
    has another permutation, so that no row comes again before all others of its domain. A row is a function of (seed,
    epoch, index) alone; it has the number of its domain as "domain".

    Args:
        parts: the rows of each domain by its name.
        shares: [K], with sum 1.
    """

    def __init__(self, parts: Mapping[str, MapDataset], shares: np.ndarray, *, seed: int):
        super().__init__()
        self.names, self._parts, self.seed = list(parts), list(parts.values()), seed
        self._sizes = np.array([len(part) for part in self._parts])
        ends = np.cumsum(shares)
        ends[np.flatnonzero(shares)[-1] :] = 1
        places = (uniform(seed, _DOMAIN) + GOLDEN_RATIO * np.arange(self._sizes.sum())) % 1
        self.domains = np.searchsorted(ends, places, side="right")
        self._counts = np.bincount(self.domains, minlength=len(self.names))
        self._turns = np.empty_like(self.domains)
        starts = np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        self._turns[np.argsort(self.domains, kind="stable")] = np.arange(len(self.domains)) - starts
        self._drawn = (None, np.empty(0))

    def __len__(self):
        return len(self.domains)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._drawn[0] != (epoch := self.epoch):
            sizes = self._sizes[self.domains]
            passes, places = np.divmod(epoch * self._counts[self.domains] + self._turns, sizes)
            keys = random_integers(self.seed, _ROW, self.domains, passes)
            self._drawn = (epoch, permuted(places, sizes, keys))
        domain = int(self.domains[index])
        return self._parts[domain][int(self._drawn[1][index])] | {"domain": domain}
