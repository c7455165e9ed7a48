"""Train on pairs that the policy samples and a reward model or function ranks: online DPO, and iterative DPO.

The embedded default takes about a minute on a CPU:
    python recipes/online_dpo.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/online_dpo.py --config recipes/configs/online_dpo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/online_dpo.py --model_name_or_path MODEL
        --dataset_name PROMPTS --reward_funcs MODEL_OR_MODULE:FUNCTION --use_peft --output_dir output/mine
Iterative DPO, with a reference that moves:
    python recipes/online_dpo.py --rounds 3 --sample_from reference
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import OnlineDPOConfig, OnlineDPOTrainer, cli
from lifecycle_hf.trainers.preference.paired import OBJECTIVES


@dataclass
class OnlineArguments(cli.MeasuredArguments):
    """Hold the objective, the rewards, the data and the measurements of the run."""

    objective: str = field(
        default="dpo", metadata={"help": "Objective that is optimised on the pairs.", "choices": tuple(OBJECTIVES)}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward models by name or path, and functions as MODULE:FUNCTION."}
    )


def main(script_args, args, model_args):
    inputs = cli.trainer_inputs(script_args, args, model_args, "ppo", start="sft")
    inputs["eval_dataset"] = cli.first_rows(inputs["eval_dataset"], script_args.measure_rows)
    rewards = [cli.resolve_reward(name) for name in script_args.reward_funcs]
    trainer = OnlineDPOTrainer(**inputs, reward_funcs=rewards, objective=script_args.objective)
    evaluated = {"proxy_reward": ("eval_score", True), "reward_margin": ("eval_rewards/margins", True)}
    cli.monitor_preferences(trainer, script_args, evaluated)
    cli.train_and_report(trainer, script_args)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "online_dpo_toyworld.yaml"
    main(*cli.parse((OnlineArguments, OnlineDPOConfig, ModelConfig), default, description=__doc__))
