"""Policy, value, reference and reward models behind one module, so that one engine (DDP, ZeRO) holds them all."""

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lifecycle_hf.models.heads import ScalarHead, last_token_hidden
from lifecycle_hf.models.shared_base import SharedBase
from lifecycle_hf.scoring import Completions, completion_hidden_states, completion_logprobs

VALUE_FOLDER = "value"
VALUE_HEAD = "value_head.safetensors"


def backbone(model: nn.Module) -> nn.Module:
    """The transformer below the head of a model or of a PeftModel over it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, base.base_model_prefix)


class SharedReward(nn.Module):
    """A reward model as a frozen adapter of the shared base: r = w·h_last − centre."""

    def __init__(self, head: torch.Tensor, center: float):
        super().__init__()
        self.weight = nn.Parameter(head, requires_grad=False)
        self.center = center

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1) - self.center


class ActorCritic(nn.Module):
    """What PPO runs, as one module.

    Args:
        policy: causal LM that trains, or a PeftModel over one.
        value_model: sequence-classification model with one label whose head is read at every position; None with
            `shared` (an adapter of the policy's base and a scalar head take its place) and without a critic.
        reference: frozen causal LM, or None where `reference_role` names an adapter of the shared base, "base" for
            the base with adapters off.
        rewards: frozen reward models ([`RewardModel`] or [`SharedReward`]) by name.
        shared: the roles of the policy's PeftModel.
        critic: whether there is a value function.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        value_model: nn.Module | None = None,
        reference: nn.Module | None = None,
        rewards: dict[str, nn.Module] | None = None,
        shared: SharedBase | None = None,
        reference_role: str | None = None,
        critic: bool = True,
    ):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.reference = reference
        self.rewards = nn.ModuleDict(rewards or {})
        self.shared = shared
        self.reference_role = reference_role
        self.value_head = ScalarHead(self.config.hidden_size) if shared is not None and critic else None
        for frozen in (self.reference, self.rewards):
            if frozen is not None:
                frozen.requires_grad_(False)

    @property
    def config(self):
        return self.policy.config

    @property
    def policy_role(self) -> str | None:
        return self.shared.policy if self.shared is not None else None

    def role(self, role: str | None):
        return self.shared.role(role) if self.shared is not None else nullcontext()

    def activation_checkpointing_enable(self, **kwargs):
        """Checkpoints policy and value model; roles on a shared base are recomputed under the right adapter."""
        for model in filter(None, (self.policy, self.value_model)):
            model.activation_checkpointing_enable(**kwargs)
        if self.shared is not None:
            self.policy.enable_input_require_grads()
            self.shared.keep_roles_in_checkpointing()

    def forward(
        self,
        batch: Completions | None = None,
        texts: Completions | None = None,
        *,
        want: tuple[str, ...] = (),
        temperature: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Computes what `want` names.

        "logprobs", "entropy", "ref_logprobs": [B, T], at `temperature`. "values": [B, T + 1], V(s_t) read before y_t,
        and the value after the last token in the column behind it. "texts": log-probs of `texts` [B', T'] at
        temperature 1. "reward:<name>": [B], the centred score of the sequences of `batch`.
        """
        out = {}
        if self.shared is not None:
            self.shared.activate(self.policy_role)
        if "logprobs" in want:
            out["logprobs"], entropy = completion_logprobs(
                self.policy, batch, temperature=temperature, entropy="entropy" in want
            )
            if entropy is not None:
                out["entropy"] = entropy
        if "texts" in want:
            out["texts"], _ = completion_logprobs(self.policy, texts)
        if "values" in want:
            out["values"] = self._values(batch)
        if "ref_logprobs" in want:
            with torch.no_grad(), self.role(self.reference_role):
                out["ref_logprobs"], _ = completion_logprobs(
                    self.reference if self.reference is not None else self.policy, batch, temperature=temperature
                )
        for name in (w.removeprefix("reward:") for w in want if w.startswith("reward:")):
            out[f"reward:{name}"] = self._reward(name, batch)
        return out

    def _values(self, batch: Completions) -> torch.Tensor:
        with self.role("value"):
            hidden = completion_hidden_states(backbone(self.value_model or self.policy), batch, extra=1)
        if self.value_model is None:
            return self.value_head(hidden)
        return self.value_model.score(hidden).squeeze(-1).float()

    @torch.no_grad()
    def _reward(self, name: str, batch: Completions) -> torch.Tensor:
        reward, lengths = self.rewards[name], batch.prompt_lengths + batch.completion_lengths
        if not isinstance(reward, SharedReward):
            return reward(batch.input_ids, lengths)
        with self.role(name):
            hidden = backbone(self.policy)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        return reward(last_token_hidden(hidden, lengths))

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the policy as an ordinary checkpoint (or adapter) at the root and the value function under `value/`.

        Args:
            state_dict: weights of this whole module, where they are sharded over processes.
        """

        def part(prefix):
            if state_dict is None:
                return None
            return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}

        value_folder = Path(folder) / VALUE_FOLDER
        if self.shared is None:
            self.policy.save_pretrained(folder, state_dict=part("policy."))
            if self.value_model is not None:
                self.value_model.save_pretrained(value_folder, state_dict=part("value_model."))
            return
        self.shared.save_adapter(self.shared.policy, folder, part("policy."))
        if self.value_head is not None:
            self.shared.save_adapter("value", value_folder, part("policy."))
            head = part("value_head.") or self.value_head.state_dict()
            save_file({k: v.detach().cpu().contiguous() for k, v in head.items()}, value_folder / VALUE_HEAD)

    def load_pretrained(self, folder: str) -> None:
        """Reads back what [`save_pretrained`] wrote.

        Raises:
            ValueError: if the checkpoint belongs to another model, naming both, or lacks the value function.
        """
        value_folder = Path(folder) / VALUE_FOLDER
        if (self.value_head is not None or self.value_model is not None) and not value_folder.is_dir():
            raise ValueError(f"{folder} has no folder {VALUE_FOLDER!r}: it is no checkpoint of PPO with a critic.")
        if self.shared is not None:
            self.shared.load_adapter(self.shared.policy, folder)
            if self.value_head is not None:
                self.load_value(value_folder)
            return
        _load_weights(self.policy, folder)
        if self.value_model is not None:
            _load_weights(self.value_model, value_folder)

    def load_value(self, folder: str | Path) -> None:
        """Reads the value adapter and its head from the `value/` folder of a PPO checkpoint."""
        self.shared.load_adapter("value", folder)
        self.value_head.load_state_dict(load_file(Path(folder) / VALUE_HEAD))


def _load_weights(model: nn.Module, folder: str | Path) -> None:
    theirs = type(model.config).from_pretrained(folder)
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        here, there = getattr(model.config, name, None), getattr(theirs, name, None)
        if here != there:
            raise ValueError(
                f"The checkpoint {folder} belongs to another base model: its {name} is {there!r}, the model here has "
                f"{here!r}."
            )
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())
