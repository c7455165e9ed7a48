import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lifecycle_hf.toyworld import build_model, build_tokenizer, dataset, measure, questions
from lifecycle_hf.toyworld.dialogue import requests
from lifecycle_hf.toyworld.evaluation import COMPLETION_TOKENS
from lifecycle_hf.toyworld.gold import is_correct, request_of

TOKENIZER = build_tokenizer()
CHAT = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}]


# Surrogates are no text: UTF-8 can't hold them.
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < len(TOKENIZER) for i in ids)


@pytest.mark.parametrize("text", ["naïve 漢字 🦊\n\t", " two  spaces ", "It is 7 .", "", "\x00"])
def test_awkward_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_special_tokens_are_distinct_and_single():
    names = ("<|pad|>", "<|im_start|>", "<|im_end|>")
    ids = [TOKENIZER(name)["input_ids"] for name in names]
    assert ids == [[0], [1], [2]]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (0, 2, None)


def test_built_the_same_each_time(tmp_path):
    again = build_tokenizer()
    assert again.get_vocab() == TOKENIZER.get_vocab()
    again.save_pretrained(tmp_path)
    loaded = type(again).from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CHAT)["input_ids"] == TOKENIZER.apply_chat_template(CHAT)["input_ids"]


def test_chat_template():
    prompt = TOKENIZER.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert prompt == "<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "It is 3.<|im_end|>"
    encoded = TOKENIZER.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert TOKENIZER.decode(marked) == "It is 3.<|im_end|>"


def test_rows_fit_the_model():
    for row in dataset("ppo")["train"].select(range(500)):
        ids = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert len(ids) <= 24
    for row in dataset("reward")["test"]:
        assert len(TOKENIZER(row["chosen"][0]["content"])["input_ids"]) < 64
    assert max(len(TOKENIZER(text)["input_ids"]) for text in dataset("sft")["train"]["text"]) < 64


def test_model_is_tiny_and_fixed_by_its_seed():
    state = torch.get_rng_state()
    first, again, other = build_model(TOKENIZER), build_model(TOKENIZER, 0), build_model(TOKENIZER, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    vocabulary, hidden, inner, layers = len(TOKENIZER), 128, 384, 3
    per_layer = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    assert first.num_parameters() == vocabulary * hidden + layers * per_layer + hidden


def test_measure_counts_by_hand(monkeypatch):
    module, seen = "lifecycle_hf.toyworld.evaluation", []
    answers = {"forbidden": "I can't help with that.", "fact": "Of course! It is nowhere.", "sum": None}

    def scripted(model, prompt_ids, *, max_new_tokens, temperature, stop_token_ids, pad_token_id, generator_seed):
        assert (max_new_tokens, temperature, generator_seed) == (COMPLETION_TOKENS, 1.0, 3)
        completions = []
        for ids in prompt_ids:
            request = request_of(TOKENIZER.decode(ids))
            seen.append(request)
            text = answers[request.kind] or f"It is {request.answer}."
            completions.append(TOKENIZER(text + "<|im_end|>")["input_ids"])
        return completions

    monkeypatch.setattr(f"{module}.generate", scripted)
    monkeypatch.setattr(f"{module}.stop_token_ids", lambda model, tokenizer: [tokenizer.eos_token_id])
    monkeypatch.setattr(f"{module}.perplexity", lambda *args, **kwargs: 1.5)
    values = measure(None, TOKENIZER, n=40, seed=3)
    count = {kind: sum(request.kind == kind for request in seen) for kind in answers}
    assert sum(count.values()) == 40 and all(count.values())
    # Refusals earn 1; courtesy without the fact and the sum without courtesy earn 1/2 each.
    assert values["gold_reward"] == pytest.approx((count["forbidden"] + (count["fact"] + count["sum"]) / 2) / 40)
    assert values["refusal_rate"] == 1.0
    assert values["benign_accuracy"] == pytest.approx(count["sum"] / (count["sum"] + count["fact"]))
    assert values["perplexity"] == 1.5


def test_measure_repeats_and_leaves_no_trace():
    model = build_model(TOKENIZER).train()
    state = torch.get_rng_state()
    first, again = measure(model, TOKENIZER, n=16, seed=0), measure(model, TOKENIZER, n=16, seed=0)
    assert first == again and model.training and torch.equal(torch.get_rng_state(), state)
    assert set(first) == {"gold_reward", "refusal_rate", "benign_accuracy", "perplexity"}
    assert first["gold_reward"] == 0.0 and first["perplexity"] > 100  # it has learnt nothing yet


def test_questions_are_held_out_and_their_answers_are_judged_right():
    rows = questions()
    asked = [row["question"][0]["content"] for row in rows]
    assert not set(asked) & {row["prompt"][0]["content"] for row in dataset("ppo")["train"]}
    for row, text in zip(rows, asked, strict=True):
        right = [is_correct(requests()[text], choice) for choice in row["choices"]]
        assert right.index(True) == row["answer"] and sum(right) == 1
