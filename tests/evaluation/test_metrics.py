"""Metrics against numbers by hand and against lm-evaluation-harness."""

import math

import numpy as np
import pytest
import torch
from bigram_setting import TABLE, Bigram, Letters

from lifecycle_hf.evaluation.metrics import exact_match, kl_to_reference, multiple_choice, perplexity

TEXTS = ["a", "aab", "bbbba"]
# a$: 1/4.  aab$: 1/2 1/4 1/8.  bbbba$: 3/4 three times, 1/8, 1/4.
PROBABILITIES = [0.25, 0.5, 0.25, 0.125, 0.75, 0.75, 0.75, 0.125, 0.25]
EXPECTED = math.exp(-sum(map(math.log, PROBABILITIES)) / 9)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_mean_over_all_tokens(batch_size):
    assert perplexity(Bigram(TABLE), Letters(), TEXTS, batch_size=batch_size) == pytest.approx(EXPECTED, rel=1e-6)


def test_neither_the_mean_of_texts_nor_of_batches():
    per_text = [[0.25], [0.5, 0.25, 0.125], [0.75, 0.75, 0.75, 0.125, 0.25]]
    mean_of_means = math.exp(-sum(sum(map(math.log, row)) / len(row) for row in per_text) / 3)
    assert abs(mean_of_means - EXPECTED) > 0.1
    assert perplexity(Bigram(TABLE), Letters(), TEXTS, batch_size=1) == pytest.approx(EXPECTED, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    assert perplexity(Bigram(torch.full((3, 3), 1 / 3)), Letters(), TEXTS) == pytest.approx(3, rel=1e-6)


def test_an_end_token_is_not_doubled_and_texts_are_cut():
    assert perplexity(Bigram(TABLE), Letters(), ["a$"]) == pytest.approx(4)
    # Three tokens of bbbba$: two predictions, 3/4 each.
    assert perplexity(Bigram(TABLE), Letters(), ["bbbba"], max_length=3) == pytest.approx(4 / 3)


def test_masks_come_from_lengths_and_the_mode_is_left():
    model = Bigram(TABLE).train()
    perplexity(model, Letters(), TEXTS, batch_size=2)
    assert model.batches == [([2, 4], False), ([6], False)]
    assert model.training


def test_padding_does_not_matter_to_a_real_model(tiny_llama):
    make_model, tokenizer = tiny_llama
    model = make_model()
    texts = ["The capital of France is Paris.", "Two", "Please tell me a story about a small red fox."]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    for batch_size in (1, 2, 3):
        value = perplexity(model, tokenizer, texts, batch_size=batch_size)
        assert value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_conversation_begins_and_ends_once(tiny_llama):
    """The template writes BOS and EOS itself: −log p of exactly its ids, up to the last EOS."""
    make_model, tokenizer = tiny_llama
    model = make_model(initializer_range=0.2)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    ids = torch.tensor([ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]])
    nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert perplexity(model, tokenizer, [chat]) == pytest.approx(nll.exp().item(), rel=1e-5)


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_predict(texts):
    with pytest.raises(ValueError, match=f"perplexity got {len(texts)} texts, none of two tokens or more"):
        perplexity(Bigram(TABLE), Letters(), texts)


def test_the_items_are_those_of_the_texts_in_their_order():
    measured = perplexity(Bigram(TABLE), Letters(), TEXTS, batch_size=2)
    assert measured.columns[:, 1].tolist() == [1, 3, 5]
    assert measured.columns[:2, 0].tolist() == pytest.approx([math.log(4), math.log(64)], rel=1e-6)


def test_multiple_choice_by_hand():
    """After a: "b" 1/4, "bb" 3/16, "aab" 1/16; per character log 1/4 = −1.39, −0.84, −0.92: "bb" wins instead of "b".

    After b: "a" 1/8, "b" 3/4. The probabilities are shares of the sums.
    """
    answered = multiple_choice(
        Bigram(TABLE), Plain(), ["a", "b"], [["b", "bb", "aab"], ["a", "b"]], [1, 1], batch_size=2
    )
    assert answered.acc.columns[:, 0].tolist() == [0, 1] and answered.acc_norm.columns[:, 0].tolist() == [1, 1]
    expected = [[4 / 8, 3 / 8, 1 / 8], [1 / 7, 6 / 7, 0]]
    assert np.allclose(answered.probabilities, expected, atol=1e-6) and answered.labels.tolist() == [1, 1]


def test_an_end_that_the_tokenizer_appends_is_no_part_of_a_choice():
    """After a, b: 1/4 against a: 1/2; with the end appended the choices would be b$ after a$."""

    class Ended(Plain):
        def __call__(self, text):
            return {"input_ids": [*super().__call__(text)["input_ids"], self.eos_token_id]}

    answered = multiple_choice(Bigram(TABLE), Ended(), ["a"], [["b", "a"]], [1])
    assert np.allclose(answered.probabilities, [[1 / 3, 2 / 3]], atol=1e-6)


class Plain(Letters):
    """Spaces are no tokens."""

    def ids(self, text):
        return super().ids(text.replace(" ", ""))


@pytest.mark.parametrize(
    ("questions", "choices", "labels", "options", "words"),
    [
        ([], [], [], {}, "0 questions"),
        (["a"], [["b"]], [1], {}, "question 0 has the label 1"),
        (["a"], [["b", ""]], [0], {}, "question 0"),
        ([""], [["b"]], [0], {}, "1 tokens are left"),
        (["a"], [["bb"]], [0], {"max_length": 2}, "both need one"),
    ],
)
def test_questions_that_cannot_be_asked(questions, choices, labels, options, words):
    with pytest.raises(ValueError, match=words):
        multiple_choice(Bigram(TABLE), Plain(), questions, choices, labels, **options)


def test_exact_match():
    assert exact_match([" 4 ", "5"], ["4", "4"]).columns[:, 0].tolist() == [1, 0]
    pattern = r"(-?\d[\d,]*)"
    answers, references = ["so 3, no: 1,200", "none", "5"], ["… #### 1,200", "… #### 5", "so 5"]
    assert exact_match(answers, references, pattern=pattern).columns[:, 0].tolist() == [1, 0, 1]
    answers, references = [" Paris ", "Paris, 1789", ""], ["Paris", "Paris", ""]  # no match in any reference
    assert exact_match(answers, references, pattern=pattern).columns[:, 0].tolist() == [1, 0, 1]


def test_kl_by_hand():
    """From a: p = (1/2, 1/4, 1/4) against q = (1/4, 1/4, 1/2): 1/2·log 2 − 1/4·log 2 = 1/4·log 2. From b: p = q."""
    other = TABLE.clone()
    other[0] = torch.tensor([0.25, 0.25, 0.5])
    sequences = [[0], [1]], [[0, 1, 0], [1, 0]]  # states visited: a a b, b b
    measured = kl_to_reference(Bigram(TABLE), Bigram(other), *sequences)
    assert measured["kl"].columns[:, 0].tolist() == pytest.approx([2 * math.log(2) / 4, 0], abs=1e-6)
    assert measured["kl_per_token"] == pytest.approx(math.log(2) / 10, abs=1e-6)
    # Sampled tokens: from a, a (log 2) and b (0).
    assert kl_to_reference(Bigram(TABLE), Bigram(other), *sequences, estimator="k1")["kl"] == pytest.approx(
        math.log(2) / 2, abs=1e-6
    )
    assert kl_to_reference(Bigram(TABLE), Bigram(other), *sequences, estimator="k3")["kl"] == pytest.approx(
        (1 / 2 - 1 + math.log(2)) / 2, abs=1e-6
    )


def test_sampled_estimators_agree_with_the_exact_kl():
    other = torch.tensor([[0.3, 0.4, 0.3], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])
    draw, rows = np.random.default_rng(0), []
    for _ in range(2000):
        row = [0]
        for _ in range(4):
            row.append(int(draw.choice(3, p=TABLE[row[-1]].double() / TABLE[row[-1]].double().sum())))
        rows.append(row)
    sequences = [row[:1] for row in rows], [row[1:] for row in rows]
    kl = {
        estimator: kl_to_reference(Bigram(TABLE), Bigram(other), *sequences, estimator=estimator, batch_size=500)["kl"]
        for estimator in ("exact", "k1", "k3")
    }
    for estimator in ("k1", "k3"):
        error = (kl[estimator].columns[:, 0] - kl["exact"].columns[:, 0]).std() / 2000**0.5
        assert abs(kl[estimator] - kl["exact"]) < 4 * error
    assert kl["exact"].columns[:, 0].std() < kl["k1"].columns[:, 0].std()


def test_a_prompt_is_the_prefix_of_a_model_with_prefix_attention(tiny_llama):
    """Against the log-probs that training takes, by the home of scoring."""
    from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM
    from lifecycle_hf.completions.scoring import Completions, completion_logprobs

    _, tokenizer = tiny_llama
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LifecycleConfig(vocab_size=len(tokenizer), attention="prefix", initializer_range=0.3, **sizes)
    model = LifecycleForCausalLM(config).eval()
    question, choices = "Two and three make", ["five", "a small red fox"]
    got = multiple_choice(model, tokenizer, [question], [choices], [0]).probabilities[0]
    prompt = tokenizer(question)["input_ids"]
    answers = [tokenizer(f" {choice}")["input_ids"] for choice in choices]
    with torch.no_grad():
        logprobs = completion_logprobs(model, Completions.from_lists([prompt] * 2, answers, 0)).logprobs.sum(1)
    assert got.tolist() == pytest.approx(logprobs.softmax(0).tolist(), rel=1e-4)
