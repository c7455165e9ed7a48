"""Prove the library on a GPU, measure it, and bring home the figures: one command, no Hub, random weights.

    python benchmarks/gpu.py                          # all parts, at most 25 minutes; needs CUDA
    python benchmarks/gpu.py --parts correct decode --minutes 8
    python benchmarks/gpu.py --smoke                  # tiny shapes, also on a CPU, to see that it runs
    python benchmarks/gpu.py --check output/gpu       # on another machine: load the checkpoint that was written there

Parts, in this order:

- correct: log-probs and gradients of every attention path against float64 on the CPU, greedy decoding against the
  CPU's, the ratio before a rollout's first step, DPO and PPO in the toy world against the CPU's losses, a resumed run
  against one that was not stopped, and a checkpoint to load elsewhere.
- fast: steps of DPO and SFT and an update of PPO: tokens/s, MFU, peak memory; TRL's trainer beside where it is there.
- decode: tokens/s and the share of the memory-bandwidth floor, of this library's samplers and transformers'.
- profile: the longest kernels, and the time in which the GPU waits for the host.

Every result is printed as a row and written to OUTPUT/gpu.json at once, so a run that is cut off keeps what it has.
README.md in this folder says how to run it on a machine without a package registry.
"""

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_correct import check, correct
from gpu_fast import fast
from gpu_kernels import decode, profile

PARTS = {"correct": correct, "fast": fast, "decode": decode, "profile": profile}
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "deepspeed", "bitsandbytes")


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions of all that plays a part, and the name of the device."""
    found = {"python": platform.python_version(), "device": "CPU"}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run(part: str, args, report: dict, path: Path) -> None:
    """Run a part in its share of the time, and write each result when it is there."""
    rows, start = report["parts"].setdefault(part, []), time.perf_counter()
    limit = 60 * args.minutes / len(args.parts)
    print(f"\n## {part}", flush=True)
    try:
        for row in PARTS[part](args):
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
            print(" | ".join(f"{name}: {shown(value)}" for name, value in row.items()), flush=True)
            path.write_text(json.dumps(report, indent=1))
            if time.perf_counter() - start > limit:
                rows.append({"cut off": f"{part} reached its {limit:.0f} seconds"})
                break
    except Exception as error:  # the other parts still run
        rows.append({"failed": f"{type(error).__name__}: {error}"})
        if args.smoke:
            raise
    if rows and {"cut off", "failed"} & rows[-1].keys():
        print(rows[-1], flush=True)
    path.write_text(json.dumps(report, indent=1))


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="for all parts; each has an equal share")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes and few steps, on the CPU if there is no GPU"
    )
    parser.add_argument("--output", default="output/gpu", help="folder of gpu.json and of the checkpoint")
    parser.add_argument("--check", metavar="FOLDER", help="load the checkpoint of a run elsewhere, and compare")
    args = parser.parse_args()
    if args.check:
        print(check(Path(args.check)))
        return 0
    if not torch.cuda.is_available() and not args.smoke:
        print("There is no CUDA device here: nothing was measured. --smoke runs every part in small on a CPU.")
        return 0
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(args.device), "smoke": args.smoke, "parts": {}}
    print(report["environment"], flush=True)
    for part in args.parts:
        run(part, args, report, folder / "gpu.json")
    bad = [row for rows in report["parts"].values() for row in rows if "failed" in row or row.get("passed") is False]
    print(f"\n{len(bad)} of the checks failed. {folder / 'gpu.json'} holds everything.")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
