import pytest
import torch

from lifecycle_hf.scoring import Completions, completion_hidden_states, completion_logprobs, token_logprobs

close = torch.testing.assert_close
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15]]
COMPLETIONS = [[20, 21], [22, 23, 24, 2], [25]]


def naive_logprobs(model, prompt, completion, temperature=1.0):
    """One unpadded row at a time, softmax of the full logits in float64."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    table = logits.log_softmax(-1)
    return [table[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)]


def test_token_logprobs_and_entropy_by_hand():
    # softmax(log 1, log 3) = (1/4, 3/4)
    logits, log = torch.tensor([[0.0, 3.0]]).clamp(min=1).log(), lambda x: torch.tensor(x).log()
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), entropy=True)
    close(logprobs, log([0.75]))
    close(entropy, -(0.25 * log([0.25]) + 0.75 * log([0.75])))
    # at temperature ½ the odds are squared: (1/10, 9/10)
    close(token_logprobs(logits, torch.tensor([0]), temperature=0.5)[0], log([0.1]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_padded_scores_equal_one_row_at_a_time(tiny_llama, temperature):
    make_model, tokenizer = tiny_llama
    model = make_model()
    batch = Completions.from_lists(PROMPTS, COMPLETIONS, tokenizer.pad_token_id)
    logprobs, entropy = completion_logprobs(model, batch, temperature=temperature, entropy=True)
    assert logprobs.shape == entropy.shape == (3, 4)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = naive_logprobs(model, prompt, completion, temperature)
        assert logprobs[row, : len(completion)].tolist() == pytest.approx(expected, abs=1e-5)
        assert logprobs[row, len(completion) :].eq(0).all() and entropy[row, len(completion) :].eq(0).all()


def test_amount_of_padding_and_batch_split_play_no_part(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    whole = completion_logprobs(model, Completions.from_lists(PROMPTS, COMPLETIONS, tokenizer.pad_token_id))[0]
    for i in range(3):
        alone = completion_logprobs(
            model, Completions.from_lists(PROMPTS[i : i + 1], COMPLETIONS[i : i + 1], tokenizer.pad_token_id)
        )[0]
        close(alone[0], whole[i, : alone.shape[1]], atol=1e-5, rtol=0)


def test_masks_come_from_lengths_not_from_the_pad_token(tiny_llama):
    make_model, tokenizer = tiny_llama
    pad = tokenizer.pad_token_id
    batch = Completions.from_lists([[7, 8]], [[pad, 20, pad]], pad)
    assert batch.mask.tolist() == [[True, True, True]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1]]
    expected = naive_logprobs(make_model(), [7, 8], [pad, 20, pad])
    assert completion_logprobs(make_model(), batch)[0][0].tolist() == pytest.approx(expected, abs=1e-5)


def test_state_before_a_token_does_not_depend_on_it(tiny_llama):
    make_model, _ = tiny_llama
    backbone = make_model().model
    states = [
        completion_hidden_states(backbone, Completions.from_lists([[7, 8]], [[20, y, 22]], 0), extra=1)[0]
        for y in (21, 99)
    ]
    close(states[0][:2], states[1][:2])  # s_0 and s_1 = (x, y_0) stand before y_1
    assert not torch.allclose(states[0][2:], states[1][2:])
    assert states[0].shape[0] == 4  # s_3, after the last token, for a bootstrap


def test_models_without_logits_to_keep_give_the_same(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()

    class Plain(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            return model(input_ids=input_ids, attention_mask=attention_mask)

    batch = Completions.from_lists(PROMPTS, COMPLETIONS, tokenizer.pad_token_id)
    close(completion_logprobs(Plain(), batch)[0], completion_logprobs(model, batch)[0])


@pytest.mark.parametrize(
    ("prompts", "completions", "name"), [([[1], []], [[1], [1]], "prompt"), ([[1]], [[]], "completion")]
)
def test_empty_rows_are_refused_by_number(prompts, completions, name):
    with pytest.raises(ValueError, match=f"Row {len(prompts) - 1} has an empty {name}"):
        Completions.from_lists(prompts, completions, 0)
