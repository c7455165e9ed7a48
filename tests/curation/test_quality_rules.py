"""Rules of Gopher and C4: what each removes, and the counts of repeated runs of words against datatrove's own."""

import pickle
import time

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf.curation import QualityRules
from lifecycle_hf.curation.quality_rules import Spaces, _Repetition, covered_characters

CLEAN = """The old house stands in the middle of a garden that nobody has seen for years.
Its doors are made of dark wood, and they have never been painted.
When the wind comes from the sea, all windows begin to sing with it.
My grandmother told us that a captain built these walls for his daughter.
She waited there for a letter, which arrived after she had left for Lisbon.
We still keep that letter in the kitchen, behind the blue plates."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CLEAN, ""),
        ("", "empty"),
        (" \n\t", "empty"),
        ("The cat sat on the mat with the dog.", "gopher_short_doc"),
        (" ".join(["of", "to", "an", "be", "the"] * 12), "gopher_below_avg_threshold"),
        (CLEAN + " #" * 40, "gopher_too_many_hashes"),
        (CLEAN + " ..." * 40, "gopher_too_many_ellipsis"),
        ("\n".join(f"- {line}" for line in CLEAN.splitlines()), "gopher_too_many_bullets"),
        (CLEAN + " 1234" * 40, "gopher_below_alpha_threshold"),
        (" ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)), "gopher_enough_stop_words"),
        ("\n".join([*CLEAN.splitlines(), *["One line of the page."] * 5]), "dup_line_frac"),
        ("\n\n".join([*CLEAN.splitlines()[:3], *[CLEAN.splitlines()[4]] * 2]), "dup_para_char_frac"),
        (CLEAN + " that is what the man said" * 6, "top_4_gram"),
    ],
)
def test_rules_by_name(text, reason):
    assert QualityRules()([text])[0].reason == reason


def test_options_of_groups():
    text = "The cat sat on the mat with the dog."
    quality = QualityRules(gopher_quality={"min_doc_words": 3}, gopher_repetition=False)
    assert quality([text, "The cat"])[0].kept and quality([text, "The cat"])[1].reason == "gopher_short_doc"
    assert QualityRules(gopher_quality=False, gopher_repetition={"top_n_grams": ()})([text])[0].kept
    with pytest.raises(ValueError, match="QualityRules: c4: .*unexpected keyword.*min_num_sentences"):
        QualityRules(c4={"sentences": 3})
    assert pickle.loads(pickle.dumps(quality))([text])[0].kept


def test_c4_cuts_lines_and_tells_which():
    lines = CLEAN.splitlines()
    page = ["Home | About", *lines[:3], "", "Enable javascript to read this page.", f"{lines[3]}[12]", "Too short."]
    page += [f"  {line}" for line in lines[4:]]
    (decision,) = QualityRules(c4=True)(["\n".join(page)])
    assert decision.kept and decision.text == CLEAN
    given = "\n".join(page)
    assert [(given[start:end], reason) for start, end, reason in decision.spans] == [
        ("Home | About", "no_terminal_punc"),
        ("Enable javascript to read this page.", "javascript"),
        ("[12]", "citation"),
        ("Too short.", "too_few_words"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One is here now. Two is here now.", "too_few_sentences"),
        (CLEAN + "\nfunction () { it is. }.", "curly_bracket"),
        (CLEAN + "\nThis is lorem ipsum text.", "lorem_ipsum"),
    ],
)
def test_c4_removes_pages(text, reason):
    assert QualityRules(c4=True)([text])[0].reason == reason


def test_c4_on_sentences_and_nothing_left():
    rules = QualityRules(
        c4={"split_paragraph": False, "min_num_sentences": -1}, gopher_quality=False, gopher_repetition=False
    )
    text = "It was cold there. No. We went home early! Accept the use of cookies."
    (decision,) = rules([text])
    assert decision.text == "It was cold there. We went home early!"
    assert [text[start:end].strip() for start, end, _ in decision.spans] == ["No.", "Accept the use of cookies."]
    assert rules(["No."])[0].reason == "empty"


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=80)


@given(WORDS, st.floats(0.01, 0.6), st.floats(0.01, 0.6))
@settings(max_examples=150, deadline=None)
def test_repeated_runs_are_those_of_datatrove(words, top, repeated):
    """Words of one letter: datatrove joins the words of a run, so that "ab c" and "a bc" are the same for it."""
    options = {"top_n_grams": ((2, top), (3, 0.9 * top)), "dup_n_grams": ((2, repeated), (3, 0.9 * repeated))}
    options |= {"dup_line_frac": None, "dup_para_frac": None, "language": Spaces()}
    document = Document(text=" ".join(words), id="")
    assert _Repetition(**options).filter(document) == GopherRepetitionFilter(**options).filter(document)


def test_covered_characters_by_hand():
    """Of "a bb a bb a" with n = 2: "a bb" and "bb a" stand again from word 2 on, so that words 2 to 4 are covered."""
    assert covered_characters(["a", "bb", "a", "bb", "a"], 2) == 1 + 2 + 1
    assert covered_characters(["a", "bb", "ccc"], 2) == covered_characters([], 2) == covered_characters(["a"], 2) == 0


def test_words_and_sentences():
    text = 'He said "No." Then he left! It was 3.5 km… or so'
    assert Spaces().sent_tokenize(text) == ['He said "No."', " Then he left!", " It was 3.5 km… or so"]
    assert Spaces().word_tokenize(" a  b\n") == ["a", "b"] and Spaces().sent_tokenize(" ") == []


@pytest.mark.parametrize("piece", ["word ", "a", ".", '."', "one two\n\n", "It is so. "])
def test_the_time_grows_as_the_text(piece):
    text = piece * (1_000_000 // len(piece))
    rules = QualityRules(gopher_quality={"max_doc_words": None}, c4=True)
    everything = QualityRules(gopher_quality=False, gopher_repetition={"dup_line_frac": 0, "dup_para_frac": 0})
    start = time.process_time()
    assert not rules([text])[0].kept
    everything([text])
    assert time.process_time() - start < 5
