"""Frozen copies and fingerprints of the reference model of a policy, and files of its log-probs."""

import copy
import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from lifecycle_hf.models.loading import is_sharded, whole
from lifecycle_hf.models.roles import role_weights

SAMPLE = 4096


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` in its present state, in eval mode and without gradients.

    Raises:
        ValueError: ZeRO-3 has sharded the model, so each process could copy only its own part.
    """
    if is_sharded(model):
        raise ValueError(
            "DeepSpeed ZeRO-3 has sharded the model, so it can't be copied as reference: pass the model by its name "
            "or path, or pass a ref_model."
        )
    return copy.deepcopy(model).eval().requires_grad_(False)


def model_fingerprint(model: nn.Module, role: str | None = None) -> str:
    """Return 16 hexadecimal digits that depend on names, shapes and evenly spaced entries of all weights.

    Args:
        role: for a PeftModel, the adapter to include; "base" for none, which gives the fingerprint of the plain model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(role_weights(model, role).items()):
        with whole(tensor):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLE)].cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_fingerprint(rows) -> str:
    """Return 16 hexadecimal digits that depend on the token ids of all rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr([row[name] for name in sorted(row) if name.endswith("_ids")]).encode())
    return digest.hexdigest()[:16]


def save_logprobs(columns: dict[str, torch.Tensor], path: Path, fingerprint: dict[str, str]) -> None:
    """Write reference log-probs, one entry per row, with the fingerprints of their model and data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")  # renamed at the end, so a file is never incomplete
    save_file({name: values.contiguous() for name, values in columns.items()}, written, metadata=fingerprint)
    written.replace(path)


def load_logprobs(path: Path, fingerprint: dict[str, str]) -> dict[str, list[float]]:
    """Read what [`save_logprobs`] wrote.

    Raises:
        ValueError: the file belongs to another model or to other data; the message names what differs.
    """
    with safe_open(path, framework="pt") as file:
        theirs = file.metadata() or {}
        differs = [
            f"{name} is {theirs.get(name)!r} there and {value!r} here"
            for name, value in fingerprint.items()
            if theirs.get(name) != value
        ]
        if differs:
            raise ValueError(
                f"The reference log-probs in {path} belong to another run: {'; '.join(differs)}. Give the reference "
                "model and data of that run, or another ref_log_probs_path, where they are computed again."
            )
        return {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
