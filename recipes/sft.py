"""Supervised fine-tuning on text, chat or prompt-completion data.

The embedded default, about a minute on a CPU:
    python recipes/sft.py
Your own, in a YAML file or as options:
    accelerate launch recipes/sft.py --config recipes/configs/sft_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py --model_name_or_path MODEL \
        --dataset_name DATA --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import SFTConfig, SFTTrainer, cli


def main(script_args, args, model_args):
    trainer = SFTTrainer(**cli.trainer_inputs(script_args, args, model_args, "sft", start="init"))
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=cli.resume_point(args))
    report = {} if trainer.eval_dataset is None else trainer.evaluate()
    tax = trainer.tax_report
    cli.finish(trainer, script_args, model_args, report | ({"before_after": tax.to_json()} if tax else {}))
    if tax and trainer.is_world_process_zero():
        print(tax.to_terminal(title="Held-out loss"))
    trainer.accelerator.print(f"Model and report.json are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "sft_toyworld.yaml"
    main(*cli.parse((cli.ProtectedArguments, SFTConfig, ModelConfig), default, description=__doc__))
