"""Log-probs, entropies and hidden states of the tokens of completions.

The results have the shape [batch B, completion tokens T]: column t belongs to token t of the completion and is read
from the position *before* it. A prompt with several completions is encoded once, batches are packed without padding,
and the LM head runs only on the positions that are needed, in chunks whose logits the backward pass computes again.

At the first call of a model a probe tests whether it can be packed and whether its logits are those of a known head.
If not, it gets padded batches or runs its own forward pass, with the same results. A lifecycle model with prefix
attention is padded too; its prefix is the prompt, as in generation.
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

from lifecycle_hf.data.collators import length_mask, on_device, pad_sequences
from lifecycle_hf.models.adapters.embeddings import embedding_rows
from lifecycle_hf.models.lm_head import head_logprobs, read_head
from lifecycle_hf.models.packed_attention import Segments, disable_packing, enable_packing

PROBE_LENGTHS = 12, 7, 5
"""Tokens of the prompt of the probe, and of its two completions."""
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
PROBE_TOLERANCE_HALF, PROBE_LEAK = 0.05, 1e-5
_traits: WeakKeyDictionary[nn.Module, dict[Callable, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sizes:
    """Hold the lengths and the groups of the rows of a batch in the host's memory.

    Every index into the batch is made from these lists, so that a GPU never has to be waited for.
    """

    prompts: list[int]
    completions: list[int]
    groups: list[int]

    @property
    def width(self) -> int:
        """T, tokens of the longest completion."""
        return max(self.completions)


def ranges(starts: list[int], lengths: list[int]) -> torch.Tensor:
    """Return the numbers from `starts[b]` on, `lengths[b]` of them, of all rows b."""
    return torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])


@dataclass
class Completions:
    """Hold prompts with their completions, padded on the right.

    Attributes:
        input_ids: [B, L], prompt, completion, padding.
        prompt_lengths, completion_lengths: [B].
        groups: [B]; rows with equal numbers have the same prompt, which is encoded once. By default no rows share one.
        sizes: the same lengths and groups in the host's memory; by default read from the tensors.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    completion_lengths: torch.Tensor
    groups: torch.Tensor | None = None
    sizes: Sizes | None = None

    def __post_init__(self):
        if self.sizes is None:
            groups = range(len(self.input_ids)) if self.groups is None else self.groups.tolist()
            self.sizes = Sizes(self.prompt_lengths.tolist(), self.completion_lengths.tolist(), list(groups))
        if len(self.sizes.prompts) != len(self.input_ids):
            raise ValueError(
                f"A batch of {len(self.input_ids)} rows came with the lengths of {len(self.sizes.prompts)}: batches "
                "must not be split after they were collated (accelerator_config: dispatch_batches, split_batches)."
            )

    @classmethod
    def from_lists(
        cls, prompts: list[list[int]], completions: list[list[int]], pad_token_id: int, device=None, groups=None
    ):
        """Build a batch from lists of token ids, and a list of group numbers or None.

        Raises:
            ValueError: a prompt or a completion is empty, or two rows of a group have different prompts; names the
                row.
        """
        for name, rows in (("prompt", prompts), ("completion", completions)):
            empty = [i for i, row in enumerate(rows) if not row]
            if empty:
                raise ValueError(f"Row {empty[0]} has an empty {name}: every {name} needs at least one token.")
        first = {}
        for i, group in enumerate(groups or []):
            if first.setdefault(group, prompts[i]) != prompts[i]:
                raise ValueError(f"Row {i} is in group {group}, whose first row has another prompt: split the group.")
        ids = [p + c for p, c in zip(prompts, completions, strict=True)]
        lengths = [len(p) for p in prompts], [len(c) for c in completions]
        rows = range(len(prompts)) if groups is None else groups
        parts = [pad_sequences(ids, pad_token_id), *map(torch.tensor, lengths)]
        parts += [None] if groups is None else [torch.tensor(groups)]
        moved = [part if part is None else on_device(part, device) for part in parts]
        return cls(*moved, Sizes(*lengths, list(rows)))

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, L], 1 at the tokens of prompt and completion."""
        return length_mask(self.prompt_lengths + self.completion_lengths, self.input_ids.shape[1]).long()

    @cached_property
    def mask(self) -> torch.Tensor:
        """[B, T], true at the tokens of the completion."""
        return length_mask(self.completion_lengths, self.sizes.width)

    @cached_property
    def filled(self) -> torch.Tensor:
        """Places of the tokens of the completions in the flattened [B, T], row after row, [M]."""
        rows, width = len(self.input_ids), self.sizes.width
        return self._index([row * width for row in range(rows)], self.sizes.completions)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Tokens of all completions, row after row, [M]."""
        width = self.input_ids.shape[1]
        starts = [row * width + prompt for row, prompt in enumerate(self.sizes.prompts)]
        return self.input_ids.flatten()[self._index(starts, self.sizes.completions)]

    def _index(self, starts: list[int], lengths: list[int]) -> torch.Tensor:
        return on_device(ranges(starts, lengths), self.input_ids.device)

    @cached_property
    def packed(self) -> "Layout":
        """Layout of the batch in one packed row: each prompt, followed by its completions."""
        device, width = self.input_ids.device, self.input_ids.shape[1]
        prompts, completions = self.sizes.prompts, self.sizes.completions
        members: dict[int, list[int]] = {}
        for row, group in enumerate(self.sizes.groups):
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
        places = [on_device(part, device) for part in (torch.cat(tokens), prompt_starts, starts)]
        return Layout(*places, Segments(trees, device))

    @cached_property
    def padded(self) -> "Layout":
        """Layout of the batch in its padded rows, flattened."""
        starts = torch.arange(len(self.input_ids), device=self.input_ids.device) * self.input_ids.shape[1]
        tokens = torch.arange(self.input_ids.numel(), device=self.input_ids.device)
        return Layout(tokens, starts, starts + self.prompt_lengths)

    @property
    def leaders(self) -> list[int]:
        """Return for each row the index of the first row of the same group."""
        return [self.sizes.groups.index(group) for group in self.sizes.groups]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return {name of the field: tensor}, without those that are None."""
        return {f.name: part for f in fields(self) if isinstance(part := getattr(self, f.name), torch.Tensor)}


class Layout(NamedTuple):
    """Positions of the tokens of a batch in the flattened input of a model, [1, N] packed or [B, L] padded.

    Attributes:
        tokens: [N], position in the flattened `input_ids` of the batch of each input token of the model.
        prompt_starts, completion_starts: [B], input positions where each row's prompt and completion begin.
        segments: prompts and completions of a packed row, for the attention; None for padded rows.
    """

    tokens: torch.Tensor
    prompt_starts: torch.Tensor
    completion_starts: torch.Tensor
    segments: Segments | None = None

    def predictors(self, batch: Completions, extra: int = 0) -> torch.Tensor:
        """Return the position each completion token is predicted from, [B, T + extra]; the last token's on padding."""
        steps = torch.arange(batch.sizes.width + extra, device=self.tokens.device)
        steps = torch.minimum(steps[None], batch.completion_lengths[:, None])
        after_prompt = (self.prompt_starts + batch.prompt_lengths - 1)[:, None]
        return torch.where(steps == 0, after_prompt, self.completion_starts[:, None] + steps - 1)


class InnerPrompts(NamedTuple):
    """Name the tokens of a batch's prompts that predict another token of the prompt, once for each group.

    Attributes:
        rows, steps: [K], row and position of each of these tokens.
        leaders: [B], row whose prompt stands for that of each row.
    """

    rows: torch.Tensor
    steps: torch.Tensor
    leaders: torch.Tensor

    @classmethod
    def of(cls, batch: Completions) -> "InnerPrompts":
        leaders = batch.leaders
        lengths = [n - 1 if leaders[row] == row else 0 for row, n in enumerate(batch.sizes.prompts)]
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        places = rows, ranges([0] * len(lengths), lengths), torch.tensor(leaders)
        return cls(*(on_device(index, batch.input_ids.device) for index in places))


class Scores(NamedTuple):
    """Results of [`completion_logprobs`]."""

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
    """Compute log-probs of the completion tokens under a causal LM, log π(y_t | x, y_<t) at a temperature.

    Args:
        entropy: also return the entropies of the predicted distributions.
        entropy_gradient: give the entropies a gradient.
        prompts: also return the log-probs of the prompts.
        states: also return the last hidden states.

    Raises:
        ValueError: `prompts` with a model with prefix attention.

    Returns:
        log-probs [B, T], entropies [B, T] (with `entropy`), Σ log π(x_t | x_<t) over the prompt's tokens except the
        first [B] (with `prompts`): fp32, nats, 0 on padding. With `states` the last hidden states [B, T + 1, hidden],
        as [`completion_hidden_states`] returns them with `extra=1`.
    """
    base, mask = unwrapped(model), batch.mask
    if prompts and has_prefix(base):
        raise ValueError(
            "Log-probs of prompts were requested (as nll_on_prompt does), but with attention='prefix' each token of a "
            'prompt sees those after it: turn that off, or load the model with attention="causal".'
        )
    fused = _probed(base, _head_is_known)
    layout, outputs = _run(base.base_model if fused else base, batch, "last_hidden_state" if fused else "logits")
    places, tokens = layout.predictors(batch).flatten()[batch.filled], batch.tokens
    if prompts:
        inner = InnerPrompts.of(batch)
        places = torch.cat([places, layout.prompt_starts[inner.rows] + inner.steps])
        tokens = torch.cat([tokens, batch.input_ids[inner.rows, inner.steps + 1]])
    options = {"temperature": temperature, "entropy": entropy, "entropy_gradient": entropy_gradient}
    logprobs, entropies = head_logprobs(base if fused else None, outputs[places], tokens, **options)

    def spread(values):  # the values after those of the completions are the prompts'
        own = values[: len(batch.filled)]
        return values.new_zeros(mask.numel()).index_copy(0, batch.filled, own).view(mask.shape)

    sums, hidden = None, None
    if prompts:
        sums = logprobs.new_zeros(len(mask)).index_add(0, inner.rows, logprobs[len(batch.filled) :])[inner.leaders]
    if states and fused:
        hidden = outputs[layout.predictors(batch, extra=1)]
    elif states:
        hidden = completion_hidden_states(base.base_model, batch, extra=1)
    return Scores(spread(logprobs), spread(entropies) if entropy else None, sums, hidden)


def completion_hidden_states(
    backbone: nn.Module, batch: Completions, *, extra: int = 0, prefix: bool = True
) -> torch.Tensor:
    """Return the last hidden state before each completion token, [B, T + extra, hidden].

    Args:
        extra: 1 adds the state after the last token of each row, for a bootstrap value.
        prefix: make the prompt the prefix of a backbone with prefix attention. Reward models are trained on whole
            sequences and have no prefix.
    """
    layout, states = _run(backbone, batch, "last_hidden_state", prefix=prefix)
    return states[layout.predictors(batch, extra)]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model itself.

    Raises:
        ValueError: the adapter is a prompt-learning one, which the inner model would ignore.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("Scoring ignores a prompt-learning adapter (prefix, prompt or p-tuning): use LoRA.")
    return model.get_base_model()


def has_prefix(module: nn.Module) -> bool:
    """Return whether a lifecycle model has prefix attention (bidirectional within the prompt)."""
    return getattr(module.config, "attention", None) == "prefix"


def packs(model: nn.Module) -> bool:
    """Return whether batches of this model are packed; the first call probes it."""
    return _probed(unwrapped(model).base_model, _can_be_packed)


def _run(
    module: nn.Module, batch: Completions, output: str, packed: bool | None = None, prefix: bool = True
) -> tuple[Layout, torch.Tensor]:
    """Return the layout of the input and the output of a model or backbone for every token, flattened to [N, ...]."""
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
    """Return whether `module` has a trait, tested once, in eval mode, without gradients and autocast."""
    known = _traits.setdefault(module, {})
    if trait in known:
        return known[trait]
    modes = {part: part.training for part in module.modules()}
    module.eval()
    # Flash kernels do not support fp32, so fp32 models need the autocast that they run under.
    flash = "flash" in (module.config.get_text_config()._attn_implementation or "")
    exact = nullcontext() if flash else torch.autocast(next(module.parameters()).device.type, enabled=False)
    try:
        with torch.no_grad(), exact:
            found, why = trait(module), "its numbers would differ"
    except Exception as error:  # the code of a model may raise anything
        found, why = False, f"{type(error).__name__}: {str(error)[:100]}"
    for part, mode in modes.items():
        part.training = mode
    known[trait] = found
    if not found:
        instead = "pads its batches" if trait is _can_be_packed else "builds whole logits"
        warnings.warn(f"{type(module).__name__} {instead} in scoring, which is slower ({why}).", stacklevel=4)
    return found


def _can_be_packed(backbone: nn.Module) -> bool:
    """Return whether packing leaves the hidden states of completions unchanged; if so, set the backbone up for it."""
    if has_prefix(backbone):
        raise NotImplementedError("attention='prefix' is masked in padded batches only")
    enable_packing(backbone.config)
    same = False
    try:
        same = _packs_exactly(backbone)
    finally:
        if not same:
            disable_packing(backbone.config)
    return same


def _packs_exactly(backbone: nn.Module) -> bool:
    """Return whether packed equals padded, and a completion does not depend on the other one.

    The second test is stricter: in low precision the first one could hide a small leak between the completions.
    """

    def states(batch, packed):
        layout, states = _run(backbone, batch, "last_hidden_state", packed=packed)
        return states[layout.predictors(batch)]

    batch, other = _probe_batch(backbone), _probe_batch(backbone, first=1)
    got = states(batch, packed=True)
    moved = (states(other, packed=True)[1] - got[1]).abs().max()
    return bool(moved <= PROBE_LEAK * got.abs().max()) and _alike(got, states(batch, packed=False), backbone)


def _head_is_known(base: nn.Module) -> bool:
    """Return whether [`read_head`] reproduces the logits from the last hidden states."""
    batch = _probe_batch(base)
    _, states = _run(base.base_model, batch, "last_hidden_state", packed=False)
    return _alike(read_head(base)(states), _run(base, batch, "logits", packed=False)[1], base)


def _probe_batch(module: nn.Module, first: int = 0) -> Completions:
    """Return two random completions of one prompt; `first` shifts the tokens of the first completion."""
    rows, draw = embedding_rows(module), torch.Generator().manual_seed(0)
    prompt, *completions = (torch.randint(rows, (n,), generator=draw).tolist() for n in PROBE_LENGTHS)
    completions[0] = [(token + first) % rows for token in completions[0]]
    return Completions.from_lists([prompt] * 2, completions, 0, next(module.parameters()).device, groups=[0, 0])


def _alike(got: torch.Tensor, expected: torch.Tensor, module: nn.Module) -> bool:
    """Return whether two tensors are equal up to the rounding of the dtype, relative to the largest entry."""
    autocast = torch.is_autocast_enabled(got.device.type)
    exact = not (autocast or getattr(module, "is_quantized", False)) and next(module.parameters()).dtype
    tolerance = PROBE_TOLERANCE.get(exact, PROBE_TOLERANCE_HALF)
    got, expected = got.double(), expected.double()
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())
