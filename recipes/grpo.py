"""Train against rewards by GRPO: each completion is compared with the others of its prompt (DeepSeekMath, Eq. 3).

The embedded default takes about two minutes on a CPU:
    python recipes/grpo.py
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/grpo.py
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/grpo.py --config recipes/configs/grpo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/grpo.py --model_name_or_path MODEL
        --dataset_name PROMPTS --reward_funcs MODEL_OR_MODULE:FUNCTION --num_generations 8 --use_peft
        --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import GRPOConfig, GRPOTrainer, cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "grpo_toyworld.yaml"
    options = cli.parse((cli.PolicyArguments, GRPOConfig, ModelConfig), default, description=__doc__)
    cli.train_policy(GRPOTrainer, *options)
