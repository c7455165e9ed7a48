"""ROUGE-L and BLEU: by hand, and against the packages rouge-score and sacrebleu; the first sentence of a prompt."""

import random

import pytest

from lifecycle_hf.evaluation.bootstrap import bootstrap_interval
from lifecycle_hf.evaluation.text import bleu, lcs_lengths, leads, rouge_l


def test_rouge_l_by_hand():
    # 4 words each; "police the gunman" is the longest common subsequence: 2·3 / (4 + 4)
    assert rouge_l("Police killed the gunman.", "police ended the gunman") == 0.75
    # 2 of 3 and 5 words: 2·2 / 8; case, signs and letters other than a-z part words
    assert rouge_l("a-b, C!", "a x b y z") == 0.5
    assert rouge_l("the same", "The same") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "?!") == rouge_l("", "") == 0.0
    assert rouge_l("a b c d e f g x y z", "a b c d e f g u v w") == 0.7  # exactly the threshold of Self-Instruct


def test_lcs_is_that_of_the_table():
    draw = random.Random(0)
    for _ in range(100):
        a, b = ([draw.choice("abcd") for _ in range(draw.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert lcs_lengths(a, [b, a]) == [table[-1][-1], len(a)]


def test_rouge_l_equals_rouge_score_on_random_strings():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    draw = random.Random(1)
    signs = ["a", "b", "C", "7", "ab", "ABC", "é", "ß", "İ", "中", "_", "-", "\n", ".", " ", "  ", "k"]
    for _ in range(300):
        ours, theirs = ("".join(draw.choices(signs, k=draw.randrange(120))) for _ in range(2))
        expected = scorer.score(theirs, ours)["rougeL"].fmeasure
        assert rouge_l(ours, theirs) == pytest.approx(expected, rel=1e-12)


def test_bleu_by_hand():
    # 1- to 4-grams: 5 of 6, 3 of 5, 2 of 4, 1 of 3; as long as the reference, so no brevity penalty
    found = bleu(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert found == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4), rel=1e-12)


def test_bleu_is_that_of_the_corpus_and_so_are_its_resamples():
    corpus_bleu = pytest.importorskip("sacrebleu").corpus_bleu
    draw = random.Random(2)
    rows = [["".join(draw.choices(["a ", "b ", "c. ", "d"], k=draw.randrange(14))) for _ in range(40)] for _ in "12"]
    found = bleu(*rows)
    assert found == pytest.approx(corpus_bleu(rows[0], [rows[1]]).score / 100, rel=1e-12)
    taken = [draw.randrange(40) for _ in range(40)]  # what a resample of the rows gives
    expected = corpus_bleu([rows[0][i] for i in taken], [[rows[1][i] for i in taken]]).score / 100
    assert found.statistic(found.columns[taken].mean(0)) == pytest.approx(expected, rel=1e-12)
    low, high = bootstrap_interval(found, resamples=200)
    assert low < found < high


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["Sum up:\nAnn: Hi. How are you?\nBob: Well.", "Sum up:\nBob: I met Mr. Fox today. He ran."],
         ["Ann: Hi. How are you?", "Bob: I met Mr. Fox today."]),
        (["Title of: u.s. output fell . \n\nTitle:\n", "Title of: a u.k. bank ... \n\nTitle:\n"],
         ["u.s. output fell .", "a u.k. bank ..."]),
        (["Arvel is far. It is small.", "Arvels are far."], ["Arvel is far.", "Arvels are far."]),
        (["One alone. It has no other."], ["One alone."]),
        (["Both start", "Both start so"], ["start", "start so"]),
    ],
)  # fmt: skip
def test_leads_are_first_sentences_behind_what_all_prompts_begin_with(prompts, expected):
    assert leads(prompts) == expected
