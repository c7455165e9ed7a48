"""Fine-tune a model on text, chat or prompt-completion data.

The embedded default takes about a minute on a CPU:
    python recipes/sft.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/sft.py --config recipes/configs/sft_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py --model_name_or_path MODEL \
        --dataset_name DATA --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import SFTConfig, SFTTrainer, cli


def main(script_args, args, model_args):
    trainer = SFTTrainer(**cli.trainer_inputs(script_args, args, model_args, "sft", start="init"))
    cli.train_and_report(trainer, script_args, trainer.evaluate, title="Held-out loss")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "sft_toyworld.yaml"
    main(*cli.parse((cli.ProtectedArguments, SFTConfig, ModelConfig), default, description=__doc__))
