"""Run launched scripts one after the other in the same processes: a launch costs more than most of them.

Argument: a JSON list of [script, [arguments]]; the scripts are modules beside this file with a function `main`.
"""

import gc
import json
import os
import sys
from importlib import import_module

if os.environ.get("FSDP_ON_CPU"):
    import fsdp_shim  # noqa: F401

from ending import end


def without_compiling():
    """Let DeepSpeed do without its collectives in shared memory, which it would compile for more than a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        without_compiling()
    trainer = None
    for script, arguments in json.loads(sys.argv[1]):
        main = import_module(script).main
        gc.freeze()  # as tests/conftest.py
        trainer = main(*arguments) or trainer
    end(trainer)
