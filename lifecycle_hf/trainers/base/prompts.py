"""Prompts of the trainers that sample: tokenised, with room for a completion, and with what rewards need."""

from functools import partial

from datasets import Dataset
from torch import nn

from lifecycle_hf.completions.scorer import RewardSource
from lifecycle_hf.data.schemas import refuse_stream, to_prompts
from lifecycle_hf.data.tokenize import tokenize_prompts
from lifecycle_hf.trainers.base.options import SamplingOptions


def prepare_prompts(dataset: Dataset, tokenizer, args: SamplingOptions, where: str) -> Dataset:
    """Return rows with "prompt" (of at most `max_prompt_length` tokens), "prompt_ids" and the other columns."""
    options = {"max_length": args.max_prompt_length, "where": where, "strict": args.strict_data}
    refuse_stream(dataset, where)
    dataset = to_prompts(dataset, where)
    if args.chat_template_kwargs:
        dataset = dataset.map(partial(_with_template_kwargs, args.chat_template_kwargs))
    return tokenize_prompts(dataset, tokenizer, **options, num_proc=args.dataset_num_proc)


def _with_template_kwargs(given: dict, row: dict) -> dict:
    own = row.get("chat_template_kwargs") or {}
    return {"chat_template_kwargs": given | {name: value for name, value in own.items() if value is not None}}


def check_reward_columns(sources: list[RewardSource], columns: list[str]) -> None:
    """Raise a ValueError if a reward callable needs a column that the dataset does not have."""
    for source in sources:
        missing = source.function.required.difference(columns) if source.function else set()
        if missing:
            raise ValueError(
                f"The reward function {source.name!r} needs {sorted(missing)}, and train_dataset has the columns "
                f"{columns}: add the missing ones, or give these parameters defaults."
            )


def check_room(model: nn.Module, args: SamplingOptions) -> None:
    """Shorten prompts and texts to the model's number of positions; raise a ValueError if no prompt would fit."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and room <= args.max_completion_length:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt, as the model has {room} "
            "positions: lower it."
        )
    if room is not None and (args.max_prompt_length or room) + args.max_completion_length > room:
        args.max_prompt_length = room - args.max_completion_length
    args.ptx_max_length = min(args.ptx_max_length, room or args.ptx_max_length)
