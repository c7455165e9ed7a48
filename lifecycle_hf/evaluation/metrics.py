"""Capability and drift of a model: perplexity, multiple choice, exact match, KL to the reference.

All of them return a `Measurement`: a float that remembers its items, so that a report can give its interval.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.data.collators import length_mask, pad_sequences
from lifecycle_hf.data.tokenize import encode_complete, encode_prompt
from lifecycle_hf.evaluation.bootstrap import Measurement, exp_ratio, ratio
from lifecycle_hf.objectives.policy import kl_estimate


@torch.no_grad()
def row_logits(
    model: PreTrainedModel, rows: Sequence[list[int]], *, batch_size: int, prefixes: Sequence[int] | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index, logits [length, vocabulary] in fp32) of every row of token ids, the shortest first, in eval mode.

    Args:
        prefixes: how many tokens of each row a model with prefix attention reads both ways; none by default.
    """
    device, training = next(model.parameters()).device, model.training
    has_prefix = getattr(getattr(model, "config", None), "attention", None) == "prefix"
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = pad_sequences([rows[i] for i in batch], 0).to(device)
            mask = length_mask(torch.tensor([len(rows[i]) for i in batch], device=device), ids.shape[1]).long()
            extra = {}
            if has_prefix:
                extra["prefix_lengths"] = torch.tensor([prefixes[i] if prefixes else 0 for i in batch], device=device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
            for i, scores in zip(batch, logits, strict=True):
                yield i, scores[: len(rows[i])].float()
    finally:
        model.train(training)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | list[dict]],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> Measurement:
    """Return exp(Σ −log p(x_t | x_<t) / number of predicted tokens), over all tokens of all texts together.

    Each text, or conversation, is tokenised with its special tokens, ended at an EOS where the tokenizer has one (see
    `encode_complete`), and cut to `max_length` tokens; its first token is given, not predicted. The model's mode
    (train or eval) is left as it was. The items are (Σ −log p, predicted tokens) of each text.

    Raises:
        ValueError: no text has two tokens, so nothing can be predicted.
    """
    rows = [encode_complete(tokenizer, text)[:max_length] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError(
            f"perplexity got {len(texts)} texts, none of two tokens or more: there is nothing to predict."
        )
    items = np.empty((len(rows), 2))
    for i, logits in row_logits(model, rows, batch_size=batch_size):
        ids = torch.tensor(rows[i][1:], device=logits.device)
        items[i] = cross_entropy(logits[:-1], ids, reduction="sum").item(), len(ids)
    return Measurement(items, exp_ratio)


class MultipleChoice(NamedTuple):
    """Hold what [`multiple_choice`] returns.

    Attributes:
        acc: share of questions whose choice of highest log-likelihood is right.
        acc_norm: the same by log-likelihood per character.
        probabilities: [N, most choices], softmax of the log-likelihoods over the choices; 0 where there is none.
        labels: [N], the right choices.
    """

    acc: Measurement
    acc_norm: Measurement
    probabilities: np.ndarray
    labels: np.ndarray


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str | list[dict]],
    choices: Sequence[Sequence[str]],
    labels: Sequence[int],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> MultipleChoice:
    """Compare argmax_c Σ_t log p(c_t | question, c_<t) with the label; `acc`, `acc_norm` as in lm-evaluation-harness.

    Behind a question that is text a choice stands after a space, tokenised together with it; messages are rendered up
    to where the answer begins. Of more than `max_length` tokens the first ones are cut off.

    Raises:
        ValueError: no question, counts that differ, an empty choice, a label that names none, or no token left before
            a choice.
    """
    if not len(questions) == len(choices) == len(labels) > 0:
        raise ValueError(
            f"multiple_choice got {len(questions)} questions, {len(choices)} sets of choices and {len(labels)} labels."
        )
    rows, lengths = [], []
    for i, (question, options, label) in enumerate(zip(questions, choices, labels)):
        if not all(options) or not 0 <= label < len(options):
            raise ValueError(f"multiple_choice: question {i} has the label {label} and the choices {list(options)}.")
        for choice in options:
            context, answer = encode_choice(tokenizer, question, choice)
            rows.append((context + answer)[-(max_length or 0) :])
            lengths.append(len(answer))
            if not 0 < len(answer) < len(rows[-1]):
                raise ValueError(
                    f"multiple_choice: of question {i} and its choice {choice!r}, {len(rows[-1])} tokens are left by "
                    f"{max_length=}, {len(answer)} of them the choice's: both need one at least."
                )
    sums = np.empty(len(rows))
    prefixes = [len(row) - n for row, n in zip(rows, lengths)]
    for i, logits in row_logits(model, rows, batch_size=batch_size, prefixes=prefixes):
        answer = torch.tensor(rows[i][-lengths[i] :], device=logits.device)
        sums[i] = -cross_entropy(logits[-lengths[i] - 1 : -1], answer, reduction="sum").item()
    scores = np.full((len(choices), max(map(len, choices))), -np.inf)
    characters = np.ones_like(scores)
    at = 0
    for i, options in enumerate(choices):
        scores[i, : len(options)] = sums[at : at + len(options)]
        characters[i, : len(options)] = [len(choice) for choice in options]
        at += len(options)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    labels = np.asarray(labels)
    right = [Measurement(values.argmax(1) == labels) for values in (scores, scores / characters)]
    return MultipleChoice(*right, weights / weights.sum(1, keepdims=True), labels)


def encode_choice(
    tokenizer: PreTrainedTokenizerBase, question: str | list[dict], choice: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a question and of a choice after it, as `multiple_choice` reads them."""
    if not isinstance(question, str):
        return encode_prompt(tokenizer, question), tokenizer(choice, add_special_tokens=False)["input_ids"]
    context = question.rstrip()
    ids = _unended(tokenizer, f"{context}{question[len(context) :] or ' '}{choice}")
    start = len(_unended(tokenizer, context))
    return ids[:start], ids[start:]


def _unended(tokenizer, text) -> list[int]:
    """Token ids without the EOS that some tokenizers append; one that stands alone opens the text."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@torch.no_grad()
def completion_nll(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[list[int]], *, batch_size: int = 8
) -> np.ndarray:
    """Return −Σ_t log p(y_t | x, y_<t) of each completion y of a prompt x, nats, [N]; the model is put in eval mode.

    Completions of the same prompt that fall into one batch share its encoding.

    Args:
        prompts, completions: token ids, none empty.
    """
    nll, training = np.empty(len(prompts)), model.training
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            own, answers = [prompts[i] for i in rows], [completions[i] for i in rows]
            groups = [own.index(prompt) for prompt in own]
            batch = Completions.from_lists(own, answers, 0, next(model.parameters()).device, groups)
            nll[rows] = -completion_logprobs(model, batch).logprobs.sum(1).double().cpu().numpy()
    finally:
        model.train(training)
    return nll


def exact_match(answers: Sequence[str], references: Sequence[str], *, pattern: str | None = None) -> Measurement:
    """Return the share of answers that equal their reference, without white space at both ends.

    Args:
        pattern: regular expression whose last match (its first group, if it has one) is what is compared, on either
            side. Where the reference has a match, an answer without one is wrong; where it has none, whole texts are
            compared.
    """

    def last(text):
        found = re.findall(pattern, text) if pattern else [text]
        match = found[-1] if found else None
        return match[0] if isinstance(match, tuple) else match

    def right(answer, reference):
        one, other = last(answer), last(reference)
        if other is None:
            one, other = answer, reference
        return one is not None and one.strip() == other.strip()

    return Measurement([right(*pair) for pair in zip(answers, references, strict=True)])


def kl_to_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    estimator: str = "exact",
    batch_size: int = 8,
) -> dict[str, Measurement]:
    """Return KL(π‖π_ref) along completions of π at temperature 1, nats: {"kl": per sequence, "kl_per_token"}.

    "exact": Σ_t Σ_v π(v|s_t)·log(π(v|s_t) / π_ref(v|s_t)), the full vocabulary at each state visited, so that only the
    states are sampled; "k1", "k2", "k3": from the sampled tokens alone (`objectives.policy.kl_estimate`).

    Args:
        prompts, completions: token ids, one completion each, none empty.

    Returns:
        means over sequences of the sum over tokens, and over all tokens; items (KL, tokens) of each sequence.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    options = {"batch_size": batch_size, "prefixes": [len(prompt) for prompt in prompts]}
    items = np.empty((len(rows), 2))
    pairs = zip(row_logits(model, rows, **options), row_logits(reference, rows, **options))
    for (i, logits), (_, ref_logits) in pairs:
        n = len(completions[i])
        ours, theirs = (x[-n - 1 : -1].log_softmax(-1) for x in (logits, ref_logits))
        if estimator == "exact":
            kl = (ours.exp() * (ours - theirs)).sum(-1)
        else:
            tokens = torch.tensor(completions[i], device=ours.device)[:, None]
            kl = kl_estimate(ours.gather(1, tokens), theirs.gather(1, tokens), estimator=estimator)
        items[i] = kl.sum().item(), n
    return {"kl": Measurement(items), "kl_per_token": Measurement(items, ratio)}
