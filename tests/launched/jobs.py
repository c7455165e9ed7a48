"""Run launched scripts one after the other in the same processes: a launch costs more than most of them.

Argument: a JSON list of [script, [arguments]]; the scripts are modules beside this file with a function `main`.
"""

import json
import os
import sys
from importlib import import_module

if os.environ.get("FSDP_ON_CPU"):
    import fsdp_shim  # noqa: F401

from ending import end

if __name__ == "__main__":
    for script, arguments in json.loads(sys.argv[1]):
        trainer = import_module(script).main(*arguments)
    end(trainer)
