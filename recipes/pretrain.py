r"""Pretrain on text by one objective: causal, masked, prefix, span_corruption or ul2.

The embedded default is UL2 on Python's own documentation and takes a few minutes on a CPU:
    python recipes/pretrain.py
Your own text file, folder of .txt and .md files, or dataset; without a tokenizer a new one is trained:
    accelerate launch recipes/pretrain.py --config recipes/configs/pretrain_python.yaml --dataset_name book.txt \
        --objective causal --output_dir output/mine
Train an existing model further:
    python recipes/pretrain.py --model_name_or_path T5_OR_LLAMA --dataset_name DATA --objective span_corruption
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import PretrainingConfig, cli
from lifecycle_hf.data.corpora import train_tokenizer
from lifecycle_hf.models.loading import load_tokenizer
from lifecycle_hf.trainers.supervised.pretraining import PretrainingTrainer, new_model, sample

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass
class PretrainingArguments(cli.RecipeArguments):
    """Hold the corpus, and the size of a new model."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; else the model's, or a new one."})
    vocab_size: int = field(default=4096, metadata={"help": "Size of a new tokenizer, trained on the corpus."})
    hidden_size: int = field(default=256, metadata={"help": "Width of a new model."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Layers of a new model."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads of a new model."})
    num_key_value_heads: int = field(default=2, metadata={"help": "Key and value heads of a new model."})
    intermediate_size: int = field(default=688, metadata={"help": "Width of a new model's feed-forward layers."})
    prompt: str = field(default="The ", metadata={"help": "Text that the trained model continues at the end."})


def main(script_args, args, model_args):
    if model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("Pretraining trains a whole model: leave use_peft, load_in_4bit and load_in_8bit out.")
    train, test = cli.load_splits(script_args, "pretrain")
    source = script_args.tokenizer_name or model_args.model_name_or_path
    tokenizer = load_tokenizer(source) if source else train_tokenizer(train["text"], script_args.vocab_size)
    args.model_init_kwargs = cli.model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    sizes = {name: getattr(script_args, name) for name in SIZES}
    model = model_args.model_name_or_path or new_model(args, tokenizer, **sizes)
    trainer = PretrainingTrainer(model, args, train, test, tokenizer)
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=cli.resume_point(args))
    report = trainer.evaluate() if test is not None else {}
    text = sample(trainer, script_args.prompt)
    cli.finish(trainer, script_args, report | ({"sample": text} if text else {}))
    trainer.accelerator.print(f"Held out: {report}\nSample: {text}\nModel and report.json are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "pretrain_python.yaml"
    main(*cli.parse((PretrainingArguments, PretrainingConfig, ModelConfig), default, description=__doc__))
