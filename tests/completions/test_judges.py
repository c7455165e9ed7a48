"""Judges: both orders, win rates by hand, and errors for what is no probability."""

import math

import pytest
import torch

from lifecycle_hf.completions.judges import LanguageModelJudge, RewardJudge, judged, win_rates
from lifecycle_hf.completions.rewards import KeptScores, Samples
from lifecycle_hf.completions.scorer import reward_scorer

PAIRS = [("a cat", "a dog and more"), ("yes", "no"), ("x", "x")]
PROMPTS = ["Tell me", "Please", [{"role": "user", "content": "hello"}]]


def test_swapped_answers_give_the_complement_exactly(tiny_llama):
    make_model, tokenizer = tiny_llama
    judge = LanguageModelJudge(make_model().eval(), tokenizer, letters=("A", "B"), batch_size=2)
    forward, backward = judge(PROMPTS, PAIRS), judge(PROMPTS, [(b, a) for a, b in PAIRS])
    assert all(p == 1 - q for p, q in zip(forward, backward, strict=True))
    assert forward[2] == 0.5 and forward[0] != 0.5 and all(0 <= p <= 1 for p in forward)


def test_a_judge_that_always_says_the_same_letter_says_nothing(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model().eval()
    letter = tokenizer("A", add_special_tokens=False)["input_ids"][0]
    head = torch.nn.Linear(32, model.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()
        head.bias[letter] = 20.0
    model.lm_head = head
    assert LanguageModelJudge(model, tokenizer)(PROMPTS, PAIRS) == [0.5] * 3


def test_the_probability_is_that_of_the_two_letters(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model().eval()
    question = "{prompt} {first} {second}"
    judge = LanguageModelJudge(model, tokenizer, question)
    ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]

    def p(first, second):
        chat = [{"role": "user", "content": f"Tell me {first} {second}"}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return torch.softmax(model(torch.tensor([given])).logits[0, -1, ids].double(), 0)[0].item()

    expected = (p("cat", "dog") + 1 - p("dog", "cat")) / 2
    assert judge(["Tell me"], [("cat", "dog")]) == [pytest.approx(expected, rel=1e-5)]


def test_rewards_judge_by_bradley_terry(tmp_path):
    kept = KeptScores(tmp_path / "kept.jsonl")
    lengths = lambda prompts, completions: [float(len(c)) for c in completions]
    judge = RewardJudge(*reward_scorer(lengths, [0.5], torch.device("cpu"), kept))
    expected = [1 / (1 + math.exp(0.5 * (14 - 5))), 1 / (1 + math.exp(-0.5)), 0.5]
    assert judge(["a", "b", "c"], PAIRS) == pytest.approx(expected)


def test_win_rates_by_hand():
    # a beats b by .9, c by .8; b beats c by .6; of the second prompt all answers are one text, which nobody judges
    table, asked = {("a", "b"): 0.9, ("a", "c"): 0.8, ("b", "c"): 0.6}, []

    def judge(prompts, pairs):
        asked.extend(zip(prompts, pairs, strict=True))
        return [table[pair] for pair in pairs]

    samples = Samples(["p"] * 3 + ["q"] * 3, ["a", "b", "c", "x", "x", "x"])
    rates = win_rates(judge, samples, 3)
    torch.testing.assert_close(rates, torch.tensor([0.85, (0.1 + 0.6) / 2, (0.2 + 0.4) / 2, 0.5, 0.5, 0.5]))
    assert asked == [("p", pair) for pair in table]


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (lambda prompts, pairs: [0.5], "returned 1 values for 2 pairs"),
        (lambda prompts, pairs: None, "returned None for 2 pairs"),
        (lambda prompts, pairs: ["A", "B"], "returned 'A' for pair 0, prompt 'p', answers 'a' and 'b'"),
        (lambda prompts, pairs: [0.5, 1.5], "returned 1.5 for pair 1"),
        (lambda prompts, pairs: [0.5, math.nan], "returned nan for pair 1"),
    ],
)
def test_garbage_is_named(says, message):
    with pytest.raises(ValueError, match=message):
        judged(says, ["p", "q"], [("a", "b"), ("c", "d")])


def test_judges_that_can_not_be(tiny_llama):
    make_model, tokenizer = tiny_llama
    with pytest.raises(ValueError, match=r"lacks \{second\}"):
        LanguageModelJudge(make_model(), tokenizer, "{prompt} {first}")
    with pytest.raises(ValueError, match="letter 'Of course' has"):
        LanguageModelJudge(make_model(), tokenizer, letters=("Of course", "B"))
