"""Sample N completions of each prompt, keep the best by a reward, draw what N buys, and train on the winners.

The embedded default takes about a minute on a CPU:
    python recipes/best_of_n.py
    python recipes/best_of_n.py --train true --rounds 2
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/best_of_n.py --model_name_or_path MODEL --dataset_name PROMPTS
        --reward_funcs MODEL_OR_MODULE:FUNCTION --num_generations 8 --output_dir output/mine
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import SFTConfig, SFTTrainer, cli


@dataclass
class BestOfNArguments(cli.SamplingArguments):
    """Hold the prompts, the rewards and the sampling of the run."""

    train: bool = field(default=False, metadata={"help": "Fine-tune on the winners, which is rejection sampling."})
    rounds: int = field(default=1, metadata={"help": "With --train: samples and fine-tunes this often."})


def main(script_args, args, model_args):
    state, folder = PartialState(), Path(args.output_dir)
    prompts = cli.prompts_of(script_args, script_args.rounds if script_args.train else 1)
    model = cli.resolve_model(model_args.model_name_or_path, "sft")
    for number, rows in enumerate(prompts, 1):
        found = cli.sample_best(script_args, model_args, model, rows, folder / f"round_{number}", args.seed + number)
        if state.is_main_process:
            cli.report_best(found, folder / f"round_{number}")
        if not script_args.train:
            continue
        trainer = SFTTrainer(
            model, args, train_dataset=found.winners(), peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )  # fmt: skip
        trainer.dataset_name = script_args.dataset_name
        trainer.train()
        cli.finish(trainer, script_args, {})
        model = str(folder)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "best_of_n_toyworld.yaml"
    main(*cli.parse((BestOfNArguments, SFTConfig, ModelConfig), default, description=__doc__))
