"""Orthogonal projection: optimizer steps that, to first order, leave a capability loss unchanged."""

import math
from collections import deque
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

DEPENDENT = 1e-8
"""Eigenvalue of the normalised Gram matrix, relative to the largest, below which directions count as dependent."""
PASSES = 4
"""Most times that one step is projected; a pass after the first removes the rounding error of the one before."""
CHOICES = {
    "when": ("always", "conflict"),
    "level": ("gradient", "update"),
    "scope": ("global", "tensor"),
    "refresh": ("fresh", "running"),
}


def multipliers(gram: np.ndarray, dots: np.ndarray, *, conflict: bool) -> np.ndarray:
    """Return the v [k] for which g + Cᵀv is the vector nearest to g with C(g + Cᵀv) = 0, or ≥ 0 with `conflict`.

    Without `conflict`, v = −(CCᵀ)⁺ Cg. With it, v solves GEM's dual problem, the minimum over v ≥ 0 of
    ½ vᵀ(CCᵀ)v + (Cg)ᵀv, by an active-set method.

    Args:
        gram: CCᵀ, [k, k], float64. Directions may be 0 or depend on each other.
        dots: Cg, [k].

    Reference: https://arxiv.org/abs/1706.08840, section 3; active set: Lawson and Hanson (1974), chapter 23.
    """
    norms = np.sqrt(gram.diagonal())
    scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    gram, dots, v = gram * np.outer(scale, scale), dots * scale, np.zeros_like(dots)

    def solved(free):
        inverse = np.linalg.pinv(gram[np.ix_(free, free)], rcond=DEPENDENT, hermitian=True)
        trial = np.zeros_like(v)
        trial[free] = -inverse @ dots[free]
        return trial

    if not conflict:
        return solved(norms > 0) * scale
    free, tolerance = np.zeros(len(v), dtype=bool), 1e-9 * np.abs(dots).max()
    for _ in range(3 * len(v)):
        slack = np.where(free, np.inf, gram @ v + dots)
        if slack.min() >= -tolerance:
            break
        free[slack.argmin()] = True
        trial = solved(free)
        while (trial < 0).any():
            falling = trial < 0
            v = v + np.min(v[falling] / (v[falling] - trial[falling])) * (trial - v)
            free &= v > 1e-12 * v.max()
            trial = solved(free)
        v = trial
    return v * scale


def inner_products(rows: list[torch.Tensor | None], origin: torch.Tensor | None = None) -> torch.Tensor:
    """Return the inner products [m, m] of m tensors of one shape, computed in float64 (float32 on MPS).

    Args:
        rows: the tensors; None stands for a tensor of zeros. The last is not None.
        origin: subtracted from the last tensor first.
    """
    last = rows[-1]
    accurate = torch.float32 if last.device.type == "mps" else torch.float64
    chunk = 2**15 if last.device.type == "cpu" else 2**22  # fits the cache of a core; few kernel launches
    flat = [None if row is None else row.reshape(-1) for row in rows]
    products = torch.zeros(len(rows), len(rows), dtype=accurate, device=last.device)
    scratch = torch.zeros(len(rows), min(chunk, last.numel()), dtype=accurate, device=last.device)
    for start in range(0, last.numel(), chunk):
        part = slice(start, start + chunk)
        block = scratch[:, : last.numel() - start]
        for row, values in zip(block, flat):
            if values is not None:
                row.copy_(values[part])
        if origin is not None:
            block[-1] -= origin.reshape(-1)[part]
        products += block @ block.T
    return products


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor that FSDP2 has sharded, and any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bare(optimizer) -> torch.optim.Optimizer:
    """Return the torch optimizer that accelerate has wrapped.

    Raises:
        ValueError: the wrapper is DeepSpeed's.
    """
    while hasattr(optimizer, "optimizer"):
        if "deepspeed" in type(optimizer).__module__:
            raise ValueError(
                "OrthogonalProjection does not run under DeepSpeed, which partitions gradients and parameters: "
                "use DDP or FSDP2 (accelerate_configs/ddp.yaml, fsdp2.yaml)."
            )
        optimizer = optimizer.optimizer
    return optimizer


def capability_gradient(
    model: nn.Module, capability_loss: Callable, batches: int, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the gradients of a loss, by name, and the loss: means over `batches` batches and all processes.

    The gradients that the model holds are the same afterwards. A parameter that has no gradient in any process is left
    out of the result. Under FSDP2 the result holds this process's shards.

    Raises:
        ValueError: the loss is not a scalar tensor with a graph.
    """
    own, loss = {p: p.grad for p in model.parameters() if p.requires_grad}, 0.0
    for parameter in own:
        parameter.grad = None
    try:
        for _ in range(batches):
            with torch.enable_grad():
                value = capability_loss(model)
                if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise ValueError(
                        "OrthogonalProjection: capability_loss must give a scalar tensor that depends on parameters "
                        f"that train, not {value!r}: do not use no_grad or detach in it."
                    )
                value.backward()
            loss += value.detach().float() / batches
        found = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    finally:
        for parameter, gradient in own.items():
            parameter.grad = gradient
    if _world() == 1:
        return found, loss.item()
    # FSDP2 has already averaged the gradients that it has sharded.
    whole = {name: p for name, p in parameters.items() if not hasattr(p, "to_local")}
    sums = loss.new_tensor([*(name in found for name in whole), loss.item()])
    dist.all_reduce(sums)
    *present, loss = sums.tolist()
    for name in compress(whole, present):
        total = found[name].contiguous() if name in found else torch.zeros_like(whole[name])
        dist.all_reduce(total)
        found[name] = total.div_(_world())
    return found, loss / _world()


class OrthogonalProjection:
    """Remove from every optimizer step the part that changes a capability loss to first order.

    g ← g + Cᵀv with the v of [`multipliers`]. The rows of C [k, n] are k gradients c of the capability loss at the
    parameters before the step. g is the gradient (`level="gradient"`) or the step Δθ that the optimizer made
    (`level="update"`). The inner products are float64. Adam's preconditioning, weight decay and Lion's sign make the
    step of a projected gradient non-orthogonal again; a projected update is orthogonal with every optimizer.

    - `when="always"`: ⟨g, c⟩ = 0 for every direction, so g ← g − QQᵀg, Q an orthonormal basis of C.
    - `when="conflict"`: the nearest g that raises the loss of no direction: ⟨g, c⟩ ≥ 0 for a gradient, ⟨Δθ, c⟩ ≤ 0
      for an update. With k = 1, g changes only where that is violated, and then as with "always". With k > 1 it is
      GEM's quadratic program over the c themselves (the signs of an orthonormal basis have no meaning).

    Parameters are matched by name. A parameter without a gradient of the task or of the capability loss is not
    projected, and C is restricted to the others, so that the equations hold for the step that the optimizer makes. A
    direction within 1e-4 of the span of the others counts as dependent. In bf16 the result is rounded:
    |⟨g, c⟩| ≤ 2⁻⁸ Σ|g||c|, and at the update level 2⁻⁸ Σ|θ||c|; in fp32 the factor is 2⁻²⁴. A g that is parallel to
    the directions up to rounding (8 ε) becomes exactly 0.

    The work is done in hooks of the optimizer: once a step for any number of micro-batches, after clipping (a
    projected gradient is never longer) and after a GradScaler's unscaling, and not at all for a skipped step. In
    several processes (DDP, FSDP2) each gives its own capability batch, and all use the mean of their gradients.

    Memory: one buffer of the size of the gradient for each direction, and at the update level one more for θ before
    the step. With `refresh="fresh"` and `every=1` the directions are freed after each step.

    Args:
        model: the module whose parameters are protected, without DDP's wrapper; under FSDP2 the sharded module.
        capability_loss: `f(model) -> scalar`, on its own next batch, with autocast where wanted. Its scale does not
            matter: multiply it by 1,000 if gradients underflow in fp16. Its position in its data is not saved here.
        k: number of directions.
        batches: batches averaged in each direction; the gradient of one small batch is mostly noise.
        every: optimizer steps between refreshes.
        scope: "global" projects all parameters as one vector, "tensor" each tensor by itself.
        refresh: "fresh" computes all k directions anew; "running" computes one and keeps the last k.
        storage: dtype of the stored directions, such as torch.bfloat16; None is the dtype of the gradient.
        offload: store the directions in CPU memory.

    Raises:
        ValueError: an option is out of range.

    References: https://arxiv.org/abs/1910.07104 (projection), https://arxiv.org/abs/1706.08840 (GEM).
    """

    def __init__(
        self,
        model: nn.Module,
        capability_loss: Callable[[nn.Module], torch.Tensor],
        *,
        k: int = 1,
        batches: int = 1,
        every: int = 1,
        when: str = "always",
        level: str = "gradient",
        scope: str = "global",
        refresh: str = "fresh",
        storage: torch.dtype | None = None,
        offload: bool = False,
    ):
        for name, number in (("k", k), ("batches", batches), ("every", every)):
            if number < 1:
                raise ValueError(f"OrthogonalProjection: {name}={number} must be at least 1.")
        for name, value in (("when", when), ("level", level), ("scope", scope), ("refresh", refresh)):
            if value not in CHOICES[name]:
                raise ValueError(f"OrthogonalProjection: {name}={value!r}; choose one of {', '.join(CHOICES[name])}.")
        if storage is not None and not storage.is_floating_point:
            raise ValueError(f"OrthogonalProjection: storage={storage} is no floating-point type: use torch.bfloat16.")
        self.model, self.capability_loss = model, capability_loss
        self.k, self.batches, self.every = k, batches, every
        self.when, self.level, self.scope, self.refresh = when, level, scope, refresh
        self.storage, self.offload = storage, offload
        self.step = 0
        self._directions: deque[dict[str, torch.Tensor]] = deque(maxlen=k)
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._handles = []
        self._metrics = dict.fromkeys(("cosine", "removed", "loss"), math.nan)

    def attach(self, optimizer) -> "OrthogonalProjection":
        """Register the hooks on `optimizer`, a torch optimizer or accelerate's, and remove earlier ones.

        Raises:
            ValueError: the optimizer is DeepSpeed's, FSDP1 has flattened the parameters, or the optimizer trains none
                of the model's parameters.
        """
        self.detach()
        optimizer = bare(optimizer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
            raise ValueError("OrthogonalProjection: FSDP1 flattens the parameters; use FSDP2 (fsdp_version: 2).")
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) in owned}
        if not self._parameters:
            raise ValueError(
                "OrthogonalProjection: the optimizer trains no parameter of the model: prepare the model first, then "
                "build the optimizer from it, with requires_grad set."
            )
        hooks = [optimizer.register_step_pre_hook(self._before_step)]
        self._handles = [*hooks, optimizer.register_step_post_hook(self._after_step)]
        return self

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self) -> dict[str, float]:
        """Return measurements of the last step, over the parameters that are projected; NaN before the first.

        "cosine": between g and the sum of the directions (below 0 a gradient would raise the capability loss, above 0
        an update). "removed": ‖g − g projected‖ / ‖g‖. "loss": the capability loss when it was last computed.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the directions; under FSDP2 this process's shards."""
        kept = {f"{i}.{name}": c for i, found in enumerate(self._directions) for name, c in found.items()}
        return {"step": self.step} | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step count and the directions of [`state_dict`].

        Raises:
            ValueError: the state belongs to another model; names the parameter.
        """
        state, named = dict(state), dict(self.model.named_parameters())
        self.step, kept = state.pop("step"), {}
        for key, direction in state.items():
            index, name = key.split(".", 1)
            if name not in named or local(named[name]).shape != direction.shape:
                raise ValueError(
                    f"OrthogonalProjection: the state holds {name} of shape {tuple(direction.shape)}, which the model "
                    "does not have: resume with the model and the number of processes that wrote it."
                )
            device = "cpu" if self.offload else named[name].device
            kept.setdefault(int(index), {})[name] = direction.to(device)
        self._directions = deque((kept[i] for i in sorted(kept)), maxlen=self.k)

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise ValueError("OrthogonalProjection: step() got a closure: call backward() before step() instead.")
        self.step += 1
        if (self.step - 1) % self.every == 0 or not self._directions:
            for _ in range(self.k if self.refresh == "fresh" else 1):
                if len(self._directions) == self.k:
                    self._directions.popleft()  # before the new one exists, so that there are never k + 1
                self._directions.append(self._new_direction())
        protected = set().union(*self._directions)
        moving = {n: p for n, p in self._parameters.items() if n in protected and p.grad is not None}
        if self.level == "update":
            self._before = {name: local(p).clone() for name, p in moving.items()}
        else:
            self._project({name: (local(p.grad), None) for name, p in moving.items()})

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        before, self._before = self._before, {}
        self._project({name: (local(self._parameters[name]), old) for name, old in before.items()})
        if self.refresh == "fresh" and self.every == 1:
            self._directions.clear()  # frees memory; the next step computes its own

    def _new_direction(self) -> dict[str, torch.Tensor]:
        found, loss = capability_gradient(self.model, self.capability_loss, self.batches, self._parameters)
        if not math.isfinite(loss):
            raise ValueError(f"OrthogonalProjection: the capability loss is {loss} at optimizer step {self.step}.")
        if not found:
            raise ValueError(
                "OrthogonalProjection: the capability loss has no gradient for any of the "
                f"{len(self._parameters)} tensors that the optimizer trains: compute it with the model it is given."
            )
        self._metrics["loss"] = loss
        device = "cpu" if self.offload else None
        return {name: found.pop(name).to(device=device, dtype=self.storage) for name in list(found)}

    def _project(self, targets: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Project the tensors of `targets` in place: (gradient, None), or (parameter, its value before the step)."""
        if not targets:
            return
        blocks = [[name] for name in targets] if self.scope == "tensor" else [list(targets)]
        products = self._products(blocks, targets)
        total = products.sum(0)
        if not np.isfinite(total[:-1, :-1]).all():
            raise ValueError(
                f"OrthogonalProjection: the capability gradient of optimizer step {self.step} is not finite (its loss "
                f"is {self._metrics['loss']}): use a wider dtype, or in fp16 a smaller loss."
            )
        if not np.isfinite(total).all():  # g has overflowed, and a fused optimizer skips the step
            self._metrics |= {"cosine": math.nan, "removed": math.nan}
            return
        norm = math.sqrt(total[-1, -1])
        together = norm * math.sqrt(max(total[:-1, :-1].sum(), 0))
        self._metrics["cosine"] = float(total[:-1, -1].sum() / together) if together > 0 else math.nan
        for turn in range(PASSES):  # what remains of g may be short, and the rounding error of g large beside it
            moves = [self._move(block, table, targets) for block, table in zip(blocks, products)]
            if turn == 0:
                self._metrics["removed"] = math.sqrt(sum(lost for lost, _ in moves)) / norm if norm > 0 else 0.0
            blocks = [block for block, (_, exact) in zip(blocks, moves) if not exact]
            if not blocks:
                break
            products = self._products(blocks, targets)

    def _move(self, block, table, targets) -> tuple[float, bool]:
        """Project one block; return the squared length of the removed part and whether no further pass is needed."""
        gram, dots, square = table[:-1, :-1], table[:-1, -1], table[-1, -1]
        sign = -1 if self.level == "update" else 1
        v = sign * multipliers(gram, sign * dots, conflict=self.when == "conflict")
        if not v.any():
            return 0.0, True
        left = square + 2 * v @ dots + v @ gram @ v
        epsilon = max(torch.finfo(targets[name][0].dtype).eps for name in block)
        if left <= max(8 * epsilon, 1e-7) ** 2 * square:
            for tensor, origin in (targets[name] for name in block):
                tensor.zero_() if origin is None else tensor.copy_(origin)
            return square, True
        for factor, direction in zip(v.tolist(), self._directions):
            for name in block if factor else ():
                if name in direction:
                    targets[name][0].add_(direction[name].to(targets[name][0].device), alpha=factor)
        return v @ gram @ v, np.abs(v) @ np.sqrt(gram.diagonal()) <= 4 * math.sqrt(left)

    def _products(self, blocks, targets) -> np.ndarray:
        """Return inner products [blocks, k + 1, k + 1] of the directions and (last) the target, over all processes."""
        tables = []
        for block in blocks:
            found = []
            for name in block:
                tensor, origin = targets[name]
                rows = [*(direction.get(name) for direction in self._directions), tensor]
                found.append(inner_products(rows, origin) / _copies(self._parameters[name]))
            tables.append(torch.stack([table.to(found[0].device) for table in found]).sum(0))
        products = torch.stack([table.to(tables[0].device) for table in tables])
        if _world() > 1:
            dist.all_reduce(products)
        return products.cpu().double().numpy()


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _copies(parameter: torch.Tensor) -> int:
    """Return how many processes hold the same piece of `parameter`."""
    copies = _world()
    if hasattr(parameter, "to_local"):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape):
            copies //= size if placement.is_shard() else 1
    return copies
