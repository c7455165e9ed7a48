"""Completions in, per-token log-probs out: the one home of scoring.

Everything is in completion coordinates, [batch B, completion tokens T]: column t belongs to the t-th token of the
completion and is read from the position *before* it. A prompt with several completions is encoded once, nothing is
padded, and the LM head sees the completions' positions only, in chunks whose logits the backward pass makes anew.
A model that can't be packed, or whose head does more than is known here, is found by a probe at its first call and
takes the padded path or its own forward, with the same numbers. So does a lifecycle model with prefix attention: the
prompt is its prefix, as it is in generation.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lifecycle_hf.data.collators import length_mask, pad_sequences
from lifecycle_hf.models.lm_head import head_logprobs, read_head
from lifecycle_hf.models.packed_attention import Segments, disable_packing, enable_packing

PROBE_PROMPT, PROBE_COMPLETIONS = 12, (7, 5)
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
PROBE_TOLERANCE_HALF, PROBE_LEAK = 0.05, 1e-5
_traits: WeakKeyDictionary[nn.Module, dict[Callable, bool]] = WeakKeyDictionary()


@dataclass
class Completions:
    """Prompts with their completions, padded on the right.

    Attributes:
        input_ids: [B, L], prompt then completion then padding.
        prompt_lengths, completion_lengths: [B].
        groups: [B]; rows of one number have the same prompt, which is encoded once. By default each has its own.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    completion_lengths: torch.Tensor
    groups: torch.Tensor | None = None

    @classmethod
    def from_lists(
        cls,
        prompts: list[list[int]],
        completions: list[list[int]],
        pad_token_id: int,
        device=None,
        groups: list[int] | None = None,
    ):
        """Pads token lists.

        Raises:
            ValueError: if a prompt or a completion is empty, or two rows of a group have different prompts, naming the
                row.
        """
        for name, rows in (("prompt", prompts), ("completion", completions)):
            empty = [i for i, row in enumerate(rows) if not row]
            if empty:
                raise ValueError(f"Row {empty[0]} has an empty {name}: every {name} needs at least one token.")
        first = dict(zip(reversed(groups or []), reversed(prompts)))
        odd = [i for i, group in enumerate(groups or []) if prompts[i] != first[group]]
        if odd:
            raise ValueError(f"Row {odd[0]} is in group {groups[odd[0]]}, whose first row has another prompt.")
        ids = [p + c for p, c in zip(prompts, completions, strict=True)]
        return cls(
            pad_sequences(ids, pad_token_id).to(device),
            torch.tensor([len(p) for p in prompts], device=device),
            torch.tensor([len(c) for c in completions], device=device),
            None if groups is None else torch.tensor(groups, device=device),
        )

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, L], 1 on prompt and completion."""
        return length_mask(self.prompt_lengths + self.completion_lengths, self.input_ids.shape[1]).long()

    @cached_property
    def mask(self) -> torch.Tensor:
        """[B, T], true on completion tokens."""
        return length_mask(self.completion_lengths, int(self.completion_lengths.max()))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """The completions' tokens one after the other, [M]."""
        rows = length_mask(self.prompt_lengths + self.completion_lengths, self.input_ids.shape[1])
        return self.input_ids[rows & ~length_mask(self.prompt_lengths, self.input_ids.shape[1])]

    @cached_property
    def packed(self) -> "Layout":
        """How the batch stands in one row of trees: a prompt, then its completions."""
        device, width = self.input_ids.device, self.input_ids.shape[1]
        prompts, completions = self.prompt_lengths.tolist(), self.completion_lengths.tolist()
        members: dict[int, list[int]] = {}
        for row, group in enumerate(range(len(prompts)) if self.groups is None else self.groups.tolist()):
            members.setdefault(group, []).append(row)
        tokens, trees, at = [], [], 0
        prompt_starts, starts = torch.zeros(2, len(prompts), dtype=torch.long)
        for rows in members.values():
            prompt = prompts[rows[0]]
            tokens.append(torch.arange(prompt) + rows[0] * width)
            prompt_starts[rows], at = at, at + prompt
            for row in rows:
                tokens.append(torch.arange(prompt, prompt + completions[row]) + row * width)
                starts[row], at = at, at + completions[row]
            trees.append((prompt, [completions[row] for row in rows]))
        return Layout(
            torch.cat(tokens).to(device), prompt_starts.to(device), starts.to(device), Segments(trees, device)
        )

    @cached_property
    def padded(self) -> "Layout":
        """How the batch stands in its rows, flattened."""
        starts = torch.arange(len(self.input_ids), device=self.input_ids.device) * self.input_ids.shape[1]
        tokens = torch.arange(self.input_ids.numel(), device=self.input_ids.device)
        return Layout(tokens, starts, starts + self.prompt_lengths)

    @property
    def leaders(self) -> torch.Tensor:
        """[B], the first row that has the same prompt."""
        rows = torch.arange(len(self.input_ids), device=self.input_ids.device)
        return rows if self.groups is None else (self.groups[:, None] == self.groups).long().argmax(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the batch consists of, by the names of the fields."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


class Layout(NamedTuple):
    """Where the tokens of a batch stand in what a model is given, [1, N] or [B, L], flattened.

    Attributes:
        tokens: [N], the places of the model's tokens in the flattened `input_ids` of the batch.
        prompt_starts, completion_starts: [B], where each row's prompt and completion begin.
        segments: the trees of a packed row.
    """

    tokens: torch.Tensor
    prompt_starts: torch.Tensor
    completion_starts: torch.Tensor
    segments: Segments | None = None

    def predictors(self, batch: Completions, extra: int = 0) -> torch.Tensor:
        """[B, T + extra], the place each completion token is predicted from; padding points at the last token."""
        steps = torch.arange(int(batch.completion_lengths.max()) + extra, device=self.tokens.device)
        steps = torch.minimum(steps[None], batch.completion_lengths[:, None])
        after_prompt = (self.prompt_starts + batch.prompt_lengths - 1)[:, None]
        return torch.where(steps == 0, after_prompt, self.completion_starts[:, None] + steps - 1)


class Scores(NamedTuple):
    """What [`completion_logprobs`] returns."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    prompt_logprobs: torch.Tensor | None = None
    states: torch.Tensor | None = None


def completion_logprobs(
    model: nn.Module,
    batch: Completions,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    prompts: bool = False,
    states: bool = False,
) -> Scores:
    """Log-probs of the completion tokens of `batch` under a causal LM; on request entropies, those of the prompts, and
    the hidden states that they were read from.

    log π(y_t | x, y_<t) at the temperature in force.

    Raises:
        ValueError: `prompts` of a model with prefix attention.

    Returns:
        log-probs [B, T], entropies [B, T] (with `entropy`), Σ log π(x_t | x_<t) over the prompt's tokens but the first
        [B] (with `prompts`): fp32, nats, 0 on padding. With `states` the last hidden states [B, T + 1, hidden], as
        [`completion_hidden_states`] gives them with `extra=1`.
    """
    base, mask = unwrapped(model), batch.mask
    if prompts and has_prefix(base):
        raise ValueError(
            "Log-probs of prompts were asked for (as nll_on_prompt does), but with attention='prefix' each token of a "
            'prompt sees those after it: turn that off, or load the model with attention="causal".'
        )
    fused = _probed(base, _head_is_known)
    layout, outputs = _run(base.base_model if fused else base, batch, "last_hidden_state" if fused else "logits")
    places, tokens = layout.predictors(batch)[mask], batch.tokens
    if prompts:
        lead = torch.arange(len(mask), device=mask.device) == batch.leaders
        inner = length_mask(batch.prompt_lengths - 1, batch.input_ids.shape[1]) & lead[:, None]
        steps = torch.arange(inner.shape[1], device=mask.device)
        places = torch.cat([places, (layout.prompt_starts[:, None] + steps)[inner]])
        tokens = torch.cat([tokens, batch.input_ids.roll(-1, 1)[inner]])
    options = {"temperature": temperature, "entropy": entropy, "entropy_gradient": entropy_gradient}
    logprobs, entropies = head_logprobs(base if fused else None, outputs[places], tokens, **options)
    n = int(mask.sum())

    def spread(values):
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values[:n])

    sums, hidden = None, None
    if prompts:
        rows = inner.nonzero()[:, 0]
        sums = logprobs.new_zeros(len(mask)).index_add(0, rows, logprobs[n:])[batch.leaders]
    if states:
        if fused:
            hidden = outputs[layout.predictors(batch, extra=1)]
        else:
            hidden = completion_hidden_states(base.base_model, batch, extra=1)
    return Scores(spread(logprobs), spread(entropies) if entropy else None, sums, hidden)


def completion_hidden_states(
    backbone: nn.Module, batch: Completions, *, extra: int = 0, prefix: bool = True
) -> torch.Tensor:
    """Last hidden states that precede each completion token, [B, T + extra, hidden].

    With `extra=1` the last column that belongs to a row is the state after its last token, that of a bootstrap value.

    Args:
        prefix: whether the prompt is the prefix of a backbone with prefix attention, which reward models, trained on
            whole sequences, do without.
    """
    layout, states = _run(backbone, batch, "last_hidden_state", prefix=prefix)
    return states[layout.predictors(batch, extra)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper of PEFT.

    Raises:
        ValueError: the adapter is a prompt-learning one, whose tokens the model would not see.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("a prompt-learning adapter (prefix, prompt or p-tuning) can't be scored: use LoRA.")
    return model.get_base_model()


def has_prefix(module: nn.Module) -> bool:
    """Whether prompts see themselves both ways, which a lifecycle model's config says."""
    return getattr(module.config, "attention", None) == "prefix"


def packs(model: nn.Module) -> bool:
    """Whether batches of this model are packed, which a probe finds out at the first call."""
    return _probed(unwrapped(model).base_model, _can_be_packed)


def _run(
    module: nn.Module, batch: Completions, output: str, packed: bool | None = None, prefix: bool = True
) -> tuple[Layout, torch.Tensor]:
    """The output of a model or backbone for every token, flattened to [N, ...], and where what stands in it."""
    if packed is None:
        packed = packs(module)
    if not packed:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if has_prefix(module):
            inputs["prefix_lengths"] = batch.prompt_lengths * prefix
        return batch.padded, getattr(module(**inputs, use_cache=False), output).flatten(0, 1)
    layout, segments = batch.packed, batch.packed.segments
    inputs = {"input_ids": batch.input_ids.flatten()[layout.tokens][None], "position_ids": segments.position_ids}
    outputs = module(**inputs, attention_mask=segments.dummy_mask, segments=segments, use_cache=False)
    return layout, getattr(outputs, output).flatten(0, 1)


def _probed(module: nn.Module, trait: Callable[[nn.Module], bool]) -> bool:
    """Whether `module` has a trait, found out once with dropout off, without gradients and autocast."""
    known = _traits.setdefault(module, {})
    if trait in known:
        return known[trait]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    # Flash kernels know no fp32, so models kept in it need the autocast that they run under.
    flash = "flash" in (module.config.get_text_config()._attn_implementation or "")
    exact = nullcontext() if flash else torch.autocast(next(module.parameters()).device.type, enabled=False)
    try:
        with torch.no_grad(), exact:
            found, why = trait(module), "its numbers would differ"
    except Exception as error:  # whatever a model's code raises where it can't be used so
        found, why = False, f"{type(error).__name__}: {str(error)[:100]}"
    for part, mode in modes.items():
        part.training = mode
    known[trait] = found
    if not found:
        instead = "pads its batches" if trait is _can_be_packed else "builds whole logits"
        warnings.warn(f"{type(module).__name__} {instead} in scoring, which is slower ({why}).", stacklevel=4)
    return found


def _can_be_packed(backbone: nn.Module) -> bool:
    """Whether completions packed behind their prompt have the hidden states they have each by itself; if so it is set
    up for it."""
    if has_prefix(backbone):
        raise NotImplementedError("attention='prefix' is masked in padded batches only")
    enable_packing(backbone.config)
    try:
        same = _packs_truly(backbone)
    except Exception:
        disable_packing(backbone.config)
        raise
    if not same:
        disable_packing(backbone.config)
    return same


def _packs_truly(backbone: nn.Module) -> bool:
    """Packed equals padded, and the second completion does not move when the first is another one: that holds exactly,
    where low precision hides a small leak from the comparison."""

    def states(batch, packed):
        layout, states = _run(backbone, batch, "last_hidden_state", packed=packed)
        return states[layout.predictors(batch)]

    batch, other = _probe_batch(backbone), _probe_batch(backbone, first=1)
    got = states(batch, packed=True)
    moved = (states(other, packed=True)[1] - got[1]).abs().max()
    leaks = moved > PROBE_LEAK * got.abs().max()
    return not leaks and _alike(got, states(batch, packed=False), backbone)


def _head_is_known(base: nn.Module) -> bool:
    """Whether the logits are what [`read_head`] makes of the last hidden states."""
    batch = _probe_batch(base)
    _, states = _run(base.base_model, batch, "last_hidden_state", packed=False)
    return _alike(read_head(base)(states), _run(base, batch, "logits", packed=False)[1], base)


def _probe_batch(module: nn.Module, first: int = 0) -> Completions:
    """Two completions of one prompt, random tokens; `first` draws another first completion."""
    rows, draw = module.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(rows, (length,), generator=draw).tolist() for length in (PROBE_PROMPT, *PROBE_COMPLETIONS)
    )
    completions[0] = [(token + first) % rows for token in completions[0]]
    return Completions.from_lists([prompt] * 2, completions, 0, next(module.parameters()).device, groups=[0, 0])


def _alike(got: torch.Tensor, expected: torch.Tensor, module: nn.Module) -> bool:
    """Equal up to the rounding of the dtype, relative to the largest entry."""
    autocast = torch.is_autocast_enabled(got.device.type)
    exact = not (autocast or getattr(module, "is_quantized", False)) and next(module.parameters()).dtype
    tolerance = PROBE_TOLERANCE.get(exact, PROBE_TOLERANCE_HALF)
    got, expected = got.double(), expected.double()
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
