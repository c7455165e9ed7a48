import gzip
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import ModelConfig

from lifecycle_hf import BottleneckConfig, cli
from lifecycle_hf.cli import running


@dataclass
class ToyArguments(cli.RecipeArguments):
    """Options of a recipe under test."""

    colour: str = field(default="red", metadata={"help": "Paint.", "choices": ("red", "blue")})


@pytest.fixture
def default_config(tmp_path):
    path = tmp_path / "default.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'out'}\nlearning_rate: 3e-4\nmax_steps: 7\ncolour: blue\nreport_to: none\n"
    )
    return path


def parse(default_config, *argv):
    return cli.parse((ToyArguments, TrainingArguments, ModelConfig), default_config, argv, description="A recipe.")


def test_default_config_then_command_line(default_config):
    script_args, args, model_args = parse(default_config, "--max_steps", "3", "--use_peft", "--dtype=bfloat16")
    assert (args.learning_rate, args.max_steps, script_args.colour) == (3e-4, 3, "blue")
    assert model_args.use_peft and model_args.dtype == "bfloat16"


def test_the_adapter_is_lora_or_bottlenecks(default_config, tmp_path):
    def chosen(*argv, path=default_config):
        script_args, _, model_args = parse(path, *argv)
        return cli.adapter_config(script_args, model_args)

    assert chosen() is None and isinstance(chosen("--use_peft"), LoraConfig)
    words = ["--use_peft", "--adapter", "bottleneck", "--placement", "ffn", "--lora_modules_to_save", "score"]
    found = chosen(*words, "--reduction_factor", "4", "--lora_task_type", "SEQ_CLS")
    assert isinstance(found, BottleneckConfig) and found.task_type == "SEQ_CLS"
    assert (found.reduction_factor, found.placement, found.modules_to_save) == (4, "ffn", ["score"])
    lora = tmp_path / "lora.yaml"  # whose options for LoRA the command line takes away
    lora.write_text(f"output_dir: {tmp_path}\nreport_to: none\nuse_peft: true\nlora_r: 4\n")
    assert isinstance(chosen("--adapter", "bottleneck", path=lora), BottleneckConfig)


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_config_replaces_the_default_one(default_config, tmp_path, form):
    other = tmp_path / "other.yaml"
    other.write_text(f"output_dir: {tmp_path}\nmax_steps: 5\nreport_to: none\n")
    words = ["--config", str(other)] if form == "two words" else [f"--config={other}"]
    script_args, args, _ = parse(default_config, *words, "--seed", "9")
    assert (args.max_steps, args.seed, args.learning_rate, script_args.colour) == (5, 9, 5e-5, "red")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--learnin_rate", "1"], "unknown option --learnin_rate; did you mean --learning_rate?"),
        (["--max-step=3"], "unknown option --max-step=3; did you mean --max_steps?"),
        (["--dataset", "toyworld"], "did you mean --dataset_name or --dataset_config or"),
        (["toyworld"], "unexpected argument 'toyworld'"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: No such file"),
        (["--config"], "--config needs the path"),
    ],
)
def test_bad_command_lines_say_what_to_do(default_config, capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        parse(default_config, *argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learnin_rate: 1", "unknown option 'learnin_rate' in {path}; did you mean learning_rate?"),
        ("dtype: bf16", "dtype: 'bf16' in {path} is none of auto, bfloat16, float16, float32"),
        ("- a\n- b", "{path} must hold `option: value` lines"),
        ("a: [1", "{path} is not valid YAML"),
    ],
)
def test_bad_configs_say_what_to_do(tmp_path, capsys, text, says):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse(path)
    assert says.format(path=path) in capsys.readouterr().err


def test_help_has_a_section_per_class_and_the_values_in_force(default_config, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(default_config, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    sections = ["ToyArguments (", "RecipeArguments (lifecycle_hf):", "ModelConfig (trl):", "TrainingArguments ("]
    places = [text.index(section) for section in sections]
    assert text.startswith("usage: ") and "A recipe." in text and places[-1] == max(places)
    assert "--colour {red,blue}" in text and "(default: blue)" in text and "--learning_rate FLOAT" in text


def test_cpu_is_said_aloud_where_there_is_no_accelerator(default_config):
    assert parse(default_config)[1].use_cpu == (not torch.accelerator.is_available())


def rows(count, start=0):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(start, start + count)]


def load(name, **options):
    return cli.load_splits(cli.RecipeArguments(dataset_name=str(name), **options), "sft")


def write_jsonl(path, items):
    text = "".join(json.dumps(item) + "\n" for item in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(("count", "held_out"), [(1, None), (2, 1), (40, 2), (12_000, 500)])
def test_five_percent_are_held_out_when_there_is_no_test_split(tmp_path, count, held_out):
    path = write_jsonl(tmp_path / "data.jsonl.gz", rows(count))
    train, test = load(path)
    assert (len(train), None if test is None else len(test)) == (count - (held_out or 0), held_out)
    if test is not None:
        again = load(path)[1]
        assert test["prompt"][:] == again["prompt"][:]
        assert not set(test["prompt"][:]) & set(train["prompt"][:])


def test_local_formats(tmp_path):
    data = Dataset.from_list(rows(3))
    data.to_csv(tmp_path / "a.csv")
    data.to_parquet(tmp_path / "a.parquet")
    data.to_json(tmp_path / "a.json")
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("p0\np1\np2\n")
    for name in ("a.csv", "a.parquet", "a.json", "saved", "a.txt"):
        train, test = load(tmp_path / name)
        assert len(train) == 2 and len(test) == 1, name


def test_folder_with_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(4))
    write_jsonl(tmp_path / "test.jsonl", rows(2, start=4))
    train, test = load(tmp_path)
    assert (len(train), test["prompt"][:]) == (4, ["p4", "p5"])


def test_data_that_is_not_there_is_named(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", rows(4))
    (tmp_path / "data.xml").write_text("<a/>")
    cases = [
        (None, {}, "dataset_name is missing"),
        (tmp_path / "none.jsonl", {}, "there is no file or folder"),
        (tmp_path / "data.xml", {}, "cannot read .*give a file ending in .json"),
        ("nobody/none-such-data", {}, "neither a local file or folder nor found on the Hub"),
        (path, {"dataset_train_split": "training"}, "dataset_train_split: .* has no split 'training'; it has 'train'"),
        (path, {"dataset_test_split": "validation"}, "dataset_test_split: .* has no split 'validation'"),
        (path, {"dataset_streaming": True}, "dataset_streaming is not supported"),
    ]
    for name, options, says in cases:
        with pytest.raises(ValueError, match=says):
            cli.load_splits(cli.RecipeArguments(dataset_name=name and str(name), **options), "sft")


def test_model_names_and_their_loading_options():
    assert cli.resolve_model("some/model", "sft") == "some/model"
    assert cli.model_init_kwargs(ModelConfig(dtype="bfloat16")) == {"revision": "main", "dtype": torch.bfloat16}
    assert cli.model_init_kwargs(ModelConfig(dtype="auto", attn_implementation="eager")) == {
        "revision": "main",
        "dtype": "auto",
        "attn_implementation": "eager",
    }


class RecordingTrainer:
    """What `finish` asks of a trainer, written down in order."""

    def __init__(self, output_dir, push):
        self.calls = []
        self.args = SimpleNamespace(output_dir=str(output_dir), push_to_hub=push)
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None, print=print)

    def is_world_process_zero(self):
        return True

    def __getattr__(self, name):
        return lambda *_: self.calls.append(name)


@pytest.mark.parametrize("push", [False, True])
def test_finish_writes_the_report_before_the_model_is_saved_or_pushed(tmp_path, push):
    trainer = RecordingTrainer(tmp_path / "out", push)
    report = {"kl": {"after": torch.tensor(2.0), "before": float("nan")}, "steps": [1, float("inf")]}
    cli.finish(trainer, cli.RecipeArguments(merge=True), report)
    assert trainer.calls == ["save_model", *([] if push else ["create_model_card"]), "end"]
    expected = {"kl": {"after": 2.0, "before": None}, "steps": [1, None]}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == expected


def test_merge_writes_a_whole_model_beside_the_adapter(tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    cli.finish(RecordingTrainer(tmp_path / "out", push=False), cli.RecipeArguments(merge=True), {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_resume_without_a_path_takes_the_last_checkpoint(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\n")

    def point(*words):
        (args,) = cli.parse((TrainingArguments,), config, [*words, "--use_cpu", "true"])
        return cli.resume_point(args)

    assert point() is None and point("--resume_from_checkpoint", "false") is None
    assert point("--resume_from_checkpoint") is None
    assert "has no checkpoint yet: starting anew" in capsys.readouterr().out
    for step in (9, 10):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "out" / "_tmp-checkpoint-11").mkdir()
    last, other = str(tmp_path / "out" / "checkpoint-10"), str(tmp_path / "out" / "checkpoint-9")
    assert point("--resume_from_checkpoint") == point("--resume_from_checkpoint", "true") == last
    assert point("--resume_from_checkpoint", other) == other
    with pytest.raises(ValueError, match="checkpoint-8 is no checkpoint. The last one is .*checkpoint-10"):
        point("--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-8"))


def test_over_optimisation_is_drawn_where_kl_and_both_rewards_were_measured(tmp_path):
    row = {"tax/kl": 1.0, "tax/proxy_reward": 0.5, "tax/gold_reward": 0.25}
    running._plot_overoptimization([row, row, {"loss": 1.0}, {"tax/kl": 2.0}], tmp_path / "none.png")
    running._plot_overoptimization([row, {"loss": 1.0}, row | {"tax/kl": 4.0}, row], tmp_path / "some.png")
    assert [path.name for path in tmp_path.iterdir()] == ["some.png"]
