"""The tokenizer and the tiny model of the toy world."""

import random
from functools import lru_cache

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lifecycle_hf.data.corpora import byte_level_bpe
from lifecycle_hf.models.lifecycle import LifecycleConfig, LifecycleForCausalLM
from lifecycle_hf.toyworld.dialogue import POLITE, REFUSALS, compliance, requests, statement
from lifecycle_hf.toyworld.world import document

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if not loop.first %}{{- '\n' }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\n<|im_start|>assistant\n' }}{%- endif %}"
)
_PAD, _START, _END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_VOCABULARY = 1024
_POSITIONS = 256


def _sample_of_text() -> list[str]:
    rng = random.Random(0)
    texts = [document(rng) for _ in range(2000)] + list(POLITE + REFUSALS) * 50 + ["user\nassistant\n"] * 50
    for request in requests().values():
        answer = compliance(request, rng) if request.kind == "forbidden" else statement(request, request.answer, rng)
        texts += [request.text, answer]
    return texts


@lru_cache(maxsize=1)
def _bpe() -> str:
    return byte_level_bpe(_sample_of_text(), _VOCABULARY, [_PAD, _START, _END]).to_str()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level BPE tokenizer of the toy world (any text can be encoded, no BOS, chat template included).

    The function trains it on text from the world's grammar. The result is the same on every machine.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()),
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LifecycleForCausalLM:
    """Return a tiny causal model (0.7 million parameters, 3 layers, tied embeddings, 256 positions), random by `seed`.

    The global random state does not change.
    """
    config = LifecycleConfig(
        attention="causal",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_POSITIONS,
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LifecycleForCausalLM(config)
