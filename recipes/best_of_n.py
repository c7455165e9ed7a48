"""Sample N completions of each prompt, keep the best by a reward, draw what N buys, and train on the winners.

The embedded default takes about a minute on a CPU:
    python recipes/best_of_n.py
    python recipes/best_of_n.py --train --rounds 2
Your own model and data, in a YAML file or as options:
    accelerate launch recipes/best_of_n.py --config recipes/configs/best_of_n_smollm2.yaml
    accelerate launch recipes/best_of_n.py --model_name_or_path MODEL --dataset_name PROMPTS
        --reward_funcs MODEL_OR_MODULE:FUNCTION --num_generations 8 --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import SFTConfig, cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "best_of_n_toyworld.yaml"
    cli.sample_and_train(*cli.parse((cli.BestOfNArguments, SFTConfig, ModelConfig), default, description=__doc__))
