"""Test the LM head in chunks: values and gradients equal those of log-softmax for all dtypes and temperatures."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lifecycle_hf.models.lm_head import CHUNK_LOGITS, LinearLogProbs, head_logprobs, token_logprobs

close = torch.testing.assert_close
VOCAB, ROWS = 97, 11
TOKENS = torch.arange(ROWS) * 7 % VOCAB


def data(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (ROWS, VOCAB))
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def gradients_by_hand(states, weight, temperature, upstream):
    """Return the gradients of Σ g·log softmax(states @ weight.T / temperature)[token], in float64."""
    states, weight = (x.detach().double().requires_grad_() for x in (states, weight))
    table = (states @ weight.T / temperature).log_softmax(-1)
    return torch.autograd.grad((table.gather(1, TOKENS[:, None])[:, 0] * upstream).sum(), (states, weight))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_gradcheck_at_a_temperature(size):
    states, weight = data(torch.float64)

    def logprobs(states, weight):
        return LinearLogProbs.apply(states, weight, TOKENS, 0.7, False, size)[0]

    assert torch.autograd.gradcheck(logprobs, (states, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 0.03), (torch.bfloat16, False, 0.03)],
)
def test_gradients_in_every_precision(temperature, dtype, autocast, tolerance):
    """Compare relative to the largest entry; under autocast and in bf16 the products are rounded to 8 bits."""
    states, weight = data(dtype)
    upstream = torch.linspace(-1, 2, ROWS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, entropies = LinearLogProbs.apply(states, weight, TOKENS, temperature, True, 4)
    assert logprobs.dtype == torch.float32 and not entropies.requires_grad
    (logprobs * upstream).sum().backward()
    expected = gradients_by_hand(states, weight, temperature, upstream.double())
    for parameter, gradient in zip((states, weight), expected, strict=True):
        assert parameter.grad.dtype == dtype
        assert (parameter.grad.double() - gradient).abs().max() <= tolerance * gradient.abs().max()


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    states, weight = data()
    expected = dict(zip(("states", "weight"), gradients_by_hand(states, weight, 1.0, torch.ones(ROWS).double())))
    inputs = {"states": states, "weight": weight}
    inputs[frozen].requires_grad_(False)
    LinearLogProbs.apply(states, weight, TOKENS, 1.0, False, 4)[0].sum().backward()
    for name, value in inputs.items():
        assert (value.grad is None) == (name == frozen)
        if name != frozen:
            close(value.grad, expected[name].float(), atol=1e-4, rtol=1e-4)


HEADS = {
    "plain": ("llama", {}), "capped": ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 4}),
    "scaled": ("granite", {"logits_scaling": 4.0}), "with a bias": ("phi", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_every_head_is_read_as_the_model_reads_it(monkeypatch, name, entropy_gradient):
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 4 * VOCAB)
    family, options = HEADS[name]
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | options)))
    ids = TOKENS[None]
    states = model.base_model(ids).last_hidden_state[0]
    expected = token_logprobs(model(ids).logits[0], TOKENS, temperature=0.7, entropy=True)
    got = head_logprobs(model, states, TOKENS, temperature=0.7, entropy=True, entropy_gradient=entropy_gradient)
    for value, other in zip(got, expected, strict=True):
        close(value, other, atol=1e-5, rtol=0)
    assert got[1].requires_grad == entropy_gradient
