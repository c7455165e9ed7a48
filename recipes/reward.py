"""A reward model from preference pairs: Bradley–Terry, centred and calibrated on held-out pairs.

The embedded default, about a minute on a CPU:
    python recipes/reward.py
Your own, in a YAML file or as options:
    accelerate launch recipes/reward.py --config recipes/configs/reward_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/reward.py --model_name_or_path MODEL \
        --dataset_name PAIRS --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import RewardConfig, RewardTrainer, cli


def main(script_args, args, model_args):
    trainer = RewardTrainer(**cli.trainer_inputs(script_args, args, model_args, "reward", start="sft"))
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=cli.resume_point(args))
    report = {} if trainer.eval_dataset is None else trainer.finalize()
    tax = trainer.tax_report
    cli.finish(trainer, script_args, model_args, report | ({"before_after": tax.to_json()} if tax else {}))
    if tax and trainer.is_world_process_zero():
        print(tax.to_terminal(title="Held-out pairs"))
    trainer.accelerator.print(f"Model, report.json and calibration.png are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "reward_toyworld.yaml"
    main(*cli.parse((cli.RecipeArguments, RewardConfig, ModelConfig), default, description=__doc__))
