"""Measure a model in the toy world: gold reward on held-out requests, perplexity on held-out documents."""

import math
import random

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.evaluation.bootstrap import Measurement
from lifecycle_hf.evaluation.metrics import perplexity
from lifecycle_hf.toyworld.data import dataset, draw_request
from lifecycle_hf.toyworld.dialogue import requests
from lifecycle_hf.toyworld.gold import is_clean_refusal, is_correct, is_refusal, judge, text_of
from lifecycle_hf.toyworld.world import ATTRIBUTES, DIGITS, is_held_out

COMPLETION_TOKENS = 32
HIGHER_IS_BETTER = {"gold_reward": True, "refusal_rate": True, "benign_accuracy": True, "perplexity": False}
"""The metrics of the toy world, and for each whether higher is better."""


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 128, seed: int = 0) -> dict:
    """Return the metrics of a model, measured on `n` held-out requests and all held-out documents.

    - "gold_reward": mean gold reward of one completion for each request (at most 32 tokens, temperature 1).
    - "refusal_rate": share of the forbidden requests that get a clean refusal.
    - "benign_accuracy": share of the benign requests that get a correct answer and no refusal.
    - "perplexity": perplexity of the held-out documents.

    Each is a `Measurement`, or NaN if no request of its kind was drawn. Requests and sampling depend on `seed` only.
    The global random state of torch does not change.
    """
    rng = random.Random(f"measure {seed}")
    asked = [draw_request(rng, held_out=True) for _ in range(n)]
    prompts = [[{"role": "user", "content": request.text}] for request in asked]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    completions = generate(
        model,
        ids,
        max_new_tokens=COMPLETION_TOKENS,
        temperature=1.0,
        stop_token_ids=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        generator_seed=seed,
    )
    texts = [text_of(text) for text in tokenizer.batch_decode(completions)]
    judged = list(zip(asked, texts, strict=True))
    refused = [is_clean_refusal(text) for request, text in judged if request.kind == "forbidden"]
    correct = [is_correct(r, text) and not is_refusal(text) for r, text in judged if r.kind != "forbidden"]
    return {
        "gold_reward": _mean([judge(request, text) for request, text in judged]),
        "refusal_rate": _mean(refused),
        "benign_accuracy": _mean(correct),
        "perplexity": perplexity(model, tokenizer, dataset("ptx")["test"]["text"], batch_size=64),
    }


def questions() -> Dataset:
    """Return the held-out benign requests as multiple choice: {"question": messages, "choices", "answer": index}.

    The choices are the answers "It is VALUE." for each value of the attribute, or for each possible sum.
    """
    sums = [str(total) for total in range(2 * DIGITS[0], 2 * DIGITS[-1] + 1)]
    rows = []
    for request in requests().values():
        if request.kind != "forbidden" and is_held_out(request.text):
            values = list(ATTRIBUTES[request.subject[1]]) if request.kind == "fact" else sums
            question, choices = [{"role": "user", "content": request.text}], [f"It is {value}." for value in values]
            rows.append({"question": question, "choices": choices, "answer": values.index(request.answer)})
    return Dataset.from_list(rows)


def _mean(values: list) -> float:
    return Measurement(values) if values else math.nan
