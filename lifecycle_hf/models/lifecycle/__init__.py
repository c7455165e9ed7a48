"""One decoder with three kinds of attention. The import registers it with transformers' Auto classes and with PEFT."""

import peft.utils.constants as peft_defaults
import transformers

from lifecycle_hf.models.lifecycle.configuration_lifecycle import LifecycleConfig
from lifecycle_hf.models.lifecycle.modeling_lifecycle import (
    LifecycleForCausalLM,
    LifecycleForMaskedLM,
    LifecycleForQuestionAnswering,
    LifecycleForSequenceClassification,
    LifecycleModel,
)

_AUTO = {
    transformers.AutoModel: LifecycleModel,
    transformers.AutoModelForCausalLM: LifecycleForCausalLM,
    transformers.AutoModelForMaskedLM: LifecycleForMaskedLM,
    transformers.AutoModelForQuestionAnswering: LifecycleForQuestionAnswering,
    transformers.AutoModelForSequenceClassification: LifecycleForSequenceClassification,
}

transformers.AutoConfig.register(LifecycleConfig.model_type, LifecycleConfig, exist_ok=True)
LifecycleConfig.register_for_auto_class()
for auto, model in _AUTO.items():
    auto.register(LifecycleConfig, model, exist_ok=True)
    model.register_for_auto_class(auto.__name__)

for table in vars(peft_defaults).values():  # layers that PEFT methods adapt by default, by model type
    if isinstance(table, dict) and "llama" in table:
        table.setdefault(LifecycleConfig.model_type, table["llama"])

__all__ = ["LifecycleConfig", *(model.__name__ for model in _AUTO.values())]
