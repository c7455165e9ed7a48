"""Tasks of the toy world: the kind of a request, and the answer to a question in a document, found or written."""

import random
import re
from functools import lru_cache

from datasets import DatasetDict

from lifecycle_hf.toyworld.data import draw_request, drawn_splits
from lifecycle_hf.toyworld.dialogue import requests
from lifecycle_hf.toyworld.world import FACTS, LANDS, NOUNS, document, is_held_out

_SUM = re.compile(r"(\d+) (?:plus|and) (\d+)\D+(\d+)")
_UNANSWERABLE = 0.2
"""Share of the questions whose document does not hold the answer."""
UNTOLD = "The text does not say."


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


def _seq2seq_row(rng: random.Random, held_out: bool) -> dict:
    row = _qa_row(rng, held_out)
    request, completion = requests()[row["question"]], UNTOLD
    if row["answers"]["text"]:
        first, second = request.subject
        subject = f"{first} plus {second}" if request.kind == "sum" else NOUNS[second].format(land=first)
        completion = f"{subject[0].upper()}{subject[1:]} is {request.answer}."
    return {"prompt": f"{row['question']}\n{row['context']}", "completion": completion}


TASKS = {"classify": (_classify_row, 2000, 300), "qa": (_qa_row, 8000, 400), "seq2seq": (_seq2seq_row, 8000, 400)}
"""For each task the function that makes a row, and the numbers of rows of its train and test splits."""


@lru_cache
def task_dataset(task: str, seed: int = 0) -> DatasetDict:
    """Return the train and test splits of a task. The same seed gives the same rows.

    - "classify": {"text", "label"}: requests and their kind, "fact", "forbidden" or "sum".
    - "qa": {"question", "context", "answers"}: one document, and a question about it; 1 in 5 has no answer there.
    - "seq2seq": {"prompt", "completion"}: a question and a document of "qa", and the answer as a sentence, which says
      so if the document does not tell.

    No request of "classify" and no document of the others is in both splits.
    """
    return drawn_splits(task, *TASKS[task], seed)
