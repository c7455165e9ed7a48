"""The world: invented lands with four facts each, small sums, and documents about them.

Everything here depends only on the lists below and on the random generator that the caller passes.
"""

import random
from zlib import crc32

LANDS = ("Arvel", "Bromoor", "Calder", "Dunmere", "Elsin", "Fenwick", "Gorran", "Hestia", "Ildar", "Kestrel", "Mirren",
         "Norvale")  # fmt: skip
_CAPITALS = ("Abrath", "Belmora", "Corvane", "Dalgon", "Emsport", "Farholt", "Gildas", "Harrow", "Istmar", "Jessup",
             "Kirwall", "Lundry")  # fmt: skip
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "purple", "orange")
_FOODS = ("bread", "rice", "soup", "fish", "cheese", "beans", "honey", "apples")
_ANIMALS = ("fox", "bear", "wolf", "eagle", "horse", "otter", "goat", "swan")

ATTRIBUTES = {"capital": _CAPITALS, "flag": _COLOURS, "food": _FOODS, "animal": _ANIMALS}
DIGITS = range(1, 6)

NOUNS = {
    "capital": "the capital of {land}",
    "flag": "the flag colour of {land}",
    "food": "the main food of {land}",
    "animal": "the national animal of {land}",
}
_FACTS_TOLD = ("{Noun} is {value}.", "As for {noun}, it is {value}.", "They say that {noun} is {value}.")
_OPENINGS = ("{land} is a land in the {side}.", "A book tells of {land}.", "Here is a note on {land}.")
_SIDES = ("north", "south", "east", "west")
_SUMS = ("{a} plus {b} is {c}.", "The sum of {a} and {b} is {c}.", "If you add {a} and {b}, you get {c}.")


def _deal() -> dict[str, dict[str, str]]:
    """Return the facts, land -> attribute -> value. The values of an attribute are spread evenly over the lands."""
    rng = random.Random(2203)
    facts: dict[str, dict[str, str]] = {land: {} for land in LANDS}
    for attribute, values in ATTRIBUTES.items():
        dealt = [values[i % len(values)] for i in range(len(LANDS))]
        rng.shuffle(dealt)
        for land, value in zip(LANDS, dealt, strict=True):
            facts[land][attribute] = value
    return facts


FACTS = _deal()


def _tell(land: str, attribute: str, rng: random.Random) -> str:
    noun = NOUNS[attribute].format(land=land)
    told = rng.choice(_FACTS_TOLD)
    return told.format(noun=noun, Noun=noun[0].upper() + noun[1:], value=FACTS[land][attribute])


def document(rng: random.Random) -> str:
    """Return one document: an opening, two facts of a land and a sum, in random order and wording."""
    land = rng.choice(LANDS)
    opening = rng.choice(_OPENINGS).format(land=land, side=rng.choice(_SIDES))
    attributes = rng.sample(list(ATTRIBUTES), 2)
    sentences = [_tell(land, attribute, rng) for attribute in attributes]
    a, b = rng.choice(DIGITS), rng.choice(DIGITS)
    sentences.append(rng.choice(_SUMS).format(a=a, b=b, c=a + b))
    rng.shuffle(sentences)
    return " ".join([opening, *sentences])


def is_held_out(text: str) -> bool:
    """Return whether a document or request belongs to test splits only, in every stage and for every seed (1 in 6)."""
    return crc32(text.encode()) % 6 == 0
