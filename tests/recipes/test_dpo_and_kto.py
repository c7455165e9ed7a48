"""recipes/dpo.py and recipes/kto.py: two steps with the options people use, resuming, pushing, the effect."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = [
    "--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "4",
    "--learning_rate", "1e-2", "--logging_steps", "1", "--warmup_steps", "0",
]  # fmt: skip
PAPER = {"dpo": "2305.18290", "ipo": "2310.12036", "orpo": "2403.07691", "kto": "2402.01306"}


def run(stage, output, dataset, model, *options):
    from lifecycle_hf import KTOConfig, PreferenceConfig, cli

    spec = importlib.util.spec_from_file_location(f"recipe_{stage}", RECIPES / f"{stage}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    script = recipe.PreferenceArguments if stage == "dpo" else cli.MeasuredArguments
    config = {"dpo": PreferenceConfig, "kto": KTOConfig}[stage]
    argv = ["--output_dir", str(output), "--dataset_name", str(dataset), "--model_name_or_path", str(model), *QUICK]
    default = RECIPES / "configs" / f"{stage}_toyworld.yaml"
    recipe.main(*cli.parse((script, config, recipe.ModelConfig), default, argv=[*argv, *map(str, options)]))
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def base(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """{name: a .jsonl of 100 rows}; five of them are held out."""
    words = ["Paris", "a small red fox", "seven", "hello"]
    rows = {
        "pairs": [
            {"prompt": f"word {i}:", "chosen": f" {words[i % 4]}", "rejected": " no" * (1 + i % 3)} for i in range(100)
        ],
        "answers": [
            {"prompt": f"word {i}:", "completion": f" {words[i % 4]} {i}", "label": i % 2 == 0} for i in range(100)
        ],
    }
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


def same_weights(one, two):
    return all(torch.equal(weight, two[name]) for name, weight in one.items()) and one.keys() == two.keys()


@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo"])
def test_objectives_on_pairs(objective, base, data, tmp_path):
    options = [] if objective == "dpo" else ["--objective", objective]
    report = run("dpo", tmp_path / "out", data["pairs"], base, *options)
    assert set(report) == {"reward_accuracy", "chosen_logp"}
    if objective != "orpo":  # the policy starts as its reference, so no answer has the higher reward
        assert report["reward_accuracy"]["before"] == 0
    assert report["chosen_logp"]["before"] < 0 and report["chosen_logp"]["after"] != report["chosen_logp"]["before"]
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (f"{objective.upper()}: ", PAPER[objective], "pairs", "beta", "learning_rate", "reward accuracy"):
        assert said in card, said
    check_reload(tmp_path / "out", base)


@pytest.mark.parametrize("name", ["pairs", "answers"])
@pytest.mark.parametrize("point", ["mismatched", "running_mean"])
def test_kto_on_pairs_and_on_answers(name, point, base, data, tmp_path):
    report = run("kto", tmp_path / "out", data[name], base, "--reference_point", point)
    assert set(report) == {"reward_margin", "kl"} and report["kl"]["before"] == pytest.approx(0, abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("KTO: ", PAPER["kto"], name, point, "desirable_weight", "reward margin"):
        assert said in card, said
    check_reload(tmp_path / "out", base)


def test_kto_whose_held_out_answers_are_of_one_class(base, tmp_path):
    """There is no margin then, which is no reason to end the run."""
    rows = [{"prompt": f"word {i}:", "completion": f" {i}", "label": i % 2 == 0} for i in range(20)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:6:2])))
    report = run("kto", tmp_path / "out", tmp_path / "data", base)
    assert report["kl"]["before"] == pytest.approx(0, abs=1e-5)
    assert report.get("reward_margin", {}).get("after") is None
    check_reload(tmp_path / "out", base)


def check_reload(folder, base):
    """An ordinary checkpoint with its tokenizer, that has learnt something."""
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, base))
    assert not same_weights(model.state_dict(), before.state_dict())
    assert same_weights(model.state_dict(), load_file(folder / "model.safetensors"))
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_adapters_merge(stage, base, data, tmp_path):
    out = tmp_path / "out"
    run(stage, out, data["pairs"], base, "--use_peft", "true", "--merge", "true")
    card = (out / "README.md").read_text()
    assert str(base) in card or "base" in card
    assert "lora_r" in card and not (out / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM"
    adapted = AutoPeftModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        got, expected, before = (
            model(ids).logits for model in (merged, adapted, AutoModelForCausalLM.from_pretrained(base))
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (got - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("dpo", ["--use_peft", "true"]),
        ("dpo", ["--objective", "orpo"]),
        ("kto", ["--reference_point", "running_mean"]),
        ("kto", ["--precompute_ref_log_probs", "true"]),
    ],
)
def test_two_steps_and_two_more_are_four(stage, options, base, data, tmp_path):
    """Weights bitwise, and the logged losses."""
    answers = data["pairs" if stage == "dpo" else "answers"]
    options = [*options, "--max_steps", 4, "--save_steps", 2]  # of a YAML with save_strategy: no
    run(stage, tmp_path / "whole", answers, base, *options)
    resume = ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2")
    run(stage, tmp_path / "resumed", answers, base, *options, *resume)
    name = "adapter_model.safetensors" if "--use_peft" in options else "model.safetensors"
    whole, resumed, half = (
        load_file(folder / name)
        for folder in (tmp_path / "whole", tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    )
    assert same_weights(whole, resumed) and not same_weights(whole, half)
    history = [
        json.loads((tmp_path / folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        for folder in ("whole", "resumed")
    ]
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in history]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    if "running_mean" in options:
        states = [
            json.loads((tmp_path / folder / "checkpoint-4" / "lifecycle_reference_point.json").read_text())
            for folder in ("whole", "resumed")
        ]
        assert states[0] == states[1] and states[0]["mean"] != 0


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("dpo", ["--objective {dpo,ipo,orpo}", "--label_smoothing", "--length_normalize", "--nll_on_prompt"]),
        ("kto", ["--reference_point {mismatched,running_mean}", "--desirable_weight", "--undesirable_weight"]),
    ],
)
def test_help_shows_the_options(stage, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(stage, tmp_path, "pairs", "base", "--help")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for option in (*said, "--beta", "--max_length", "--precompute_ref_log_probs", "--use_peft", "--merge", "loss"):
        assert option in shown, option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective", "dop"], "invalid choice: 'dop'"),
        (["--reference_point", "mean"], "unknown option --reference_point"),
        (["--label_smothing", "0.1"], "did you mean --label_smoothing"),
    ],
)
def test_options_that_are_none(options, message, base, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run("dpo", tmp_path / "out", data["pairs"], base, *options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


PROBE = """
import torch
from {module} import {auto}
model = {auto}.from_pretrained("me/aligned").eval()
print(model(torch.tensor([[7, 8, 9, 10]])).logits.sum().item())
"""


@pytest.mark.parametrize(("stage", "peft"), [pytest.param("dpo", False, marks=pytest.mark.slow), ("kto", True)])
def test_pushed_and_loaded_back(hub, stage, peft, base, data, tmp_path):
    out = tmp_path / "out"
    options = ["--use_peft", "true"] if peft else []
    hub.run(
        str(RECIPES / f"{stage}.py"), "--model_name_or_path", base, "--dataset_name", data["pairs"], "--output_dir",
        out, *QUICK, "--push_to_hub", "--hub_model_id", "me/aligned", *options, cwd=tmp_path,
    )  # fmt: skip
    files = hub.files("me/aligned")
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    assert files[weights] == (out / weights).read_bytes() and "tokenizer.json" in files
    card = files["README.md"].decode()
    for said in (f"{stage.upper()}: ", PAPER[stage], "base", "learning_rate", "before"):
        assert said in card, said
    module, auto = ("peft", "AutoPeftModelForCausalLM") if peft else ("transformers", "AutoModelForCausalLM")
    loader = AutoPeftModelForCausalLM if peft else AutoModelForCausalLM
    with torch.no_grad():
        expected = loader.from_pretrained(out).eval()(torch.tensor([[7, 8, 9, 10]])).logits.sum().item()
    assert float(hub.run(PROBE.format(module=module, auto=auto))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "name"), [([], "dpo"), (["--objective", "orpo"], "orpo"), (["--objective=ipo"], "ipo")]
)
def test_each_objective_has_its_embedded_configuration(argv, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dpo.py", *argv, "--max_steps", "1"])
    config = runpy.run_path(str(RECIPES / "dpo.py"))["default_config"]()
    assert config.name == f"{name}_toyworld.yaml" and config.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "kto"])
def test_default_aligns_and_keeps_its_answers(objective, seed, tmp_path):
    """The embedded default, about a minute each: the bounds that each seed must keep; no tuning has seen these."""
    recipe = [RECIPES / "kto.py"] if objective == "kto" else [RECIPES / "dpo.py", "--objective", objective]
    command = [sys.executable, *map(str, recipe), "--seed", str(seed), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=1800, cwd=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    print({"objective": objective, "seed": seed, "report": report})
    assert report["gold_reward"]["after"] >= 0.7 and report["benign_accuracy"]["after"] >= 0.7
