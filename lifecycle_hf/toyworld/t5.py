"""The tiny encoder-decoder of the toy world."""

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration


def build_t5(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> T5ForConditionalGeneration:
    """Return a tiny T5 (1.1 million parameters, 2 + 2 layers, tied embeddings, no dropout), random by `seed`.

    The global random state does not change.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)
