"""Counting what would make the host wait for a GPU, on the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}


class HostSyncs(TorchDispatchMode):
    """Count, by name, what a GPU would have to finish its queue for: values read by the host, and sizes that depend on
    values (`nonzero`, indexing by a mask). `tolist` does not go through the dispatcher on the CPU, so it is replaced.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.paused = False

    def count(self, name: str) -> None:
        if not self.paused:
            self.found.append(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = args[1] if packet in INDEXED else ()
        if packet in READS or any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks):
            self.count(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._tolist = torch.Tensor.tolist

        def tolist(tensor):
            self.count("tolist")
            return self._tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)
