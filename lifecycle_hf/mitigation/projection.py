"""Orthogonal projection: an optimizer that takes no first-order step along what a capability depends on."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

DEPENDENT = 1e-8
"""Squared length, of a unit vector, below which what a direction adds to the others counts as nothing."""
PASSES = 4
CHOICES = {
    "when": ("always", "conflict"),
    "level": ("gradient", "update"),
    "scope": ("global", "tensor"),
    "refresh": ("fresh", "running"),
}


def multipliers(gram: np.ndarray, dots: np.ndarray, *, conflict: bool) -> np.ndarray:
    """The v [k] for which g + Cᵀv is the vector nearest to g with C(g + Cᵀv) = 0, or ≥ 0 on `conflict`.

    Always: v = −(CCᵀ)⁺ Cg. On conflict: GEM's dual, min over v ≥ 0 of ½ vᵀ(CCᵀ)v + (Cg)ᵀv, by an active set.

    Args:
        gram: CCᵀ, [k, k], float64; a direction that is 0 or depends on the others does no harm.
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
    """[m, m]: the products of m tensors of one shape, exact to float64; None is 0, `origin` is taken off the last."""
    last = rows[-1]
    accurate = torch.float32 if last.device.type == "mps" else torch.float64
    chunk = 2**15 if last.device.type == "cpu" else 2**22  # what fits a core's cache; few launches
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
    """This process's piece of a tensor that FSDP2 has sharded, and any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bare(optimizer) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's.

    Raises:
        ValueError: it is DeepSpeed's.
    """
    while True:
        if "deepspeed" in type(optimizer).__module__ and hasattr(optimizer, "optimizer"):
            raise ValueError(
                "OrthogonalProjection does not run under DeepSpeed, which steps on its own partitions of gradients "
                "and parameters: use DDP or FSDP2 (accelerate_configs/ddp.yaml, fsdp2.yaml)."
            )
        if not hasattr(optimizer, "optimizer"):
            return optimizer
        optimizer = optimizer.optimizer


class OrthogonalProjection:
    """Takes out of every optimizer step what it would do, to first order, to a capability loss.

    g ← g + Cᵀv with the v of [`multipliers`]: C [k, n] holds k gradients c of the capability loss at the parameters
    before the step, g the gradient (`level="gradient"`) or the realised step Δθ (`level="update"`). The inner products
    are float64. Adam's preconditioning, weight decay and Lion's sign bend a projected gradient off again; the
    projected update stays orthogonal whatever the optimizer.

    - `when="always"`: ⟨g, c⟩ = 0 for every direction, so g ← g − QQᵀg, Q an orthonormal basis of C.
    - `when="conflict"`: the nearest g that raises no direction's loss: ⟨g, c⟩ ≥ 0 for a gradient, ⟨Δθ, c⟩ ≤ 0 for an
      update. With k = 1, g changes only on a violation, and then as always; with k > 1 it is GEM's quadratic program
      over the c themselves (not over an orthonormal basis, whose signs mean nothing).

    Parameters are matched by name. Those without a gradient in one of the two passes are left as they are, and C is
    cut to the others, so that the equations hold for the step that the optimizer makes. A direction within 1e-4 of
    the span of the others counts as dependent. In bf16 the result is rounded: |⟨g, c⟩| ≤ 2⁻⁸ Σ|g||c|, and at the
    update level 2⁻⁸ Σ|θ||c|; in fp32 2⁻²⁴ takes the place of 2⁻⁸. A g parallel to the directions to rounding (8 ε)
    becomes exactly 0.

    Hooks of the optimizer do the work, so it happens once a step however many micro-batches that has, after clipping
    (a projected gradient is never longer) and after a GradScaler's unscaling; a skipped step has none. In several
    processes (DDP, FSDP2) each gives its own capability batch, and all use the mean of their gradients.

    Memory: one gradient-sized buffer per direction, and at the update level one more, θ before the step; fresh
    directions of every step are gone after it.

    Args:
        model: the module whose parameters are protected, without DDP's wrapper; under FSDP2 the sharded module.
        capability_loss: `f(model) -> scalar`, on its own next batch, with autocast where wanted. Its scale does
            not matter: multiply it by 1,000 if gradients underflow in fp16. Where it is in its data is not saved here.
        k: directions.
        batches: batches averaged in each direction; one small batch is mostly noise.
        every: optimizer steps between refreshes.
        scope: "global" projects all parameters as one vector, "tensor" each tensor by itself.
        refresh: "fresh" computes all k directions anew, "running" one, and keeps the last k.
        storage: dtype of the kept directions, such as torch.bfloat16; None is the gradient's own.
        offload: keep the directions in CPU memory.

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
            raise ValueError(f"OrthogonalProjection: storage={storage} is no floating-point type: try torch.bfloat16.")
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
        """Hooks into `optimizer`, a torch optimizer or accelerate's, and leaves the one it was attached to.

        Raises:
            ValueError: the optimizer is DeepSpeed's, FSDP1 has flattened the parameters, or the optimizer trains none
                of the model's parameters.
        """
        self.detach()
        optimizer = bare(optimizer)
        if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
            raise ValueError("OrthogonalProjection: FSDP1 flattens the parameters; use FSDP2 (fsdp_version: 2).")
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = self.model.named_parameters()
        self._parameters = {name: p for name, p in named if p.requires_grad and id(p) in owned}
        if not self._parameters:
            raise ValueError(
                "OrthogonalProjection: the optimizer trains no parameter of the model: build it from the same model, "
                "after preparing that, with requires_grad set."
            )
        hooks = [optimizer.register_step_pre_hook(self._before_step)]
        self._handles = [*hooks, optimizer.register_step_post_hook(self._after_step)]
        return self

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def metrics(self) -> dict[str, float]:
        """Of the last step, over the parameters that the capability loss has gradients for; NaN before the first.

        "cosine": between g and the sum of the directions (below 0 a gradient would raise the capability loss, above 0
        an update). "removed": ‖g − g projected‖ / ‖g‖. "loss": the capability loss when it was last computed.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The step count and the directions; under FSDP2 this process's pieces."""
        kept = {f"{i}.{name}": c for i, found in enumerate(self._directions) for name, c in found.items()}
        return {"step": self.step} | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: it belongs to another model, naming the parameter.
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
            raise ValueError("OrthogonalProjection: a closure computes gradients too late; do so before step().")
        self.step += 1
        if (self.step - 1) % self.every == 0 or not self._directions:
            self._refresh()
        protected = set().union(*self._directions)
        moving = {n: p for n, p in self._parameters.items() if n in protected and p.grad is not None}
        if self.level == "update":
            self._before = {name: local(p).clone() for name, p in moving.items()}
            return
        self._project({name: (local(p.grad), None) for name, p in moving.items()})

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        before, self._before = self._before, {}
        self._project({name: (local(self._parameters[name]), old) for name, old in before.items()})
        if self.refresh == "fresh" and self.every == 1:
            self._directions.clear()  # the next step has its own: neither its memory nor a checkpoint needs these

    def _refresh(self) -> None:
        if self.refresh == "fresh":
            self._directions.clear()
        for _ in range(self.k if self.refresh == "fresh" else 1):
            if len(self._directions) == self.k:
                self._directions.popleft()  # before there is a new one, so that there are never k + 1
            self._directions.append(self._capability_gradient())

    def _capability_gradient(self) -> dict[str, torch.Tensor]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable]
        for parameter in trainable:
            parameter.grad = None
        loss = 0.0
        try:
            for _ in range(self.batches):
                with torch.enable_grad():
                    value = self.capability_loss(self.model)
                    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                        raise ValueError(
                            "OrthogonalProjection: capability_loss must give a scalar tensor that depends on "
                            f"parameters that train, not {value!r}: leave no_grad and detach out of it."
                        )
                    value.backward()
                loss += value.detach().float() / self.batches
            found = {name: local(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        finally:
            for parameter, gradient in zip(trainable, gradients):
                parameter.grad = gradient
        return self._checked(*self._averaged(found, loss))

    def _averaged(self, found, loss) -> tuple[dict[str, torch.Tensor], float]:
        """The mean over processes; FSDP2 has done it for what it sharded."""
        if _world() == 1:
            return found, loss.item()
        whole = {name: p for name, p in self._parameters.items() if not hasattr(p, "to_local")}
        present = torch.stack([*(loss.new_tensor(float(name in found)) for name in whole), loss.reshape(())])
        dist.all_reduce(present)
        *present, loss = present.tolist()
        for name in [name for name, count in zip(whole, present) if count]:
            total = found[name].contiguous() if name in found else torch.zeros_like(whole[name])
            dist.all_reduce(total)
            found[name] = total.div_(_world())
        return found, loss / _world()

    def _checked(self, found, loss) -> dict[str, torch.Tensor]:
        if not math.isfinite(loss):
            raise ValueError(f"OrthogonalProjection: the capability loss is {loss} at optimizer step {self.step}.")
        if not found:
            raise ValueError(
                "OrthogonalProjection: the capability loss has no gradient for any of the "
                f"{len(self._parameters)} tensors that the optimizer trains: compute it with the model it is given."
            )
        self._metrics["loss"] = loss
        place = {"dtype": self.storage} | ({"device": "cpu"} if self.offload else {})
        return {name: found.pop(name).to(**place) for name in list(found)}

    def _project(self, targets: dict[str, tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Projects in place what `targets` names: (tensor, None), or (parameter, the same before the step)."""
        if not targets:
            return
        blocks = [[name] for name in targets] if self.scope == "tensor" else [list(targets)]
        products, removed = self._products(blocks, targets), 0.0
        total = products.sum(0)
        if not np.isfinite(total[:-1, :-1]).all():
            raise ValueError(
                f"OrthogonalProjection: the capability gradient of optimizer step {self.step} is not finite (its loss "
                f"is {self._metrics['loss']}): try a wider dtype, or a smaller loss under fp16."
            )
        if not np.isfinite(total).all():  # an overflow, with which a fused optimizer skips the step
            self._metrics |= {"cosine": math.nan, "removed": math.nan}
            return
        norm = math.sqrt(total[-1, -1])
        for turn in range(PASSES):  # rounding leaves a little of what was long beside what remains
            unfinished = []
            for block, table in zip(blocks, products):
                lost, exact = self._move(block, table, targets)
                removed += lost if turn == 0 else 0.0
                unfinished += [] if exact else [block]
            blocks = unfinished
            if not blocks:
                break
            products = self._products(blocks, targets)
        together = norm * math.sqrt(max(total[:-1, :-1].sum(), 0))
        self._metrics["cosine"] = float(total[:-1, -1].sum() / together) if together > 0 else math.nan
        self._metrics["removed"] = math.sqrt(removed) / norm if norm > 0 else 0.0

    def _move(self, block, table, targets) -> tuple[float, bool]:
        """Projects one block; tells the squared length taken off and whether rounding can be left at that."""
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
        """[blocks, k + 1, k + 1]: the inner products of the directions and, last, the target, over all processes."""
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
    """How many processes hold the same piece of `parameter`."""
    copies = _world()
    if hasattr(parameter, "to_local"):
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape):
            copies //= size if placement.is_shard() else 1
    return copies
