"""Self-Instruct with a scripted writer: every count by hand, no similar pair, and a killed run that goes on."""

import json
import random
import re
from itertools import combinations

import pytest

from lifecycle_hf.evaluation.text import rouge_l
from lifecycle_hf.synthesis import Cut, self_instruct
from lifecycle_hf.synthesis.self_instruct import filter_instances, listed_tasks, parse_instances

SEEDS = [
    {"instruction": "Is the day a day of work?", "is_classification": True, "input": "Sunday", "output": "no"},
    {"instruction": "Count the letters.", "instances": [{"input": "abc", "output": "3"}]},
    {"instruction": "Who painted the ceiling of that chapel?", "input": "", "output": "Michelangelo"},
]
ROUNDS = [
    Cut(
        " Name a fruit that grows on trees.\nTask 5: Draw a red circle now.\nTask 6: Sing.\n7. ¿Que hora es?\n"
        "Task 8: Name one fruit that grows on trees.\n**Task 9:** Say if the number is even\nor odd.\n"
        "Task 10: count the letters!\nTask 11: Write a long poem ab"
    ),
    "Here are some:\n1. Tell a joke about cows.\n2. Describe the taste of water.\n3. Recite pi. 4",
    Cut("Task 6: Repeat what I say."),
    "Compare a bicycle with a horse.",
]
INSTANCES = {
    "Name a fruit that grows on trees.": " none\nOutput: apple\nInput: none\nOutput: apple",
    "Say if the number is even or odd.": " even\nInput: 4\nOutput: odd\nInput: 3\nOutput: even\nInput: 3\n"
    "Output: 5\nInput: 5\nOutput:\nInput: 9",
    "Tell a joke about cows.": "a cow, and that is all",
    "Describe the taste of water.": "**Input:** None.\n**Output:** It has none.",
    "Recite pi. 4": Cut("Input: to 3 digits\nOutput: 3.14\nInput: to 200 digits\nOutput: 3.14159265358"),
    "Compare a bicycle with a horse.": "N/A\nOutput: Both carry a person.",
}


class Script:
    """Answer by the last line of the prompt; `kill` is the call that is not answered."""

    def __init__(self, rounds=ROUNDS, instances=INSTANCES, kill=None):
        self.rounds, self.instances, self.kill, self.calls, self.prompts = rounds, instances, kill, 0, []
        self.name, self.batch_size, self.tokens, self.seeds = "script", 1, {"prompt": 0, "completion": 0}, []

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        self.calls += 1
        if self.calls == self.kill:
            raise KeyboardInterrupt
        self.tokens["completion"] += len(chats)
        return [self.answer("\n".join(turn["content"] for turn in chat), temperature) for chat in chats]

    def answer(self, prompt, temperature):
        self.prompts.append(prompt)
        *_, task, kind = prompt.splitlines()
        if kind == "Classification:":
            return "Yes." if "even" in task else "Answer: no, yes"
        if kind in ("Input:", "Output:"):
            assert (kind == "Output:") == ("even" in task)
            return self.instances[task.removeprefix("Task: ")]
        assert temperature == 0.7
        # the round follows from what is known: the first text until one of its tasks is in the prompt, and so on
        shown = set(re.findall(r"Task \d+: (.*)", prompt))
        known = [i for i, text in enumerate(self.rounds) if shown & set(listed_tasks(text, 0))]
        return self.rounds[known[-1] + 1 if known else 0]


def run(folder, writer=None, **options):
    options = {"target": 4, "prompts_per_round": 1} | options
    return self_instruct(writer or Script(), SEEDS, output_dir=folder, **options)


def test_every_count_by_hand(tmp_path):
    writer = Script(rounds=ROUNDS[:2])
    rows, report = run(tmp_path, writer)
    first, second = {"is_classification": False, "round": 0}, {"is_classification": False, "round": 1}
    assert rows == [
        {"instruction": "Name a fruit that grows on trees.", "input": "", "output": "apple"} | first,
        {"instruction": "Say if the number is even or odd.", "input": "4", "output": "even"}
        | {"is_classification": True, "round": 0},
        {"instruction": "Describe the taste of water.", "input": "", "output": "It has none."} | second,
        {"instruction": "Recite pi. 4", "input": "to 3 digits", "output": "3.14"} | second,
    ]
    # round 0 has eight tasks: two pass; the fifth shares 6 words of 7 with the first: 12/14, the seventh is a seed
    # round 1 has three, of which the jokes get no instance
    assert report["instructions"] == {
        "kept": 4, "similar": 2, "keyword": 1, "too short": 1, "start": 1, "cut off": 1, "no instance": 1
    }  # fmt: skip
    assert report["instances"] == {
        "kept": 4, "repeated": 1, "input with other outputs": 2, "output is input": 1, "empty output": 1, "cut off": 1
    }  # fmt: skip
    # 1 + 2 + 2 texts in round 0, 1 + 3 + 3 in round 1
    assert report["rounds"] == 2 and report["tokens"] == {"prompt": 0, "completion": 12} and writer.calls == 12
    assert [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()] == rows
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_the_context_has_two_generated_tasks_and_six_of_people(tmp_path):
    tasks = list(INSTANCES)
    writer = Script(rounds=[f"9. {tasks[0]}\n10. {tasks[1]}", f"9. {tasks[3]}\n10. {tasks[5]}"])
    people = [row | {"instruction": f"{row['instruction']} {i}"} for i in range(4) for row in SEEDS]
    self_instruct(writer, people, output_dir=tmp_path, target=4, prompts_per_round=1)
    asked = [prompt for prompt in writer.prompts if re.search(r"Task 9:$", prompt)]
    shown = [[line.split(": ", 1)[1] for line in re.findall(r"Task [1-8]: .*", prompt)] for prompt in asked]
    own = {row["instruction"] for row in people}
    assert [len(set(tasks)) for tasks in shown] == [8, 8] and [len(set(tasks) - own) for tasks in shown] == [0, 2]


@pytest.mark.parametrize("kill", range(1, 13))
def test_a_killed_run_goes_on_and_gives_the_same(kill, tmp_path):
    run(tmp_path / "whole", Script(rounds=ROUNDS[:2]))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Script(rounds=ROUNDS[:2], kill=kill))
    path = tmp_path / "cut" / "written.jsonl"
    with path.open("ab") as file:
        file.write('{"key": "é'.encode()[: 9 + kill % 3])
    writer = Script(rounds=ROUNDS[:2])
    run(tmp_path / "cut", writer)
    assert writer.calls == 12 - (kill - 1)
    for name in ("generated.jsonl", "report.json", "written.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_kept_pair_is_similar_whatever_the_order(tmp_path):
    draw = random.Random(0)
    for number in range(20):
        tasks = [
            " ".join(draw.choices(["say", "add", "two", "sum", "red", "cat"], k=draw.randrange(3, 9)))
            for _ in range(40)
        ]
        texts = ["\n".join(f"{i}. {task}" for i, task in enumerate(part, 1)) for part in (tasks[:20], tasks[20:])]

        def writer(chats, texts=texts, **options):
            last = [chat[1]["content"] for chat in chats]
            if last[0].startswith("Task"):
                return texts[: len(chats)]
            return ["no" if line == "Classification:" else " none\nOutput: x" for line in last]

        with pytest.warns(UserWarning, match="nothing was kept in 1 rounds in a row"):
            rows, report = self_instruct(
                writer, SEEDS, output_dir=tmp_path / str(number), prompts_per_round=2, patience=1, target=100
            )
        kept = [row["instruction"] for row in [*SEEDS, *rows]]
        assert 10 < len(kept) < 43 and max(rouge_l(a, b) for a, b in combinations(kept, 2)) < 0.7
        assert sum(report["instructions"].values()) == 80  # two rounds of all tasks
        for task in set(tasks) - set(kept):
            assert max(rouge_l(task, other) for other in kept) >= 0.7  # what was dropped is similar to what was kept


def test_a_list_is_read_from_its_number_on():
    assert listed_tasks("Sing a song.\nTask 10: Go.\nTask 11:\n", 9) == ["Sing a song.", "Go."]
    assert listed_tasks("Sure:\n\nTask 9: Sing\na song.", 9) == ["Sing a song."]
    assert listed_tasks("Sing.\nTask 10: 2. Go.\nTask 11: 3 to 5.", 9) == ["Sing.", "Go.", "3 to 5."]
    assert listed_tasks("Add 2 and 3.", 9) == ["Add 2 and 3."] and listed_tasks("", 9) == []


def test_instances_are_read_with_or_without_the_first_name():
    assert parse_instances(" a\nb\nOutput: c\nd", False) == [{"input": "a\nb", "output": "c\nd"}]
    assert parse_instances("Input: <noinput>\nOutput: none", False) == [{"input": "", "output": "none"}]
    assert parse_instances("x\nInput: 1\nInput: 2\nOutput: y", True) == [{"output": "x", "input": "1"}]
    assert parse_instances("Input: 1", True) == parse_instances("", False) == []
    for text, whole in (("a\nOutput: b\nOutput: c", True), ("a\nOutput: b", False), ("a\nOutput: b\nInput:", True)):
        assert bool(filter_instances(parse_instances(Cut(text), False))[0]) is whole  # the last field alone is cut off
    assert filter_instances([{"input": "It is so", "output": "it is  so"}]) == ([], {"output is input": 1})
    row = {"input": "", "output": "a"}
    assert filter_instances([row, {"input": "", "output": "b"}])[0] == [row, {"input": "", "output": "b"}]


def test_a_higher_target_goes_on(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "more", target=2)
    writer = Script()
    run(tmp_path / "more", writer)
    assert (
        writer.prompts
        and (tmp_path / "more" / "generated.jsonl").read_bytes()
        == (tmp_path / "whole" / "generated.jsonl").read_bytes()
    )


def test_what_can_not_be(tmp_path):
    def garbage(chats, **options):
        return ["one"] * (len(chats) + 1)

    with pytest.raises(ValueError, match="'garbage' returned 2 texts for 1 chats. What it wrote before is in"):
        run(tmp_path / "garbage", garbage)
    assert (tmp_path / "garbage" / "generated.jsonl").read_text() == ""
    run(tmp_path / "a")
    with pytest.raises(ValueError, match="holds samples made with threshold=0.7, and this run has 0.5"):
        run(tmp_path / "a", threshold=0.5)
    with pytest.raises(ValueError, match="prompts_per_round=0"):
        run(tmp_path / "b", prompts_per_round=0)
    with pytest.raises(ValueError, match=r"seed tasks: 1 of 1 rows can't be used \(1 without an instruction\)"):
        self_instruct(Script(), [{"input": "x"}], output_dir=tmp_path / "c")
    with pytest.warns(UserWarning, match=r"seed tasks: 1 of 4 rows can't be used"):
        self_instruct(Script(), [*SEEDS, {"instruction": None}], output_dir=tmp_path / "d", target=1)
    with pytest.raises(ValueError, match="strict_data is on"):
        self_instruct(Script(), [*SEEDS, {"instruction": None}], output_dir=tmp_path / "e", strict_data=True)
