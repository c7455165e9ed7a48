"""Rows that can't be used: count them, and say what is wrong with them and how to mend them."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence


class Unusable(ValueError):
    """The reason why a row can't be used; its second line, if there is one, says how to mend the row."""


def refuse(problem: str) -> None:
    """Raise `Unusable` if there is a problem."""
    if problem:
        raise Unusable(problem)


def usable_rows(problems: Sequence[str], *, where: str, strict: bool) -> list[int]:
    """Return the indices of the rows without a problem, and report the others in one warning.

    The second line of a problem says how to mend it.

    Raises:
        ValueError: no row is left, or `strict` is set and a row has a problem.
    """
    problems = list(problems)
    bad = [index for index, problem in enumerate(problems) if problem]
    if not bad:
        return list(range(len(problems)))
    told, mends = tell_rows(Counter(problems[index] for index in bad), len(problems), bad[0], where)
    if strict:
        mend = "mend or remove these rows, raise the length, or turn it off."
        raise ValueError(f"{told}. strict_data is on: {mend}{mends}")
    if len(bad) == len(problems):
        raise ValueError(f"{told}. No row is left: mend the data or raise the length.{mends}")
    warnings.warn(f"{told}. They are dropped.{mends}", UserWarning, stacklevel=3)
    return [index for index, problem in enumerate(problems) if not problem]


def tell_rows(problems: Counter, rows: int, first: int, where: str) -> tuple[str, str]:
    """Return how many of `rows` can't be used, why, and which is the first; and how to mend them."""
    listed, mends = tell(problems)
    return f"{where}: {problems.total()} of {rows} rows can't be used ({listed}); the first is row {first}", mends


def tell(problems: Counter) -> tuple[str, str]:
    """Return the reasons in problems with their counts, the most common first, and how to mend the rows."""
    reasons, mends = Counter(), {}
    for problem, count in problems.most_common():
        reason, _, mend = problem.partition("\n")
        reasons[reason] += count
        mends |= {f" {mend}": None} if mend else {}
    listed = [f"{count} {reason}" for reason, count in reasons.most_common(5)]
    return ", ".join([*listed, "..."] if len(reasons) > 5 else listed), "".join(mends)


class StreamFilter:
    """Tell usable rows of a stream by `dataset.filter(self, with_indices=True)`, and count the others as they come.

    A warning tells the first unusable row, the tenth, the hundredth, and so on. In each process that loads data the
    rows are counted anew.

    Args:
        problem: returns why a row can't be used, or an empty string.
        strict: raise on the first row that can't be used.

    Raises:
        ValueError: when such a row comes under `strict`, or if none of the first 1,000 rows is usable.
    """

    def __init__(self, problem: Callable[[dict], str], *, where: str, strict: bool):
        self.problem, self.where, self.strict = problem, where, strict
        self.problems, self.last = Counter(), -1  # how often each problem came, and the last row that had one

    def __call__(self, row: dict, index: int) -> bool:
        problem = self.problem(row)
        if problem and index > self.last:  # a later epoch brings the same rows
            self.problems[problem] += 1
            self.last = index
            self._tell()
        return not problem

    def _tell(self) -> None:
        bad, rows = self.problems.total(), self.last + 1
        if self.strict or bad == rows == 1000:
            usable_rows([""] * (rows - bad) + [*self.problems.elements()], where=self.where, strict=self.strict)
        if bad == 10 ** (len(str(bad)) - 1):
            listed, mends = tell(self.problems)
            told = f"{bad} of the first {rows} rows can't be used ({listed})"
            warnings.warn(f"{self.where}: {told}. They are dropped.{mends}", UserWarning, stacklevel=2)
