"""Train a reward model on preference pairs (Bradley–Terry), centred and calibrated on held-out pairs.

The embedded default takes about a minute on a CPU:
    python recipes/reward.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/reward.py --config recipes/configs/reward_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/reward.py --model_name_or_path MODEL \
        --dataset_name PAIRS --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import RewardConfig, RewardTrainer, cli


def main(script_args, args, model_args):
    trainer = RewardTrainer(**cli.trainer_inputs(script_args, args, model_args, "reward", start="sft"))
    cli.train_and_report(trainer, script_args, trainer.finalize, title="Held-out pairs")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "reward_toyworld.yaml"
    main(*cli.parse((cli.RecipeArguments, RewardConfig, ModelConfig), default, description=__doc__))
