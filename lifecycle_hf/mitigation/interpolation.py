"""Interpolation between a base checkpoint and an aligned one, written piece by piece from file to file."""

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

from lifecycle_hf.models import weight_files
from lifecycle_hf.models.weight_files import FLOATS, Stored, checkpoint_folder, pieces, read_checkpoint

Alpha = float | Mapping[str, float]
EXACT = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
OWN_BASE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base W unchanged; with others W + s·BA starts from a changed W."""
_LAYER = re.compile(r"^(.*?\b(?:layers|layer|h|blocks|block)\.)(\d+)\.")
_OF_A_RUN = re.compile(r"(trainer_state|report|(all|train|eval)_results|lifecycle_(?!adapter).*)\.json")
_FIRST = re.compile(r"embed|wte|wpe|shared")


def interpolate(base: str | Path | None, aligned: str | Path, alpha: Alpha, output: str | Path) -> Path:
    """Write θ = (1 − α)·θ_base + α·θ_aligned to the folder `output` and return its path.

    A failed call leaves no folder `output`. Neither checkpoint is loaded: the tensors are read, blended and written in
    pieces of a few MB, in fp32 (fp64 if they are fp64). The result has the dtype, files and shards of `aligned`, and a
    copy of its config and tokenizer. Where α is 0 or 1 the bytes are copied. Tensors that are not floating point are
    those of `aligned`. Where one checkpoint leaves out a matrix because it is tied to another, and the other
    checkpoint has it as a bitwise copy of that matrix, it is blended with the α of the matrix it is tied to.

    If `aligned` is a LoRA adapter, the result is an adapter of the same base: W + α·s·BA is exactly s·(αB)A, so
    lora_B and its bias are multiplied by α, which may differ between layers. Whole weights in the adapter, such as
    trained embeddings, are blended with those of the base.

    Args:
        base, aligned: folders or Hub names of safetensors checkpoints. For an adapter `base` may be None: the adapter
            names its base.
        alpha: α: 0 for the base, 1 for the aligned model; other values may extrapolate. Or {part of a parameter's
            name: α}, such as {"layers.0.": 0.3, "mlp": 0.8, "": 0.5}: the longest part that a name contains decides
            (the first of equal length), and "" is contained in every name.

    Raises:
        ValueError: names, shapes or kinds of tensors differ (names the first); a checkpoint is quantised, damaged or
            missing; α does not cover every tensor or has a part that no name contains; the adapter is not plain LoRA
            or has another base; `output` is not empty.

    Reference: https://arxiv.org/abs/2203.05482 (averaging), https://arxiv.org/abs/2309.06256 (α by layers).
    """
    output, theirs = Path(output), checkpoint_folder(aligned)
    _check_free(output)
    own = read_checkpoint(theirs)
    adapter = (theirs / "adapter_config.json").exists()
    if adapter:
        base = _base_of_adapter(aligned, theirs, base)
        pairs = _adapter_pairs(own, base)
    else:
        if base is None:
            raise ValueError(f"{aligned} is not an adapter, so it names no base: give `base`.")
        pairs = _pairs(own, read_checkpoint(checkpoint_folder(base)), f"{base}", f"{aligned}")
    parts = dict(alpha) if isinstance(alpha, Mapping) else {"": alpha}
    ratios = _ratios(parts, {name: _plain(twin) for name, (twin, _) in pairs.items()})
    staging = output.with_name(f"_tmp-{output.name}-{os.getpid()}")
    staging.mkdir(parents=True)
    buffers = weight_files.piece_buffers()
    try:
        for path in sorted({entry.path for entry in own.values()}):
            names = [name for name, entry in own.items() if entry.path == path]
            blended = {own[name]: _blend(pairs[name][1], own[name], ratios[name], buffers) for name in names}
            weight_files.write_like(staging / path.name, path, blended)
        for path in (path for pattern in weight_files.COMPANIONS for path in theirs.glob(pattern)):
            if not _OF_A_RUN.fullmatch(path.name):
                shutil.copyfile(path, staging / path.name)
        (staging / "README.md").write_text(_card(output.name, base, aligned, parts, adapter))
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
    """Interpolate at each α and measure; return rows {alpha, path, metrics} in the order of `alphas`.

    Args:
        measure: `f(path of a checkpoint) -> {metric: value}`.
        output_dir: gets a folder for each α, `0`, `1`, …
        keep: keep the checkpoints; otherwise only one at a time is on disk, and `path` is None.

    Raises:
        ValueError: as in [`interpolate`].
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
    """Search an α for each of a few groups of layers by a validation metric (heterogeneous model averaging).

    The layers are cut into consecutive groups of equal size; embeddings belong to the first group, the final norm and
    the head to the last. The search starts from `alpha` in every group. A move raises the ratio of one group by `step`
    and lowers that of another (`hold_mean`, which keeps (1/K)·Σ_k α_k = α as in the paper), or changes only one ratio.
    The first move that improves the metric is made; if none does, the step is halved. The paper trains the ratios;
    this search only measures, at most K(K − 1) times (2K without `hold_mean`) for each move.

    Args:
        measure: `f(path of a checkpoint) -> metric`; use data on which you do not report results.
        output: folder of the best checkpoint.
        alpha: the ratio to start from, in [0, 1].
        step, min_step: first and smallest change of a ratio.

    Returns:
        {"alpha": mapping for [`interpolate`], "ratios": α of each group, "metric": its value, "trials": rows
        {ratios, metric} in the order of measurement}.

    Raises:
        ValueError: as in [`interpolate`]; α, groups or steps are out of range, or there are fewer layers than groups.

    Reference: https://arxiv.org/abs/2309.06256, section 5 (HMA).
    """
    if not (0 <= alpha <= 1 and groups >= 1 and 0 < min_step <= step):
        raise ValueError(f"search_layer_ratios needs 0 <= {alpha=} <= 1, {groups=} >= 1, 0 < {min_step=} <= {step=}.")
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
    """Return ratios in [0, 1] from which no move of at least `min_step` raises `value`; start from `best`."""
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
    """Return the `alpha` for [`interpolate`] that gives each of `len(ratios)` consecutive groups of layers a ratio.

    Raises:
        ValueError: there are fewer layers than groups.
    """
    names, layers = list(names), {}
    for stack, number in (match.groups() for name in names if (match := _LAYER.match(name))):
        layers[stack] = max(layers.get(stack, 0), int(number) + 1)
    if not layers or min(layers.values()) < len(ratios):
        raise ValueError(f"{len(ratios)} groups need as many layers, found {layers or 'none'}: lower `groups`.")
    alpha = {"": ratios[-1]} | {name: ratios[0] for name in names if _FIRST.search(name) and not _LAYER.match(name)}
    for stack, count in layers.items():
        parts = {f"{stack}{i}.": ratios[i * len(ratios) // count] for i in range(count)}
        alpha |= {part: ratio for part, ratio in parts.items() if any(part in name for name in names)}
    return alpha


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: choose another output, or delete it.")


def _pairs(own, others, base: str, aligned: str) -> dict[str, tuple[str, Stored]]:
    """Return {name in `own`: (name whose α it gets, tensor to blend it with)}.

    Raises:
        ValueError: a name, shape or dtype differs; names the tensor.
    """
    pairs, twins = {}, {}
    for name in sorted(own.keys() ^ others.keys()):
        there, where = (own, aligned) if name in own else (others, base)
        twins[name] = weight_files.find_twin(name, there, own.keys() & others.keys())
        if twins[name] is None:
            raise ValueError(
                f"{name} is only in {where}, and it is not a copy of another matrix there that it could be tied to: "
                f"give two checkpoints of one architecture as {base} and {aligned}."
            )
    for name, entry in own.items():
        twin = twins.get(name, name)
        _check_alike(name, entry, others[twin], base, aligned)
        pairs[name] = twin, entry if entry.dtype in EXACT else others[twin]
    return pairs


def _check_alike(name: str, entry: Stored, other: Stored, base: str, aligned: str) -> None:
    if entry.shape != other.shape:
        raise ValueError(f"{name} has shape {other.shape} in {base} and {entry.shape} in {aligned}.")
    kinds = [stored.dtype if stored.dtype not in FLOATS else "float" for stored in (other, entry)]
    if kinds[0] != kinds[1] or kinds[0] not in ("float", *EXACT):
        raise ValueError(
            f"{name} is {other.dtype} in {base} and {entry.dtype} in {aligned}: only {', '.join(FLOATS)} are blended."
        )


def _base_of_adapter(aligned: str | Path, folder: Path, base: str | Path | None) -> str:
    """Return the base that an adapter names, or `base` where it names none.

    Raises:
        ValueError: the adapter's delta is not s·BA on that base, or it names another base than `base`.
    """
    config, no = json.loads((folder / "adapter_config.json").read_text()), (None, False, [])
    known = {
        "use_dora": no,
        "alora_invocation_tokens": no,
        "peft_type": ("LORA",),
        "init_lora_weights": OWN_BASE_INITS,
    }
    odd = [f"{key}={config.get(key)!r}" for key, values in known.items() if config.get(key) not in values]
    if odd:
        raise ValueError(
            f"The adapter {aligned} has {odd[0]}, so it is not W + s·BA on its base: merge it (merge_adapter) and "
            "interpolate the merged model."
        )
    named = config.get("base_model_name_or_path") or base
    resolved = {str(Path(name).resolve()) if Path(name).is_dir() else str(name) for name in (base or named, named)}
    if len(resolved) > 1:
        raise ValueError(
            f"The adapter {aligned} belongs to {named}, not to {base}: give {named} as base, or None. To interpolate "
            "between two adapters, merge both first (merge_adapter)."
        )
    return named


def _adapter_pairs(own: dict[str, Stored], base: str) -> dict[str, tuple[str, Stored | None]]:
    """Return the pairs of [`_pairs`] for an adapter: lora_B is blended with None (0), lora_A with itself."""
    pairs = {name: (name, None) for name in own if ".lora_B." in name or name.endswith(".lora_embedding_B")}
    pairs |= {name: (name, own[name]) for name in own if ".lora_A." in name or name.endswith(".lora_embedding_A")}
    whole = {_plain(name): name for name in own if name not in pairs}
    others = read_checkpoint(checkpoint_folder(base)) if whole else {}
    for plain, name in whole.items():
        if plain not in others:
            raise ValueError(
                f"The adapter trained all of {plain}, which its base {base} does not have: merge it (merge_adapter) "
                "and interpolate between whole checkpoints that both have it."
            )
        _check_alike(plain, own[name], others[plain], base, "the adapter")
        pairs[name] = name, others[plain]
    return pairs


def _plain(name: str) -> str:
    """Return the name that a parameter of an adapter has in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _ratios(parts: Mapping[str, float], names: dict[str, str]) -> dict[str, float]:
    """Return {key: α} for {key: name that decides its α}."""
    matching = {name: [part for part in parts if part in name] for name in names.values()}
    idle = parts.keys() - set().union(*matching.values())
    odd = [f"{value!r} for {part!r}" for part, value in parts.items() if not math.isfinite(value)]
    odd += [f"{part!r}, which is in no parameter's name" for part in parts if part in idle]
    if odd:
        raise ValueError(f"alpha has {odd[0]}: give finite ratios for parts of names such as {min(matching)}.")
    for name in (name for name in matching if not matching[name]):
        raise ValueError(f'alpha says nothing of {name}: add {{"": ratio}} for all names that no other part is in.')
    return {key: float(parts[max(matching[name], key=len)]) for key, name in names.items()}


def _blend(other: Stored | None, entry: Stored, ratio: float, buffers: tuple) -> Iterator[torch.Tensor]:
    """Yield the bytes of (1 − ratio)·other + ratio·entry; None as `other` stands for 0, `entry` itself is copied."""
    same = {0: other, 1: entry}.get(entry is other or ratio)
    if same is not None and same.dtype == entry.dtype:
        yield from pieces(same, buffers[0])
        return
    dtypes = [FLOATS[stored.dtype] for stored in (entry, other or entry)]
    # With two tensors of one dtype torch computes each entry in fp32 or wider and rounds it once.
    wide = dtypes[0] if dtypes[0] == dtypes[1] else reduce(torch.promote_types, dtypes, torch.float32)
    for high, low in zip(pieces(entry, buffers[0]), pieces(other, buffers[1]) if other else repeat(None)):
        high = high.view(dtypes[0]).to(wide)
        mixed = high.mul_(ratio) if low is None else low.view(dtypes[1]).to(wide).lerp_(high, ratio)
        yield mixed.to(dtypes[0]).view(torch.uint8)


def _card(name: str, base: str | Path, aligned: str | Path, parts: Mapping[str, float], adapter: bool) -> str:
    """Return the text of README.md. Its metadata has Hub names only; of a local path only the last part is shown."""
    names = [str(base), str(aligned)]
    on_hub = [model for model in names if weight_files.HUB_ID.fullmatch(model) and not Path(model).exists()]
    data = ModelCardData(
        base_model=(on_hub[0] if adapter or len(on_hub) == 1 else on_hub) if on_hub else None,
        base_model_relation=("adapter" if adapter else "merge") if on_hub else None,
        library_name="peft" if adapter else "transformers",
        tags=["lifecycle_hf", "interpolation"],
    )
    first, second = (model if model in on_hub else Path(model).name for model in names)
    table = "\n".join(f"| {f'`{part}`' if part else 'all others'} | {ratio:g} |" for part, ratio in parts.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nθ = (1 − α)·θ_base + α·θ_aligned of `{first}` (base) and "
        f"`{second}` (aligned), made by `interpolate` of lifecycle_hf{', which scaled lora_B' if adapter else ''}.\n\n"
        f"| parameters with | α |\n|---|---:|\n{table}\n\n"
        "Paper: [Mitigating the Alignment Tax of RLHF](https://arxiv.org/abs/2309.06256).\n"
    )
