"""Evol-Instruct with a scripted writer: every rule and the lineage by hand, and a killed run that goes on."""

import json

import pytest

from lifecycle_hf.synthesis import OPERATORS, Cut, evol_instruct
from lifecycle_hf.synthesis.evol_instruct import answer_fault, instruction_fault, operator_prompt, says_equal

SEEDS = [
    {"instruction": "Add the numbers.", "input": "2 3", "output": "5"},
    {"instruction": "Name a bird."},
    {"instruction": "Say hello."},
    {"instruction": "Sort words.", "instances": [{"input": "", "output": ""}]},
    {"instruction": "Tell the time."},
    {"instruction": "Sing now."},
    {"instruction": "Be brief."},
]
EVOLVED = {
    "Add the numbers.\n\n2 3": "Add the numbers and show the steps.",
    "Add the numbers and show the steps.": "Add the numbers, show the steps, check them.",
    "Name a bird.": "name a  bird.",  # round 1 and 2: equal without asking
    "Say hello.": "Here is the Rewritten\nprompt: say hello twice.",  # round 1 and 2: copied
    "Sort words.": "Sort the words.",  # round 1 and 2: judged equal
    "Tell the time.": "Tell the time in Rome.",  # round 1 and 2: refused
    "Sing now.": "Sing loudly now.",  # round 1 and 2: an answer of stop words
    "Be brief.": Cut("Be as brief as"),  # round 1 and 2: cut off
}
ANSWERS = {
    "Add the numbers and show the steps.": " 2 + 3 = 5 ",
    "Add the numbers, show the steps, check them.": "5",
    "Tell the time in Rome.": "I'm sorry, I have no clock.",
    "Sing loudly now.": "And so - it is!",
}


class Script:
    """Answer by what stands in the chat; `kill` is the call that is not answered."""

    def __init__(self, kill=None):
        self.kill, self.calls, self.batch_size, self.name, self.asked = kill, 0, 2, "script", []

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        self.calls += 1
        if self.calls == self.kill:
            raise KeyboardInterrupt
        return [self.answer("\n".join(turn["content"] for turn in chat)) for chat in chats]

    def answer(self, prompt):
        self.asked.append(prompt)
        if prompt in ANSWERS:
            return ANSWERS[prompt]
        if prompt.endswith("Reply:"):
            return "Equal." if "First prompt: Sort words." in prompt else "They are not equal"
        return EVOLVED[prompt.partition("#Given prompt#:\n")[2].rpartition("\n#")[0]]


def run(folder, writer=None, **options):
    return evol_instruct(writer or Script(), SEEDS, output_dir=folder, **{"rounds": 2} | options)


def test_every_rule_and_the_lineage_by_hand(tmp_path):
    writer = Script()
    rows, report = run(tmp_path, writer)
    assert [(row["instruction"], row["output"], row["id"], row["parent"], row["round"]) for row in rows] == [
        ("Add the numbers and show the steps.", "2 + 3 = 5", "0.1", "0.0", 1),
        ("Add the numbers, show the steps, check them.", "5", "0.2", "0.1", 2),
    ]
    # each fault happens to its seed in both rounds; "name a  bird." is equal by itself and "Sort the words." is judged
    faults = {"no information gain": 4, "copied prompt": 2, "cut off": 2, "refusal": 2, "empty answer": 2}
    assert report["instructions"] == faults | {"kept": 2}
    assert sum(sum(tally.values()) for tally in report["operators"].values()) == 14
    for row in rows:
        assert row["operator"] in OPERATORS and row["input"] == "" and report["operators"][row["operator"]]["kept"] > 0
    # of 7 instructions 4 pass the first rules and 3 are not judged equal: 7 + 4 + 3 texts in each round, of which the
    # second call to judge two was made in round 1 already
    assert len(writer.asked) == 28 - 2
    assert [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()] == rows
    assert json.loads((tmp_path / "report.json").read_text()) == report


@pytest.mark.parametrize("kill", range(1, 16, 2))
def test_a_killed_run_goes_on_and_gives_the_same(kill, tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Script(kill))
    with (tmp_path / "cut" / "written.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    writer = Script()
    run(tmp_path / "cut", writer)
    assert writer.calls == 15 - (kill - 1)  # calls of two chats or one: 4 + 2 + 2 in round 1, 4 + 1 + 2 in round 2
    for name in ("generated.jsonl", "report.json", "written.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_more_rounds_go_on(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "more", rounds=1)
    writer = Script()
    run(tmp_path / "more", writer)
    assert writer.calls == 7
    whole, more = (tmp_path / name / "generated.jsonl" for name in ("whole", "more"))
    assert more.read_bytes() == whole.read_bytes()


def test_operators_are_drawn_by_seed(tmp_path):
    def operators(seed, **options):
        def writer(chats, **o):
            return [f"seed {o['seed']} not equal"] * len(chats)

        rows, _ = run(tmp_path / f"{seed} {len(options)}", writer, seed=seed, rounds=6, **options)
        return [row["operator"] for row in rows]

    assert operators(0) != operators(1) and set(operators(0)) == set(OPERATORS) and len(operators(0)) == 42
    assert set(operators(0, operators=["deepen"])) == {"deepen"}


def test_every_operator_has_its_own_prompt():
    prompts = [operator_prompt(name, "Count {x} to ten.") for name in OPERATORS]
    asked = [prompt[0]["content"] for prompt in prompts]
    assert len(set(asked)) == 6 and all(text.endswith("#Given prompt#:\nCount {x} to ten.") for text in asked)
    assert [prompt[1]["content"] for prompt in prompts] == ["#Rewritten prompt#:"] * 5 + ["#Created prompt#:"]


def test_the_rules_at_their_borders():
    assert answer_fault("Sorry, " + "x " * 78) == "refusal" and answer_fault("Sorry, " + "x " * 79) == ""
    assert answer_fault("?!") == answer_fault("") == answer_fault("No, it is not.") == "empty answer"
    assert answer_fault("No, Rome is not.") == "" and answer_fault(Cut("Rome")) == "cut off"
    assert instruction_fault(" ", "a") == instruction_fault("A  b", "a B") == "no information gain"
    assert (
        instruction_fault("Improve the #given prompt#", "a") == "copied prompt" and instruction_fault("c", "a") == ""
    )
    replies = {"Equal": True, "**equal**": True, "Not equal": False, "unequal": False, "maybe": False, "": False}
    assert {text: says_equal(text) for text in replies} == replies


def test_what_can_not_be(tmp_path):
    with pytest.raises(ValueError, match=r"operators=\['deeper'\]: give some of add_constraints, deepen, "):
        run(tmp_path, operators=["deeper"])
    with pytest.raises(ValueError, match=r"operators=\[\]"):
        run(tmp_path, operators=[])

    def dies(chats, **options):
        if "show the steps" in str(chats):
            raise TimeoutError("no answer")
        return Script()(chats, max_tokens=1, temperature=0, seed=0)

    with pytest.raises(ValueError, match="'dies' failed: TimeoutError: no answer. What it wrote before is in"):
        run(tmp_path, dies)
    assert len((tmp_path / "written.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="holds samples made with writer='dies'"):
        run(tmp_path)
    with pytest.raises(ValueError, match="seed tasks: 1 of 2 rows can't be used.*strict_data"):
        evol_instruct(Script(), [{"instruction": "a"}, {}], output_dir=tmp_path / "a", strict_data=True)
