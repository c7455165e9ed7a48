"""What alignment cost (`lifecycle_hf.evaluation`) and how to pay less (`lifecycle_hf.mitigation`)"""

from lifecycle_hf import evaluation, mitigation
from lifecycle_hf.evaluation import *  # noqa: F403
from lifecycle_hf.mitigation import *  # noqa: F403

__all__ = [*evaluation.__all__, *mitigation.__all__]
