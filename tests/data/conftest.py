"""Tokenizers that tests of the data may change."""

import copy

import pytest

# SmolLM2 and Qwen put a line break behind each turn's end.
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama):
    return copy.deepcopy(tiny_llama[1])


@pytest.fixture
def chatml(tokenizer):
    tokenizer.chat_template = CHATML
    return tokenizer
