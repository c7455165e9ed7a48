"""Train by self-play (SPIN): prefer the answers of the data to samples of the previous round's model.

The embedded default takes about three minutes on a CPU:
    python recipes/spin.py
Your own model and data, in a YAML file or as options:
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/spin.py --model_name_or_path MODEL
        --dataset_name ANSWERS --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import SPINConfig, SPINTrainer, cli


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "reward", start="sft")
    inputs["eval_dataset"] = cli.first_rows(inputs["eval_dataset"], script_args.measure_rows)
    trainer = SPINTrainer(**inputs)
    evaluated = {"target_logp": ("eval_logps/chosen", True), "reward_margin": ("eval_rewards/margins", True)}
    cli.monitor_preferences(trainer, script_args, evaluated)
    cli.train_and_report(trainer, script_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "spin_toyworld.yaml"
    main(*cli.parse((cli.MeasuredArguments, SPINConfig, ModelConfig), default, description=__doc__))
