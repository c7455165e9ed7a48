"""The cache of stages: built once, whole or not at all, keyed by what defines it."""

import multiprocessing
import os
import subprocess
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lifecycle_hf.toyworld import build_tokenizer, stage_checkpoint, stages


def slow_build(folder):
    with open(folder.parent.parent / "builds.txt", "a") as log:
        log.write("built\n")
    (folder / "weights").write_text("first half, ")
    time.sleep(0.5)
    with open(folder / "weights", "a") as file:
        file.write("second half")


def fetch(folder, barrier, results):
    barrier.wait()
    path = stages.build_once(folder, slow_build, message="building")
    results.put((path / "weights").read_text())


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    folder = tmp_path / "stage"
    workers = [context.Process(target=fetch, args=(folder, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == ["first half, second half"] * 2
    for worker in workers:
        worker.join()
    assert (tmp_path / "builds.txt").read_text() == "built\n"


def build_as_rank(rank, folder, store):
    os.environ["LIFECYCLE_HF_CACHE"] = str(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 1:
        stages.stage_checkpoint("init")
    torch.distributed.barrier()


def test_whichever_rank_builds_a_stage_builds_it_whole(tmp_path):
    arguments = (tmp_path / "cache", tmp_path / "store")
    torch.multiprocessing.start_processes(build_as_rank, arguments, nprocs=2, start_method="fork")
    (path,) = (tmp_path / "cache" / "toyworld").glob("*/init")
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == len(AutoTokenizer.from_pretrained(path))


def test_half_written_folder_is_not_taken(tmp_path, capsys):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "weights").write_text("first half, ")
    (folder / "stale").touch()
    stages.build_once(folder, slow_build, message="toyworld: building stage x")
    assert (folder / "weights").read_text() == "first half, second half"
    assert not (folder / "stale").exists()
    assert capsys.readouterr().out == "toyworld: building stage x\n"
    stages.build_once(folder, slow_build, message="again")
    assert capsys.readouterr().out == ""


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "weights").write_text("first half, ")
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        stages.build_once(tmp_path / "stage", fail, message="building")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIFECYCLE_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def init(cache, monkeypatch):
    """The first stage, made in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_build_init", stages.write_init)
        return stage_checkpoint("init")


def test_init_is_an_ordinary_checkpoint(cache, capsys, monkeypatch):
    monkeypatch.setattr(stages, "_build_init", stages.write_init)
    folder = stage_checkpoint("init")
    assert folder.name == "init" and folder.parent.parent == cache / "toyworld"
    assert f"toyworld: building stage init (a second, cached in {folder})" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == build_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 1_000_000
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    stage_checkpoint("init")
    assert capsys.readouterr().out == ""


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.delenv("LIFECYCLE_HF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert stages.cache_root() == tmp_path / "xdg" / "lifecycle_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert stages.cache_root() == tmp_path / "home" / ".cache" / "lifecycle_hf"
    monkeypatch.setenv("LIFECYCLE_HF_CACHE", str(tmp_path / "mine"))
    assert stages.cache_root() == tmp_path / "mine"


def recipe(monkeypatch, code, text):
    calls = []

    def run(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, code, stdout=text)

    monkeypatch.setattr(stages.subprocess, "run", run)
    return calls


def test_stages_build_upon_each_other_alone_and_on_the_cpu(cache, monkeypatch, capsys):
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED",
                "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"}  # fmt: skip
    for name in launched:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    calls = recipe(monkeypatch, 0, "")
    folder = stage_checkpoint("reward")
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()] == ["init", "sft", "reward"]
    assert [command[1].rpartition("/")[2] for command, _ in calls] == ["-c", "sft.py", "reward.py"]
    assert all(command[-2:] == ["--use_cpu", "true"] for command, _ in calls[1:])
    for _, options in calls:
        assert options["env"]["HF_HUB_OFFLINE"] == "1"
        assert not launched.intersection(options["env"])
    assert stage_checkpoint("reward") == folder and len(calls) == 3


def test_a_failing_recipe_shows_the_end_of_its_output(init, cache, monkeypatch):
    recipe(monkeypatch, 3, "\n".join(f"line {i}" for i in range(100)) + "\nValueError: the mend")
    with pytest.raises(RuntimeError, match="stage sft failed with exit status 3") as error:
        stage_checkpoint("sft")
    lines = str(error.value).splitlines()
    assert lines[1] == "line 71" and lines[-1] == "ValueError: the mend"
    assert not [path for path in (cache / "toyworld").iterdir() if path.name.startswith("sft")]


def test_key_changes_with_what_defines_the_stage(monkeypatch, tmp_path):
    before = {stage: stages._key(stage) for stage in ("init", "sft", "reward")}
    assert len(set(before.values())) == 3 and before == {stage: stages._key(stage) for stage in before}
    sources = stages._sources
    changed = tmp_path / "sft_toyworld.yaml"
    changed.write_text("learning_rate: 1\n")
    monkeypatch.setattr(stages, "_sources", lambda stage: sources(stage) + ([changed] if stage == "sft" else []))
    after = {stage: stages._key(stage) for stage in before}
    assert after["init"] == before["init"]
    assert after["sft"] != before["sft"] and after["reward"] != before["reward"]
    monkeypatch.setattr(stages, "version", lambda library: "0")
    assert stages._key("init") != before["init"]


def test_what_is_missing_is_named(init, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of stage 'dpo'; choose one of init, t5, sft, reward"):
        stage_checkpoint("dpo")
    sources = stages._sources
    gone = {"init": [], "sft": [tmp_path / "recipes" / "sft.py"]}
    monkeypatch.setattr(stages, "_sources", lambda stage: sources(stage) + gone[stage])
    with pytest.raises(FileNotFoundError, match="recipes/sft.py is missing: .*clone the repository"):
        stage_checkpoint("sft")
