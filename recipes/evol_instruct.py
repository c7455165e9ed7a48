"""Let a model evolve instructions into harder and rarer ones, round by round, and answer them.

The embedded default takes seconds: a script stands in for the model.
    python recipes/evol_instruct.py
A model, or an OpenAI-compatible server (the key is read from OPENAI_API_KEY); the same command again goes on:
    python recipes/evol_instruct.py --model_name_or_path MODEL --dataset_name TASKS.jsonl --output_dir output/mine
    python recipes/evol_instruct.py --server_url http://localhost:8000/v1 --server_model NAME --output_dir output/mine
Then fine-tune on OUTPUT_DIR/generated.jsonl, whose columns are instruction, input and output.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import cli
from lifecycle_hf.synthesis import OPERATORS, evol_instruct
from lifecycle_hf.synthesis.self_instruct import PROMPTS
from lifecycle_hf.toyworld.dialogue import REFUSALS, requests, statement


@dataclass
class EvolInstructArguments(cli.WriterArguments):
    """Hold how often, and in which ways, instructions are evolved."""

    rounds: int = field(default=4, metadata={"help": "How often each is evolved; a higher number goes on."})
    operators: list[str] = field(
        default_factory=lambda: list(OPERATORS), metadata={"help": f"Some of {', '.join(OPERATORS)}."}
    )


TASKS = [{"instruction": text} for text in list(requests())[::12]]
EXTRA = ("Answer in one word.", "Say how you know.", "Be polite.", "Name the land, too.", "Then ask me something.")


def script(chats, *, max_tokens, temperature, seed, stop=()):
    """Write what a poor model would: requests of the toy world with additions, and their answers, with faults."""
    return [written(chat, random.Random(f"{seed} {i}")) for i, chat in enumerate(chats)]


def written(chat, draw):
    text, start = chat[0]["content"], chat[-1]["content"]
    if start == "Reply:":
        return " equal" if "please" in text else " not equal"
    if len(chat) == 1:
        request = next((request for known, request in requests().items() if text.startswith(known)), None)
        if request is None:
            return "It is so!"
        return statement(request, request.answer, draw) if request.answer else draw.choice(REFUSALS)
    given = text.rpartition("#Given prompt#:\n")[2]
    evolved = draw.choice(list(requests())) if "Created" in start else f"{given} {draw.choice(EXTRA)}"
    faulty = (given, f"{given} please", f"Rewritten prompt: {given}", "Tell me more about it.")
    return draw.choice([*faulty, *[evolved] * 8])


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "evol_instruct_toyworld.yaml"
    args, model_args, *_ = cli.parse((EvolInstructArguments, ModelConfig), default, description=__doc__)
    writer = cli.load_writer(args, model_args, script)
    rows, report = evol_instruct(
        writer, cli.load_tasks(args, TASKS if writer is script else PROMPTS["seeds"]), output_dir=args.output_dir,
        rounds=args.rounds, operators=args.operators, max_tokens=args.max_tokens, temperature=args.temperature,
        seed=args.seed, strict_data=args.strict_data,
    )  # fmt: skip
    tallies = {"all": report["instructions"]} | report["operators"]
    print(cli.tell_written(report, tallies, args.output_dir))
