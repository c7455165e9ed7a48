"""Constitutional AI: critique and revise answers by principles, label pairs by a model, and train on both.

The embedded default takes about two minutes on a CPU, after the stages of the toy world:
    python recipes/constitution.py
    python recipes/constitution.py --train ppo --output_dir output/constitution_ppo
The data alone, by the model itself or by a server of a larger one:
    python recipes/constitution.py --model_name_or_path MODEL --dataset_name PROMPTS --train none
        --server_url http://localhost:8000/v1 --server_model Qwen/Qwen3-8B --output_dir output/mine
All stages, each by the recipe of its name (sft, reward, dpo or ppo), whose options are set as STAGE:OPTION=VALUE:
    python recipes/constitution.py --model_name_or_path MODEL --dataset_name PROMPTS --principles mine.yaml
        --launcher "accelerate launch" --stage_options sft:use_peft=true sft:num_train_epochs=1 dpo:beta=0.1
"""

from pathlib import Path

from lifecycle_hf import cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "constitution_toyworld.yaml"
    cli.constitute(*cli.parse((cli.ConstitutionArguments,), default, description=__doc__))
