"""Run a script in several processes the way the README says: `accelerate launch --config_file ...`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "accelerate_configs"
OF_THIS_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _missing_for_deepspeed():
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: pip install -e .[deepspeed]"
    return (
        "" if shutil.which("g++") or shutil.which("c++") else "DeepSpeed compiles its CPU operations: no C++ compiler"
    )


needs_deepspeed = pytest.mark.skipif(bool(_missing_for_deepspeed()), reason=_missing_for_deepspeed())


def launch(config_name, script, *args, timeout=900, env=None, cwd=None):
    """Run `script` under accelerate_configs/<config_name>.yaml and return its standard output.

    Raises AssertionError with the end of the output when it fails.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in OF_THIS_PROCESS and not k.startswith("ACCELERATE_")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config_name}.yaml")),
        *("--main_process_port", str(_free_port()), str(script), *map(str, args)),
    ]
    settings = {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, env=inherited | settings | (env or {}), cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        raise AssertionError(
            f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        )
    return done.stdout


def launch_jobs(config_name, jobs, fsdp=False):
    """Run scripts of tests/launched, [(name, arguments)], in turn in one launch; returns what they print."""
    listed = json.dumps([(script, [str(argument) for argument in arguments]) for script, arguments in jobs])
    env = {"FSDP_ON_CPU": "1"} if fsdp else {}
    return launch(config_name, REPOSITORY / "tests" / "launched" / "jobs.py", listed, env=env, timeout=1800)


def results(printed):
    """{name: what it found} of the lines `RESULT name {...}` that a launched script printed."""
    lines = [line.split(" ", 2) for line in printed.splitlines() if line.startswith("RESULT ")]
    return {name: json.loads(found) for _, name, found in lines}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
