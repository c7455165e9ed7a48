"""KTO: answers that are each desirable or not, or preference pairs.

The embedded default, about a minute on a CPU:
    python recipes/kto.py
Your own, in a YAML file or as options:
    accelerate launch recipes/kto.py --config recipes/configs/kto_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/kto.py --model_name_or_path MODEL \
        --dataset_name ANSWERS --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import KTOConfig, KTOTrainer, cli


def main(script_args, args, model_args):
    args.model_init_kwargs = cli.model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    train, test = cli.load_splits(script_args, "reward")
    trainer = KTOTrainer(
        model=cli.resolve_model(model_args.model_name_or_path, "sft"),
        args=args,
        train_dataset=train,
        eval_dataset=cli.held_out(test, script_args.measure_rows),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if test:
        evaluated = {"reward_margin": ("eval_rewards/margins", True), "kl": ("eval_kl", False)}
        cli.monitor_tax(
            trainer, script_args, script_args.measure_steps or None, evaluated, cli.load_texts(script_args)
        )
    cli.train_and_report(trainer, script_args, model_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "kto_toyworld.yaml"
    main(*cli.parse((cli.MeasuredArguments, KTOConfig, ModelConfig), default, description=__doc__))
