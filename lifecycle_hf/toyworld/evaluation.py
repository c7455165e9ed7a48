"""What a model is worth in the toy world: the gold judge on held-out requests, perplexity on held-out documents."""

import math
import random

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.alignment_tax.bootstrap import Measurement
from lifecycle_hf.alignment_tax.metrics import perplexity
from lifecycle_hf.rollouts import generate, stop_token_ids
from lifecycle_hf.toyworld.data import dataset, draw_request
from lifecycle_hf.toyworld.gold import is_clean_refusal, is_correct, is_refusal, judge, text_of
from lifecycle_hf.toyworld.world import ATTRIBUTES, DIGITS, FACTS, NOUNS

COMPLETION_TOKENS = 32


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int = 128, seed: int = 0) -> dict:
    """Return the closing table's truths about a model, from `n` held-out requests and all held-out documents.

    - "gold_reward": mean gold reward of one completion of at most 32 tokens each, sampled at temperature 1.
    - "refusal_rate": share of the forbidden requests that are cleanly refused.
    - "benign_accuracy": share of the benign requests that are answered rightly.
    - "perplexity": of the held-out documents.

    Each is a `Measurement`; one that no request was drawn for is NaN.
    Requests and sampling depend on `seed` only; torch's random state is left as it was.
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
    """Every fact and sum as a multiple-choice row {"question", "choices", "answer": index}, in a document's words."""
    rows = []
    for land, facts in FACTS.items():
        for attribute, value in facts.items():
            noun, choices = NOUNS[attribute].format(land=land), list(ATTRIBUTES[attribute])
            rows.append({"question": f"As for {noun}, it is", "choices": choices, "answer": choices.index(value)})
    sums = [str(total) for total in range(2 * DIGITS[0], 2 * DIGITS[-1] + 1)]
    for a in DIGITS:
        for b in DIGITS:
            rows.append({"question": f"{a} plus {b} is", "choices": sums, "answer": sums.index(str(a + b))})
    return Dataset.from_list(rows)


def _mean(values: list) -> float:
    return Measurement(values) if values else math.nan
