"""Write chains of thought for rows without one, by a few examples; a chain is kept if it ends at the answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from lifecycle_hf.evaluation.text import normalized_answer
from lifecycle_hf.synthesis.writers import Recorded, Writer

CUE, ENDING = "Let's think step by step.", "The answer is"


def write_chains(
    writer: Writer, rows: Dataset, examples: Sequence[Mapping], *, output_dir: str | Path, chain: str = "chain",
    max_tokens: int = 256, temperature: float = 0.0, seed: int = 0,
) -> tuple[Dataset, Counter]:  # fmt: skip
    """Return the rows with a chain of thought where the writer found one, for the `cot_ratio` of a mixture.

    The writer sees the examples as earlier turns that end with "The answer is ...". A chain is kept if its answer is
    that of the row, compared as SQuAD compares answers. Rows that have a chain keep it. All texts are kept in
    `output_dir/chains.jsonl` as they come, so a run that was killed goes on.

    Args:
        rows: columns `instruction`, `output` and possibly `input`.
        examples: rows of the same columns, with a chain.
        chain: name of the column.

    Returns:
        the rows with the column `chain`, "" where there is none; and {what became of a row: count}.

    Raises:
        ValueError: an example lacks a column, or the writer fails.

    Reference: https://arxiv.org/abs/2201.11903 (chains by examples); https://arxiv.org/abs/2203.14465, Section 3.1
    (the filter).
    """
    shown = []
    for i, example in enumerate(examples):
        lacking = [name for name in ("instruction", "output", chain) if not example.get(name)]
        if lacking:
            raise ValueError(
                f"write_chains: example {i} lacks {', '.join(lacking)}: give it, or leave the example out."
            )
        shown += [_question(example), _turn("assistant", f"{example[chain]} {ENDING} {example['output']}.")]
    given = [row.get(chain) or "" for row in rows]
    open_rows = [i for i, text in enumerate(given) if not text]
    write = Recorded(writer, Path(output_dir) / "chains.jsonl")
    chats = [[*shown, _question(rows[i])] for i in open_rows]
    texts = write(chats, max_tokens=max_tokens, temperature=temperature, seed=seed) if chats else []
    told = Counter({"had a chain": len(given) - len(open_rows)})
    for i, text in zip(open_rows, texts, strict=True):
        steps, ended, answer = text.rpartition(ENDING)
        right = normalized_answer(answer.strip()) == normalized_answer(str(rows[i]["output"]))
        given[i] = steps.strip() if ended and right else ""
        told["no answer" if not ended else "another answer" if not right else "kept" if given[i] else "no steps"] += 1
    kept = rows.remove_columns([chain]) if chain in rows.column_names else rows
    return kept.add_column(chain, given), +told


def _question(row: Mapping) -> dict:
    return _turn("user", "\n\n".join(filter(None, (row["instruction"], row.get("input"), CUE))))


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}
