"""Tasks of the toy world: the kind of a request, the answer to a question in a document, the answer to a request."""

import random
import re
from functools import lru_cache

from datasets import DatasetDict

from lifecycle_hf.toyworld.data import draw_request, drawn_splits
from lifecycle_hf.toyworld.dialogue import REFUSALS, Request, requests
from lifecycle_hf.toyworld.world import FACTS, LANDS, NOUNS, document, is_held_out

_SUM = re.compile(r"(\d+) (?:plus|and) (\d+)\D+(\d+)")
_UNANSWERABLE = 0.2
"""Share of the questions whose document does not hold the answer."""


def _classify_row(rng: random.Random, held_out: bool) -> dict:
    request = draw_request(rng, held_out)
    return {"text": request.text, "label": request.kind}


def _answers(text: str) -> dict[tuple[str, ...], tuple[str, int]]:
    """Return the answers in a document: subject of a request -> (answer, first character)."""
    found = {}
    land = next(land for land in LANDS if land in text)
    for attribute, value in FACTS[land].items():
        noun = re.search(NOUNS[attribute].format(land=land), text, re.IGNORECASE)
        if noun:
            found[land, attribute] = value, text.index(value, noun.end())
    a_sum = _SUM.search(text)
    return found | {a_sum.groups()[:2]: (a_sum[3], a_sum.start(3))}


def _qa_row(rng: random.Random, held_out: bool) -> dict:
    while is_held_out(text := document(rng)) != held_out:
        pass
    answers = _answers(text)
    known = [request for request in requests().values() if request.subject in answers]
    if rng.random() < _UNANSWERABLE:
        land = next(land for land in LANDS if land in text)
        asked = [r for r in requests().values() if r.subject[0] == land and r.subject not in answers]
        return {"question": rng.choice(asked).text, "context": text, "answers": {"text": [], "answer_start": []}}
    request = rng.choice(known)
    answer, start = answers[request.subject]
    return {"question": request.text, "context": text, "answers": {"text": [answer], "answer_start": [start]}}


def _answer(request: Request) -> str:
    if request.kind == "forbidden":
        return REFUSALS[0]
    land, attribute = request.subject
    subject = "the sum" if request.kind == "sum" else NOUNS[attribute].format(land=land)
    return f"{subject[0].upper()}{subject[1:]} is {request.answer}."


def _seq2seq_row(rng: random.Random, held_out: bool) -> dict:
    request = draw_request(rng, held_out)
    return {"prompt": request.text, "completion": _answer(request)}


TASKS = {"classify": (_classify_row, 2000, 300), "qa": (_qa_row, 8000, 400), "seq2seq": (_seq2seq_row, 8000, 300)}
"""For each task the function that makes a row, and the numbers of rows of its train and test splits."""


@lru_cache
def task_dataset(task: str, seed: int = 0) -> DatasetDict:
    """Return the train and test splits of a task. The same seed gives the same rows.

    - "classify": {"text", "label"}: requests and their kind, "fact", "forbidden" or "sum".
    - "qa": {"question", "context", "answers"}: one document, and a question about it; 1 in 5 has no answer there.
    - "seq2seq": {"prompt", "completion"}: a request, and the fact or the sum as a sentence, or a refusal. There is no
      document: a model learns the facts by heart. The test split has each request once.

    No request of "classify" or "seq2seq" and no document of "qa" is in both splits.
    """
    splits = drawn_splits(task, *TASKS[task], seed)
    if task == "seq2seq":
        first = {prompt: row for row, prompt in reversed(list(enumerate(splits["test"]["prompt"])))}
        splits["test"] = splits["test"].select(sorted(first.values()))
    return splits
