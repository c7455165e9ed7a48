"""Policy, value, reference and reward models behind one module, so that one engine (DDP, ZeRO) holds them all."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lifecycle_hf.models.heads import ScalarHead, last_token_hidden
from lifecycle_hf.scoring import Completions, completion_hidden_states, unwrapped
from lifecycle_hf.trainers.policy import PolicyAndReference, load_weights

VALUE_FOLDER = "value"
VALUE_HEAD = "value_head.safetensors"


class SharedReward(nn.Module):
    """A reward model as a frozen adapter of the shared base: r = w·h_last − centre."""

    def __init__(self, head: torch.Tensor, center: float):
        super().__init__()
        self.weight = nn.Parameter(head, requires_grad=False)
        self.center = center

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1) - self.center


class ActorCritic(PolicyAndReference):
    """What PPO runs: a [`PolicyAndReference`] with a value function and reward models.

    Args:
        policy, reference, shared, reference_role: as there.
        value_model: sequence-classification model with one label whose head is read at every position; None with
            `shared` (an adapter of the policy's base and a scalar head take its place) and without a critic.
        rewards: frozen reward models ([`RewardModel`] or [`SharedReward`]) by name.
        critic: whether there is a value function.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        value_model: nn.Module | None = None,
        rewards: dict[str, nn.Module] | None = None,
        critic: bool = True,
        **reference,
    ):
        super().__init__(policy, **reference)
        self.value_model = value_model
        self.rewards = nn.ModuleDict(rewards or {}).requires_grad_(False)
        self.value_head = ScalarHead(self.config.hidden_size) if self.shared is not None and critic else None

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
    ) -> dict[str, torch.Tensor]:
        """Computes what `want` names, beside what [`PolicyAndReference.forward`] knows.

        "values": [B, T + 1], V(s_t) read before y_t, and the value after the last token in the column behind it.
        "reward:<name>": [B], the centred score of the sequences of `batch`.
        """
        out = super().forward(batch, texts, want=want, temperature=temperature)
        if "values" in want:
            out["values"] = self._values(batch)
        for name in (w.removeprefix("reward:") for w in want if w.startswith("reward:")):
            out[f"reward:{name}"] = self._reward(name, batch)
        return out

    def _values(self, batch: Completions) -> torch.Tensor:
        with self.role("value"):
            hidden = completion_hidden_states(unwrapped(self.value_model or self.policy).base_model, batch, extra=1)
        if self.value_model is None:
            return self.value_head(hidden)
        return self.value_model.score(hidden).squeeze(-1).float()

    @torch.no_grad()
    def _reward(self, name: str, batch: Completions) -> torch.Tensor:
        reward = self.rewards[name]
        if not isinstance(reward, SharedReward):
            return reward(batch.input_ids, batch.prompt_lengths + batch.completion_lengths)
        with self.role(name):
            hidden = completion_hidden_states(unwrapped(self.policy).base_model, batch, extra=1)
        return reward(last_token_hidden(hidden, batch.completion_lengths + 1))

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the policy as [`PolicyAndReference.save_pretrained`] and the value function under `value/`."""
        super().save_pretrained(folder, state_dict)
        value_folder = Path(folder) / VALUE_FOLDER
        if self.value_model is not None:
            self.value_model.save_pretrained(value_folder, state_dict=self.part("value_model", state_dict))
        if self.value_head is not None:
            self.shared.save_adapter("value", value_folder, self.part("policy", state_dict))
            head = self.part("value_head", state_dict) or self.value_head.state_dict()
            save_file({k: v.detach().cpu().contiguous() for k, v in head.items()}, value_folder / VALUE_HEAD)

    def load_pretrained(self, folder: str) -> None:
        """Reads back what [`save_pretrained`] wrote.

        Raises:
            ValueError: if the checkpoint belongs to another model, naming both, or lacks the value function.
        """
        value_folder = Path(folder) / VALUE_FOLDER
        if (self.value_head is not None or self.value_model is not None) and not value_folder.is_dir():
            raise ValueError(f"{folder} has no folder {VALUE_FOLDER!r}: it is no checkpoint of PPO with a critic.")
        super().load_pretrained(folder)
        if self.value_head is not None:
            self.load_value(value_folder)
        if self.value_model is not None:
            load_weights(self.value_model, value_folder)

    def load_value(self, folder: str | Path) -> None:
        """Reads the value adapter and its head from the `value/` folder of a PPO checkpoint."""
        self.shared.load_adapter("value", folder)
        self.value_head.load_state_dict(load_file(Path(folder) / VALUE_HEAD))
