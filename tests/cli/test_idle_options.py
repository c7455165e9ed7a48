"""An option that the command line or a user's YAML gives has its effect, or ends the recipe with a line on why not."""

import runpy
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import ModelConfig

from lifecycle_hf import KTOConfig, PPOConfig, PreferenceConfig, PretrainingConfig, RewardConfig, SFTConfig, cli

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WITHOUT_TRAINING = ("constitution", "curate", "evol_instruct", "self_instruct")
CONFIGS = [path for path in sorted((RECIPES / "configs").glob("*.yaml")) if not path.stem.startswith(WITHOUT_TRAINING)]
NAMES = (
    "best_of_n", "classify", "dpo", "grpo", "instruct", "kto", "online_dpo", "ppo", "pretrain", "qa", "reward", "rloo",
    "scaling_law", "seq2seq", "sft", "spin",
)  # fmt: skip
OWN = {
    "dpo": PreferenceConfig, "kto": KTOConfig, "ppo": PPOConfig, "pretrain": PretrainingConfig,
    "reward": RewardConfig, "sft": SFTConfig,
}  # fmt: skip
real_parse = cli.parse


def parse(path, *argv):
    kinds = (cli.ProtectedArguments, TrainingArguments, ModelConfig)
    return real_parse(kinds, path, [str(word) for word in argv])[1]


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """A function that returns the training arguments of a recipe under a YAML file (its own one by default)."""

    def arguments(name, *argv, path=None):
        class Parsed(Exception):
            pass

        def parsed(kinds, default, description=None):
            words = ["--output_dir", tmp_path, "--use_cpu", *argv]
            raise Parsed(real_parse(kinds, path or default, [str(word) for word in words])[1])

        monkeypatch.setattr(cli, "parse", parsed)
        with pytest.raises(Parsed) as found:
            runpy.run_path(RECIPES / f"{name}.py", run_name="__main__")
        return found.value.args[0]

    return arguments


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_the_command_line_set_the_strategy_of_an_embedded_configuration(name, recipe):
    def run(*argv):
        return recipe(name, *argv)

    assert run().save_strategy == "no"
    saves = run("--save_steps", 40, "--save_total_limit", 2, "--eval_steps=20", "--logging_steps", 5)
    assert (saves.save_strategy, saves.save_steps, saves.save_total_limit) == ("steps", 40, 2)
    assert (saves.eval_strategy, saves.eval_steps, saves.logging_steps) == ("steps", 20, 5)
    best = run("--save_steps", 40, "--eval_steps", 20, "--load_best_model_at_end", "--metric_for_best_model", "kl")
    assert best.load_best_model_at_end and best.metric_for_best_model == "kl"
    if name != "scaling_law":  # the ladder sets the steps of each run
        longer = run("--num_train_epochs", 7)
        assert (longer.num_train_epochs, longer.max_steps) == (7, -1)
        assert run("--max_steps", 3).max_steps == 3
    assert run("--lr_scheduler_type", "constant").warmup_steps in (0, 0.02)
    for word in ("--gradient_checkpointing", "--activation_checkpointing"):
        assert run(word, "true").activation_checkpointing and not run(word, "false").activation_checkpointing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_configuration_of_a_recipe_has_idle_options(path, recipe):
    scripts = (script.stem for script in RECIPES.glob("*.py"))
    name = next((name for name in scripts if path.stem.startswith(name + "_")), "dpo")  # of IPO and ORPO, too
    assert recipe(name, path=path)
    off = recipe(name, "--save_strategy", "no", "--eval_strategy", "no", path=path)
    assert (off.save_strategy, off.eval_strategy) == ("no", "no")


SAID = {
    "save_total_limit": ('save_strategy: "no"', "--save_total_limit 3", "set save_steps, or another save_strategy"),
    "save_steps": ("", "--save_strategy epoch --save_steps 500", 'set save_strategy to "steps"'),
    "eval_steps": ("eval_strategy: epoch\neval_steps: 5", "", 'set eval_strategy to "steps"'),
    "eval_delay": ("", "--eval_delay 5", "set eval_steps and save_steps"),
    "load_best_model_at_end": ('save_strategy: "no"', "--load_best_model_at_end", "set eval_steps and save_steps"),
    "metric_for_best_model": ("eval_steps: 5", "--metric_for_best_model x", "set load_best_model_at_end"),
    "greater_is_better": ("eval_steps: 5", "--greater_is_better true", "set metric_for_best_model"),
    "save_strategy": ("", "--save_strategy best", "set eval_steps"),
    "logging_steps": ('logging_strategy: "no"\nlogging_steps: 5', "", 'set logging_strategy to "steps"'),
    "warmup_steps": ("lr_scheduler_type: constant", "--warmup_steps 50", '"constant_with_warmup"'),
    "lr_scheduler_kwargs": ("lr_scheduler_type: constant", '--lr_scheduler_kwargs {"a":1}', "that has options"),
    "num_train_epochs": ("", "--num_train_epochs 3 --max_steps 5", "leave max_steps out"),
    "adam_beta2": ("adam_beta2: 0.9\noptim: sgd", "", "choose an Adam optimizer"),
    "optim_args": ("", "--optim_args momentum=0.9", "choose an optim that has options"),
    "optim_target_modules": ("", "--optim_target_modules all-linear", "GaLore or APOLLO"),
    "gradient_checkpointing": ("gradient_checkpointing: true\nactivation_checkpointing: false", "", "one of the two"),
    "activation_checkpointing_kwargs": (
        "activation_checkpointing: false", '--activation_checkpointing_kwargs {"use_reentrant":false}',
        "turn activation_checkpointing on",
    ),
    "liger_kernel_config": ("liger_kernel_config: {rope: true}", "", "turn use_liger_kernel on"),
    "dataloader_persistent_workers": ("", "--dataloader_persistent_workers", "set dataloader_num_workers"),
    "length_column_name": ("", "--length_column_name n", 'train_sampling_strategy to "group_by_length"'),
    "hub_model_id": ("", "--hub_model_id me/mine", "set push_to_hub"),
    "run_name": ("", "--run_name mine", "set report_to to the tracker"),
    "ignore_data_skip": ("", "--ignore_data_skip", "set resume_from_checkpoint"),
    "do_predict": ("", "--do_predict", "a recipe always trains"),
    "lora_r": ("", "--lora_r 8", "set use_peft"),
    "use_dora": ("use_dora: true", "", "set use_peft"),
    "adapter": ("", "--adapter bottleneck", "set use_peft"),
    "lora_alpha": ("use_peft: true\nadapter: bottleneck", "--lora_alpha 8", 'set adapter to "lora"'),
    "placement": ("use_peft: true", "--placement ffn", 'set adapter to "bottleneck"'),
    "bnb_4bit_quant_type": ("use_peft: true", "--bnb_4bit_quant_type fp4", "set load_in_4bit"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_an_option_without_effect_is_refused_by_name(name, tmp_path, capsys):
    text, words, says = SAID[name]
    path = tmp_path / "mine.yaml"
    path.write_text(f"output_dir: {tmp_path}\nreport_to: none\n{text}\n")
    with pytest.raises(SystemExit) as stop:
        parse(path, *words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"error: {name}=" in said and says in said and f"or leave {name} out" in said


def test_what_the_command_line_switches_off_in_a_file_is_left_out(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"output_dir: {tmp_path}\nsave_steps: 40\neval_strategy: steps\neval_steps: 20\nwarmup_steps: 5\n")
    args = parse(path, "--save_strategy=no", "--eval-strategy", "no", "--lr_scheduler_type", "constant")
    assert (args.save_strategy, args.eval_strategy, args.warmup_steps) == ("no", "no", 0)
    assert (args.save_steps, args.eval_steps) == (500, None)


BUILT = {
    "save_steps": {"save_strategy": "no", "save_steps": 40},
    "save_total_limit": {"save_strategy": "no", "save_total_limit": 1},
    "eval_steps": {"eval_steps": 40},
    "load_best_model_at_end": {"save_strategy": "no", "load_best_model_at_end": True},
    "warmup_steps": {"lr_scheduler_type": "constant", "warmup_steps": 3},
    "optim_args": {"optim_args": "momentum=0.9"},
}


@pytest.mark.parametrize("config", OWN.values(), ids=OWN)
@pytest.mark.parametrize("name", BUILT)
def test_a_program_is_told_as_well(config, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* has no effect with .* or leave {name} out"):
        config(str(tmp_path), use_cpu=True, report_to="none", **BUILT[name])
