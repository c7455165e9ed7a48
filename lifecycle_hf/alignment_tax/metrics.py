"""What a model still knows: perplexity on held-out text."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.data.collators import length_mask, pad_sequences


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> float:
    """exp(Σ −log p(x_t | x_<t) / number of predicted tokens), over all tokens of all texts, not a mean of means.

    Each text is tokenised with its special tokens, ended at an EOS where the tokenizer has one, and cut to
    `max_length` tokens; its first token is given, not predicted. The model's mode (train or eval) is left as it was.

    Raises:
        ValueError: no text has two tokens, so nothing can be predicted.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        rows.append((ids if ids[-1:] == end else [*ids, *end])[:max_length])
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    if not rows:
        raise ValueError(
            f"perplexity got {len(texts)} texts, none of two tokens or more: there is nothing to predict."
        )
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids = pad_sequences(batch, 0).to(device)
        mask = length_mask(torch.tensor([len(row) for row in batch], device=device), ids.shape[1])
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        for scores, row, kept in zip(logits, ids, mask, strict=True):
            length = int(kept.sum())
            total += cross_entropy(scores[: length - 1].float(), row[1:length], reduction="sum").item()
            count += length - 1
    model.train(training)
    return math.exp(total / count)
