"""The policy, value, reference and reward models as one module, so that one engine (DDP, ZeRO) wraps all of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lifecycle_hf.completions.scoring import Completions, completion_hidden_states, unwrapped
from lifecycle_hf.models.adapters.names import split_adapter
from lifecycle_hf.models.heads import NormalisedHead, ScalarHead, last_token_hidden
from lifecycle_hf.models.loading import is_adapter
from lifecycle_hf.trainers.base.policy import PolicyAndReference, load_weights

VALUE_FOLDER = "value"
VALUE_HEAD = "value_head.safetensors"


class SharedReward(nn.Module):
    """Compute the reward of a frozen adapter of the shared base: r = w·h_last − centre."""

    def __init__(self, head: torch.Tensor, center: float):
        super().__init__()
        self.weight = nn.Parameter(head, requires_grad=False)
        self.center = center

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1) - self.center


class Settled(torch.autograd.Function):
    """A loss with known gradients: its backward pass returns them, and it keeps no graph."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, *(None if g is None else g * upstream.to(g.dtype) for g in gradients)


def settled(loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Compute the gradients of `loss` at once, which frees its activations before those of another model exist."""
    with torch.autocast(loss.device.type, enabled=False):  # as in a backward pass, which runs in the forward's dtypes
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return Settled.apply(loss.detach(), gradients, *parameters)


class ActorCritic(PolicyAndReference):
    """Hold the models of PPO: a [`PolicyAndReference`] with a value function and reward models.

    Args:
        policy, reference, shared, reference_role: as in [`PolicyAndReference`].
        value: "head" for a normalised head on the reference's hidden states, "adapter" for an adapter of the policy's
            base with a scalar head, "model" for `value_model`; None without a critic.
        value_model: sequence-classification model with one label, whose head is applied at every position.
        rewards: frozen reward models ([`RewardModel`] or [`SharedReward`]) by name.

    Attributes:
        settles_values: whether the gradients of the value loss are computed at once, while its adapter is active, so
            that the activations of the value function and of the policy never exist together.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        value: str | None = None,
        value_model: nn.Module | None = None,
        rewards: dict[str, nn.Module] | None = None,
        **reference,
    ):
        super().__init__(policy, **reference)
        self.value, self.value_model, self.settles_values = value, value_model, False
        self.rewards = nn.ModuleDict(rewards or {}).requires_grad_(False)
        heads = {"head": NormalisedHead, "adapter": ScalarHead}
        self.value_head = heads[value](self.config.get_text_config().hidden_size) if value in heads else None

    @property
    def frozen(self) -> list[nn.Module]:
        return [*super().frozen, *self.rewards.values()]

    @property
    def checkpointed(self) -> list[nn.Module]:
        return list(filter(None, (self.policy, self.value_model)))

    def forward(
        self,
        batch: Completions | None = None,
        texts: Completions | None = None,
        *,
        want: tuple[str, ...] = (),
        temperature: float = 1.0,
        features: torch.Tensor | None = None,
        value_loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the entries that `want` names: those of [`PolicyAndReference.forward`] and the following.

        "values": [B, T + 1], V(s_t) before y_t, and in the column after the last token the value after it.
        "value_loss": `value_loss` of the values. "reward:<name>": [B], the centred score of the sequences of `batch`.

        Args:
            features: the "ref_states" of `batch` for a value head, if they are known.
        """
        early = {}
        if "value_loss" in want:  # before the policy, whose forward pass leaves activations in memory
            loss = value_loss(self._values(batch, features))
            early["value_loss"] = settled(loss, self.value_parameters) if self.settles_values else loss
        out = early | super().forward(batch, texts, want=want, temperature=temperature)
        if "values" in want:
            out["values"] = self._values(batch, out.get("ref_states", features))
        rewards = [name.removeprefix("reward:") for name in want if name.startswith("reward:")]
        return out | {f"reward:{name}": self._reward(name, batch) for name in rewards}

    @property
    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function."""
        return [p for n, p in self.named_parameters() if p.requires_grad and self.is_value(n)]

    def is_value(self, name: str) -> bool:
        """Return whether the parameter `name` of this module belongs to the value function."""
        adapter = self.value == "adapter" and split_adapter(name, self.shared.model.base_model.prefix)[0] == "value"
        return adapter or name.startswith(("value_model.", "value_head."))

    def _values(self, batch: Completions, features: torch.Tensor | None) -> torch.Tensor:
        if self.value == "head":
            return self.value_head(features)
        if self.value == "model":
            hidden = completion_hidden_states(unwrapped(self.value_model).base_model, batch, extra=1)
            return self.value_model.score(hidden).squeeze(-1).float()
        with self.role("value"):
            return self.value_head(completion_hidden_states(unwrapped(self.policy).base_model, batch, extra=1))

    @torch.no_grad()
    def _reward(self, name: str, batch: Completions) -> torch.Tensor:
        reward = self.rewards[name]

        def last(backbone):
            hidden = completion_hidden_states(backbone, batch, extra=1, prefix=False)
            return last_token_hidden(hidden, batch.completion_lengths + 1)

        if not isinstance(reward, SharedReward):
            return reward.score_states(last)
        with self.role(name):
            return reward(last(unwrapped(self.policy).base_model))

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the policy as [`PolicyAndReference.save_pretrained`] does, and the value function to `value/`."""
        super().save_pretrained(folder, state_dict)
        value_folder = Path(folder) / VALUE_FOLDER
        if self.value_model is not None:
            self.value_model.save_pretrained(value_folder, state_dict=self.part("value_model", state_dict))
        if self.value == "adapter":
            self.shared.save_adapter("value", value_folder, self.part("policy", state_dict))
        if self.value_head is not None:
            value_folder.mkdir(parents=True, exist_ok=True)
            head = self.part("value_head", state_dict) or self.value_head.state_dict()
            save_file({k: v.detach().cpu().contiguous() for k, v in head.items()}, value_folder / VALUE_HEAD)

    def load_pretrained(self, folder: str) -> None:
        """Read the weights that [`save_pretrained`] wrote.

        Raises:
            ValueError: the checkpoint belongs to another model, or it has no value function.
        """
        value_folder = Path(folder) / VALUE_FOLDER
        if self.value is not None and not value_folder.is_dir():
            raise ValueError(
                f"{folder} has no folder {VALUE_FOLDER!r}: resume from a checkpoint of PPO with a critic."
            )
        super().load_pretrained(folder)
        if self.value_head is not None:
            self.load_value(value_folder)
        if self.value_model is not None:
            load_weights(self.value_model, value_folder)

    def load_value(self, folder: str | Path) -> None:
        """Read the value head, and the value adapter if there is one, from the `value/` folder of a checkpoint.

        Raises:
            ValueError: the folder holds a value function of another kind or size.
        """
        path = Path(folder) / VALUE_HEAD
        state = load_file(path) if path.exists() else {}
        heads = self.value_head.state_dict(), state
        here, there = ({name: tuple(tensor.shape) for name, tensor in head.items()} for head in heads)
        if here != there or (self.value == "adapter") != is_adapter(str(folder)):
            raise ValueError(
                f"{folder} does not hold the value function of value={self.value!r}: the head has {here} here and "
                f"{there or 'no ' + VALUE_HEAD} there. Set `value` as in the run that wrote it."
            )
        if self.value == "adapter":
            self.shared.load_adapter("value", folder)
        self.value_head.load_state_dict(state)
