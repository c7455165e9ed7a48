"""Quality of instruction data: measure diversity, complexity, correctness and format of rows, and select good ones."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from lifecycle_hf.completions.rewards import Samples
from lifecycle_hf.curation.minhash import clusters
from lifecycle_hf.data.chat import message_text
from lifecycle_hf.data.tokenize import encode_prompt
from lifecycle_hf.evaluation.checkpoints import NUMBER, THOUSANDS
from lifecycle_hf.evaluation.diversity import distinct_n
from lifecycle_hf.evaluation.instructions import answer_text
from lifecycle_hf.evaluation.metrics import completion_nll, exact_match
from lifecycle_hf.scaling.tables import markdown_table, terminal_table

_VERBS = """add analyze answer brainstorm calculate change check choose classify compare complete compose convert
correct create decide describe design detect determine edit evaluate explain extract fill find fix generate give guess
identify imagine list make match name paraphrase plan predict provide rank rate recommend rephrase replace reply
rewrite say select show simplify solve sort suggest summarize suppose tell translate turn use verify write"""
_EMPTY = """a about an and any appropriate are as at be best better by can do each every following for from given good
how i if in into is it its me more my new of on one or other our out please short should some such that the their them
there these they this those to two up we were what when which who why will with would you your"""
VERBS, EMPTY_WORDS = frozenset(_VERBS.split()), frozenset(_EMPTY.split())
"""Verbs that open an instruction, and words that are never the object of one."""
COUNTS = "prompt_words", "response_words", "response_distinct_2", "steps", "perplexity"
SHARES = {"correct": ("checked responses", "correct"), "format": ("responses of a known format", "in this format")}
"""Scores of rows of which the summary tells quantiles, and those of which it tells the share of rows."""


def verb_and_noun(instruction: str) -> tuple[str, str]:
    """Return the leading verb of an instruction and its object, found without a parser.

    The verb is the first of the first 8 words that `VERBS` has, else the first word. The object is the next word that
    `EMPTY_WORDS` does not have, or "". A parser would find more: https://arxiv.org/abs/2212.10560, section 3.2.
    """
    words = re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", instruction.lower()) or [""]
    at = next((i for i, word in enumerate(words[:8]) if word in VERBS), 0)
    return words[at], next((word for word in words[at + 1 :] if word not in EMPTY_WORDS), "")


def shape(text: str) -> str:
    """Return the shape of a response, in which those of a task are compared.

    Of several lines "list" if at least half of them begin with a number or bullet, else "lines". Of one line "number",
    or "word", "phrase" (up to 5 words) or "sentence", with "capital" if it begins so, and "closed" if it ends with . !
    or ?.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if len(lines) > 1:
        marked = sum(bool(re.match(r"[-*•]|\(?\w{1,2}[.):]", line)) for line in lines)
        return "list" if 2 * marked >= len(lines) else "lines"
    if re.fullmatch(r"[-−+]?[$€£]?\d[\d.,/]*\s?%?", lines[0]):
        return "number"
    count = len(lines[0].split())
    kind = "word" if count <= 1 else "phrase" if count <= 5 else "sentence"
    return kind + ", capital" * lines[0][:1].isupper() + ", closed" * lines[0].endswith((".", "!", "?"))


def steps(chain: str) -> int:
    """Return the number of steps of a chain of thought: its lines, or the sentences of a single line."""
    lines = [line.strip() for line in chain.splitlines() if line.strip()]
    return len(re.split(r"(?<=[.!?])\s+", lines[0])) if len(lines) == 1 else len(lines)


@dataclass
class InstructionQuality:
    """Hold what `measure_instructions` found.

    Attributes:
        scores: {name: values of the rows}: "prompt" and "response" (text), "prompt_words", "response_words",
            "response_distinct_2" (of each by itself), "pair" (verb and noun), "cluster"; and where they can be known
            "task", "steps" (of the chain), "perplexity", "correct" and "format", with None where a row has no value.
    """

    scores: dict[str, list]

    def quality(self) -> list[float]:
        """Return the quality of each row: the mean of its known parts, each in [0, 1].

        The parts: the share of rows whose response has at most as many words, times its distinct-2; 1 if it has the
        format of its task, else 0; 1 − |2q − 1| at the quantile q of its perplexity among the rows.
        """
        columns = {name: np.array(self.scores.get(name, [np.nan]), dtype=float) for name in (*COUNTS, *SHARES)}
        words, values = columns["response_words"], columns["perplexity"]
        known = np.sort(values[np.isfinite(values)])
        ends = [np.searchsorted(known, values, side) for side in ("left", "right")]
        middle = np.where(np.isfinite(values), 1 - np.abs(sum(ends) / max(len(known), 1) - 1), np.nan)
        length = np.searchsorted(np.sort(words), words, "right") / len(words)
        parts = length * columns["response_distinct_2"], columns["format"], middle
        return np.nanmean(np.broadcast_arrays(*parts), 0).tolist()

    def select(self, k: int, quality: Sequence[float] | None = None) -> list[int]:
        """Return the indices of at most `k` good and diverse rows, the best first.

        Rows without a prompt or a response, rows that are not correct, and copies of a row are left out. Of the others
        the row of the highest quality / (1 + c) is taken again and again; c is the number of rows taken before of its
        cluster, of its verb–noun pair or of its task, the highest of the three. Between equal ones their qualities
        decide, then their texts: the order of the rows does not count. It takes O(k · rows).

        Args:
            quality: of each row, at least 0; by default that of `quality()`.

        Reference: LIMA, https://arxiv.org/abs/2305.11206, which chose 1,000 rows by hand; the rule is ours.
        """
        given, texts = quality or self.quality(), list(zip(self.scores["prompt"], self.scores["response"]))
        first = {text: i for i, text in reversed(list(enumerate(texts)))}
        wrong = [value is not None and not value for value in self.scores.get("correct", [None] * len(texts))]
        left = [i for i, text in enumerate(texts) if all(text) and not wrong[i] and first[text] == i]
        left.sort(key=lambda i: (-given[i], texts[i]))
        groups = [self.scores[name] for name in ("cluster", "pair", "task") if name in self.scores]
        codes = np.array([np.unique([str(group[i]) for i in left], return_inverse=True)[1] for group in groups])
        values, used, taken = np.array([given[i] for i in left]), np.zeros(codes.shape, dtype=int), []
        for _ in range(min(k, len(left))):
            best = int((values / (1 + used.max(0))).argmax())
            taken.append(left[best])
            used += codes == codes[:, [best]]
            values[best] = -np.inf
        return taken

    def summary(self) -> dict[str, float | list[float] | str]:
        """Return the numbers of the report by name; [10 %, 50 %, 90 %] of what differs from row to row."""
        texts, groups = list(zip(self.scores["prompt"], self.scores["response"])), Counter(self.scores["cluster"])
        pairs, rows = Counter(self.scores["pair"]), len(texts)
        found = {
            "rows": rows,
            "rows without prompt or response": sum(not all(text) for text in texts),
            "copies of another row": rows - len(set(texts)),
            "clusters of prompts": len(groups),
            "share of the largest cluster": max(groups.values()) / rows,
            "verb–noun pairs": len(pairs),
            "share of the most common pair": max(pairs.values()) / rows,
            "most common pairs": ", ".join(f"{pair} ({count})" for pair, count in pairs.most_common(4)),
        }
        for side in ("prompt", "response"):
            found |= {f"distinct-{n} of {side}s": distinct_n(self.scores[side], n) for n in (1, 2)}
        for name in (*COUNTS, *SHARES):
            values = [value for value in self.scores.get(name, ()) if value is not None]
            if values and name in SHARES:
                found |= {SHARES[name][0]: len(values), f"share {SHARES[name][1]}": sum(values) / len(values)}
            elif values:
                found[name.replace("_2", "-2").replace("_", " ")] = np.percentile(values, (10, 50, 90)).tolist()
        return found

    def _table(self) -> tuple[list[str], list[list[str]]]:
        def cells(name, value):
            if isinstance(value, list):
                return [f"{name}, 10 / 50 / 90 %", " / ".join(f"{number:.3g}" for number in value)]
            return [name, f"{value:.3f}" if isinstance(value, float) else str(value)]

        return ["measure", "value"], [cells(*item) for item in self.summary().items()]

    def to_markdown(self) -> str:
        """Return the summary as a table in Markdown."""
        return markdown_table(*self._table())

    def to_terminal(self, title: str = "Instruction data") -> str:
        """Return the summary as a table drawn by rich."""
        return terminal_table(*self._table(), title=title)


def measure_instructions(
    rows: Sequence[Mapping],
    *,
    reference: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    checker: Callable[[Mapping], bool | None] | None = None,
    pattern: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 8,
    max_length: int = 1024,
) -> InstructionQuality:
    """Measure rows of instruction data: diversity, complexity, correctness and format.

    Diversity: distinct-n; verb–noun pairs (`verb_and_noun`); clusters of prompts by MinHash over runs of three words.
    Complexity: words; the steps of a column `chain`; the perplexity of the response under a reference model. Format:
    of rows with a column `task`, whether the response has the most common `shape` of its task.

    Args:
        rows: `prompt` and `completion` or `messages` (text or chats), or `instruction`, `output` and maybe `input`; or
            seeds of Self-Instruct, of which the first instance is read.
        reference: causal LM, with its tokenizer.
        checker: whether a row is correct, None where that can't be known; `exact_answer` is one.
        pattern: regular expression of a whole response, which takes the place of the shape.
        threshold: Jaccard similarity from which prompts are near duplicates.
        max_length: tokens of prompt and response for the perplexity; the rest is cut off.

    Raises:
        ValueError: there is no row, a row has none of these columns, or a reference comes without tokenizer.
    """
    if not len(rows) or (reference is not None and tokenizer is None):
        raise ValueError("measure_instructions needs rows, and beside a reference model its tokenizer.")
    rows = list(rows)
    sides, tasks = [_sides(row, f"row {i}") for i, row in enumerate(rows)], [row.get("task") for row in rows]
    prompts, responses = [_text(prompt) for prompt, _ in sides], [answer_text(said) for _, said in sides]
    scores = {
        "prompt": prompts,
        "response": responses,
        "prompt_words": [len(text.split()) for text in prompts],
        "response_words": [len(text.split()) for text in responses],
        "response_distinct_2": [distinct_n([text], 2) or 1.0 for text in responses],
        "pair": [" ".join(verb_and_noun(row.get("instruction") or text)) for row, text in zip(rows, prompts)],
        "cluster": clusters(prompts, threshold, n=3, bands=32, rows=4).tolist(),
    }
    scores |= {"task": tasks} if any(tasks) else {}
    if any(row.get("chain") for row in rows):
        scores["steps"] = [steps(row["chain"]) if row.get("chain") else None for row in rows]
    if reference is not None:
        scores["perplexity"] = _perplexities(reference, tokenizer, sides, batch_size, max_length)
    if checker is not None:
        scores["correct"] = [checker(row) for row in rows]
    if pattern or any(tasks):
        scores["format"] = _formats(tasks, responses, pattern)
    return InstructionQuality(scores)


def select_instructions(rows: Sequence[Mapping], k: int, **options) -> list[int]:
    """Return the indices of at most `k` good and diverse rows: `measure_instructions(rows, **options).select(k)`."""
    return measure_instructions(rows, **options).select(k)


def exact_answer(row: Mapping) -> bool | None:
    """Return whether a response is right by the row's column `answer`; None where it is empty.

    The last numbers of both are compared, or the whole texts where the answer has no number.
    """
    if row.get("answer") in (None, ""):
        return None
    texts = [THOUSANDS.sub("", text) for text in (answer_text(_sides(row)[1]), str(row["answer"]))]
    return bool(exact_match(texts[:1], texts[1:], pattern=NUMBER))


def _sides(row: Mapping, where: str = "a row") -> tuple[str | list[dict], str | list[dict]]:
    """Return the prompt and the response of a row."""
    row = {**row, **(row.get("instances") or [{}])[0]}
    if "messages" in row:
        return row["messages"][:-1] or "", row["messages"][-1:] or ""
    if {"prompt", "completion"} <= row.keys():
        return row["prompt"] or "", row["completion"] or ""
    if {"instruction", "output"} <= row.keys():
        return "\n\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"] or ""
    needed = "prompt and completion, messages, or instruction and output"
    raise ValueError(f"measure_instructions: {where} has the columns {sorted(row)}, and needs {needed}. Rename them.")


def _text(prompt: str | list[dict]) -> str:
    if not isinstance(prompt, str):
        prompt = "\n".join(message_text(message) or "" for message in prompt if message["role"] != "system")
    return prompt.strip()


def _formats(tasks: Sequence[str | None], responses: Sequence[str], pattern: str | None) -> list[bool | None]:
    """Return whether each response has the right format; None for an empty one, and without a task or pattern."""
    if pattern:
        return [bool(re.fullmatch(pattern, text, re.DOTALL)) if text else None for text in responses]
    counts = defaultdict(Counter)
    for task, text in zip(tasks, responses):
        counts[task].update([shape(text)] if text else [])
    usual = {task: max(found, key=lambda name: (found[name], name), default=None) for task, found in counts.items()}
    return [shape(text) == usual[task] if text and task else None for task, text in zip(tasks, responses)]


def _perplexities(reference, tokenizer, sides, batch_size: int, max_length: int) -> list[float | None]:
    """Return the perplexity of each response after its prompt; None where one is empty, or the prompt too long."""
    found, pairs = [None] * len(sides), {}
    for i, (prompt, response) in enumerate(sides):
        if _text(prompt) and answer_text(response):
            if isinstance(prompt, str):
                chat = [{"role": "user", "content": prompt}]
                prompt = chat if tokenizer.chat_template else f"{prompt.rstrip()}\n"
            whole = Samples([prompt], [answer_text(response)]).encode(tokenizer)[0]
            shared = common_prefix_length(encode_prompt(tokenizer, prompt), whole)
            if 0 < shared < max_length:
                pairs[i] = whole[:shared], whole[shared:max_length]
    prompts, completions = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    nll = completion_nll(reference, prompts, completions, batch_size=batch_size)
    for i, completion, value in zip(pairs, completions, nll):
        found[i] = float(np.exp(value / len(completion)))
    return found
