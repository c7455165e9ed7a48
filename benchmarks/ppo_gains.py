"""What each of PPO's gains gives by itself: updates with it and without it, interleaved, all else the same.

    export OMP_NUM_THREADS=1
    python benchmarks/ppo_gains.py                          # every gain; about twenty minutes
    python benchmarks/ppo_gains.py --gain packing --updates 4

The setting is that of benchmarks/ppo.py: LoRA, a value head on cached features, fp32, unless the gain says otherwise.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ppo
from measuring import alternate, prepare, show


class Gain(NamedTuple):
    """What is switched off in the worker of the side without it."""

    title: str
    off: Callable[[], None]
    value: str = "head"
    ragged: bool = False


def no_merging() -> None:
    from lifecycle_hf.trainers.base.sampler import PolicySampler

    PolicySampler._merges = lambda self, models: False


def no_compacting() -> None:
    from lifecycle_hf.completions import sampling

    sampling.COMPACT_FROM = 2


def no_packing() -> None:
    from lifecycle_hf.completions import scoring

    scoring.packs = lambda model: False


def no_settling() -> None:
    from lifecycle_hf.trainers.policy.ppo import PPOTrainer

    PPOTrainer._settles_values = lambda self: False


def no_kept_chunk() -> None:
    from lifecycle_hf.models import lm_head

    # A last chunk of one row is kept; all others are computed again.
    plain = lm_head.LinearLogProbs.apply
    lm_head.LinearLogProbs.apply = lambda states, weight, tokens, t, entropy, size, keep: plain(
        states, weight, tokens, t, entropy, max(1, min(size, len(states) - 1)), keep
    )


GAINS = {
    "merging": Gain("adapter merged while decoding", no_merging),
    "compacting": Gain("finished rows leave decoding", no_compacting, ragged=True),
    "packing": Gain("no padding in scoring and training", no_packing),
    "chunk": Gain("last chunk of logits kept", no_kept_chunk),
    "settling": Gain("value's backward before policy's forward", no_settling, value="adapter"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gain", choices=[*GAINS, "all"], default="all")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--output", default="output/bench_ppo_gains.json")
    return parser.parse_args()


def work(side: str, gain: Gain, *given) -> None:
    if side == "without":
        gain.off()
    ppo.work("ours", ppo.Setting(True, gain.value), *given)


def measure(name: str, options, args) -> dict:
    gain, options.ragged = GAINS[name], GAINS[name].ragged
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ppo.make_tokenizer(options)
        paths, rows = ppo.make_models(options, tokenizer, folder), ppo.make_prompts(options, tokenizer)
        sides = dict.fromkeys(("with", "without"), (gain, options, paths, rows))
        _, updates = alternate(work, sides, args.updates + 1)
    return {"gain": name, "updates": updates}


def row(result: dict) -> list:
    """Seconds and peaks with and without, and the ratio of seconds with its spread."""
    both = [result["updates"][side] for side in ("with", "without")]
    phases = []
    for phase in (*ppo.PHASES, "total"):
        times = [sorted(update["cpu_s"][phase] for update in updates[1:]) for updates in both]
        phases += [values[len(values) // 2] for values in times]
    ratios = [a["cpu_s"]["total"] / b["cpu_s"]["total"] for a, b in zip(*(updates[1:] for updates in both))]
    peaks = [max(update["peak_mib"] for update in updates) for updates in both]
    return [GAINS[result["gain"]].title, *phases, sum(ratios) / len(ratios), min(ratios), max(ratios), *peaks]


def main() -> None:
    args, results = parse_args(), []
    prepare()
    options = ppo.parse_args(["--updates", str(args.updates)])
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    for name in GAINS if args.gain == "all" else [args.gain]:
        results.append(measure(name, options, args))
        Path(args.output).write_text(json.dumps(results, indent=1))
        print(f"{name}: done", flush=True)
    names = " | ".join(f"{phase} with | without" for phase in (*ppo.PHASES, "total CPU s"))
    header = f"gain | {names} | total with / without (min–max) | peak MiB with | without"
    pattern = "{}" + " | {:.2f}" * 8 + " | {:.3f} ({:.3f}–{:.3f}) | {:.0f} | {:.0f}"
    show("Each gain by itself", header, pattern, [row(result) for result in results])


if __name__ == "__main__":
    main()
