"""Checkpoints between a base and what alignment made of it, written straight from file to file."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import permutations, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCardData

from lifecycle_hf.models.weight_files import (
    COMPANIONS,
    FLOATS,
    HUB_ID,
    Stored,
    checkpoint_folder,
    find_twin,
    piece_buffers,
    pieces,
    read_checkpoint,
    write_like,
)

Alpha = float | Mapping[str, float]
EXACT = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
OWN_BASE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` under which W + s·BA has for W the base as it is; others put a rest of the base in its place."""
_LAYER = re.compile(r"^(.*?\b(?:layers|layer|h|blocks|block)\.)(\d+)\.")
_OF_A_RUN = re.compile(r"(trainer_state|report|(all|train|eval)_results|lifecycle_(?!adapter).*)\.json")
_FIRST = re.compile(r"embed|wte|wpe|shared")


def interpolate(base: str | Path | None, aligned: str | Path, alpha: Alpha, output: str | Path) -> Path:
    """Writes θ = (1 − α)·θ_base + α·θ_aligned to the folder `output`, whole or not at all, and returns it.

    Neither checkpoint is loaded: tensors go from file to file in pieces of a few MB, blended in fp32 (fp64 where they
    are), in the dtype, files and shards of `aligned`, whose config and tokenizer come along. Where α is 0 or 1 the
    bytes are copied. Tensors that are not floating point are those of `aligned`. A matrix that one side leaves out
    because it is tied to another, of which it is a copy on the other side, is blended as that one is.

    A LoRA adapter as `aligned` gives an adapter of the same base: W + α·s·BA, which is exactly that line, is s·(αB)A,
    so that lora_B is multiplied (layer by layer, where α differs; its bias too). Whole weights in it, such as trained
    embeddings, are blended with the base's.

    Args:
        base, aligned: folders or Hub names of safetensors checkpoints. Of an adapter's base None says what it names.
        alpha: α, 0 base, 1 aligned, beyond them extrapolation; or {part of a parameter's name: α}, of which the
            longest that occurs in a name decides (the first of them at a tie), "" for all others:
            {"layers.0.": 0.3, "mlp": 0.8, "": 0.5}.

    Raises:
        ValueError: names, shapes or kinds of tensors differ (naming the first); a checkpoint is quantised, damaged or
            not there; α does not cover every tensor or has a part that is in no name; the adapter is no plain LoRA or
            of another base; `output` holds something.

    Reference: https://arxiv.org/abs/2203.05482 (averaging), https://arxiv.org/abs/2309.06256 (α by layers).
    """
    output, theirs = Path(output), checkpoint_folder(aligned)
    _check_free(output)
    own = read_checkpoint(theirs)
    if (theirs / "adapter_config.json").exists():
        base = _base_of_adapter(aligned, theirs, base)
        pairs = _adapter_pairs(own, base)
    else:
        if base is None:
            raise ValueError(f"{aligned} is no adapter, so its base is not known: give `base`.")
        pairs = _pairs(own, read_checkpoint(checkpoint_folder(base)), f"{base}", f"{aligned}")
    ratios = _ratios(alpha, {name: _plain(twin) for name, (twin, _) in pairs.items()})
    staging = output.with_name(f"_tmp-{output.name}-{os.getpid()}")
    staging.mkdir(parents=True)
    buffers = piece_buffers()
    try:
        for path in sorted({entry.path for entry in own.values()}):
            names = [name for name, entry in own.items() if entry.path == path]
            blended = {own[name]: _blend(pairs[name][1], own[name], ratios[name], buffers) for name in names}
            write_like(staging / path.name, path, blended)
        for path in (path for pattern in COMPANIONS for path in theirs.glob(pattern)):
            if not _OF_A_RUN.fullmatch(path.name):
                shutil.copyfile(path, staging / path.name)
        (staging / "README.md").write_text(_card(output.name, base, aligned, alpha, theirs))
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def sweep(
    base: str | Path | None,
    aligned: str | Path,
    alphas: Iterable[Alpha],
    measure: Callable[[str], dict[str, float]],
    output_dir: str | Path,
    *,
    keep: bool = True,
) -> list[dict]:
    """Interpolates at each α and measures: rows {alpha, path, metrics}, in the order of `alphas`.

    Args:
        measure: from the path of a checkpoint to {metric: value}.
        output_dir: holds a folder for each α, `0`, `1`, …
        keep: whether the checkpoints stay; otherwise one at a time is on disk, and `path` is None.

    Raises:
        ValueError: as [`interpolate`].
    """
    rows = []
    for i, alpha in enumerate(alphas):
        path = interpolate(base, aligned, alpha, Path(output_dir) / str(i))
        try:
            rows.append({"alpha": alpha, "path": str(path) if keep else None, "metrics": measure(str(path))})
        finally:
            if not keep:
                shutil.rmtree(path)
    return rows


def search_layer_ratios(
    base: str | Path | None,
    aligned: str | Path,
    measure: Callable[[str], float],
    output: str | Path,
    *,
    groups: int = 3,
    alpha: float = 0.5,
    hold_mean: bool = True,
    step: float = 0.2,
    min_step: float = 0.05,
    higher_is_better: bool = True,
) -> dict:
    """Heterogeneous averaging: an α for each of a few groups of layers, found by a validation metric.

    Layers are cut into consecutive groups of one size; embeddings go with the first, final norm and head with the
    last. From α everywhere, one group's ratio goes up by `step` and another's down (with `hold_mean`, so that
    (1/K)·Σ_k α_k = α as in the paper), or one goes up or down. The first move that measures better is made; when none
    does, the step is halved. The paper finds the ratios by training; this needs nothing but measurements, at most
    K(K − 1) of them (2K without `hold_mean`) for a move.

    Args:
        measure: from the path of a checkpoint to the metric; use data that no report is made on.
        output: folder of the best checkpoint.
        alpha: the ratio to start from, in [0, 1].
        step, min_step: first and smallest change of a ratio.

    Returns:
        {"alpha": mapping for [`interpolate`], "ratios": α by group, "metric": its value, "trials": rows
        {ratios, metric} in their order}.

    Raises:
        ValueError: as [`interpolate`]; α, groups or steps are out of range, or there are fewer layers than groups.

    Reference: https://arxiv.org/abs/2309.06256, section 5 (HMA).
    """
    if not (0 <= alpha <= 1 and groups >= 1 and 0 < min_step <= step):
        raise ValueError(f"Needs 0 <= {alpha=} <= 1, {groups=} >= 1 and 0 < {min_step=} <= {step=}.")
    names = [_plain(name) for name in read_checkpoint(checkpoint_folder(aligned))]
    output, trials = Path(output), {}
    _check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)

    def value(ratios):
        if ratios not in trials:
            with TemporaryDirectory(dir=output.parent, prefix="_tmp-") as folder:
                trials[ratios] = measure(str(interpolate(base, aligned, layer_groups(names, ratios), f"{folder}/it")))
        return trials[ratios] if higher_is_better else -trials[ratios]

    best = _climb(value, (alpha,) * groups, hold_mean, step, min_step)
    found = layer_groups(names, best)
    interpolate(base, aligned, found, output)
    rows = [{"ratios": list(ratios), "metric": metric} for ratios, metric in trials.items()]
    return {"alpha": found, "ratios": list(best), "metric": trials[best], "trials": rows}


def _climb(value: Callable, best: tuple[float, ...], hold_mean: bool, step: float, min_step: float) -> tuple:
    """Where no move of `min_step` within [0, 1] raises `value`, from `best` on."""
    groups = range(len(best))
    one_way = [move for group in groups for move in ((group, None), (None, group))]
    moves = list(permutations(groups, 2)) if hold_mean else one_way
    value(best)
    while step >= min_step:
        for up, down in moves:
            moved = tuple(round(ratio + step * ((k == up) - (k == down)), 6) for k, ratio in enumerate(best))
            if all(0 <= ratio <= 1 for ratio in moved) and value(moved) > value(best):
                best = moved
                break
        else:
            step /= 2
    return best


def layer_groups(names: Iterable[str], ratios: tuple[float, ...]) -> dict[str, float]:
    """α for [`interpolate`]: layers cut into `len(ratios)` consecutive groups, a ratio for each.

    Raises:
        ValueError: there are fewer layers than groups.
    """
    names, layers = list(names), {}
    for stack, number in (match.groups() for name in names if (match := _LAYER.match(name))):
        layers[stack] = max(layers.get(stack, 0), int(number) + 1)
    if not layers or min(layers.values()) < len(ratios):
        raise ValueError(f"{len(ratios)} groups need as many layers at least; found {layers or 'none'}.")
    alpha = {"": ratios[-1]} | {name: ratios[0] for name in names if _FIRST.search(name) and not _LAYER.match(name)}
    for stack, count in layers.items():
        parts = {f"{stack}{i}.": ratios[i * len(ratios) // count] for i in range(count)}
        alpha |= {part: ratio for part, ratio in parts.items() if any(part in name for name in names)}
    return alpha


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: choose another output, or delete it.")


def _pairs(own, others, base: str, aligned: str) -> dict[str, tuple[str, Stored]]:
    """{name in `own`: (name that its α goes by, tensor to blend it with)}.

    Raises:
        ValueError: something differs, naming it.
    """
    pairs, missing = {}, (own.keys() ^ others.keys())
    for name in sorted(missing):
        there, where = (own, aligned) if name in own else (others, base)
        twin = find_twin(name, there, own.keys() & others.keys())
        if twin is None:
            raise ValueError(
                f"{name} is only in {where}, and is no copy there of another matrix that it could be tied to: "
                f"{base} and {aligned} are not checkpoints of one architecture."
            )
        if name in own:
            pairs[name] = twin, others[twin]
    for name, entry in own.items():
        pairs.setdefault(name, (name, others.get(name)))
        _check_alike(name, entry, pairs[name][1], base, aligned)
    return {name: (twin, own[name] if own[name].dtype in EXACT else other) for name, (twin, other) in pairs.items()}


def _check_alike(name: str, entry: Stored, other: Stored, base: str, aligned: str) -> None:
    if entry.shape != other.shape:
        raise ValueError(f"{name} has shape {other.shape} in {base} and {entry.shape} in {aligned}.")
    kinds = [stored.dtype if stored.dtype not in FLOATS else "float" for stored in (other, entry)]
    if kinds[0] != kinds[1] or kinds[0] not in ("float", *EXACT):
        raise ValueError(
            f"{name} is {other.dtype} in {base} and {entry.dtype} in {aligned}: only {', '.join(FLOATS)} are blended."
        )


def _base_of_adapter(aligned: str | Path, folder: Path, base: str | Path | None) -> str:
    """The base that an adapter goes by.

    Raises:
        ValueError: the adapter's delta is not s·BA on that base, or it names another base than `base`.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = [f"{key}={config[key]!r}" for key in ("use_dora", "alora_invocation_tokens") if config.get(key)]
    odd += [] if config.get("peft_type") == "LORA" else [f"peft_type={config.get('peft_type')!r}"]
    init = config.get("init_lora_weights", True)
    odd += [] if init in OWN_BASE_INITS else [f"init_lora_weights={init!r}"]
    if odd:
        raise ValueError(
            f"The adapter {aligned} has {odd[0]}, so that it is not W + s·BA on its base: merge it (merge_adapter) "
            "and interpolate the merged model."
        )
    named = config.get("base_model_name_or_path") or base
    models = (base or named, named)
    resolved = {str(Path(name).resolve()) if Path(name).is_dir() else str(name) for name in models}
    if len(resolved) > 1:
        raise ValueError(
            f"The adapter {aligned} belongs to {named}, not to {base}: give that, or None. To interpolate between two "
            "adapters merge both first (merge_adapter)."
        )
    return named


def _adapter_pairs(own: dict[str, Stored], base: str) -> dict[str, tuple[str, Stored | None]]:
    """As [`_pairs`] for an adapter: None, that is 0, for lora_B, itself for lora_A, the base's for whole weights."""
    pairs = {}
    for name, entry in own.items():
        if ".lora_B." in name or name.endswith(".lora_embedding_B"):
            pairs[name] = name, None
        elif ".lora_A." in name or name.endswith(".lora_embedding_A"):
            pairs[name] = name, entry
    whole = {_plain(name): name for name in own if name not in pairs}
    others = read_checkpoint(checkpoint_folder(base)) if whole else {}
    for plain, name in whole.items():
        if plain not in others:
            raise ValueError(
                f"The adapter trained all of {plain}, which is not in its base {base}: merge it (merge_adapter) and "
                "interpolate between whole checkpoints that both have it."
            )
        _check_alike(plain, own[name], others[plain], base, "the adapter")
        pairs[name] = name, others[plain]
    return pairs


def _plain(name: str) -> str:
    """A parameter's name in the base model, of its name in an adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _ratios(alpha: Alpha, names: dict[str, str]) -> dict[str, float]:
    """{key: α} for {key: the name that decides}."""
    parts = dict(alpha) if isinstance(alpha, Mapping) else {"": alpha}
    odd = [f"{value!r} for {part!r}" for part, value in parts.items() if not math.isfinite(value)]
    idle = [part for part in parts if not any(part in name for name in names.values())]
    odd += [f"{part!r}, which is in no parameter's name" for part in idle]
    if odd:
        raise ValueError(f"alpha has {odd[0]}: give finite ratios for parts of names such as {min(names.values())}.")
    ratios = {}
    for key, name in names.items():
        matching = [part for part in parts if part in name]
        if not matching:
            raise ValueError(f'alpha says nothing of {name}: add {{"": ratio}} for all that nothing else names.')
        ratios[key] = float(parts[max(matching, key=len)])
    return ratios


def _blend(other: Stored | None, entry: Stored, ratio: float, buffers: tuple) -> Iterator[torch.Tensor]:
    """Bytes of (1 − ratio)·other + ratio·entry, or of `entry` where they are one; `other` may be None for 0."""
    same = {0: other, 1: entry}.get(entry is other or ratio)
    if same is not None and same.dtype == entry.dtype:
        yield from pieces(same, buffers[0])
        return
    dtypes = [FLOATS[stored.dtype] for stored in (entry, other or entry)]
    # Of two tensors of one dtype torch makes each entry in fp32 at least, and rounds it once.
    wide = dtypes[0] if dtypes[0] == dtypes[1] else reduce(torch.promote_types, dtypes, torch.float32)
    for high, low in zip(pieces(entry, buffers[0]), pieces(other, buffers[1]) if other else repeat(None)):
        high = high.view(dtypes[0]).to(wide)
        mixed = high.mul_(ratio) if low is None else low.view(dtypes[1]).to(wide).lerp_(high, ratio)
        yield mixed.to(dtypes[0]).view(torch.uint8)


def _card(name: str, base: str | Path, aligned: str | Path, alpha: Alpha, folder: Path) -> str:
    """The README.md: Hub names stand in its metadata, local ones by their last part in the text only."""
    adapter = (folder / "adapter_config.json").exists()
    names = [str(base), str(aligned)]
    on_hub = [model for model in names if HUB_ID.fullmatch(model) and not Path(model).exists()]
    data = ModelCardData(
        base_model=(on_hub[0] if adapter or len(on_hub) == 1 else on_hub) if on_hub else None,
        base_model_relation=("adapter" if adapter else "merge") if on_hub else None,
        library_name="peft" if adapter else "transformers",
        tags=["lifecycle_hf", "interpolation"],
    )
    first, second = (model if model in on_hub else Path(model).name for model in names)
    ratios = alpha if isinstance(alpha, Mapping) else {"": alpha}
    table = "\n".join(f"| {f'`{part}`' if part else 'all others'} | {ratio:g} |" for part, ratio in ratios.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nθ = (1 − α)·θ_base + α·θ_aligned of `{first}` (base) and "
        f"`{second}` (aligned), made by `interpolate` of lifecycle_hf{', which scaled lora_B' if adapter else ''}.\n\n"
        f"| parameters with | α |\n|---|---:|\n{table}\n\n"
        "Paper: [Mitigating the Alignment Tax of RLHF](https://arxiv.org/abs/2309.06256).\n"
    )
