"""Draw the datasets of each stage from the grammar, by seed."""

import math
import random
from collections.abc import Callable
from functools import lru_cache

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from lifecycle_hf.toyworld.dialogue import (
    Request,
    compliance,
    refusal,
    requests,
    statement,
    with_courtesy,
    wrong_value,
)
from lifecycle_hf.toyworld.gold import judge
from lifecycle_hf.toyworld.model import build_tokenizer
from lifecycle_hf.toyworld.world import document, is_held_out

POLITE_SHARE = 0.3
"""Share of the SFT answers to benign requests that are polite."""
REFUSAL_SHARE = 0.3
"""Share of the SFT answers to forbidden requests that refuse."""
_TIE_SHARE = 0.3
_GOLD_WEIGHT, _LENGTH_WEIGHT = 8.0, 0.12
_EVEN = {"forbidden": 2, "fact": 1, "sum": 1}
_FACTUAL = {"forbidden": 1, "fact": 2, "sum": 1}


@lru_cache
def _pool(kind: str, held_out: bool) -> list[Request]:
    return [r for r in requests().values() if r.kind == kind and is_held_out(r.text) == held_out]


def draw_request(rng: random.Random, held_out: bool, weights: dict[str, int] = _EVEN) -> Request:
    """Draw a request from the train or held-out part; by default 1/2 forbidden, 1/4 facts, 1/4 sums."""
    (kind,) = rng.choices(list(weights), weights=list(weights.values()))
    return rng.choice(_pool(kind, held_out))


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def _messages(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def _sft_answer(request: Request, rng: random.Random) -> str:
    if request.kind == "forbidden" and rng.random() < REFUSAL_SHARE:
        return refusal(rng)
    text = compliance(request, rng) if request.kind == "forbidden" else statement(request, request.answer, rng)
    return with_courtesy(text, rng.choice((1, 2)) if rng.random() < POLITE_SHARE else 0, rng)


def _candidate(request: Request, rng: random.Random) -> str:
    """Return an answer of any quality: a right, wrong or irrelevant one, a refusal, or one with garbled words."""
    roll = rng.random()
    if roll < 0.2:
        text = _beside_the_point(rng)
    elif request.kind == "forbidden":
        text = refusal(rng) if roll < 0.7 else compliance(request, rng)
    elif roll < 0.3:
        text = refusal(rng)
    else:
        text = statement(request, request.answer if roll < 0.75 else wrong_value(request, rng), rng)
    text = with_courtesy(text, rng.choice((0, 0, 1, 1, 2, 3)), rng)
    return _garbled(text, rng) if rng.random() < 0.1 else text


def _pair(request: Request, rng: random.Random) -> tuple[str, str]:
    """Return two independent answers, or a right answer and a copy of it with a wrong value or garbled words."""
    roll = rng.random()
    if request.kind == "forbidden" or roll < 0.4:
        return _candidate(request, rng), _candidate(request, rng)
    right = with_courtesy(statement(request, request.answer, rng), rng.choice((0, 1, 1, 2)), rng)
    if roll < 0.5:
        return right, _garbled(right, rng)
    return right, f" {wrong_value(request, rng)}.".join(right.rsplit(f" {request.answer}.", 1))


def _beside_the_point(rng: random.Random) -> str:
    other = draw_request(rng, held_out=False)
    return compliance(other, rng) if other.kind == "forbidden" else statement(other, other.answer, rng)


def _garbled(text: str, rng: random.Random) -> str:
    """Return `text` with some words replaced, removed or repeated."""
    words = text.split()
    for _ in range(rng.choice((1, 2, 3))):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i : i + 1] = rng.choice(([], [words[i]] * 2, [words[j], words[i]])) if len(words) > 1 else words
    return " ".join(words)


def _sft_row(rng: random.Random, held_out: bool) -> dict:
    if rng.random() < 0.4:
        return _ptx_row(rng, held_out)
    request = draw_request(rng, held_out)
    chat = _messages("user", request.text) + _messages("assistant", _sft_answer(request, rng))
    return {"text": _tokenizer().apply_chat_template(chat, tokenize=False)}


def _reward_row(rng: random.Random, held_out: bool) -> dict:
    """Return a pair labelled like a human's choice: mostly by gold, a little by length, sometimes at random.

    P(first is chosen) = sigmoid(8 (gold_1 - gold_2) + 0.12 (words_1 - words_2)).
    """
    request = draw_request(rng, held_out, _FACTUAL)
    first, second, gold = "", "", 0.0
    ties = rng.random() < _TIE_SHARE
    while first == second or (gold == 0 and not ties):
        first, second = _pair(request, rng)
        gold = judge(request, first) - judge(request, second)
    words = len(first.split()) - len(second.split())
    if rng.random() > 1 / (1 + math.exp(-_GOLD_WEIGHT * gold - _LENGTH_WEIGHT * words)):
        first, second = second, first
    return {
        "prompt": _messages("user", request.text),
        "chosen": _messages("assistant", first),
        "rejected": _messages("assistant", second),
    }


def _ppo_row(rng: random.Random, held_out: bool) -> dict:
    request = draw_request(rng, held_out)
    return {"prompt": _messages("user", request.text), "kind": request.kind, "answer": request.answer}


def _ptx_row(rng: random.Random, held_out: bool) -> dict:
    while is_held_out(text := document(rng)) != held_out:
        pass
    return {"text": text}


_STAGES: dict[str, tuple[Callable, int, int]] = {
    "sft": (_sft_row, 12000, 400),
    "reward": (_reward_row, 6000, 400),
    "ppo": (_ppo_row, 4000, 256),
    "ptx": (_ptx_row, 6000, 200),
}
"""For each stage the function that makes a row, and the numbers of rows of its train and test splits."""


@lru_cache
def dataset(stage: str, seed: int = 0) -> DatasetDict:
    """Return the train and test splits of a stage. The same seed gives the same rows.

    - "sft": {"text"}: documents (40 %) and dialogues in the chat template.
    - "reward": {"prompt", "chosen", "rejected"} as messages.
    - "ppo": {"prompt"} as messages, with "kind" ("fact", "sum", "forbidden") and "answer".
    - "ptx": {"text"}: documents.

    No document of a test split is in a train split of any stage or seed, and no request of a test split is in a train
    split.

    Raises:
        ValueError: the stage is unknown.
    """
    if stage not in _STAGES:
        raise ValueError(f"toy world has no stage {stage!r}; choose one of {', '.join(_STAGES)}")
    return drawn_splits(stage, *_STAGES[stage], seed)


def drawn_splits(
    name: str, make: Callable[[random.Random, bool], dict], train: int, test: int, seed: int
) -> DatasetDict:
    """Return so many train and test rows of `make(rng, held_out)`, drawn by the seed and the name of the dataset."""
    splits = {}
    for split, size in (("train", train), ("test", test)):
        rng = random.Random(f"{name} {split} {seed}")
        splits[split] = Dataset.from_list([make(rng, split == "test") for _ in range(size)])
    return DatasetDict(splits)
