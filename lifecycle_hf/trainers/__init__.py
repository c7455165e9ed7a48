"""One trainer per way of training, each beside its options."""

import warnings

# PEFT and TRL still ask transformers by the old name, about which the user of a run can do nothing.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
