"""What OrthogonalProjection (k = 1, fresh every step) costs: against a capability backward and a step without it.

    export OMP_NUM_THREADS=1
    python benchmarks/projection.py                  # SmolLM2-135M with LoRA, and a full model of 20M parameters
    python benchmarks/projection.py --rounds 5 --only full

Four processes take turns, round by round: a step of AdamW; the same and a forward and backward of the capability loss
on a batch of the same size, with nothing made of its gradients; and the step projected at the gradient and at the
update level. The overhead is (projected − step with capability backward) / step of the same round, in CPU seconds of
the process, as median and range. Memory is the peak of a round over that of a plain step, in gradients (bytes of all
gradients); for it the rounds run once more with malloc giving back every block at once. The default model is made as
docs/real_runs.md tells. What the projection adds does not grow with the batch.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

import torch
from measuring import alternate, clocks, memory, prepare, show

SIDES = ("step", "step + capability", "gradient", "update")
SIZES = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
         "num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": False}  # fmt: skip


def make_model(kind: str, path: str):
    torch.manual_seed(0)
    if kind == "full":
        from lifecycle_hf import LifecycleConfig, LifecycleForCausalLM

        return LifecycleForCausalLM(LifecycleConfig(**SIZES))
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), lora)


def work(side, kind, path, shape, connection, folder):
    """A worker: measures one step of its side for every go."""
    from lifecycle_hf.mitigation.projection import OrthogonalProjection

    prepare()
    model = make_model(kind, path)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids, held = torch.randint(0, 8000, (2, *shape))

    def loss(model, ids=held):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    if side in ("gradient", "update"):
        OrthogonalProjection(model, loss, level=side).attach(optimizer)

    def step():
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        if side == "step + capability":
            loss(model).backward()
            optimizer.zero_grad()

    step()
    connection.send({"gradient_mib": sum(p.numel() * p.element_size() for p in trained) / 2**20})
    while connection.recv() == "go":
        Path("/proc/self/clear_refs").write_text("5")
        start = clocks(False)
        step()
        cpu, wall = (end - begin for begin, end in zip(start, clocks(False)))
        connection.send({"cpu_s": cpu, "wall_s": wall, "peak_mib": memory(False)[1]})


def run(kind: str, args) -> dict:
    given = dict.fromkeys(SIDES, (kind, args.model, (args.batch, args.length)))
    ready, timed = alternate(work, given, args.rounds)
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    os.environ |= exact
    _, kept = alternate(work, given, 3)
    for name in exact:
        del os.environ[name]
    return {"gradient_mib": ready["step"]["gradient_mib"], "timed": timed, "memory": kept}


def row(kind: str, found: dict, side: str) -> list:
    seconds = {name: [go["cpu_s"] for go in rounds] for name, rounds in found["timed"].items()}
    peaks = {name: median(go["peak_mib"] for go in rounds) for name, rounds in found["memory"].items()}
    rounds = zip(seconds[side], seconds["step + capability"], seconds["step"])
    shares = [100 * (ours - both) / step for ours, both, step in rounds]
    spread = (median(shares), min(shares), max(shares))
    buffers = [(peaks[name] - peaks["step"]) / found["gradient_mib"] for name in (side, "step + capability")]
    times = [median(seconds[name]) for name in ("step", "step + capability", side)]
    return [kind, side, *times, *spread, found["gradient_mib"], *buffers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="causal LM for LoRA; docs/real_runs.md makes one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step, and of a capability batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--only", choices=["lora", "full"])
    parser.add_argument("--output", default="output/bench_projection.json")
    args = parser.parse_args()
    prepare()
    if args.only != "full" and not Path(args.model).exists():
        sys.exit(f"--model {args.model} does not exist: make it as docs/real_runs.md tells, or give --only full.")
    found = {kind: run(kind, args) for kind in ([args.only] if args.only else ["lora", "full"])}
    header = (
        "model | level | step, CPU s | + capability backward | projected | overhead, % of a step (min–max) | "
        "gradient, MiB | extra peak, gradients | the same of + capability backward"
    )
    pattern = "{} | {} | {:.3f} | {:.3f} | {:.3f} | {:.1f} ({:.1f}–{:.1f}) | {:.1f} | {:.2f} | {:.2f}"
    rows = [row(kind, result, side) for kind, result in found.items() for side in SIDES[2:]]
    show(f"Projection, k = 1, {args.batch} × {args.length} tokens", header, pattern, rows)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
