"""Share one frozen base model between several roles: each role is an adapter of one PeftModel."""

import copy
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from lifecycle_hf.models.adapters.names import split_adapter
from lifecycle_hf.models.loading import ADAPTER_WEIGHTS, check_adapter_base, check_adapter_weights


class SharedBase:
    """Switch the adapters of a PeftModel between roles and keep every trainable adapter trainable.

    PEFT freezes the adapters that are not active, but a joint loss over two of them needs both to be trainable. So
    `requires_grad` is set again after each switch. The role "base" is the base model with its adapters off.

    Args:
        model: a PeftModel whose active adapter is the policy.
        trainable: whether the policy's adapter trains.

    Raises:
        ValueError: several adapters are active, or the adapter is of prompt learning, which can't share a base.
    """

    def __init__(self, model: PeftModel, trainable: bool = True):
        active = model.active_adapters
        if len(active) != 1 or model.peft_config[active[0]].is_prompt_learning:
            raise ValueError(
                f"The policy's active adapters are {active}: give it one active adapter that changes layers, such as "
                "LoRA (prompt learning does not)."
            )
        self.model = model
        self.policy = self.role_in_force = active[0]
        self.trainable = {self.policy} if trainable else set()
        self._set_flags()

    def add_role(self, role: str, config: PeftConfig, *, trainable: bool) -> None:
        """Add a new adapter named `role` with the shape of `config`, without its `modules_to_save`."""
        config = copy.deepcopy(config)
        config.modules_to_save, config.inference_mode = None, False
        config.base_model_name_or_path = self.model.peft_config[self.policy].base_model_name_or_path
        self._add(role, config, trainable)

    def copy_role(self, role: str, source: str) -> None:
        """Add a frozen copy of the adapter `source` under the name `role`."""
        self._add(role, copy.deepcopy(self.model.peft_config[source]), trainable=False)
        weights = get_peft_model_state_dict(self.model, adapter_name=source)
        set_peft_model_state_dict(self.model, weights, adapter_name=role)
        self._set_flags()

    def _add(self, role: str, config: PeftConfig, trainable: bool) -> None:
        if role in self.model.peft_config:
            raise ValueError(f"The model already has an adapter named {role!r}, which the trainer adds: rename yours.")
        self.model.add_adapter(role, config)
        self.trainable |= {role} if trainable else set()
        self._set_flags()

    def _set_flags(self) -> None:
        prefix = self.model.base_model.prefix
        for name, parameter in self.model.named_parameters():
            on = split_adapter(name, prefix)[0] in self.trainable
            if parameter.requires_grad != on:
                parameter.requires_grad_(on)

    def activate(self, role: str) -> None:
        """Make `role` active: the name of an adapter, or "base" for none."""
        if role == self.role_in_force:
            return
        tuner = self.model.base_model
        if role == "base":
            tuner.disable_adapter_layers()
        else:
            if self.role_in_force == "base":
                tuner.enable_adapter_layers()
            tuner.set_adapter(role)
        self.role_in_force = role
        self._set_flags()

    @contextmanager
    def role(self, role: str):
        """Make `role` active inside the `with` block."""
        before = self.role_in_force
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    @contextmanager
    def merged(self):
        """Add the active adapter to the base weights inside the `with` block, and restore the exact old weights after.

        This needs memory for a second copy of the layers that it changes. PEFT's unmerging subtracts in place instead,
        so rounding would slowly change the base. Quantised layers, and weights that two layers share, are not merged.
        """
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")]
        uses = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        kept = []
        try:
            for layer in layers:
                base = layer.get_base_layer()
                if base.weight.is_floating_point() and uses[id(base.weight)] == 1:
                    own = [p for p in (base.weight, getattr(base, "bias", None)) if p is not None]
                    kept.append((layer, [(parameter, parameter.data) for parameter in own]))
                    for parameter in own:
                        parameter.data = parameter.data.clone()
                    layer.merge(adapter_names=[self.role_in_force])
                    if layer.get_base_layer() is not base:  # LN tuning replaces the base layer by its own
                        layer.unmerge()
            yield
        finally:
            for layer, weights in kept:
                layer.merged_adapters.clear()
                for parameter, data in weights:
                    parameter.data = data

    def keep_roles_in_checkpointing(self) -> None:
        """Make gradient checkpointing recompute each layer under the role of its forward pass.

        The backward pass recomputes it, when another adapter may be active. Without this method the gradients of a
        joint loss over two roles are wrong, and nothing reports it.
        """
        for module in self.model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None and not hasattr(checkpoint, "keeps_roles"):
                module._gradient_checkpointing_func = self._role_keeping(checkpoint)

    def _role_keeping(self, checkpoint):
        def run(function, *args, **kwargs):
            role = self.role_in_force

            def under_role(*inner_args):
                self.activate(role)
                return function(*inner_args)

            return checkpoint(under_role, *args, **kwargs)

        run.keeps_roles = True
        return run

    def save_adapter(self, role: str, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write one adapter as an ordinary PEFT checkpoint to `folder`.

        Args:
            state_dict: weights of the whole model, if they are sharded over processes.
        """
        state = get_peft_model_state_dict(
            self.model, state_dict=state_dict, adapter_name=role, save_embedding_layers=False
        )
        config = copy.deepcopy(self.model.peft_config[role])
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, Path(folder) / ADAPTER_WEIGHTS)

    def load_adapter(self, role: str, folder: str | Path) -> None:
        """Read the weights of one adapter from a checkpoint of [`save_adapter`].

        Raises:
            ValueError: the checkpoint belongs to another base model or has other shapes.
        """
        check_adapter_base(str(folder), self.model.peft_config[role].base_model_name_or_path or "")
        load_adapter_weights(self.model, role, load_file(Path(folder) / ADAPTER_WEIGHTS), folder)
        self._set_flags()


def role_weights(model: nn.Module, role: str | None = None) -> dict[str, torch.Tensor]:
    """Return weights under the names of the plain model; for a PeftModel those of the base and of adapter `role`."""
    weights = model.state_dict(keep_vars=True)
    if not hasattr(model, "peft_config"):
        return weights
    adapter = model.base_model.prefix
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if split_adapter(name, adapter)[0] in (None, role)
    }


def load_adapter_weights(model: nn.Module, role: str, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load PEFT weights into the adapter `role`.

    Args:
        source: where the weights come from, for the message.

    Raises:
        ValueError: see [`check_adapter_weights`].
    """
    own = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    check_adapter_weights(own, state, source, model.peft_config[role].base_model_name_or_path)
    set_peft_model_state_dict(model, state, adapter_name=role)
