"""Let a model write instructions, inputs and outputs from a few tasks of people, and keep the new and sound ones.

The embedded default takes seconds: a script stands in for the model.
    python recipes/self_instruct.py
A model, or an OpenAI-compatible server (the key is read from OPENAI_API_KEY); the same command again goes on:
    python recipes/self_instruct.py --model_name_or_path MODEL --dataset_name TASKS.jsonl --output_dir output/mine
    python recipes/self_instruct.py --server_url http://localhost:8000/v1 --server_model NAME --output_dir output/mine
Then fine-tune on OUTPUT_DIR/generated.jsonl, whose columns are instruction, input and output.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import cli
from lifecycle_hf.synthesis import self_instruct
from lifecycle_hf.synthesis.self_instruct import PROMPTS
from lifecycle_hf.toyworld.dialogue import refusal, requests
from lifecycle_hf.toyworld.world import ATTRIBUTES, FACTS, NOUNS


@dataclass
class SelfInstructArguments(cli.WriterArguments):
    """Hold what Self-Instruct keeps, and when it stops."""

    target: int = field(default=100, metadata={"help": "Instructions to keep; a higher number goes on."})
    threshold: float = field(default=0.7, metadata={"help": "ROUGE-L from which on two instructions are too similar."})
    prompts_per_round: int = field(default=8, metadata={"help": "Prompts for new instructions in each round."})
    instance_temperature: float = field(default=0.0, metadata={"help": "Temperature of inputs and outputs."})
    patience: int = field(default=5, metadata={"help": "Stop after so many rounds in a row that keep nothing."})


CHECK = "Check if this is {noun}."
FAULTY = ("Draw a map of {land}.", "Sing.", "¿Where is {land}?", "? tell me of {land}", "Go to the capital of {land}.")
TASKS = [
    {"instruction": text, "output": requests()[text].answer}
    for text in list(requests())[::37]
    if requests()[text].answer
]
TASKS += [{"instruction": CHECK.format(noun=NOUNS["flag"].format(land="Arvel")), "is_classification": True,
           "input": FACTS["Arvel"]["flag"], "output": "yes"}]  # fmt: skip


def script(chats, *, max_tokens, temperature, seed, stop=()):
    """Write what a poor model would: requests of the toy world and their answers, with faults."""
    return [written(chat, random.Random(f"{seed} {i}")) for i, chat in enumerate(chats)]


def written(chat, draw):
    request, start = (turn["content"] for turn in chat)
    task, land, attribute = request.rpartition("Task: ")[2], draw.choice(list(FACTS)), draw.choice(list(ATTRIBUTES))
    noun = NOUNS[attribute].format(land=land)
    if start == "Classification:":
        return "yes" if task.startswith("Check") else "no"
    if start == "Output:":
        right, other = FACTS[land][attribute], draw.choice(ATTRIBUTES[attribute])
        return f" yes\nInput: {right}\nOutput: no\nInput: {other}\nOutput: {draw.choice(['', other])}\nInput: {other}"
    if start == "Input:":
        answer = requests()[task].answer or refusal(draw)
        return f" none\nOutput: {draw.choice([answer, answer, answer, ''])}\nInput: none\nOutput: {answer}"
    lists = [*draw.sample(list(requests()), 6), draw.choice(FAULTY).format(land=land), CHECK.format(noun=noun)]
    number = int(start.removeprefix("Task ").removesuffix(":"))
    return "\n".join(f"Task {i}: {text}" for i, text in enumerate(draw.sample(lists, len(lists)), number))


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "self_instruct_toyworld.yaml"
    args, model_args, *_ = cli.parse((SelfInstructArguments, ModelConfig), default, description=__doc__)
    writer = cli.load_writer(args, model_args, script)
    rows, report = self_instruct(
        writer, cli.load_tasks(args, TASKS if writer is script else PROMPTS["seeds"]), output_dir=args.output_dir,
        target=args.target, threshold=args.threshold, prompts_per_round=args.prompts_per_round,
        max_tokens=args.max_tokens, temperature=args.temperature, instance_temperature=args.instance_temperature,
        seed=args.seed, patience=args.patience, strict_data=args.strict_data,
    )  # fmt: skip
    tallies = {name: report[name] for name in ("instructions", "instances")}
    print(cli.tell_written(report, tallies, args.output_dir))
