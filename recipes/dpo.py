"""Train on preference pairs by DPO, IPO or ORPO.

The embedded defaults take about a minute on a CPU:
    python recipes/dpo.py
    python recipes/dpo.py --objective ipo
    python recipes/dpo.py --objective orpo
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/dpo.py --config recipes/configs/dpo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/dpo.py --model_name_or_path MODEL \
        --dataset_name PAIRS --objective ipo --use_peft --output_dir output/mine
"""

from argparse import ArgumentParser
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import PreferenceConfig, PreferenceTrainer, cli
from lifecycle_hf.trainers.preference.paired import OBJECTIVES


@dataclass
class PreferenceArguments(cli.MeasuredArguments):
    """Hold the objective, the data and the measurements of the run."""

    objective: str = field(
        default="dpo", metadata={"help": "Objective that is optimised on the pairs.", "choices": tuple(OBJECTIVES)}
    )


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "reward", start="sft")
    inputs["eval_dataset"] = cli.first_rows(inputs["eval_dataset"], script_args.measure_rows)
    trainer = PreferenceTrainer(**inputs, objective=script_args.objective)
    evaluated = {"reward_accuracy": ("eval_rewards/accuracies", True), "chosen_logp": ("eval_logps/chosen", True)}
    cli.monitor_preferences(trainer, script_args, evaluated)
    cli.train_and_report(trainer, script_args)


def default_config():
    """Return the embedded configuration of the objective that the command line names."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="dpo")
    configs = Path(__file__).parent / "configs"
    config = configs / f"{parser.parse_known_args()[0].objective}_toyworld.yaml"
    return config if config.is_file() else configs / "dpo_toyworld.yaml"


if __name__ == "__main__":
    main(*cli.parse((PreferenceArguments, PreferenceConfig, ModelConfig), default_config(), description=__doc__))
