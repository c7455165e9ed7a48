"""Runs Python code in forks of a process that has imported the libraries, which takes a new one ten seconds.

A line on standard input is a request, JSON: [source, arguments, working folder, file for stdout, file for stderr]. A
source that ends in .py is a script, else code. The answer is a line with the exit status.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from types import ModuleType

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
import transformers
import trl

_ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.Trainer, trl.SFTTrainer


def run(source, arguments, folder, *files):
    """What the fork does; it does not return."""
    status = 1
    signal.alarm(600)  # what hangs is killed
    try:
        for stream, file in zip((sys.stdout, sys.stderr), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
        os.chdir(folder)
        sys.argv = [source, *arguments]
        if source.endswith(".py"):
            sys.path[0] = os.path.dirname(source)
            runpy.run_path(source, run_name="__main__")
        else:
            sys.path[0], sys.argv[0] = "", "-c"
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(source, vars(main))
        status = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        if not (pid := os.fork()):
            run(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
