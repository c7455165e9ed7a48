"""recipes/sft.py, then recipes/reward.py on what it made: two steps each, with the options people use."""

import importlib.util
import json
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lifecycle_hf import BottleneckConfig
from lifecycle_hf.models.loading import load_causal_lm, load_reward_model

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]


def run(stage, output, dataset, model, *options):
    from lifecycle_hf import RewardConfig, SFTConfig, cli

    spec = importlib.util.spec_from_file_location(f"recipe_{stage}", RECIPES / f"{stage}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = {"sft": SFTConfig, "reward": RewardConfig}[stage]
    argv = ["--output_dir", str(output), "--dataset_name", str(dataset), "--model_name_or_path", str(model), *QUICK]
    default = RECIPES / "configs" / f"{stage}_toyworld.yaml"
    recipe.main(*cli.parse((cli.RecipeArguments, config, recipe.ModelConfig), default, argv=[*argv, *options]))
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def base(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model(hidden_size=64).save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    rows = {
        "sft": [{"prompt": f"word {i}:", "completion": f"Paris {i}"} for i in range(40)],
        "reward": [
            {
                "chosen": f"\n\nHuman: word {i}\n\nAssistant: yes",
                "rejected": f"\n\nHuman: word {i}\n\nAssistant: no {i}",
            }
            for i in range(40)
        ],
    }
    for name, stage_rows in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, stage_rows)))
    return tmp_path


def test_sft_then_reward(base, data, tmp_path):
    report = run("sft", tmp_path / "one", data / "sft.jsonl", base)
    assert report["before_after"]["loss"]["after"] == pytest.approx(report["eval_loss"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    report = run("reward", tmp_path / "two", data / "reward.jsonl", tmp_path / "one")
    assert {"eval_accuracy", "eval_ece", "eval_loss", "eval_margin", "before_after"} <= report.keys()
    assert load_reward_model(str(tmp_path / "two")).config.reward_center == report["eval_reward_center"]
    for name in ("calibration.png", "calibration.json", "README.md", "model.safetensors"):
        assert (tmp_path / "two" / name).is_file(), name


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_bottleneck_adapters_train_and_are_not_merged(base, data, tmp_path, stage):
    out, options = tmp_path / "out", ["--use_peft", "--adapter", "bottleneck", "--reduction_factor", "8"]
    run(stage, out, data / f"{stage}.jsonl", base, *options)
    config = PeftConfig.from_pretrained(str(out))
    assert isinstance(config, BottleneckConfig) and (config.reduction_factor, config.placement) == (8, "both")
    assert "import lifecycle_hf" in (out / "README.md").read_text()
    load = load_causal_lm if stage == "sft" else load_reward_model
    assert load(str(out)) is not None
    with pytest.raises(ValueError, match="merge: an adapter of the kind BOTTLENECK can't be merged: leave merge out"):
        run(stage, tmp_path / "merged", data / f"{stage}.jsonl", base, *options, "--merge")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("quantised", [[], ["--load_in_4bit", "true"]], ids=["lora", "qlora"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_adapters_merge(base, data, tmp_path, stage, quantised):
    out = tmp_path / "out"
    run(stage, out, data / f"{stage}.jsonl", base, "--use_peft", "true", "--merge", "true", *quantised)
    assert (out / "adapter_config.json").is_file() and "base" in (out / "README.md").read_text()
    auto = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    merged = auto.from_pretrained(out / "merged")
    assert not hasattr(merged.config, "quantization_config")
