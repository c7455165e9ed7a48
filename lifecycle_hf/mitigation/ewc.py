"""Elastic weight consolidation: a quadratic penalty on moving the weights that an earlier task depends on."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn

from lifecycle_hf.models.adapters.names import split_adapter

FORMAT = "lifecycle_hf.ewc"


class EWC:
    """The penalty λ/2 · Σ_i F_i·(θ_i − θ*_i)², F the empirical Fisher of an earlier task and θ* its solution.

    It is a function of the model, for use as an auxiliary loss in the trainers of the library or in any loop:

        ewc = EWC.estimate(model, (nll(model, row).sum() for row in capability_rows), strength=1e3)
        trainer.add_auxiliary_loss("ewc", ewc)        # or: loss = loss + ewc(model)

    Args:
        fisher: {name of the parameter: F}, in fp32.
        anchor: {name of the parameter: θ*}, with the same names and shapes.
        strength: λ ≥ 0.

    Raises:
        ValueError: names or shapes of `fisher` and `anchor` differ, or λ is negative.

    Reference: Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, equation 3.
    """

    def __init__(self, fisher: dict[str, torch.Tensor], anchor: dict[str, torch.Tensor], strength: float = 1.0):
        if not strength >= 0:
            raise ValueError(f"EWC: strength={strength} must be at least 0.")
        _check_same(fisher, anchor, "the Fisher", "the anchor")
        self.fisher, self.anchor, self.strength = fisher, anchor, strength

    @classmethod
    def estimate(
        cls, model: nn.Module, losses: Iterable[torch.Tensor], *, strength: float = 1.0, device=None
    ) -> "EWC":
        """Estimate F_i, the mean over examples of (∂ℓ/∂θ_i)², and take the current weights as anchor.

        Each example costs one backward pass; the memory is that of F, θ* and one gradient. A scalar loss must be that
        of *one* example, best from a forward pass of that example alone: the gradient of a batch mean has a smaller
        square. A loss [B] holds the losses of B examples; each backward pass then goes through the whole graph.

        Only parameters that train at the time of the call are protected, each tied weight once. A parameter that no
        loss depends on has F = 0. With LoRA the active adapter's weights are protected, under names without the
        adapter's, and the anchor is their start (where B = 0, and so F of A is 0). The model is in eval mode during
        the estimate. Under torch.distributed each rank gives its share of the examples.

        Args:
            losses: scalars or [B], with their graphs; a generator, so that one graph exists at a time. For the Fisher
                of a language model give −log p(y|x), the *sum* over the tokens of an example.
            strength: λ.
            device: where F and θ* are stored, "cpu" to offload them; by default the device of each parameter.

        Raises:
            ValueError: nothing trains, there is no loss, a loss is neither a scalar nor [B], or is not finite.
        """
        weights = _trained(model)
        if not weights:
            raise ValueError("EWC.estimate: no parameter of the model trains, so there is nothing to hold.")
        leaves = list(weights.values())
        fisher = [torch.zeros_like(p, dtype=torch.float32, device=device) for p in leaves]
        training, count = model.training, 0
        model.eval()
        try:
            for loss in losses:
                if loss.ndim > 1 or not loss.isfinite().all():
                    raise ValueError(
                        f"EWC.estimate: loss {count} has shape {tuple(loss.shape)}, value {loss.detach().tolist()}: "
                        "give finite losses, scalars of one example or [B] of B examples."
                    )
                parts = loss.reshape(-1).unbind()
                for part in parts:
                    count += 1
                    keep = part is not parts[-1]
                    gradients = torch.autograd.grad(part, leaves, retain_graph=keep, allow_unused=True)
                    for total, gradient in zip(fisher, gradients, strict=True):
                        if gradient is not None:
                            total.add_(gradient.to(total.device).float().square_())
        finally:
            model.train(training)
        count = _sum_over_ranks(fisher, count)
        if count == 0:
            raise ValueError("EWC.estimate got no losses: give at least one example.")
        anchor = {name: p.detach().to(device or p.device, copy=True) for name, p in weights.items()}
        return cls({name: total.div_(count) for name, total in zip(weights, fisher)}, anchor, strength)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Return the penalty, a scalar in fp32. Its gradient is λ·F·(θ − θ*), computed in fp32.

        No buffer of the size of the weights is stored for the backward pass.

        Raises:
            ValueError: a parameter of F is missing in the model or has another shape there; names it.
        """
        weights = {name: p for name, p in _named(model).items() if name in self.fisher}
        _check_same(self.fisher, weights, "the Fisher", "the model")
        constants = [(fisher, self.anchor[name]) for name, fisher in self.fisher.items()]
        return _Quadratic.apply(self.strength, constants, *(weights[name] for name in self.fisher))

    def save(self, path: str | Path) -> None:
        """Write F, θ* and λ to the safetensors file `path`. An interrupted call leaves no partial file there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"fisher": self.fisher, "anchor": self.anchor}
        tensors = {f"{part}.{name}": t.contiguous() for part, named in parts.items() for name, t in named.items()}
        written = path.with_name(path.name + ".part")
        save_file(tensors, written, metadata={"format": FORMAT, "strength": json.dumps(self.strength)})
        written.replace(path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, *, device="cpu") -> "EWC":
        """Read a file that [`save`] wrote.

        Args:
            model: where given, the file must hold exactly the parameters that train in it.
            device: where F and θ* are stored.

        Raises:
            ValueError: the file is damaged or not one of EWC's, or does not fit the model; names the parameter.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as safetensors: {error}. Write it again with EWC.save.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} was not written by EWC.save: its metadata is {metadata}. Give a file of EWC.save."
            )
        fisher, anchor = (
            {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
            for part in ("fisher.", "anchor.")
        )
        ewc = cls(fisher, anchor, json.loads(metadata["strength"]))
        if model is not None:
            _check_same(fisher, _trained(model), str(path), "what trains in the model")
        return ewc


class _Quadratic(torch.autograd.Function):
    """λ/2 · Σ F·(θ − θ*)² over tensors. The backward pass computes the differences again, to save memory."""

    @staticmethod
    def forward(ctx, strength, constants, *weights):
        ctx.strength, ctx.constants = strength, constants
        ctx.save_for_backward(*weights)
        terms = [
            (fisher.to(w.device) * (w.float() - anchor.to(w.device).float()).square_()).sum()
            for w, (fisher, anchor) in zip(weights, constants, strict=True)
        ]
        return strength / 2 * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer):
        gradients = []
        for w, (fisher, anchor) in zip(ctx.saved_tensors, ctx.constants, strict=True):
            difference = w.float() - anchor.to(w.device).float()
            gradients.append((ctx.strength * outer.to(w.device) * fisher.to(w.device) * difference).to(w.dtype))
        return None, None, *gradients


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name; of a PeftModel those of the base and the active adapter.

    The names leave out that of the adapter, which differs between trainers.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    active = [] if prefix is None else model.active_adapters
    if len(active) != 1:
        return dict(model.named_parameters())
    split = ((*split_adapter(name, prefix), p) for name, p in model.named_parameters())
    return {name: p for adapter, name, p in split if adapter in (None, *active)}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in _named(model).items() if p.requires_grad}


def _sum_over_ranks(totals: list[torch.Tensor], count: int) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return count
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    counts = torch.tensor(count)
    for tensor in (*totals, counts):
        summed = tensor.to(device)
        distributed.all_reduce(summed)
        tensor.copy_(summed)
    return int(counts)


def _check_same(one: dict, other: dict, here: str, there: str) -> None:
    for name in sorted(one.keys() | other.keys()):
        shapes = [tuple(side[name].shape) if name in side else "missing" for side in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"EWC: {name} is {shapes[0]} in {here} and {shapes[1]} in {there}. Train the same parameters when you "
                "estimate EWC and when you use it, and use adapters of the same rank."
            )
