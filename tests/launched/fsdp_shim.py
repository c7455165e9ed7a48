"""FSDP2 on CPU: accelerate falls back to DDP there, without a word, although torch can shard. Import it first."""

from accelerate import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin

plain = AcceleratorState.__init__


def with_fsdp(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    if self.num_processes > 1 and self.distributed_type != DistributedType.FSDP:
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="full_state_dict",
            cpu_ram_efficient_loading=False, reshard_after_forward=True,
        )  # fmt: skip
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp
