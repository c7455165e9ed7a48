r"""Train a model that finds the answer to a question in a text (extractive question answering, as in SQuAD).

The embedded default asks about documents of the toy world, and takes about a minute on a CPU:
    python recipes/qa.py
Your own model and data (columns question, context, answers), in a YAML file or as options:
    accelerate launch recipes/qa.py --config recipes/configs/qa_squad.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/qa.py --model_name_or_path MODEL \
        --dataset_name DATA --null_threshold 0 --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import QuestionAnsweringConfig, QuestionAnsweringTrainer, cli


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "qa", start="init")
    trainer = QuestionAnsweringTrainer(**inputs)
    cli.train_and_report(trainer, script_args, trainer.finalize, title="Held-out questions")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "qa_toyworld.yaml"
    main(*cli.parse((cli.ProtectedArguments, QuestionAnsweringConfig, ModelConfig), default, description=__doc__))
