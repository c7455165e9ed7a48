"""Interpolated checkpoints: exact numbers, every layout of files, what does not fit, and that they load and push."""

import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lifecycle_hf.mitigation.interpolation import interpolate, layer_groups, search_layer_ratios, sweep
from lifecycle_hf.models import weight_files

LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("me/between")
print(AutoModelForCausalLM.from_pretrained("me/between")(torch.tensor([[7, 8, 9]])).logits.double().sum().item())
"""
PUSH = """
import sys
from huggingface_hub import HfApi
for repository, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    HfApi().create_repo(repository)
    HfApi().upload_folder(repo_id=repository, folder_path=folder)
"""
FROM_HUB = """
import sys
from lifecycle_hf.mitigation.interpolation import interpolate
interpolate("me/base", "me/aligned", 0.5, sys.argv[1])
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that the tests' small tensors take several, the last one shorter."""
    monkeypatch.setattr(weight_files, "PIECE", 100)


@pytest.fixture
def pair(tiny_llama, tmp_path):
    """Folders of two models of one shape: the base, in a file, and the aligned, with its tokenizer."""
    make_model, tokenizer = tiny_llama
    make_model(seed=0).save_pretrained(tmp_path / "base")
    make_model(seed=1).save_pretrained(tmp_path / "aligned")
    tokenizer.save_pretrained(tmp_path / "aligned")
    return tmp_path / "base", tmp_path / "aligned"


def plain(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_numbers_by_hand(tmp_path):
    """At α = ¼ from (0, 4, −2) to (4, 8, 2): (1, 5, −1); at 1.5, beyond: (6, 10, 4)."""
    base = plain(tmp_path / "b", {"w": torch.tensor([0.0, 4.0, -2.0])})
    aligned = plain(tmp_path / "a", {"w": torch.tensor([4.0, 8.0, 2.0])})
    for alpha, expected in ((0.25, [1.0, 5.0, -1.0]), (1.5, [6.0, 10.0, 4.0])):
        assert weights(interpolate(base, aligned, alpha, tmp_path / f"{alpha}"))["w"].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_blends_in_fp32_or_wider_and_writes_aligneds_dtype(tmp_path, dtype, base_dtype):
    torch.manual_seed(0)
    low, high = torch.randn(13, 37).to(base_dtype), torch.randn(13, 37).to(dtype)
    base, aligned = plain(tmp_path / "b", {"w": low}), plain(tmp_path / "a", {"w": high})
    found = weights(interpolate(base, aligned, 0.3, tmp_path / "out"))["w"]
    exact = 0.7 * low.double() + 0.3 * high.double()
    assert found.dtype == dtype
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (low.double().abs() + high.double().abs())
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + wide).all()


def test_ends_are_bitwise_the_checkpoints(tmp_path):
    odd = torch.tensor([-0.0, float("inf"), float("nan"), 1e-40, 3e38])
    base, aligned = plain(tmp_path / "b", {"w": odd}), plain(tmp_path / "a", {"w": -odd.flip(0)})
    for alpha, source in ((0, base), (1, aligned), (0.0, base)):
        out = interpolate(base, aligned, alpha, tmp_path / f"{alpha}_{source.name}")
        assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_integers_and_flags_are_those_of_aligned(tmp_path):
    buffers = {"ids": torch.arange(5), "mask": torch.tensor([True, False]), "w": torch.zeros(1)}
    base = plain(tmp_path / "b", {name: torch.zeros_like(tensor) for name, tensor in buffers.items()})
    aligned = plain(tmp_path / "a", buffers | {"w": torch.ones(1)})
    found = weights(interpolate(base, aligned, 0.25, tmp_path / "out"))
    assert found["ids"].tolist() == [0, 1, 2, 3, 4] and found["mask"].tolist() == [True, False]
    assert found["w"].item() == 0.25 and found["ids"].dtype == torch.int64


@pytest.mark.parametrize("sharded", [("base",), ("aligned",), ("base", "aligned")])
def test_shards_of_either_side_change_no_number(pair, tmp_path, sharded):
    base, aligned = pair
    expected = weights(interpolate(base, aligned, 0.3, tmp_path / "whole"))
    folders, sizes = [], {"base": "20KB", "aligned": "70KB"}
    for folder in pair:
        folders.append(folder)
        if folder.name in sharded:
            folders[-1] = tmp_path / f"{folder.name}_sharded"
            AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
                folders[-1], max_shard_size=sizes[folder.name]
            )
            assert len(list(folders[-1].glob("model-*.safetensors"))) > 1
    out = interpolate(*folders, 0.3, tmp_path / "out")
    names = {path.name for path in folders[1].glob("model*")}
    assert {path.name for path in out.glob("model*")} == names
    found = weights(out)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(loaded[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("explicit", ["base", "aligned", "none"])
def test_tied_weights_written_by_one_side_only(tiny_llama, tmp_path, explicit):
    tied = {"tie_word_embeddings": True}
    folders = {}
    for seed, name in enumerate(("base", "aligned")):
        folders[name] = tmp_path / name
        tiny_llama[0](seed=seed, **tied).save_pretrained(folders[name])
        if name == explicit:
            tensors = load_file(folders[name] / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, folders[name] / "model.safetensors", metadata={"format": "pt"})
    out = interpolate(folders["base"], folders["aligned"], {"embed": 0.25, "": 0.75}, tmp_path / "out")
    found, low, high = (weights(folder) for folder in (out, folders["base"], folders["aligned"]))
    embedding = 0.75 * low["model.embed_tokens.weight"] + 0.25 * high["model.embed_tokens.weight"]
    torch.testing.assert_close(found["model.embed_tokens.weight"], embedding)
    assert ("lm_head.weight" in found) == (explicit == "aligned")
    assert found.get("lm_head.weight", found["model.embed_tokens.weight"]).equal(found["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_longest_part_of_a_name_decides(pair, tmp_path):
    base, aligned = pair
    out = interpolate(base, aligned, {"layers.1.": 0.5, "layers.1.mlp": 1, "norm": 0.25, "": 0}, tmp_path / "out")
    found, low, high = (weights(folder) for folder in (out, base, aligned))
    for name, ratio in {
        "model.layers.0.mlp.up_proj.weight": 0, "model.layers.1.mlp.up_proj.weight": 1,
        "model.layers.1.self_attn.q_proj.weight": 0.5, "lm_head.weight": 0,
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name], low[name] + ratio * (high[name] - low[name]), msg=name)


def change(tensors, **changes):
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "alpha", "words"),
    [
        ({"w": None}, 0.5, r"w is only in \S*aligned"),
        ({"extra": torch.ones(2, 2)}, 0.5, r"extra is only in \S*base"),
        ({"w": torch.zeros(3, 2)}, 0.5, r"w has shape \(3, 2\) in \S*base and \(2, 3\) in"),
        ({"w": torch.zeros(2, 3, dtype=torch.int8)}, 0.5, "w is I8 in .* and F32 in"),
        ({}, {"w": 0.5}, "alpha says nothing of b"),
        ({}, {"w": 0.5, "layers.7.": 0.1, "": 1}, r"'layers.7.', which is in no parameter's name"),
        ({}, math.nan, "nan for ''"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path, changes, alpha, words):
    tensors = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    base, aligned = plain(tmp_path / "base", change(tensors, **changes)), plain(tmp_path / "aligned", tensors)
    with pytest.raises(ValueError, match=words):
        interpolate(base, aligned, alpha, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "aligned"}


def test_equal_vectors_are_not_taken_for_tied(tmp_path):
    base = plain(tmp_path / "base", {"0.norm": torch.ones(4), "1.norm": torch.ones(4)})
    with pytest.raises(ValueError, match="1.norm is only in"):
        interpolate(base, plain(tmp_path / "aligned", {"0.norm": torch.ones(4)}), 0.5, tmp_path / "out")


def test_folders_that_cannot_be_used(pair, tmp_path, monkeypatch):
    base, aligned = pair
    with pytest.raises(ValueError, match="base is there already"):
        interpolate(base, aligned, 0.5, base)
    with pytest.raises(ValueError, match="There is no folder /nowhere"):
        interpolate("/nowhere", aligned, 0.5, tmp_path / "out")
    with pytest.raises(ValueError, match="give `base`"):
        interpolate(None, aligned, 0.5, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no safetensors"):
        interpolate(tmp_path / "empty", aligned, 0.5, tmp_path / "out")
    with pytest.raises(ValueError, match="quantised"):
        interpolate(plain(tmp_path / "q", {}, quantization_config={"bits": 4}), aligned, 0.5, tmp_path / "out")
    cut = plain(tmp_path / "cut", {"w": torch.ones(9)}) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut/model.safetensors can't be read"):
        interpolate(cut.parent, aligned, 0.5, tmp_path / "out")
    before = set(tmp_path.iterdir())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        interpolate(base, aligned, 0.5, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_result_loads_and_pushes_from_and_to_the_hub(hub, pair, tmp_path):
    base, aligned = pair
    of_the_run = {"trainer_state.json", "report.json", "lifecycle_kl_control.json", "optimizer.pt"}
    for name in of_the_run:
        (aligned / name).write_text("{}")
    (aligned / "lifecycle_adapter.json").write_text("{}")
    hub.run(PUSH, "me/base", base, "me/aligned", aligned)
    hub.run(FROM_HUB, tmp_path / "between")
    local = interpolate(base, aligned, 0.5, tmp_path / "local")
    assert (local / "model.safetensors").read_bytes() == (tmp_path / "between" / "model.safetensors").read_bytes()
    data = ModelCard.load(tmp_path / "between" / "README.md").data
    assert data.base_model == ["me/base", "me/aligned"] and data.to_dict()["base_model_relation"] == "merge"
    card = (local / "README.md").read_text()
    assert "all others | 0.5" in card and "base_model" not in card and str(tmp_path) not in card
    kept = {path.name for path in local.iterdir()}
    assert not of_the_run & kept and "lifecycle_adapter.json" in kept
    AutoTokenizer.from_pretrained(local)
    hub.run(PUSH, "me/between", local)
    model = AutoModelForCausalLM.from_pretrained(local)
    expected = model(torch.tensor([[7, 8, 9]])).logits.double().sum().item()
    assert float(hub.run(LOAD)) == pytest.approx(expected, abs=1e-4)


def lora(model, base, folder, **options):
    """An adapter whose B is not 0, saved over the base."""
    model.name_or_path = str(base)
    torch.manual_seed(3)
    config = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    adapter = get_peft_model(model, LoraConfig(**config))
    adapter.save_pretrained(folder)
    return adapter


@pytest.mark.parametrize("alpha", [0.3, {"layers.0.": 0.2, "": 0.9}])
def test_scaled_lora_is_the_interpolation_of_the_merged_model(tiny_llama, pair, tmp_path, alpha):
    """With rank-stabilised scaling, two targets, an embedding and a whole head that was trained."""
    base, _ = pair
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapter = lora(tiny_llama[0](), base, tmp_path / "lora", use_rslora=True, lora_alpha=3, **targets)
    with torch.no_grad():
        adapter.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    adapter.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    scaled = interpolate(base, tmp_path / "lora", alpha, tmp_path / "scaled")
    assert (scaled / "adapter_config.json").exists() and "scaled lora_B" in (scaled / "README.md").read_text()
    over_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), scaled)
    expected = weights(interpolate(base, tmp_path / "merged", alpha, tmp_path / "expected"))
    found = over_base.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert (expected["lm_head.weight"] - weights(base)["lm_head.weight"]).abs().max() > 1e-3


def test_adapters_that_cannot_be_scaled(tiny_llama, pair, tmp_path):
    base, aligned = pair
    cases = {"use_dora": True, "init_lora_weights": "olora"}
    for name, value in cases.items():
        lora(tiny_llama[0](), base, tmp_path / name, target_modules=["q_proj"], **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            interpolate(None, tmp_path / name, 0.5, tmp_path / "out")
    lora(tiny_llama[0](), base, tmp_path / "good", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"belongs to \S*base, not to \S*aligned"):
        interpolate(aligned, tmp_path / "good", 0.5, tmp_path / "out")
    out = interpolate(None, tmp_path / "good", 1, tmp_path / "out")
    assert (out / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "good" / "adapter_model.safetensors"
    ).read_bytes()


def mean_of(part):
    return lambda path: weights(Path(path))[part].mean().item()


def test_sweep_gives_rows(tmp_path):
    base, aligned = plain(tmp_path / "b", {"w": torch.zeros(3)}), plain(tmp_path / "a", {"w": torch.ones(3)})
    rows = sweep(base, aligned, [0, 0.25, 1], lambda path: {"mean": mean_of("w")(path)}, tmp_path / "kept")
    assert [(row["alpha"], row["metrics"]["mean"]) for row in rows] == [(0, 0), (0.25, 0.25), (1, 1)]
    assert [weights(Path(row["path"]))["w"][0].item() for row in rows] == [0, 0.25, 1]
    rows = sweep(base, aligned, [0.5], lambda path: {}, tmp_path / "gone", keep=False)
    assert rows[0]["path"] is None and list((tmp_path / "gone").iterdir()) == []


def test_layers_fall_into_groups():
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(5)]
    names += ["model.embed_tokens.weight", "norm.weight", "lm_head.weight"]
    alpha = layer_groups(names, (0.1, 0.5, 0.9))
    assert [alpha[f"model.layers.{i}."] for i in range(5)] == [0.1, 0.1, 0.5, 0.5, 0.9]
    assert alpha["model.embed_tokens.weight"] == 0.1 and alpha[""] == 0.9 and len(alpha) == 7
    with pytest.raises(ValueError, match="6 groups need as many layers"):
        layer_groups(names, (0.5,) * 6)


@pytest.mark.parametrize(("hold_mean", "best"), [(True, (0.1, 0.7, 0.7)), (False, (0.2, 0.8, 0.8))])
def test_search_finds_the_best_ratios(tmp_path, hold_mean, best):
    """From 0 to 1 a group's weight is its ratio. The metric falls off by −Σ (r − target)² with target (.2, .8, .8);
    with the mean held at ½ its best is the target's projection on it, less .1 each."""
    names = [f"model.layers.{i}.w" for i in range(3)]
    base = plain(tmp_path / "b", {name: torch.zeros(2) for name in names})
    aligned = plain(tmp_path / "a", {name: torch.ones(2) for name in names})

    def metric(path):
        found = weights(Path(path))
        return sum((found[name][0].item() - target) ** 2 for name, target in zip(names, (0.2, 0.8, 0.8)))

    options = {"hold_mean": hold_mean, "higher_is_better": False, "step": 0.2, "min_step": 0.1}
    found = search_layer_ratios(base, aligned, metric, tmp_path / "best", **options)
    assert found["ratios"] == pytest.approx(best)
    assert found["metric"] == min(row["metric"] for row in found["trials"]) == pytest.approx(metric(tmp_path / "best"))
    assert found["trials"][0]["ratios"] == [0.5, 0.5, 0.5]
    assert {path.name for path in tmp_path.iterdir()} == {"b", "a", "best"}
    if hold_mean:
        assert all(sum(row["ratios"]) == pytest.approx(1.5) for row in found["trials"])
    with pytest.raises(ValueError, match="alpha=2"):
        search_layer_ratios(base, aligned, metric, tmp_path / "no", alpha=2)
