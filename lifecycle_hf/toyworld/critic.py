"""What criticises, revises and judges answers in the toy world, whose truth is known: for the recipes' defaults."""

import hashlib
import random
from collections.abc import Sequence

from lifecycle_hf.toyworld.dialogue import refusal, statement, with_courtesy
from lifecycle_hf.toyworld.gold import is_clean_refusal, is_correct, is_polite, is_refusal, judge, request_of

FINE = "Nothing to criticise."
FAULTS = {
    "harmless": "It helps with something that is forbidden.",
    "helpful": "It does not give the right answer.",
    "polite": "It is not polite.",
}


class ToyCritic:
    """Write answers by a model, and critiques and revisions by rule: a stand-in for a large model.

    A critique finds the fault that its principle ("harmless", "helpful" or "polite") asks about, and the revision
    mends it, in a share of 1 − `error_rate` of the answers; in the others there is nothing to criticise.

    Args:
        answer: the writer of the first answers.
        principles: whose `critique` and `revision` the requests hold.
    """

    def __init__(self, answer, principles, error_rate: float = 0.1):
        self.answer, self.principles, self.error_rate = answer, principles, error_rate
        self.tokens = answer.tokens

    def __call__(self, chats: list[list[dict]], *, seed: int, **options) -> list[str]:
        if chats and len(chats[0]) > 1:
            return [self._about(chat, random.Random(f"{seed} {i}")) for i, chat in enumerate(chats)]
        return self.answer(chats, seed=seed, **options)

    def _about(self, chat: list[dict], rng: random.Random) -> str:
        texts = [message["content"] for message in chat]
        name = next(p.name for p in self.principles if p.critique == texts[2])
        request, text = request_of(texts[0]), texts[1]
        if len(texts) == 3:
            return FAULTS[name] if rng.random() > self.error_rate and fault(name, request, text) else FINE
        if texts[3] == FINE:
            return text
        if name == "harmless":
            return refusal(rng)
        return with_courtesy(text if name == "polite" else statement(request, request.answer, rng), 1, rng)


def fault(name: str, request, text: str) -> bool:
    """Return whether an answer has the fault that the principle `name` asks about."""
    forbidden = request.kind == "forbidden"
    if name == "harmless":
        return forbidden and not is_clean_refusal(text)
    if name == "helpful":
        return not forbidden and (is_refusal(text) or not is_correct(request, text))
    return not forbidden and not is_polite(text)


def judge_with_errors(error_rate: float = 0.2):
    """Return a judge of pairs that prefers the answer of higher gold reward, but errs in a share of the pairs.

    Whether it errs depends on the prompt and the two answers only, and not on their order. Answers of equal gold
    reward get 1/2.
    """

    def judge_pairs(prompts: Sequence, pairs: Sequence[tuple[str, str]]) -> list[float]:
        found = []
        for prompt, pair in zip(prompts, pairs, strict=True):
            request = request_of(prompt)
            difference = judge(request, pair[0]) - judge(request, pair[1])
            digest = hashlib.sha256("\0".join([request.text, *sorted(pair)]).encode()).digest()
            errs = int.from_bytes(digest[:4], "big") < error_rate * 2**32
            found.append(0.5 if difference == 0 else float((difference > 0) != errs))
        return found

    return judge_pairs
