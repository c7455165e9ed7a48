"""Three planted domains, of which it is known what a model gains by reading more of them."""

import random
from string import ascii_lowercase

from datasets import Dataset

from lifecycle_hf.data.domains import join_domains
from lifecycle_hf.toyworld.world import document


def planted_domains(seed: int = 0, documents: int = 300) -> Dataset:
    """Return so many documents of each domain, in the columns "text" and "domain".

    "noise" is letters at random, of which nothing can be learnt beyond their frequencies; "trivial" is one line again
    and again, which is learnt at once; "learnable" is documents of the toy world.
    """
    rng = random.Random(seed)
    return join_domains({
        "learnable": [document(rng) for _ in range(documents)],
        "noise": ["".join(rng.choices(ascii_lowercase, k=150)) for _ in range(documents)],
        "trivial": ["ab " * 50] * documents,
    })  # fmt: skip
