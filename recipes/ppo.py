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

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import PPOConfig, PPOTrainer, cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "ppo_toyworld.yaml"
    options = cli.parse((cli.PolicyArguments, PPOConfig, ModelConfig), default, description=__doc__)
    cli.train_policy(PPOTrainer, *options)
