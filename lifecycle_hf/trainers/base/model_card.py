"""The README.md of a trained model: what it is, how it was made, and what that cost."""

import json
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from lifecycle_hf import __version__
from lifecycle_hf.evaluation.report import TaxReport
from lifecycle_hf.models.adapters.notes import read_adapter_notes

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
EMBEDDED = "toyworld"
KINDS = {
    "SEQ_CLS": ("SequenceClassification", "text-classification", "classifier"),
    "QUESTION_ANS": ("QuestionAnswering", "question-answering", "question-answering model"),
    "SEQ_2_SEQ_LM": ("Seq2SeqLM", "text-generation", "encoder-decoder model"),
    "CAUSAL_LM": ("CausalLM", "text-generation", "language model"),
}
"""By PEFT's name of a task: the Auto class, the Hub's name of the task, and what the model is."""
VERSIONS_OF = ("transformers", "trl", "peft", "torch", "datasets")


def write_model_card(
    output_dir,
    *,
    trainer_name: str,
    objective: str,
    paper: tuple[str, str],
    base_model: str,
    dataset_name: str | None,
    hyperparameters: dict,
    tax: TaxReport | None = None,
    tags: list[str] = (),
    model_name: str | None = None,
) -> Path:
    """Write `output_dir`/README.md with metadata that the Hub accepts, and return its path.

    Args:
        output_dir: folder of the saved model; its config tells an adapter from a whole model, a policy from a
            reward model.
        trainer_name: class that trained it, such as `PPOTrainer`.
        objective: what was minimised or maximised, in Markdown.
        paper: (title, arXiv id).
        base_model, dataset_name: Hub names stand in the metadata; local paths and `toyworld` only in the text.
        hyperparameters: {option: value}.
        tax: the measured before/after table.
        tags: added to `lifecycle_hf` and the trainer's name.
        model_name: repository on the Hub, or the folder's name.
    """
    output_dir = Path(output_dir)
    adapter, task = _kind(output_dir)
    what = f"{'Adapter' if adapter else 'Fine-tune'} ({_what(trainer_name, task)})"
    name = model_name or output_dir.name
    data = ModelCardData(
        base_model=base_model if _on_hub(base_model) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _on_hub(base_model) else None,
        datasets=[dataset_name] if _on_hub(dataset_name) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=KINDS[task][1],
        tags=list(dict.fromkeys(["lifecycle_hf", trainer_name.removesuffix("Trainer").lower(), *tags])),
    )
    title, arxiv_id = paper
    base, dataset = _named(base_model, HUB), _named(dataset_name, HUB + "datasets/")
    packages = {"lifecycle_hf": __version__} | {package: version(package) for package in VERSIONS_OF}
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.split('/')[-1]}",
        f"{what} of {base}, trained with `{trainer_name}` of lifecycle_hf on {dataset}.",
        f"## Use\n\n```python\n{_usage(name, task, output_dir if adapter else None)}\n```",
        f"## Objective\n\n{objective}\n\nPaper: [{title}](https://arxiv.org/abs/{arxiv_id}).",
        _tax_section(tax),
        _table("Hyperparameters", "option", hyperparameters),
        _table("Made with", "package", packages),
    ]
    card = ModelCard("\n\n".join(section for section in sections if section) + "\n")
    path = output_dir / "README.md"
    output_dir.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return path


def _kind(folder):
    """(is an adapter, PEFT's name of the task) of the model saved in `folder`."""
    if (folder / "adapter_config.json").exists():
        task = json.loads((folder / "adapter_config.json").read_text()).get("task_type")
        return True, task if task in KINDS else "CAUSAL_LM"
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    architectures = config.get("architectures") or []
    if any(name.endswith("ForConditionalGeneration") for name in architectures) and config.get("is_encoder_decoder"):
        return False, "SEQ_2_SEQ_LM"
    tasks = [task for task, (auto, *_) in KINDS.items() for name in architectures if name.endswith(f"For{auto}")]
    return False, (tasks or ["CAUSAL_LM"])[0]


def _what(trainer_name, task):
    return "reward model" if trainer_name == "RewardTrainer" else KINDS[task][2]


def _on_hub(name):
    return bool(name) and name != EMBEDDED and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _named(name, hub):
    if _on_hub(name):
        return f"[{name}]({hub}{name})"
    if name == EMBEDDED:
        return f"`{EMBEDDED}`, the tiny generated world that comes with the package"
    return f"`{Path(name).name}`" if name else "data given in memory"


def _usage(name, task, adapter):
    auto = f"Auto{'Peft' if adapter else ''}ModelFor{KINDS[task][0]}"
    own = adapter and json.loads((adapter / "adapter_config.json").read_text()).get("peft_type") == "BOTTLENECK"
    options = ""
    if adapter and task == "SEQ_CLS":
        # The config of an adapter's base knows neither the head nor the pad token that the adapter was trained with.
        labels = len(read_adapter_notes(str(adapter)).get("id2label", "1"))
        options = f", num_labels={labels}, pad_token_id=tokenizer.pad_token_id"
    lines = [
        *(["import lifecycle_hf  # registers the adapter with PEFT"] if own else []),
        f"from {'peft' if adapter else 'transformers'} import {auto}",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {auto}.from_pretrained("{name}"{options})',
    ]
    return "\n".join(lines)


def _tax_section(tax):
    if tax is None:
        return ""
    note = "Tax = what was lost from before to after training; negative is a gain. ↑ higher is better, ↓ lower is."
    return f"## Measured before and after\n\n{tax.to_markdown()}\n\n{note}"


def _table(heading, key, values):
    if not values:
        return ""
    cells = [f"| {name} | `{str(value).replace('|', chr(92) + '|')}` |" for name, value in values.items()]
    return "\n".join([f"## {heading}\n", f"| {key} | value |", "|---|---|", *cells])
