"""Preference optimisation on pairs: DPO, IPO or ORPO.

The embedded default, about a minute on a CPU:
    python recipes/dpo.py
Your own, in a YAML file or as options:
    accelerate launch recipes/dpo.py --config recipes/configs/dpo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/dpo.py --model_name_or_path MODEL \
        --dataset_name PAIRS --objective ipo --use_peft --output_dir output/mine
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import PreferenceConfig, PreferenceTrainer, cli
from lifecycle_hf.trainers.preference import OBJECTIVES


@dataclass
class PreferenceArguments(cli.MeasuredArguments):
    """Objective, data and measurements of the run."""

    objective: str = field(
        default="dpo", metadata={"help": "What is optimised on the pairs.", "choices": tuple(OBJECTIVES)}
    )


def main(script_args, args, model_args):
    args.model_init_kwargs = cli.model_init_kwargs(model_args) | (args.model_init_kwargs or {})
    train, test = cli.load_splits(script_args, "reward")
    trainer = PreferenceTrainer(
        model=cli.resolve_model(model_args.model_name_or_path, "sft"),
        args=args,
        train_dataset=train,
        eval_dataset=cli.held_out(test, script_args.measure_rows),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        objective=script_args.objective,
    )
    if test:
        evaluated = {
            "reward_accuracy": ("eval_rewards/accuracies", True),
            "chosen_logp": ("eval_logps/chosen", True),
        }
        cli.monitor_tax(
            trainer, script_args, script_args.measure_steps or None, evaluated, cli.load_texts(script_args)
        )
    cli.train_and_report(trainer, script_args, model_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "dpo_toyworld.yaml"
    main(*cli.parse((PreferenceArguments, PreferenceConfig, ModelConfig), default, description=__doc__))
