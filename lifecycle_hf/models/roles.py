"""One frozen base, several roles: policy, value, reward and reference as adapters of one PeftModel."""

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
from lifecycle_hf.models.loading import check_adapter_base

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class SharedBase:
    """Switches the adapters of a PeftModel between roles and keeps every trainable adapter trainable.

    PEFT freezes the adapters that are not active; a joint loss over two of them needs both trainable at once, so the
    flags are set anew after each switch. The role "base" is the base model with its adapters off.

    Args:
        model: a PeftModel whose active adapter is the policy.
        trainable: whether the policy's adapter trains.

    Raises:
        ValueError: if several adapters are active, or it is a prompt-learning one, which has no base to share.
    """

    def __init__(self, model: PeftModel, trainable: bool = True):
        active = model.active_adapters
        if len(active) != 1 or model.peft_config[active[0]].is_prompt_learning:
            raise ValueError(
                f"The policy's active adapters are {active}: roles need exactly one, of a kind that changes layers "
                "(LoRA and its like, not prompt learning)."
            )
        self.model = model
        self.policy = self.role_in_force = active[0]
        self.trainable = {self.policy} if trainable else set()
        self._set_flags()

    def add_role(self, role: str, config: PeftConfig, *, trainable: bool) -> None:
        """Adds a fresh adapter named `role` with the shape of `config`, without its `modules_to_save`."""
        config = copy.deepcopy(config)
        config.modules_to_save, config.inference_mode = None, False
        config.base_model_name_or_path = self.model.peft_config[self.policy].base_model_name_or_path
        self._add(role, config, trainable)

    def copy_role(self, role: str, source: str) -> None:
        """Adds a frozen copy of the adapter `source` under the name `role`."""
        self._add(role, copy.deepcopy(self.model.peft_config[source]), trainable=False)
        state = {k: v.clone() for k, v in get_peft_model_state_dict(self.model, adapter_name=source).items()}
        set_peft_model_state_dict(self.model, state, adapter_name=role)
        self._set_flags()

    def _add(self, role: str, config: PeftConfig, trainable: bool) -> None:
        if role in self.model.peft_config:
            raise ValueError(
                f"The model has an adapter named {role!r} already, a name that the trainer needs: rename yours."
            )
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
        """Puts `role` in force: the name of an adapter, or "base" for none."""
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
        """Puts `role` in force inside the block."""
        before = self.role_in_force
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    @contextmanager
    def merged(self):
        """Adds the adapter in force to the base weights inside the block, and gives the very weights back after it.

        That takes the memory of the layers that it changes once more. PEFT's unmerging subtracts in place instead, and
        the base would drift by rounding. Quantised layers, and weights that two layers share, stay as they are.
        """
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")]
        weights = [layer.get_base_layer().weight for layer in layers]
        uses = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        kept = []
        try:
            for layer, weight in zip(layers, weights, strict=True):
                base = layer.get_base_layer()
                if weight.is_floating_point() and uses[id(weight)] == 1:
                    bias = getattr(base, "bias", None)
                    kept.append((layer, weight, weight.data, bias, None if bias is None else bias.data))
                    for parameter in filter(lambda p: p is not None, (weight, bias)):
                        parameter.data = parameter.data.clone()
                    layer.merge(adapter_names=[self.role_in_force])
                    if layer.get_base_layer() is not base:  # LN tuning puts another layer in its place
                        layer.unmerge()
            yield
        finally:
            for layer, weight, weight_data, bias, bias_data in kept:
                layer.merged_adapters.clear()
                weight.data = weight_data
                if bias is not None:
                    bias.data = bias_data

    def keep_roles_in_checkpointing(self) -> None:
        """Makes gradient checkpointing recompute each layer under the role its forward had.

        The recompute runs in the backward pass, when another adapter may be in force; without this the gradients of a
        joint loss over two roles are silently wrong.
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
        """Writes one adapter as an ordinary PEFT checkpoint at the root of `folder`.

        Args:
            state_dict: the whole model's weights where they are sharded over processes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(
            self.model, state_dict=state_dict, adapter_name=role, save_embedding_layers=False
        )
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / ADAPTER_WEIGHTS)
        config = copy.deepcopy(self.model.peft_config[role])
        config.inference_mode = True
        config.save_pretrained(folder)

    def load_adapter(self, role: str, folder: str | Path) -> None:
        """Reads the weights of one adapter from a checkpoint made by [`save_adapter`].

        Raises:
            ValueError: if the checkpoint belongs to another base model or has other shapes.
        """
        check_adapter_base(str(folder), self.model.peft_config[role].base_model_name_or_path or "")
        load_adapter_weights(self.model, role, load_file(Path(folder) / ADAPTER_WEIGHTS), folder)
        self._set_flags()


def role_weights(model: nn.Module, role: str | None = None) -> dict[str, torch.Tensor]:
    """Weights by the names of the plain model; of a PeftModel those of the base, and of the adapter `role`."""
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
    """Loads PEFT weights into the adapter `role`.

    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape.
    """
    own = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
    for key in sorted(own.keys() | state.keys()):
        if key not in state or key not in own or own[key].shape != state[key].shape:
            there = tuple(state[key].shape) if key in state else "missing"
            here = tuple(own[key].shape) if key in own else "missing"
            raise ValueError(
                f"The adapter checkpoint {source} does not fit this model: {key} is {there} in the checkpoint and "
                f"{here} in the model. It was trained on another base or with another LoRA configuration."
            )
    set_peft_model_state_dict(model, state, adapter_name=role)
