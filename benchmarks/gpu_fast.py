"""The part `fast` of gpu.py: time, MFU and memory of the trainers' steps, with TRL's beside where it is there."""

import tempfile
from collections.abc import Iterator
from statistics import median

import torch
from gpu_models import bf16_peak, llama, parameters, release, tokens, wait
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step after the first two, with all that the GPU was given to do done."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.start = device, [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = wait(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 2:
            self.seconds.append(wait(self.device) - self.start)


def options_for(args, folder: str, batch: int, steps: int) -> dict:
    return {
        "output_dir": folder, "per_device_train_batch_size": batch, "max_steps": steps, "report_to": "none",
        "logging_steps": 50, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-5,
        "optim": "adamw_torch_fused" if args.device.type == "cuda" else "adamw_torch",
        "use_cpu": args.device.type == "cpu", "logging_nan_inf_filter": False,
    }  # fmt: skip


def text_rows(tokenizer, rows: int, lengths: dict[str, int]) -> list[dict[str, str]]:
    """Rows of random words with about so many tokens in each column; both sides tokenise the same text."""

    def text(length, seed):
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens(rows, length, len(tokenizer), seed)]

    columns = {name: text(length, i) for i, (name, length) in enumerate(lengths.items())}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def sides() -> dict[str, object]:
    """This library, and TRL if it can be imported."""
    import lifecycle_hf

    found = {"ours": lifecycle_hf}
    try:
        import trl

        trl.DPOTrainer  # noqa: B018, imported lazily
        found["TRL"] = trl
    except (ImportError, RuntimeError):
        pass
    return found


def fast(args) -> Iterator[dict]:
    shape, batch, steps = ("tiny", 2, 4) if args.smoke else ("1B", 8, 8)
    long = 64 if args.smoke else 2048
    for name in ("DPO", "SFT", "GRPO"):
        found = {side: [] for side in sides()}
        for turn in range(1 if args.smoke else 2):
            for side in found if turn % 2 == 0 else reversed(found):
                found[side].append(measure(args, name, side, shape, batch, steps, long))
                release()
        for side, runs in found.items():
            seconds = median(s for run in runs for s in run["seconds"])
            yield summary(args, f"{name}, {side}", seconds, runs[0])
        if "TRL" in found:
            ratios = [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(found["ours"], found["TRL"])]
            yield {"measured": f"{name}, time of ours / TRL's", "median": median(ratios), "turns": ratios}
    yield from ppo_update(args, shape, batch, long)


def measure(args, name: str, side: str, shape: str, batch: int, steps: int, long: int) -> dict:
    """Seconds of steps, tokens of a step, peak memory."""
    from datasets import Dataset

    from lifecycle_hf.toyworld.model import build_tokenizer

    library, tokenizer = sides()[side], build_tokenizer()
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    # A pair of `long` tokens, half of which are the prompt that both answers share; of GRPO one group of `batch`.
    lengths = {"DPO": {"prompt": long // 2, "chosen": long // 4, "rejected": long // 4}, "SFT": {"text": long}}
    lengths["GRPO"] = {"prompt": long // 4}
    rows = Dataset.from_list(text_rows(tokenizer, batch * steps, lengths[name]))
    times = StepTimes(args.device)
    given = {"DPO": {"ref_model": llama(shape, args.device, dtype)}, "GRPO": {"reward_funcs": lengths_of}}.get(
        name, {}
    )
    sizes = {"max_length": long}
    if name == "GRPO":
        sizes = {"num_generations": batch, "max_completion_length": long // 8, "log_completions": False}
        sizes |= {"min_entropy": 0} if side == "ours" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(library, f"{name}Config")(**options_for(args, folder, batch, steps), **sizes)
        run = getattr(library, f"{name}Trainer")(
            llama(shape, args.device, dtype),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[times],
            **given,
        )
        run.train()
        count = parameters(run.model.policy if hasattr(run.model, "policy") else run.model)
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.type == "cuda" else float("nan")
    # FLOPs of the work itself: 6 per parameter and token, 2 more for the reference; recomputed ones are left out.
    per_token = (8 if name == "DPO" else 6) * count
    total = batch * (long // 4 + long // 8 if name == "GRPO" else long)
    return {"seconds": times.seconds, "tokens": total, "flops": total * per_token, "peak_gib": peak}


def lengths_of(prompts, completions, **columns) -> list[float]:
    """A reward that costs nothing: the number of characters."""
    return [float(len(text)) for text in completions]


def summary(args, name: str, seconds: float, run: dict) -> dict:
    row = {
        "measured": name,
        "seconds_a_step": seconds,
        "tokens_per_s": run["tokens"] / seconds,
        "peak_gib": run["peak_gib"],
    }
    if args.device.type == "cuda":
        row["mfu"] = run["flops"] / seconds / bf16_peak(args.device)
    return row


def ppo_update(args, shape: str, batch: int, long: int) -> Iterator[dict]:
    """Seconds of the phases of an update: rollout, scoring, and optimisation with its MFU."""
    from datasets import Dataset

    from lifecycle_hf import PPOConfig, PPOTrainer
    from lifecycle_hf.toyworld.model import build_tokenizer

    tokenizer, new = build_tokenizer(), long // 8
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    rows = Dataset.from_list(text_rows(tokenizer, 4 * batch * 2, {"prompt": long // 4}))
    phases = {"sampling": [], "scoring": [], "optimisation": []}

    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            **options_for(args, folder, batch, 8), ppo_epochs=2, num_mini_batches=2, max_completion_length=new,
            advantage_estimator="reinforce", log_completions=False, min_entropy=0, on_fault="skip", max_faults=100,
        )  # fmt: skip
        run = PPOTrainer(llama(shape, args.device, dtype), lengths_of, config, rows, processing_class=tokenizer)
        for owner, name, phase in ((run.rollouts.sampler, "sample", "sampling"), (run.rollouts, "make", "scoring"),
                                   (run, "training_step", "optimisation")):  # fmt: skip
            setattr(owner, name, timed(getattr(owner, name), args.device, phases[phase]))
        run.train()
        count = parameters(run.model.policy)
    # The second of two updates; each has four steps, over two mini-batches in two epochs.
    sampling, scoring = phases["sampling"][-1], phases["scoring"][-1]
    optimisation = sum(phases["optimisation"][-4:]) - scoring
    flops = 4 * batch * (long // 4 + new) * 6 * count
    row = {"measured": "PPO update, ours", "sampling_s": sampling, "scoring_s": scoring - sampling,
           "optimisation_s": optimisation}  # fmt: skip
    if args.device.type == "cuda":
        row |= {
            "optimisation_mfu": flops / optimisation / bf16_peak(args.device),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    yield row


def timed(function, device: torch.device, seconds: list[float]):
    def call(*args, **kwargs):
        start = wait(device)
        found = function(*args, **kwargs)
        seconds.append(wait(device) - start)
        return found

    return call
