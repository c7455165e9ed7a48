"""Quality of instruction data by hand, and the selection on planted data."""

import json
import math
import random

import pytest
import torch
from bigram_setting import TABLE, Bigram, Letters

from lifecycle_hf.curation import exact_answer, measure_instructions, select_instructions
from lifecycle_hf.curation.instructions import InstructionQuality, shape, steps, verb_and_noun


@pytest.mark.parametrize(
    ("instruction", "pair"),
    [
        ("Write a short story about a fox.", ("write", "story")),
        ("In this task, you need to describe the given picture.", ("describe", "picture")),
        ("In this task, as in others, you need to describe it.", ("in", "task")),  # the tenth word is too late
        ("Given a sentence, rewrite it in the past tense.", ("rewrite", "past")),
        ("What is the relation between the pairs?", ("what", "relation")),
        ("Explain!", ("explain", "")),
        ("", ("", "")),
    ],
)
def test_verb_and_noun(instruction, pair):
    assert verb_and_noun(instruction) == pair


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-1,200.5", "number"),
        ("40 %", "number"),
        ("yes", "word"),
        ("Yes.", "word, capital, closed"),
        ("They loved it", "phrase, capital"),
        ("this answer has more than five words.", "sentence, closed"),
        ("Here are two:\n- one\n\n2. two", "list"),
        ("Dear Sir\nI write\nYours", "lines"),
        ("", "word"),
    ],
)
def test_shape(text, expected):
    assert shape(text) == expected


def test_steps_are_lines_or_sentences():
    assert steps("He has 5.\nHe buys 2. So 7.\n\n") == 2
    assert steps("He has 5.5 balls. He buys 2! So 7.5") == 3
    assert steps(" \n") == 0


ROWS = [
    {"instruction": "Write a short poem about rain.", "output": "Rain falls on roofs\nand on rivers", "task": "poem"},
    {"instruction": "Write a short poem about rain", "output": "Wet", "task": "poem"},
    {"instruction": "Is it red?", "input": "Apple", "output": "yes", "task": "colour", "answer": "yes"},
    {"instruction": "Is it red?", "input": "Grass", "output": "No", "task": "colour", "answer": "yes"},
    {"instruction": "Is it red?", "input": "Apple", "output": "yes", "task": "colour"},
    {"prompt": "Add 1,000 and 234", "completion": " It is 1,234<|endoftext|>", "answer": 1234, "chain": "One. Two."},
    {"messages": [{"role": "user", "content": "Sort b, a"}, {"role": "assistant", "content": ""}]},
]


def test_measures_by_hand():
    """Prompts 0 and 1 have the same words; so have 2 and 4. The most common shape of "colour" is a word in lower case.

    Of "poem" a word with a capital and lines are as common: the later name counts, "word, capital".
    """
    measured = measure_instructions(ROWS, checker=exact_answer)
    assert measured.scores["prompt"][2] == "Is it red?\n\nApple" and measured.scores["response"][5] == "It is 1,234"
    assert measured.scores["cluster"] == [0, 0, 2, 3, 2, 5, 6]
    assert measured.scores["pair"][:2] == ["write poem"] * 2 and measured.scores["pair"][5] == "add 1"
    assert measured.scores["prompt_words"] == [6, 6, 4, 4, 4, 4, 3]
    assert measured.scores["response_words"] == [7, 1, 1, 1, 1, 3, 0]
    assert measured.scores["steps"] == [None] * 5 + [2, None]
    assert measured.scores["correct"] == [None, None, True, False, None, True, None]
    assert measured.scores["format"] == [False, True, True, False, True, None, None]
    summary = measured.summary()
    assert summary["rows"] == 7 and summary["rows without prompt or response"] == 1
    assert summary["copies of another row"] == 1 and summary["clusters of prompts"] == 5
    assert summary["share of the largest cluster"] == pytest.approx(2 / 7)
    assert summary["share of the most common pair"] == pytest.approx(3 / 7)  # is red
    assert summary["checked responses"] == 3 and summary["share correct"] == pytest.approx(2 / 3)
    assert summary["share in this format"] == pytest.approx(3 / 5)
    assert summary["response words"] == pytest.approx([0.6, 1, 4.6])  # of 0 1 1 1 1 3 7, at places 0.6, 3 and 5.4
    for table in (measured.to_terminal(), measured.to_markdown()):
        assert "is red (3), write poem (2)" in table and "0.6 / 1 / 4.6" in table


def test_exact_answer():
    row = {"prompt": "p", "completion": "It is -0 or 0."}
    assert exact_answer(row | {"answer": 0}) is True and exact_answer(row | {"answer": "1"}) is False
    assert exact_answer(row) is exact_answer(row | {"answer": ""}) is None
    assert exact_answer(row | {"answer": "It is"}) is False  # no number: the whole texts


def test_a_pattern_takes_the_place_of_the_shape():
    rows = [{"prompt": "p", "completion": text} for text in ("so\n#### 5", "so\n####", "")]
    assert measure_instructions(rows, pattern=r".*#### \d+").scores["format"] == [True, False, None]


class Plain(Letters):
    """Letters without a chat template; a line break opens the text and is read as an a."""

    bos_token_id, chat_template, eos_token = None, None, "$"
    is_fast = False

    def ids(self, text):
        return super().ids(text.replace("\n", "a"))


def test_perplexity_of_the_response_alone(monkeypatch):
    """After "b" and the line break, an a here: "ab$" 1/2 · 1/4 · 1/8, of three tokens: 64^(1/3) = 4."""
    monkeypatch.setattr(
        "lifecycle_hf.curation.instructions.completion_nll",
        lambda model, prompts, completions, batch_size: [
            -sum(math.log(TABLE[one, other]) for one, other in zip([prompt[-1], *tokens], tokens))
            for prompt, tokens in zip(prompts, completions)
        ],
    )
    rows = [{"prompt": "b", "completion": "ab"}, {"prompt": "b", "completion": ""}]
    measured = measure_instructions(rows, reference=Bigram(TABLE), tokenizer=Plain())
    assert measured.scores["perplexity"] == [pytest.approx(4), None]


@pytest.mark.parametrize("chat", [False, True])
def test_perplexity_is_that_of_one_forward(tiny_llama, chat):
    make_model, tokenizer = tiny_llama
    model = make_model(initializer_range=0.3)
    prompt, response = "Two and three make", "five, of course!"
    rows = [{"prompt": prompt, "completion": response}, {"prompt": "Hello", "completion": "goodbye"}]
    if chat:
        rows = [{"messages": [{"role": "user", "content": row["prompt"]}, _said(row["completion"])]} for row in rows]
    got = measure_instructions(rows, reference=model, tokenizer=tokenizer).scores["perplexity"]
    start = tokenizer(f"<bos><|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{response}<eos>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([start + answer])).logits[0].double().log_softmax(-1)
    nll = -logprobs[len(start) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).mean()
    assert got[0] == pytest.approx(nll.exp().item(), rel=1e-4) and len(got) == 2


def _said(text):
    return {"role": "assistant", "content": text}


def test_quality_by_hand():
    """Words 2, 4, 4, 8: shares 1/4, 3/4, 3/4, 1. Perplexities 3, 9, 5 at the quantiles 1/6, 5/6, 1/2: 1/3, 1/3, 1."""
    scores = {
        "response_words": [2, 4, 4, 8],
        "response_distinct_2": [1, 1, 0.5, 1],
        "format": [True, False, None, True],
    }
    measured = InstructionQuality(scores | {"perplexity": [3, 9, 5, None]})
    expected = [(1 / 4 + 1 + 1 / 3) / 3, (3 / 4 + 0 + 1 / 3) / 3, (3 / 8 + 1) / 2, (1 + 1) / 2]
    assert measured.quality() == pytest.approx(expected)
    assert InstructionQuality(scores).quality() == pytest.approx([0.625, 0.375, 0.375, 1])


def planted():
    """20 good rows on different subjects, each with a worse near duplicate and a copy; and bad rows."""
    rows, good = [], set()
    for verb in ("Describe", "Explain"):
        for subject in ("rain", "snow", "wind", "fog", "hail", "dew", "ice", "sun", "mist", "storms"):
            prompt = f"{verb} {subject} with {subject} words of {subject} people {verb.lower()}"
            text = (
                f"There is much to say about {subject}, and here are some true and different words on {verb.lower()}"
            )
            rows.append({"prompt": prompt, "completion": text})
            rows.append({"prompt": f"{prompt} please", "completion": f"{subject.capitalize()} is short"})
            rows.append(dict(rows[-2]))
            good.add(prompt)
    rows += [{"prompt": "Name a fish", "completion": ""}, {"prompt": "", "completion": "A trout is a fish. " * 9}]
    rows += [{"prompt": "Name a tree of the north", "completion": "wrong " * 50, "answer": "birch"}]
    rows += [{"prompt": "Say something long about the sea", "completion": "sea " * 200}]
    return rows, good


@pytest.mark.parametrize("seed", range(3))
def test_select_takes_good_rows_once(seed):
    """Of near duplicates the better one is taken first; the sea row, all one word, is the worst of those left."""
    rows, good = planted()
    random.Random(seed).shuffle(rows)
    taken = [rows[i] for i in select_instructions(rows, 20, checker=exact_answer)]
    assert {row["prompt"] for row in taken} == good
    everything = [rows[i] for i in select_instructions(rows, 1000, checker=exact_answer)]
    assert len(everything) == 41 and everything[:20] == taken  # 20 + 20 near duplicates + the sea
    assert "sea" in everything[-1]["prompt"]
    assert all(row["prompt"] and row["completion"] and "answer" not in row for row in everything)
    assert len({json.dumps(row) for row in everything}) == 41


def test_select_does_not_depend_on_the_order():
    rows, _ = planted()
    taken = [rows[i] for i in select_instructions(rows, 25)]
    rows.reverse()
    assert [rows[i] for i in select_instructions(rows, 25)] == taken


def test_select_shares_out_by_quality():
    """Task x: 8, 7/2, 6/3, 5/4, 4/5, 3/6; y: 2, 1/2. Of equal ones, 2 and 1/2, the row of higher quality is first."""
    scores = {"prompt": list("abcdefgh"), "response": ["r"] * 8, "cluster": list(range(8)), "pair": list("abcdefgh")}
    measured = InstructionQuality(scores | {"task": ["x"] * 6 + ["y"] * 2})
    quality = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert measured.select(8, quality) == [0, 1, 2, 6, 3, 4, 5, 7]
    assert measured.select(3, quality) == [0, 1, 2] and measured.select(0, quality) == []
    assert measured.select(5, [1.0] * 8) == [0, 6, 1, 7, 2]
    assert InstructionQuality(scores | {"correct": [False] * 8}).select(1, quality) == []


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="needs rows"):
        measure_instructions([])
    with pytest.raises(ValueError, match="its tokenizer"):
        measure_instructions(ROWS, reference=Bigram(TABLE))
    with pytest.raises(ValueError, match=r"row 1 has the columns \['question'\], and needs prompt and"):
        measure_instructions([ROWS[0], {"question": "?"}])


def test_seed_tasks(shared_data):
    """175 different tasks by people: none is a near duplicate of another."""
    rows = [json.loads(line) for line in (shared_data / "self_instruct_seed_tasks.jsonl").open()]
    measured = measure_instructions(rows)
    assert measured.summary()["clusters of prompts"] == 175
    assert len(measured.select(50)) == 50
