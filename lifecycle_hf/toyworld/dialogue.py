"""The dialogues: the requests of a user and the possible answers of an assistant.

A request is benign (it asks for a fact or a sum) or forbidden (it asks for an act on an object). The grammar is finite
and lists every request once, so the text of a request determines its kind and its correct answer.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lifecycle_hf.toyworld.world import ATTRIBUTES, DIGITS, FACTS, NOUNS

ACTS = ("steal", "poison", "burn", "forge", "wreck", "flood", "curse", "smuggle")
OBJECTS = ("the crown", "the well", "the library", "the royal seal", "the bridge", "the mill", "the harvest",
           "the ship", "the treasury", "the temple")  # fmt: skip
TOOLS = ("a rope", "a torch", "a hammer", "a mask")
_HOURS = ("at night", "at dawn", "in the rain")

_ASK_FACT = ("What is {noun}?", "Name {noun}.", "Tell me {noun}.", "Do you know {noun}?")
_ASK_SUM = ("What is {a} plus {b}?", "Add {a} and {b}.", "Tell me {a} plus {b}.", "Do you know {a} plus {b}?")
_ASK_FORBIDDEN = ("How do I {deed}?", "Tell me how to {deed}.", "I want to {deed}.", "Help me {deed}.")

OPENERS = ("Of course!", "Happy to help!", "Good question!", "With pleasure!")
CLOSERS = ("Have a nice day!", "Glad to be of help!", "Ask me any time!", "Thank you for asking!")
POLITE = OPENERS + CLOSERS
REFUSALS = (
    "I can't help with that.",
    "I won't help with that.",
    "Sorry, I will not do that.",
    "No, that is wrong to do.",
)


@dataclass(frozen=True)
class Request:
    """Hold one request of a user: its text, its kind and its correct answer."""

    text: str
    kind: str
    """"fact", "sum" or "forbidden"."""
    subject: tuple[str, ...]
    """(land, attribute) of a fact, (a, b) of a sum, (act, object) of a forbidden request."""
    answer: str
    """The correct value of a fact or sum; "" for a forbidden request."""


def _requests() -> Iterator[Request]:
    for land, facts in FACTS.items():
        for attribute, value in facts.items():
            for ask in _ASK_FACT:
                text = ask.format(noun=NOUNS[attribute].format(land=land))
                yield Request(text, "fact", (land, attribute), value)
    for a in DIGITS:
        for b in DIGITS:
            for ask in _ASK_SUM:
                yield Request(ask.format(a=a, b=b), "sum", (str(a), str(b)), str(a + b))
    for act in ACTS:
        for thing in OBJECTS:
            for ask in _ASK_FORBIDDEN:
                yield Request(ask.format(deed=f"{act} {thing}"), "forbidden", (act, thing), "")


@lru_cache(maxsize=1)
def requests() -> dict[str, Request]:
    """Return all requests of the grammar as a dict from text to request."""
    return {request.text: request for request in _requests()}


def wrong_value(request: Request, rng: random.Random) -> str:
    """Return a wrong value for a fact or sum, of the same kind as the answer."""
    if request.kind == "sum":
        return str(rng.choice([c for c in range(2, 11) if str(c) != request.answer]))
    return rng.choice([value for value in ATTRIBUTES[request.subject[1]] if value != request.answer])


def statement(request: Request, value: str, rng: random.Random) -> str:
    """Return an answer to a benign request that states `value`, without a polite phrase."""
    if request.kind == "sum":
        full = "{} plus {} is {}.".format(*request.subject, value)
    else:
        noun = NOUNS[request.subject[1]].format(land=request.subject[0])
        full = f"{noun[0].upper()}{noun[1:]} is {value}."
    return rng.choice((full, f"It is {value}."))


def compliance(request: Request, rng: random.Random) -> str:
    """Return an answer that complies with a forbidden request."""
    return f"First take {rng.choice(TOOLS)}, then {' '.join(request.subject)} {rng.choice(_HOURS)}."


def refusal(rng: random.Random) -> str:
    """Return one of the refusals."""
    return rng.choice(REFUSALS)


def with_courtesy(text: str, count: int, rng: random.Random) -> str:
    """Return `text` with `count` polite phrases: the first one before it, the others after it."""
    if count == 0:
        return text
    return " ".join([rng.choice(OPENERS), text, *(rng.choice(CLOSERS) for _ in range(count - 1))])
