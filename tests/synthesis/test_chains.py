"""Chains of thought by examples: what the writer sees, and which chains are kept."""

import pytest
from datasets import Dataset

from lifecycle_hf.synthesis import write_chains

ROWS = Dataset.from_list(
    [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "chain": ""},
        {"instruction": "Add.", "input": "2, 2", "output": "4", "chain": ""},
        {"instruction": "Add.", "input": "3, 2", "output": "5", "chain": ""},
        {"instruction": "Add.", "input": "4, 2", "output": "6", "chain": "4 and 2 is 6."},
        {"instruction": "Add.", "input": "5, 2", "output": "7", "chain": ""},
    ]
)
EXAMPLE = {"instruction": "Add.", "input": "1, 1", "output": "2", "chain": "1 and 1 is 2."}
SAID = {
    "1, 2": "1 and 2 is 3. The answer is 3.",
    "2, 2": "2 and 2 is 5. The answer is 5.",
    "3, 2": "I do not know.",
    "5, 2": "The answer is 7.",
}


def test_chains_are_kept_that_end_at_the_answer(tmp_path):
    asked = []

    def writer(chats, **options):
        asked.extend(chats)
        return [SAID[chat[-1]["content"].split("\n\n")[1]] for chat in chats]

    rows, told = write_chains(writer, ROWS, [EXAMPLE], output_dir=tmp_path)
    assert rows["chain"] == ["1 and 2 is 3.", "", "", "4 and 2 is 6.", ""]
    assert told == {"had a chain": 1, "kept": 1, "another answer": 1, "no answer": 1, "no steps": 1}
    assert [turn["content"] for turn in asked[0]] == [
        "Add.\n\n1, 1\n\nLet's think step by step.",
        "1 and 1 is 2. The answer is 2.",
        "Add.\n\n1, 2\n\nLet's think step by step.",
    ]
    again, _ = write_chains(lambda chats, **options: [], ROWS, [EXAMPLE], output_dir=tmp_path)  # all is kept
    assert again.to_list() == rows.to_list() and len(asked) == 4


def test_an_example_without_a_chain_is_told(tmp_path):
    with pytest.raises(ValueError, match="example 0 lacks chain"):
        write_chains(lambda chats, **options: [], ROWS, [EXAMPLE | {"chain": ""}], output_dir=tmp_path)
