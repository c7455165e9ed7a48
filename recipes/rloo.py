"""Train against rewards by RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, Eq. 8).

The embedded default takes about two minutes on a CPU:
    python recipes/rloo.py
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/rloo.py
Your own model and data, in a YAML file or as options:
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/rloo.py --model_name_or_path MODEL
        --dataset_name PROMPTS --reward_funcs MODEL_OR_MODULE:FUNCTION --num_generations 8 --use_peft
        --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import RLOOConfig, RLOOTrainer, cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "rloo_toyworld.yaml"
    options = cli.parse((cli.PolicyArguments, RLOOConfig, ModelConfig), default, description=__doc__)
    cli.train_policy(RLOOTrainer, *options)
