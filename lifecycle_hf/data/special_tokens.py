"""Add the tokens of denoising objectives to a tokenizer."""

from collections.abc import Sequence

import numpy as np
from transformers import AddedToken, PreTrainedTokenizerBase

from lifecycle_hf.data.denoising import DenoisingTokens
from lifecycle_hf.data.tokenize import require_eos


def add_denoising_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_sentinels: int = 0,
    modes: Sequence[str] = (),
    mask: str | None = None,
    where: str = "processing_class",
) -> DenoisingTokens:
    """Add the sentinels ``<extra_id_0>``, ..., mode tokens and a mask token that the tokenizer does not have.

    The model's embeddings must then be resized to ``len(tokenizer)``. From then on, text that contains the string of a
    token, e.g. "[X]", is encoded as that token, unless it is encoded with ``split_special_tokens=True``.

    Raises:
        ValueError: there is no EOS token, or no token can be added to the tokenizer.
    """
    eos_id = require_eos(tokenizer, where)
    if mask is not None and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask})
    sentinels = [f"<extra_id_{number}>" for number in range(n_sentinels)]
    known = tokenizer.get_vocab()
    lacking = [token for token in [*sentinels, *modes] if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking])
    vocabulary = tokenizer.get_vocab()
    wanted = [*sentinels, *modes, *([tokenizer.mask_token] if mask is not None else [])]
    refused = [token for token in wanted if token not in vocabulary]
    if refused:
        raise ValueError(
            f"{where}: {type(tokenizer).__name__} has no room for {len(refused)} of the tokens that denoising needs "
            f"({', '.join(refused[:3])}{', ...' if len(refused) > 3 else ''}): its vocabulary of {len(tokenizer)} "
            "can't be extended. Use a tokenizer that has them (T5's) or can be extended, or a causal objective."
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids) | {vocabulary[token] for token in [*sentinels, *modes]}
    return DenoisingTokens(
        eos_id=eos_id,
        vocab_size=len(tokenizer),
        sentinel_ids=np.array([vocabulary[token] for token in sentinels], dtype=np.int32),
        mode_ids={token: vocabulary[token] for token in modes},
        mask_id=tokenizer.mask_token_id,
        special_ids=np.array(sorted(special), dtype=np.int32),
    )
