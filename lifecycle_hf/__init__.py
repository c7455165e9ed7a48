"""Train language models through their whole life, and measure what alignment costs.

Importing this package registers its models with transformers' Auto classes and with PEFT, and its adapter with PEFT.
The trainers are imported when they are first asked for.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from lifecycle_hf.models import adapters, lifecycle  # noqa: F401  (their import registers adapter and models)

try:
    __version__ = version("lifecycle_hf")
except PackageNotFoundError:  # a clone on the path that was never installed
    __version__ = "0.0.0"

_HOMES = {
    "data": "InstructionMixture InstructionTask",
    "evaluation.report": "TaxReport",
    "mitigation.projection": "OrthogonalProjection",
    "models.adapters": "BottleneckConfig",
    "models.ensemble": "RewardEnsemble",
    "models.lifecycle": "LifecycleConfig LifecycleForCausalLM LifecycleForMaskedLM LifecycleForQuestionAnswering "
    "LifecycleForSequenceClassification LifecycleModel",
    "models.loading": "load_reward_model merge_adapter",
    "scaling": "ScalingLaw fit_scaling_law",
    "trainers.base.callbacks": "TaxMonitor",
    "trainers.base.mitigations": "ProjectionCallback",
    "trainers.policy.config": "PPOConfig",
    "trainers.policy.groups": "GRPOConfig GRPOTrainer RLOOConfig RLOOTrainer",
    "trainers.policy.ppo": "PPOTrainer",
    "trainers.preference.config": "KTOConfig PreferenceConfig",
    "trainers.preference.kto": "KTOTrainer",
    "trainers.preference.online": "OnlineDPOConfig OnlineDPOTrainer SPINConfig SPINTrainer",
    "trainers.preference.paired": "DPOConfig DPOTrainer IPOConfig IPOTrainer ORPOConfig ORPOTrainer PreferenceTrainer",
    "trainers.supervised.classification": "ClassificationConfig ClassificationTrainer",
    "trainers.supervised.doremi": "DoReMiConfig DoReMiTrainer",
    "trainers.supervised.pretraining": "PretrainingConfig PretrainingTrainer",
    "trainers.supervised.question_answering": "QuestionAnsweringConfig QuestionAnsweringTrainer",
    "trainers.supervised.reward": "RewardConfig RewardTrainer",
    "trainers.supervised.seq2seq": "Seq2SeqConfig Seq2SeqTrainer",
    "trainers.supervised.sft": "SFTConfig SFTTrainer",
}
"""Public names by the module that has them."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__():
    return __all__
