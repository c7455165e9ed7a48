"""Constitutional AI: who is asked what, what is kept and dropped, and labels that do not depend on the order."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from lifecycle_hf.completions.judges import BothOrders
from lifecycle_hf.synthesis import Cut, label, load_constitution, revise
from lifecycle_hf.synthesis.constitution import draw_principles

PROMPTS = Dataset.from_dict({"prompt": ["one", "two", "three", "four", "five"]})
PRINCIPLES = load_constitution()


class Script:
    """Answer with the number of turns and the last words asked; `calls` are the chats so far."""

    name = "script"

    def __init__(self, special=None, fail_at=None):
        self.calls, self.special, self.fail_at = [], special or {}, fail_at

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise KeyboardInterrupt
        self.calls += chats
        return [
            self.special.get((chat[0]["content"], len(chat)), f"{chat[0]['content']} {len(chat)}") for chat in chats
        ]


def test_each_round_asks_for_a_critique_and_a_revision_by_its_principle(tmp_path):
    writer = Script()
    found = revise(writer, PROMPTS, PRINCIPLES, output_dir=tmp_path, rounds=2)
    assert len(writer.calls) == 5 * (1 + 2 * 2) and not found.dropped
    row = found.rows[1]
    assert row["answers"] == ["two 1", "two 5", "two 5"] and row["critiques"] == ["two 3", "two 3"]
    first, second = draw_principles(PRINCIPLES, 2, 0, 1)
    assert row["principles"] == [first.name, second.name] and first is not second
    asked = [chat for chat in writer.calls if chat[0]["content"] == "two"]
    assert [turn["role"] for turn in asked[-1]] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in asked[-1][1:4]] == ["two 5", second.critique, "two 3"]
    assert asked[-1][4]["content"].startswith(second.revision)
    sft = found.sft_rows()
    assert sft[1] == {"prompt": "two", "completion": "two 5"}
    assert [json.loads(line) for line in (tmp_path / "revised.jsonl").read_text().splitlines()] == found.rows


def test_empty_and_cut_texts_are_dropped_with_their_count(tmp_path):
    special = {("one", 1): " ", ("two", 3): "", ("three", 5): Cut("half a revi"), ("four", 3): Cut("half a critique")}
    found = revise(Script(special), PROMPTS, PRINCIPLES, output_dir=tmp_path)
    assert found.dropped == {"answer empty": 1, "critique empty": 1, "revision cut off": 1}
    assert [row["index"] for row in found.rows] == [3, 4]


@pytest.mark.parametrize("after", [5, 10])
def test_a_killed_run_goes_on_and_writes_the_same(tmp_path, after):
    whole, rest = Script(), Script()
    revise(whole, PROMPTS, PRINCIPLES, output_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        revise(Script(fail_at=after), PROMPTS, PRINCIPLES, output_dir=tmp_path / "killed")
    revise(rest, PROMPTS, PRINCIPLES, output_dir=tmp_path / "killed")
    assert len(rest.calls) == 15 - after
    for name in ("written.jsonl", "revised.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_principles_are_drawn_evenly_and_each_once_before_any_again():
    drawn = Counter(draw_principles(PRINCIPLES, 1, 0, i)[0].name for i in range(2000))
    assert all(abs(count - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5 for count in drawn.values()) and len(drawn) == 5
    assert Counter(p.name for p in draw_principles(PRINCIPLES, 7, 3, 1)).most_common(1)[0][1] == 2


class Letters(BothOrders):
    """Prefers the longer answer, if not told otherwise; `questions` is what it was asked."""

    def __init__(self, always=None):
        super().__init__()
        self.always, self.questions = always, []

    def first_letter(self, questions):
        self.questions += questions
        parts = [text.split("\n\n") for text in questions]
        lengths = [[len(part.split(": ")[1]) for part in row[2:4]] for row in parts]
        return [self.always if self.always is not None else 0.9 if a > b else 0.2 for a, b in lengths]


PAIRS = [("a", "bb"), ("ccc", "d"), ("same", "same"), ("e", "ff"), ("gggg", "h")]


def test_labels_are_asked_in_both_orders_by_a_principle(tmp_path):
    judge = Letters()
    rows, dropped = label(judge, PROMPTS, PAIRS, PRINCIPLES, output_dir=tmp_path / "1")
    # P(first letter) is 0.9 for the longer first and 0.2 else: P(longer is better) = (0.9 + 1 - 0.2) / 2
    assert rows["probability"] == pytest.approx([0.85] * 4) and dropped == {"equal answers": 1}
    assert rows["chosen"] == ["bb", "ccc", "ff", "gggg"] and rows["rejected"] == ["a", "d", "e", "h"]
    swapped, _ = label(Letters(), PROMPTS, [pair[::-1] for pair in PAIRS], PRINCIPLES, output_dir=tmp_path / "2")
    assert swapped.to_list() == rows.to_list()
    qualities = [draw_principles(PRINCIPLES, 1, 0, i)[0].quality for i in (0, 1, 3, 4)]
    assert len(judge.questions) == 8
    assert Counter(q.split("more ")[1].split("?\n")[0] for q in judge.questions) == Counter(qualities * 2)


def test_an_answer_that_was_cut_off_makes_no_pair(tmp_path):
    judge = Letters()
    pairs = [(Cut("a"), "bb"), ("ccc", Cut("d")), (Cut("same"), "same"), *PAIRS[3:]]
    rows, dropped = label(judge, PROMPTS, pairs, PRINCIPLES, output_dir=tmp_path)
    assert rows["chosen"] == ["ff", "gggg"] and dropped == {"answer cut off": 3} and len(judge.questions) == 4


def test_a_judge_that_always_says_the_same_letter_makes_no_pair(tmp_path):
    rows, dropped = label(Letters(always=0.97), PROMPTS, PAIRS, PRINCIPLES, output_dir=tmp_path)
    assert len(rows) == 0 and dropped == {"tie": 4, "equal answers": 1}


def test_labels_are_kept_as_they_come(tmp_path):
    seen = []

    def judge(prompts, pairs):
        seen.extend(prompts)
        if len(seen) > 3:
            raise KeyboardInterrupt
        return [1.0 for _ in pairs]

    with pytest.raises(KeyboardInterrupt):
        label(judge, PROMPTS, PAIRS, PRINCIPLES[:1], output_dir=tmp_path, batch_size=2)
    seen.clear()
    rows, dropped = label(judge, PROMPTS, PAIRS, PRINCIPLES[:1], output_dir=tmp_path, batch_size=2)
    assert seen == ["five"] and rows["chosen"] == ["a", "ccc", "e", "gggg"]
    with pytest.raises(ValueError, match="holds samples made with pairs"):
        label(judge, PROMPTS, PAIRS[::-1], PRINCIPLES[:1], output_dir=tmp_path, batch_size=2)


def test_a_judge_that_answers_garbage_is_told_with_the_pair(tmp_path):
    with pytest.raises(ValueError, match="returned 'yes' for pair 0, prompt 'one'"):
        label(lambda prompts, pairs: ["yes"] * len(pairs), PROMPTS, PAIRS, PRINCIPLES[:1], output_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "holds no list of principles"),
        ("- {name: a, critique: b, revision: c}", "principle 0 has the fields"),
        ("- {name: a, critique: b, revision: c, quality: ''}", "principle 0 has the fields"),
    ],
)
def test_a_constitution_that_can_not_be_read(tmp_path, text, told):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_constitution(tmp_path / "mine.yaml")
