"""Judges say which of two answers to a prompt is better: `judge(prompts, pairs) -> [P(first is better)]`."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import Samples
from lifecycle_hf.completions.scorer import RewardScorer
from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.completions.server import ChatServer
from lifecycle_hf.data.tokenize import encode_prompt

Prompt = str | list[dict]
Judge = Callable[[list[Prompt], list[tuple[str, str]]], Sequence[float]]
"""A function from prompts and pairs of answers, as text, to the probability that the first answer is better."""

QUESTION = """Which of two answers to a request is better?

Request: {prompt}

Answer A: {first}

Answer B: {second}

Reply with the letter of the better answer, A or B."""


def judged(judge: Judge, prompts: list[Prompt], pairs: list[tuple[str, str]]) -> list[float]:
    """Return what a judge says about pairs, after a check.

    Raises:
        ValueError: the judge returns another number of values, or one that is no probability; names the pair.
    """
    found = judge(prompts, pairs)
    found = found.tolist() if isinstance(found, torch.Tensor) else found
    name = getattr(judge, "__name__", type(judge).__name__)
    if not hasattr(found, "__len__") or len(found) != len(pairs):
        got = f"{len(found)} values" if hasattr(found, "__len__") else repr(found)
        raise ValueError(f"The judge {name!r} returned {got} for {len(pairs)} pairs: return one probability for each.")
    for i, p in enumerate(found):
        if isinstance(p, bool | str) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ValueError(
                f"The judge {name!r} returned {p!r} for pair {i}, prompt {str(prompts[i])[-200:]!r}, answers "
                f"{pairs[i][0][:100]!r} and {pairs[i][1][:100]!r}: it must be a number between 0 and 1, the "
                "probability that the first answer is better."
            )
    return [float(p) for p in found]


def win_rates(judge: Judge, samples: Samples, n: int) -> torch.Tensor:
    """Return the mean probability with which each completion beats the others of its prompt, [P·n].

    Every pair of the n completions of a prompt is judged once. Two equal texts are not shown to the judge: p = 1/2.

    Args:
        samples: the n completions of a prompt in a row.

    Raises:
        ValueError: see [`judged`].
    """
    starts = range(0, len(samples.texts), n)
    duels = [(start + i, start + j) for start in starts for i, j in combinations(range(n), 2)]
    open_duels = [(i, j) for i, j in duels if samples.texts[i] != samples.texts[j]]
    asked = [samples.prompts[i] for i, _ in open_duels], [(samples.texts[i], samples.texts[j]) for i, j in open_duels]
    known = dict(zip(open_duels, judged(judge, *asked), strict=True)) if open_duels else {}
    rates = torch.zeros(len(samples.texts))
    for i, j in duels:
        p = known.get((i, j), 0.5)
        rates[i] += p / (n - 1)
        rates[j] += (1 - p) / (n - 1)
    return rates


class RewardJudge:
    """Judge by reward models or callables: P(first is better) = σ(r_1 − r_2), r = Σ weights × rewards.

    Args:
        scorer, weights: what [`lifecycle_hf.completions.scorer.reward_scorer`] returns.
        batch_size: answers that a reward model reads together.
    """

    def __init__(self, scorer: RewardScorer, weights: dict[str, float], batch_size: int = 8):
        self.scorer, self.weights, self.batch_size = scorer, weights, batch_size

    def __call__(self, prompts: list[Prompt], pairs: list[tuple[str, str]]) -> list[float]:
        texts = [text for pair in pairs for text in pair]
        samples = Samples([prompt for prompt in prompts for _ in range(2)], texts)
        scores = self.scorer(samples, self.batch_size)
        total = sum(self.weights[name] * values.double() for name, values in scores.items())
        return torch.sigmoid(total[::2] - total[1::2]).tolist()


class BothOrders:
    """Base of the judges that are asked for the letter of the better answer, in both orders.

    p(a, b) is the probability of the first letter, of the two; P(a is better) = (p(a, b) + 1 − p(b, a)) / 2. So
    swapped answers give 1 − P, and a judge that always says the same letter gives 1/2.

    Args:
        question: text with {prompt}, {first} and {second}, which asks for a letter.
        letters: the two answers.

    Raises:
        ValueError: the question lacks a field.

    Reference: https://arxiv.org/abs/2212.08073, Section 4.1; https://arxiv.org/abs/2306.05685, Section 3.4.
    """

    def __init__(self, question: str = QUESTION, letters: tuple[str, str] = ("A", "B")):
        missing = [name for name in ("{prompt}", "{first}", "{second}") if name not in question]
        if missing:
            raise ValueError(f"The question of the judge lacks {', '.join(missing)}: put the field where it belongs.")
        self.question, self.letters = question, letters

    def __call__(self, prompts: list[Prompt], pairs: list[tuple[str, str]]) -> list[float]:
        orders = [(prompt, *pair) for prompt, pair in zip(prompts, pairs, strict=True)]
        asked = [
            self.question.format(prompt=as_text(prompt), first=first, second=second)
            for prompt, first, second in orders + [(prompt, b, a) for prompt, a, b in orders]
        ]
        forward, backward = torch.tensor(self.first_letter(asked), dtype=torch.float64).chunk(2)
        difference = torch.round((forward - backward) * 2**40) / 2**40  # so that ½ ± half of it are exact
        return (0.5 + difference / 2).tolist()

    def first_letter(self, questions: list[str]) -> list[float]:
        """Return for each question the probability of the first letter, of the two."""
        raise NotImplementedError


class LanguageModelJudge(BothOrders):
    """Judge by the probabilities that a language model gives the two letters as its next token.

    Args:
        model, tokenizer: causal LM; with a chat template the question is a user message.
        batch_size: questions that the model reads together.
        Others: see [`BothOrders`].

    Raises:
        ValueError: a letter is not one token, or the question lacks a field.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str = QUESTION,
        letters: tuple[str, str] = ("A", "B"), batch_size: int = 8,
    ):  # fmt: skip
        super().__init__(question, letters)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.ids = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
        for letter, tokens in zip(letters, self.ids, strict=True):
            if len(tokens) != 1:
                raise ValueError(f"The judge's letter {letter!r} has {len(tokens)} tokens: choose one of one token.")

    @torch.no_grad()
    def first_letter(self, questions: list[str]) -> list[float]:
        chats, found = self.tokenizer.chat_template is not None, []
        for start in range(0, len(questions), self.batch_size):
            part = questions[start : start + self.batch_size]
            asked = [[{"role": "user", "content": text}] if chats else text for text in part]
            ids = [encode_prompt(self.tokenizer, question) for question in asked]
            rows, groups = [row for row in ids for _ in self.ids], [i for i in range(len(ids)) for _ in self.ids]
            batch = Completions.from_lists(rows, self.ids * len(ids), 0, self.model.device, groups=groups)
            logprobs = completion_logprobs(self.model, batch).logprobs.double().view(-1, 2)
            found += torch.softmax(logprobs, 1)[:, 0].tolist()
        return found


class ServerJudge(BothOrders):
    """Judge by the letter that an OpenAI-compatible server answers, or by its log-probs where it gives them.

    Args:
        server: [`ChatServer`], whose cache keeps every answer.
        Others: see [`BothOrders`].

    Raises:
        ValueError: the server fails, or an answer holds neither letter; names the answer.
    """

    def __init__(self, server: ChatServer, question: str = QUESTION, letters: tuple[str, str] = ("A", "B")):
        super().__init__(question, letters)
        self.server = server

    def first_letter(self, questions: list[str]) -> list[float]:
        options = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        bodies = [{"messages": [{"role": "user", "content": text}]} | options for text in questions]
        return [self._read(choice) for choice in self.server.ask(bodies)]

    def _read(self, choice: dict) -> float:
        told = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        logprobs = [
            max((t["logprob"] for t in told if t["token"].strip() == letter), default=-math.inf)
            for letter in self.letters
        ]
        text = ((choice.get("message") or {}).get("content") or "").strip()
        if max(logprobs) == -math.inf:  # no log-probs: the answer itself
            said = re.match(r"\W*(\w+)", text)
            logprobs = [0.0 if said and said[1] == letter else -math.inf for letter in self.letters]
        if max(logprobs) == -math.inf:
            letters = " nor ".join(map(repr, self.letters))
            raise ValueError(f"The judge {self.server.model!r} answered {text[:100]!r}, neither {letters}.")
        return torch.softmax(torch.tensor(logprobs, dtype=torch.float64), 0)[0].item()


def as_text(prompt: Prompt) -> str:
    """Return a prompt as text; of a chat the turns with their roles, or the one message alone."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
