"""Train by KTO on single answers that are desirable or not, or on preference pairs.

The embedded default takes about a minute on a CPU:
    python recipes/kto.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/kto.py --config recipes/configs/kto_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/kto.py --model_name_or_path MODEL \
        --dataset_name ANSWERS --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import KTOConfig, KTOTrainer, cli


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "reward", start="sft")
    inputs["eval_dataset"] = cli.first_rows(inputs["eval_dataset"], script_args.measure_rows)
    trainer = KTOTrainer(**inputs)
    evaluated = {"reward_margin": ("eval_rewards/margins", True), "kl": ("eval_kl", False)}
    cli.monitor_preferences(trainer, script_args, evaluated)
    cli.train_and_report(trainer, script_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "kto_toyworld.yaml"
    main(*cli.parse((cli.MeasuredArguments, KTOConfig, ModelConfig), default, description=__doc__))
