r"""Find how often a model should read each domain of a corpus (DoReMi): a reference, a proxy by group DRO, weights.

The embedded default has three planted domains and takes two minutes on a CPU:
    python recipes/doremi.py
Your own rows of `text` and `domain`; without a tokenizer a new one is trained on them:
    accelerate launch recipes/doremi.py --dataset_name CORPUS.jsonl --max_steps 2000 --per_device_train_batch_size 64 \
        --max_length 512 --weight_step_size 1 --output_dir output/mine
Then train the model itself on the same domains by the weights that were found:
    accelerate launch recipes/pretrain.py --dataset_name CORPUS.jsonl --objective causal --output_dir output/model \
        --domain_weights output/mine/domain_weights.yaml
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from lifecycle_hf import DoReMiConfig, DoReMiTrainer, PretrainingTrainer, cli
from lifecycle_hf.data.corpora import train_tokenizer
from lifecycle_hf.models.loading import load_tokenizer
from lifecycle_hf.scaling.tables import markdown_table
from lifecycle_hf.trainers.supervised.doremi import WEIGHTS
from lifecycle_hf.trainers.supervised.pretraining import new_model

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass
class DoReMiArguments(cli.RecipeArguments):
    """Hold the corpus, the reference, and the size of reference and proxy."""

    reference: str | None = field(default=None, metadata={"help": "A trained reference; else one is trained first."})
    reference_steps: int | None = field(default=None, metadata={"help": "Steps of the reference; max_steps if unset."})
    reference_weights: str | None = field(
        default=None, metadata={"help": "YAML of the weights that the reference reads by; else by the domains' sizes."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer; else the reference's, or a new one."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of a new tokenizer, trained on the corpus."})
    hidden_size: int = field(default=256, metadata={"help": "Width of reference and proxy."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of reference and proxy."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Key and value heads."})
    intermediate_size: int = field(default=688, metadata={"help": "Width of the feed-forward layers."})


def train_reference(script_args, args, data, tokenizer, sizes) -> str:
    """Train the reference and return its folder, where a run that is resumed finds it."""
    folder = Path(args.output_dir) / "reference"
    steps = script_args.reference_steps or args.max_steps
    args = replace(
        args, output_dir=str(folder), max_steps=steps, domain_weights=script_args.reference_weights, push_to_hub=False
    )
    if args.resume_from_checkpoint is None or not (folder / "README.md").exists():
        trainer = PretrainingTrainer(new_model(args, tokenizer, **sizes), args, data, None, tokenizer)
        trainer.dataset_name = script_args.dataset_name
        trainer.train(resume_from_checkpoint=cli.resume_point(args))
        trainer.save_model()
        trainer.create_model_card()  # the last file
        trainer.accelerator.wait_for_everyone()
    return str(folder)


def main(script_args, args):
    data, _ = cli.load_splits(script_args, "pretrain")
    source = script_args.tokenizer_name or script_args.reference
    tokenizer = load_tokenizer(source) if source else train_tokenizer(data["text"], script_args.vocab_size)
    sizes = {name: getattr(script_args, name) for name in SIZES}
    reference = script_args.reference or train_reference(script_args, args, data, tokenizer, sizes)
    trainer = DoReMiTrainer(new_model(args, tokenizer, **sizes), reference, args, data, tokenizer)
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=cli.resume_point(args))
    columns = ("reference_loss", "start_weights", "last_weights", "weights")
    trainer.accelerator.wait_for_everyone()
    found = yaml.safe_load((Path(args.output_dir) / WEIGHTS).read_text())
    cells = [[name, *(f"{found[column][name]:.3f}" for column in columns)] for name in found["weights"]]
    cli.finish(trainer, script_args, found)
    table = markdown_table(["domain", *(column.replace("_", " ") for column in columns)], cells)
    trainer.accelerator.print(f"{table}\n{WEIGHTS}, its picture, the proxy and report.json are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "doremi_planted.yaml"
    main(*cli.parse((DoReMiArguments, DoReMiConfig), default, description=__doc__))
