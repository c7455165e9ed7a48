"""With prefix attention completions are scored as they are sampled: the prompt is the prefix."""

import pytest
import torch
from lifecycle_setting import padded, tiny, tokens
from peft import LoraConfig, get_peft_model

from lifecycle_hf import LifecycleForCausalLM, LifecycleForSequenceClassification
from lifecycle_hf.completions.sampling import generate
from lifecycle_hf.completions.scoring import Completions, completion_hidden_states, completion_logprobs, packs
from lifecycle_hf.models.heads import RewardModel, last_token_hidden

close = torch.testing.assert_close
LENGTHS = [6, 3, 1]
pytestmark = pytest.mark.filterwarnings("ignore:.*in scoring, which is slower")


def prompts():
    ids, mask = padded(LENGTHS, "left")
    return ids, mask, [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]


def one_row(model, prompt, completion, prefix=None):
    logits = model(
        torch.tensor([prompt + completion]), prefix_lengths=[len(prompt) if prefix is None else prefix]
    ).logits
    logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_are_those_of_the_steps_of_generation(use_cache):
    model = tiny(attention="prefix", eos_token_id=None)
    ids, mask, rows = prompts()
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, use_cache=use_cache, **how)
    chosen = out.sequences[:, ids.shape[1] :]
    steps = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    batch = Completions.from_lists(rows, chosen.tolist(), 0)
    close(completion_logprobs(model, batch).logprobs, steps, atol=1e-5, rtol=0)


def test_scores_of_rollouts_equal_one_row_at_a_time_and_are_not_the_causal_ones():
    model = tiny(attention="prefix")
    _, _, rows = prompts()
    settings = {
        "max_new_tokens": 12,
        "temperature": 1.0,
        "stop_token_ids": [5, 6, 7, 8, 9, 10, 11, 12],
        "pad_token_id": 0,
    }
    completions = generate(model, rows * 4, **settings, generator_seed=1)
    assert len({len(row) for row in completions}) > 2  # rows left the batch while it was decoded
    scores = completion_logprobs(
        model, Completions.from_lists(rows * 4, completions, 0, groups=[0, 1, 2] * 4)
    ).logprobs
    for row, (prompt, completion) in enumerate(zip(rows * 4, completions)):
        close(scores[row, : len(completion)], one_row(model, prompt, completion), atol=1e-5, rtol=0)
    assert not torch.allclose(scores[0, : len(completions[0])], one_row(model, rows[0], completions[0], prefix=0))
    # Greedy decoding, by another code, says the same as transformers'.
    ids, mask, _ = prompts()
    greedy = generate(model, rows, **settings | {"temperature": 0.0, "stop_token_ids": [2]})
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    assert [row[: len(own)] for row, own in zip(expected.tolist(), greedy)] == greedy


def test_a_prefix_model_is_padded_and_stays_as_it_was():
    model = tiny(attention="prefix")
    with pytest.warns(UserWarning, match="pads its batches in scoring.*attention='prefix'"):
        assert not packs(model)
    assert model.config._attn_implementation == "sdpa"
    assert packs(tiny(attention="causal"))


def test_adapters_and_gradients():
    model = get_peft_model(
        tiny(attention="prefix"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    ).train()
    _, _, rows = prompts()
    completions = tokens(3, 4).tolist()

    def gradient(scores):
        model.zero_grad()
        sum(part.sum() for part in scores).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got = gradient([completion_logprobs(model, Completions.from_lists(rows, completions, 0)).logprobs])
    expected = gradient([one_row(model, prompt, completion) for prompt, completion in zip(rows, completions)])
    assert got
    close(got, expected, atol=1e-4, rtol=1e-4)


def test_hidden_states_of_a_value_function_see_the_prefix_and_those_of_a_reward_do_not(tiny_llama):
    model = tiny(LifecycleForSequenceClassification, "prefix", num_labels=1)
    _, _, rows = prompts()
    batch = Completions.from_lists(rows, tokens(3, 4).tolist(), 0)
    values = completion_hidden_states(model.model, batch, extra=1)
    whole = model.model(batch.input_ids[:1, :10], prefix_lengths=[6]).last_hidden_state
    close(values[0], whole[0, 5:10], atol=1e-5, rtol=1e-5)
    hidden = completion_hidden_states(model.model, batch, extra=1, prefix=False)
    reward = RewardModel(model, tiny_llama[1])
    lengths = batch.prompt_lengths + batch.completion_lengths
    # A reward model reads whole sequences, as it was trained to.
    close(reward.read(last_token_hidden(hidden, batch.completion_lengths + 1)), reward(batch.input_ids, lengths))


def test_log_probs_of_prompts_are_refused():
    model = tiny(LifecycleForCausalLM, "prefix")
    with pytest.raises(ValueError, match="each token of a prompt sees those after it"):
        completion_logprobs(model, Completions.from_lists([[5, 6]], [[7]], 0), prompts=True)
