"""The README.md of a trained model: what it is, how it was made, and what that cost."""

import json
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from lifecycle_hf import __version__
from lifecycle_hf.evaluation.report import TaxReport

HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
EMBEDDED = "toyworld"
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
    adapter, scores = _kind(output_dir)
    own = adapter and json.loads((output_dir / "adapter_config.json").read_text()).get("peft_type") == "BOTTLENECK"
    name = model_name or output_dir.name
    data = ModelCardData(
        base_model=base_model if _on_hub(base_model) else None,
        base_model_relation=("adapter" if adapter else "finetune") if _on_hub(base_model) else None,
        datasets=[dataset_name] if _on_hub(dataset_name) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=list(dict.fromkeys(["lifecycle_hf", trainer_name.removesuffix("Trainer").lower(), *tags])),
    )
    title, arxiv_id = paper
    base, dataset = _named(base_model, HUB), _named(dataset_name, HUB + "datasets/")
    packages = {"lifecycle_hf": __version__} | {package: version(package) for package in VERSIONS_OF}
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.split('/')[-1]}",
        f"{_what(adapter, scores)} of {base}, trained with `{trainer_name}` of lifecycle_hf on {dataset}.",
        f"## Use\n\n```python\n{_usage(name, adapter, scores, own)}\n```",
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
    """(is an adapter, is a reward model) of the model saved in `folder`."""
    if (folder / "adapter_config.json").exists():
        return True, json.loads((folder / "adapter_config.json").read_text()).get("task_type") == "SEQ_CLS"
    if (folder / "config.json").exists():
        architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
        return False, any(name.endswith("ForSequenceClassification") for name in architectures)
    return False, False


def _on_hub(name):
    return bool(name) and name != EMBEDDED and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _named(name, hub):
    if _on_hub(name):
        return f"[{name}]({hub}{name})"
    if name == EMBEDDED:
        return f"`{EMBEDDED}`, the tiny generated world that comes with the package"
    return f"`{Path(name).name}`" if name else "data given in memory"


def _what(adapter, scores):
    return f"{'Adapter' if adapter else 'Fine-tune'} ({'reward model' if scores else 'language model'})"


def _usage(name, adapter, scores, own):
    auto = f"Auto{'Peft' if adapter else ''}ModelFor{'SequenceClassification' if scores else 'CausalLM'}"
    # The config of an adapter's base knows neither the head nor the pad token that the adapter was trained with.
    options = ", num_labels=1, pad_token_id=tokenizer.pad_token_id" if adapter and scores else ""
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
