"""Train a model to follow instructions, on a mixture of tasks, and measure families of tasks that it never trained on.

The embedded default takes about three minutes on a CPU:
    python recipes/instruct.py
Other shares of the tasks, and no templates:
    python recipes/instruct.py --temperature 3 --cap 1000 --templates false
Your own model and tasks: a YAML file names them (docs/instruction_tuning.md)
    accelerate launch recipes/instruct.py --config recipes/configs/instruct_smollm2.yaml --dataset_name tasks.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/instruct.py --model_name_or_path MODEL
        --dataset_name tasks.yaml --max_steps 1000 --use_peft --output_dir output/mine
"""

from pathlib import Path

from trl import ModelConfig

from lifecycle_hf import SFTConfig, cli

if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "instruct_toyworld.yaml"
    cli.instruct(*cli.parse((cli.InstructArguments, SFTConfig, ModelConfig), default, description=__doc__))
