"""The CPU configurations start as many processes as they say, on the engine that they say."""

from pathlib import Path

import pytest
from launching import launch, needs_deepspeed

SCRIPT = Path(__file__).parent / "launched" / "world_size.py"


@pytest.mark.parametrize(
    ("config", "world_size", "engine"),
    [
        ("cpu", 1, "NO"),
        ("cpu_ddp", 2, "MULTI_CPU"),
        pytest.param("cpu_zero2", 2, "DEEPSPEED", marks=needs_deepspeed),
        pytest.param("cpu_zero3", 2, "DEEPSPEED", marks=needs_deepspeed),
    ],
)
def test_cpu_configuration_runs_its_processes(config, world_size, engine, tmp_path):
    options = ("--config", config_file(tmp_path), "--output_dir", tmp_path)
    assert f"world_size {world_size} on {engine}" in launch(config, SCRIPT, *options)


def config_file(folder):
    path = folder / "options.yaml"
    path.write_text("report_to: none\n")
    return path
