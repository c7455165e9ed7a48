"""Adapters, the parts of a model that PEFT trains, and the names of their parameters.

The import registers the bottleneck adapter with PEFT.
"""

from lifecycle_hf.models.adapters.bottleneck import BottleneckConfig

__all__ = ["BottleneckConfig"]
