"""One decoder with three ways of attention. Its import registers it with transformers' Auto classes and with PEFT."""

import peft.utils.constants as peft_defaults
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from lifecycle_hf.models.lifecycle.configuration_lifecycle import LifecycleConfig
from lifecycle_hf.models.lifecycle.modeling_lifecycle import (
    LifecycleForCausalLM,
    LifecycleForMaskedLM,
    LifecycleForQuestionAnswering,
    LifecycleForSequenceClassification,
    LifecycleModel,
)

_AUTO = {
    AutoModel: LifecycleModel,
    AutoModelForCausalLM: LifecycleForCausalLM,
    AutoModelForMaskedLM: LifecycleForMaskedLM,
    AutoModelForQuestionAnswering: LifecycleForQuestionAnswering,
    AutoModelForSequenceClassification: LifecycleForSequenceClassification,
}

AutoConfig.register(LifecycleConfig.model_type, LifecycleConfig, exist_ok=True)
LifecycleConfig.register_for_auto_class()
for auto, model in _AUTO.items():
    auto.register(LifecycleConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)

for table in vars(peft_defaults).values():  # the layers that each method of PEFT adapts by default, by model type
    if isinstance(table, dict) and "llama" in table:
        table.setdefault(LifecycleConfig.model_type, table["llama"])

__all__ = ["LifecycleConfig", *(model.__name__ for model in _AUTO.values())]
