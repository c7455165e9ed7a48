r"""Train a model that writes one text from another: an encoder-decoder such as T5, a prefix LM or a causal LM.

The embedded default answers requests of the toy world, and takes about a minute on a CPU:
    python recipes/seq2seq.py
Your own model and data (columns prompt, completion), in a YAML file or as options:
    accelerate launch recipes/seq2seq.py --config recipes/configs/seq2seq_samsum.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/seq2seq.py --model_name_or_path MODEL \
        --dataset_name DATA --generation_num_beams 4 --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import Seq2SeqConfig, Seq2SeqTrainer, cli


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "seq2seq", start="t5")
    trainer = Seq2SeqTrainer(**inputs)
    cli.train_and_report(trainer, script_args, trainer.finalize, title="Held-out rows")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "seq2seq_toyworld.yaml"
    main(*cli.parse((cli.ProtectedArguments, Seq2SeqConfig, ModelConfig), default, description=__doc__))
