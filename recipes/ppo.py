"""Train against rewards by PPO with a pretraining mix (InstructGPT, Eq. 2).

The embedded default takes some minutes on a CPU (`make ppo`):
    python recipes/ppo.py
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/ppo.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/ppo.py --config recipes/configs/ppo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/ppo.py --model_name_or_path MODEL
        --dataset_name PROMPTS --reward_funcs MODEL_OR_MODULE:FUNCTION --ptx_dataset_name TEXTS --ptx_coef 0.5
        --use_peft --output_dir output/mine
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import PPOConfig, PPOTrainer, cli


@dataclass
class PPOArguments(cli.ProtectedArguments):
    """Hold the data, the rewards and the measurements of the run."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward models by name or path, and functions as MODULE:FUNCTION."}
    )
    measure_updates: int = field(
        default=5, metadata={"help": "Measure capability, reward and KL before, after and every X updates; 0: never."}
    )
    measure_rows: int = field(default=128, metadata={"help": "Held-out prompts and texts of each measurement."})


def main(script_args, args, model_args):
    train, test = cli.load_splits(script_args, "ppo")
    texts = cli.load_ptx(script_args)
    trainer = PPOTrainer(
        model=cli.resolve_model(model_args.model_name_or_path, "sft"),
        reward_funcs=[cli.resolve_reward(name) for name in script_args.reward_funcs],
        args=args,
        train_dataset=train,
        eval_dataset=cli.first_rows(test, script_args.measure_rows),
        ptx_dataset=texts[0],
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        model_init_kwargs=cli.model_init_kwargs(model_args),
    )
    every = script_args.measure_updates * args.steps_per_update
    if every and test:
        evaluated = {"proxy_reward": ("eval_score", True), "kl": ("eval_kl", False)}
        cli.monitor_tax(trainer, script_args, every, evaluated, texts[1])
    cli.train_and_report(trainer, script_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "ppo_toyworld.yaml"
    main(*cli.parse((PPOArguments, PPOConfig, ModelConfig), default, description=__doc__))
