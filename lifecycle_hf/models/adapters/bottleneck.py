"""The bottleneck adapter of Houlsby et al. (2019) as a PEFT method; the import registers it with PEFT."""

from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

NAME = "bottleneck"
NON_LINEARITIES = {
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = {"attention": slice(0, 1), "ffn": slice(1, 2), "both": slice(0, 2)}
_LLAMA, _MOE = ("o_proj", "down_proj"), ("o_proj", "mlp")
_BART = (r"\w+_attn\.out_proj", "fc2")
_BERT = (r"(?:cross)?attention\.output\.dense", r"layer\.\d+\.output\.dense")
_T5 = (r"(?:SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo")
TARGETS = {
    **dict.fromkeys(("lifecycle", "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _MOE),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("opt", "bart", "mbart"), _BART),
    "gpt2": (r"(?:cross)?attn\.c_proj|crossattention\.c_proj", r"mlp\.c_proj"),
}
"""{model type: regular expressions of the modules whose outputs are adapted, (of attention, of the FFN)}."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Configure bottleneck adapters: h ← h + f(h·W_down + b_down)·W_up + b_up on the outputs of attention and FFN.

    Each adapter stands behind the projection back to the model's width and before the residual sum. W_up and the
    biases are 0 at the start, so the model starts as its base. W_down is normal with σ = 0.01, cut off at 2σ. The
    adapter is not linear, so it can't be merged into the base. Several active adapters are applied one after another.

    Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751.

    Args:
        reduction_factor: width of the model / width of the bottleneck, rounded down; 16 by default.
        bottleneck_size: width of the bottleneck, instead of `reduction_factor`.
        non_linearity: f, one of `NON_LINEARITIES`.
        placement: "attention", "ffn" or "both": which outputs are adapted, where `target_modules` is None.
        use_bias: whether there are b_down and b_up.
        target_modules: names (or one regular expression) of the modules whose outputs are adapted, as in other PEFT
            methods; by default those of the model's type in `TARGETS`. A module that is no linear layer must return
            states of the model's width, alone or first in a tuple.
        exclude_modules, modules_to_save: as in other PEFT methods.
        init_bottleneck_weights: False draws W_up and the biases at random too, for tests.

    Raises:
        ValueError: a value is not valid, or both sizes are given.
    """

    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    non_linearity: str = "gelu"
    placement: str = "both"
    use_bias: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_bottleneck_weights: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(NAME.upper())
        if self.reduction_factor is None and self.bottleneck_size is None:
            self.reduction_factor = 16
        sizes = {"reduction_factor": self.reduction_factor, "bottleneck_size": self.bottleneck_size}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) == 2 or min(given.values()) <= 0:
            raise ValueError(f"BottleneckConfig: {given}: give one of {' and '.join(sizes)}, greater than 0.")
        for name, known in (("non_linearity", NON_LINEARITIES), ("placement", PLACEMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"BottleneckConfig: {name}={getattr(self, name)!r}: choose one of {', '.join(known)}."
                )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Apply the active bottleneck adapters to the output [..., width] of `base_layer`.

    Args:
        width: width of the output.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("non_linearity",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int):
        super().__init__()
        self.base_layer, self.width, self.merged_adapters = base_layer, width, []
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.non_linearity = {}
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, on the device and in the dtype of the base layer."""
        size = config.bottleneck_size or max(1, int(self.width / config.reduction_factor))
        down = nn.Linear(self.width, size, bias=config.use_bias)
        up = nn.Linear(size, self.width, bias=config.use_bias)
        if config.init_bottleneck_weights:
            nn.init.trunc_normal_(down.weight, std=0.01, a=-0.02, b=0.02)
            for start in (up.weight, up.bias, down.bias):
                if start is not None:
                    nn.init.zeros_(start)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.non_linearity[adapter_name] = NON_LINEARITIES[config.non_linearity]
        device = next(self.get_base_layer().parameters()).device
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args, **kwargs):
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for name in [name for name in self.active_adapters if name in self.bottleneck_down]:
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            inner = self.non_linearity[name](down(self._cast_input_dtype(hidden, down.weight.dtype)))
            hidden = hidden + up(inner).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class BottleneckTuner(BaseTuner):
    """Put bottleneck adapters into a model; `get_peft_model(model, BottleneckConfig())` calls it."""

    prefix, tuner_layer_cls = f"{NAME}_", BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> BottleneckConfig:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            if kind not in TARGETS:
                raise ValueError(
                    f"BottleneckConfig does not know the modules of the model type {kind!r}: set target_modules to "
                    f"the names of its output projections, such as ['o_proj', 'down_proj']. It knows: "
                    f"{', '.join(sorted(TARGETS))}."
                )
            peft_config.target_modules = rf".*\.(?:{'|'.join(TARGETS[kind][PLACEMENTS[peft_config.placement]])})"
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        width = getattr(base, "out_features", getattr(base, "nf", None))  # `nf` is that of transformers' Conv1D
        width = width or self.model.config.get_text_config().hidden_size
        self._replace_module(parent, target_name, BottleneckLayer(target, adapter_name, peft_config, width), target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "A bottleneck adapter can't be merged: it is not linear, so no weights of the base give its output. Keep "
            "it beside its base (PeftModel.from_pretrained loads it), or train LoRA, which can be merged."
        )


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, without which `register_peft_method` refuses the name."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)


_add_peft_type(NAME.upper())
register_peft_method(name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckTuner)
