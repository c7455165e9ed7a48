r"""Train a classifier of texts or of pairs of texts: one label, several labels, or a number to predict.

The embedded default tells the kind of a request of the toy world, and takes a few seconds on a CPU:
    python recipes/classify.py
Your own model and data (columns text, label, and where there are pairs text_pair), in a YAML file or as options:
    accelerate launch recipes/classify.py --config recipes/configs/classify_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/classify.py --model_name_or_path MODEL \
        --dataset_name DATA --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import ClassificationConfig, ClassificationTrainer, cli


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "classify", start="init")
    trainer = ClassificationTrainer(**inputs)
    cli.train_and_report(trainer, script_args, trainer.finalize, title="Held-out rows")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "classify_toyworld.yaml"
    main(*cli.parse((cli.ProtectedArguments, ClassificationConfig, ModelConfig), default, description=__doc__))
