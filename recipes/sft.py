"""Supervised fine-tuning on text, chat or prompt-completion data.

The embedded default, about a minute on a CPU:
    python recipes/sft.py
Your own, in a YAML file or as options:
    accelerate launch recipes/sft.py --config recipes/configs/sft_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/sft.py --model_name_or_path MODEL \
        --dataset_name DATA --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import SFTConfig, SFTTrainer, cli


def main(script_args, args, model_args):
    args.model_init_kwargs = cli.model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    train, test = cli.load_splits(script_args, "sft")
    trainer = SFTTrainer(
        model=cli.resolve_model(model_args.model_name_or_path, "init"),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    report = {} if test is None else trainer.evaluate()
    tax = trainer.tax_report
    cli.finish(trainer, script_args, model_args, report | ({"before_after": tax.to_json()} if tax else {}))
    if tax and trainer.is_world_process_zero():
        print(tax.to_terminal(title="Held-out loss"))
    trainer.accelerator.print(f"Model and report.json are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "sft_toyworld.yaml"
    main(*cli.parse((cli.RecipeArguments, SFTConfig, ModelConfig), default, description=__doc__))
