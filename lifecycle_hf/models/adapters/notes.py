"""Notes beside an adapter: what its config lacks, and a run that loads it needs."""

import json
from pathlib import Path

from peft import PeftModel
from transformers.utils import cached_file

from lifecycle_hf.models.adapters.embeddings import embedding_rows

ADAPTER_NOTES = "lifecycle_adapter.json"


def save_adapter_notes(model: PeftModel, output_dir: str | Path) -> None:
    """Write next to an adapter what its config lacks: vocabulary size, pad token, reward centre, labels, quantisation.

    These are in a separate file because transformers treats an adapter folder with a config.json as a full model.
    """
    base = model.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    notes = {
        "vocab_size": embedding_rows(base),
        "pad_token_id": base.config.get_text_config().pad_token_id,
        "reward_center": getattr(base.config, "reward_center", None),
        "quantization_config": None if quantization is None else quantization.to_dict(),
    }
    if base.config.problem_type is not None:
        notes |= {key: getattr(base.config, key) for key in ("problem_type", "id2label")}
    notes = {key: value for key, value in notes.items() if value is not None}
    (Path(output_dir) / ADAPTER_NOTES).write_text(json.dumps(notes, indent=2) + "\n")


def read_adapter_notes(path: str) -> dict:
    """Read what [`save_adapter_notes`] wrote next to an adapter, local or on the Hub; {} if there is nothing."""
    quiet = [f"_raise_exceptions_for_{reason}" for reason in ("missing_entries", "connection_errors")]
    notes = cached_file(path, ADAPTER_NOTES, **dict.fromkeys(quiet, False))
    return json.loads(Path(notes).read_text()) if notes else {}


def labels_of(notes: dict) -> dict:
    """Return what the config of a classifier says of its labels, from the notes beside its adapter."""
    labels = {int(key): label for key, label in notes.get("id2label", {}).items()}
    named = {"id2label": labels, "label2id": {label: key for key, label in labels.items()}}
    return named | {"problem_type": notes["problem_type"]} if labels else {}
