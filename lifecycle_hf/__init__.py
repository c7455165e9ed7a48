"""Train language models through their whole life, and measure what alignment costs."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lifecycle_hf")
except PackageNotFoundError:  # a clone on the path that was never installed
    __version__ = "0.0.0"

_HOMES = {
    "alignment_tax.projection": ("OrthogonalProjection",),
    "alignment_tax.report": ("TaxReport",),
    "models.lifecycle": (
        "LifecycleConfig",
        "LifecycleForCausalLM",
        "LifecycleForMaskedLM",
        "LifecycleForQuestionAnswering",
        "LifecycleForSequenceClassification",
        "LifecycleModel",
    ),
    "models.loading": ("load_reward_model", "merge_adapter"),
    "scaling": ("ScalingLaw", "fit_scaling_law"),
    "trainers.callbacks": ("TaxMonitor",),
    "trainers.kto": ("KTOTrainer",),
    "trainers.preference": (
        "DPOConfig",
        "DPOTrainer",
        "IPOConfig",
        "IPOTrainer",
        "ORPOConfig",
        "ORPOTrainer",
        "PreferenceTrainer",
    ),
    "trainers.preference_config": ("KTOConfig", "PreferenceConfig"),
    "trainers.mitigations": ("ProjectionCallback",),
    "trainers.ppo": ("PPOTrainer",),
    "trainers.ppo_config": ("PPOConfig",),
    "trainers.pretraining": ("PretrainingConfig", "PretrainingTrainer"),
    "trainers.reward": ("RewardConfig", "RewardTrainer"),
    "trainers.sft": ("SFTConfig", "SFTTrainer"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__():
    return __all__


class _Watch(MetaPathFinder):
    """Calls `action` once `package` has been imported, by whomever."""

    def __init__(self, package, action):
        self.package, self.action = package, action

    def find_spec(self, name, path=None, target=None):
        if name != self.package:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.action()

            spec.loader.exec_module = exec_module
        return spec


def _after_import(package, action):
    if package in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(package, action))


def _register_models():
    import_module(f"{__name__}.models.lifecycle")


def _register_adapters():
    """Every method of PEFT knows for Llama which layers it adapts by default: the same for the lifecycle models."""
    for table in vars(import_module("peft.utils.constants")).values():
        if isinstance(table, dict) and "llama" in table:
            table.setdefault("lifecycle", table["llama"])


# `import lifecycle_hf` is quick, and still all that transformers' Auto classes and PEFT need to know its models.
_after_import("transformers", _register_models)
_after_import("peft", _register_adapters)
