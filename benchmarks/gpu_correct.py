"""The part `correct` of gpu.py: every path against the CPU or against itself."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_models import llama, pairs, release, tokens
from torch import nn

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference from float64 that passes: of a log-prob in nats, and of a gradient relative to its norm."""
BOTH, HALF = tuple(BOUNDS), (torch.bfloat16,)
PATHS = {  # the implementation that the model names, dtypes, whether it needs CUDA
    "segments": ("sdpa", BOTH, False),
    "varlen": ("sdpa", HALF, True),
    "flex_attention": ("flex_attention", BOTH, True),
    "flash_attention_2": ("flash_attention_2", HALF, True),
}
PAIRS = {"rows": 48, "prompt": 24, "answer": 16, "top": 400}


def correct(args) -> Iterator[dict]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for check_one in (attention_paths, greedy_decoding, first_ratio, losses_in_the_toy_world, resuming, checkpoint):
        yield from check_one(args)
        release()


def attention_paths(args) -> Iterator[dict]:
    """Log-probs and gradients of packed completions, by each attention implementation and dtype."""
    from lifecycle_hf.completions.scoring import Completions, completion_logprobs
    from lifecycle_hf.models import packed_attention

    shape, device = "tiny" if args.smoke else "0.2B", args.device
    lengths = [(30, 9), (30, 17), (12, 25), (12, 4)]
    prompts, answers = tokens(2, 30, 400), tokens(4, 25, 400, 1)
    rows = (
        [prompts[i // 2][:n] for i, (n, _) in enumerate(lengths)],
        [answers[i][:n] for i, (_, n) in enumerate(lengths)],
    )

    def score(model):
        batch = Completions.from_lists(*rows, 0, next(model.parameters()).device, groups=[0, 0, 1, 1])
        logprobs = completion_logprobs(model, batch).logprobs
        (logprobs.sum() / len(batch.tokens)).backward()
        return logprobs.detach().double().cpu(), [p.grad.double().cpu() for p in model.parameters()]

    base = llama(shape)
    expected = score(copy.deepcopy(base).double())
    kernels = packed_attention.KERNEL_DEVICES
    for path, (implementation, dtypes, cuda_only) in PATHS.items():
        for dtype in dtypes if device.type == "cuda" or not cuda_only else ():
            row = {"check": f"attention, {path}, {dtype}"}
            packed_attention.KERNEL_DEVICES = kernels if path == "varlen" else set()
            try:
                model = llama(shape, device, dtype, implementation)
                model.load_state_dict(base.state_dict())
                got = score(model)
            except (ImportError, ValueError) as error:
                yield row | {"missing": str(error)[:120]}
                continue
            finally:
                packed_attention.KERNEL_DEVICES = kernels
            config = model.config
            heads = (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.hidden_size // config.num_attention_heads,
            )
            if path == "varlen" and packed_attention.torch_kernel(model.device, dtype, *heads, False) is None:
                yield row | {"missing": "torch has no variable-length kernel that agrees with SDPA here"}
                continue
            row["logprob_error"] = float((got[0] - expected[0]).abs().max())
            squares = [float((a - b).square().sum()) for a, b in zip(got[1], expected[1], strict=True)]
            row["gradient_error"] = math.sqrt(sum(squares) / sum(float(g.square().sum()) for g in expected[1]))
            row["packed"] = (model.config._attn_implementation or "").startswith(packed_attention.PREFIX)
            within = max(row["logprob_error"], row["gradient_error"]) <= BOUNDS[dtype]
            yield row | {"passed": within and row["packed"]}
            del model
            release()


def greedy_decoding(args) -> Iterator[dict]:
    """Share of the tokens of greedy decoding in fp32 that are the CPU's, in plain and in captured steps."""
    from lifecycle_hf.completions.sampling import generate

    model, prompts = llama("tiny", seed=1), [row[: 5 + i] for i, row in enumerate(tokens(8, 16, 400))]
    options = {"max_new_tokens": 48, "temperature": 0.0, "stop_token_ids": [2], "pad_token_id": 0}
    wanted = generate(model, prompts, **options, captured=False)
    model = model.to(args.device)
    for captured in (False, True):
        got = generate(model, prompts, **options, captured=captured)
        pairs_of_tokens = [(a, b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y)]
        same = sum(a == b for a, b in pairs_of_tokens) / len(pairs_of_tokens)
        yield {"check": f"greedy decoding, captured={captured}", "same_tokens": same, "passed": same > 0.98}


def options_for(args, folder, steps, device, **more) -> dict:
    return {
        "output_dir": folder, "max_steps": steps, "use_cpu": device.type == "cpu", "report_to": "none", "seed": 0,
        "logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant", "save_strategy": "no",
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "activation_checkpointing": False,
    } | more  # fmt: skip


def ppo(args, folder, steps, device, **more):
    """PPO from the toy world's random model, rewarded for its letters e."""
    from lifecycle_hf import PPOConfig, PPOTrainer, toyworld
    from lifecycle_hf.toyworld.model import build_model, build_tokenizer

    tokenizer = build_tokenizer()
    more |= {"max_completion_length": 16, "ppo_epochs": 2, "log_completions": False, "min_entropy": 0}
    config = PPOConfig(**options_for(args, folder, steps, device, **more))

    def letters(prompts, completions, **columns):
        return [float(c[0]["content"].count("e")) for c in completions]

    data = toyworld.dataset("ppo")["train"].select(range(64))
    return PPOTrainer(build_model(tokenizer), letters, config, data, processing_class=tokenizer)


def dpo(args, folder, steps, device, dtype=torch.float32, **more):
    from lifecycle_hf import DPOConfig, DPOTrainer
    from lifecycle_hf.toyworld.model import build_tokenizer

    config = DPOConfig(**options_for(args, folder, steps, device, **more))
    return DPOTrainer(llama("tiny", dtype=dtype), args=config, train_dataset=pairs(**PAIRS),
                      processing_class=build_tokenizer())  # fmt: skip


def log_of(run, name) -> list[float]:
    return [float(line[name]) for line in run.state.log_history if name in line]


def first_ratio(args) -> Iterator[dict]:
    for bf16 in (False, True) if args.device.type == "cuda" else (False,):
        with tempfile.TemporaryDirectory() as folder:
            run = ppo(args, folder, 4, args.device, bf16=bf16)
            run.train()
        errors = log_of(run, "policy/ratio_error_at_start")
        yield {
            "check": f"ratio before a first step, bf16={bf16}",
            "largest_error": max(errors),
            "passed": max(errors) == 0,
        }


def losses_in_the_toy_world(args) -> Iterator[dict]:
    """DPO: the losses of the CPU, step by step. PPO: the samples differ, so only that it learns without a fault."""
    steps, losses = 4 if args.smoke else 20, []
    for device in (torch.device("cpu"), args.device):
        with tempfile.TemporaryDirectory() as folder:
            run = dpo(args, folder, steps, device)
            run.train()
        losses.append(log_of(run, "loss"))
    largest = max(abs(a - b) for a, b in zip(*losses, strict=True))
    yield {"check": f"{steps} steps of DPO", "largest_difference_of_a_loss": largest, "passed": largest < 2e-3}
    for device in {torch.device("cpu"), args.device}:
        with tempfile.TemporaryDirectory() as folder:
            run = ppo(args, folder, steps, device)
            run.train()
        scores, kl = log_of(run, "score"), log_of(run, "kl")
        finite = all(map(math.isfinite, [*scores, *kl]))
        yield {"check": f"{steps} steps of PPO, {device.type}", "first_score": scores[0], "last_score": scores[-1],
               "last_kl": kl[-1], "passed": finite}  # fmt: skip


def resuming(args) -> Iterator[dict]:
    """A run that was stopped and resumed has, bit for bit, the weights of one that was not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for name, make in (("DPO", dpo), ("PPO", ppo)):
            with tempfile.TemporaryDirectory() as folder:
                whole = make(args, f"{folder}/whole", 6, args.device)
                whole.train()
                make(args, f"{folder}/cut", 3, args.device, save_strategy="steps", save_steps=3).train()
                resumed = make(args, f"{folder}/cut", 6, args.device)
                resumed.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-3")
            same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters()))
            yield {"check": f"resumed {name} bit for bit", "passed": same}
    finally:
        torch.use_deterministic_algorithms(False)


def checkpoint(args) -> Iterator[dict]:
    """A checkpoint of a short run stays in the output folder, with log-probs to compare on another machine."""
    folder = Path(args.output) / "checkpoint"
    with tempfile.TemporaryDirectory() as scratch:
        run = dpo(args, scratch, 2, args.device)
        run.train()
        run.save_model(str(folder))
    (folder / "logprobs.json").write_text(json.dumps(fingerprint(run.model.policy)))
    yield {"check": "checkpoint to load elsewhere", "folder": str(folder), "passed": True}


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[float]:
    ids = torch.tensor(tokens(1, 12, 400, 5), device=next(model.parameters()).device)
    return model.eval()(ids).logits.float().log_softmax(-1)[0, :, 7].tolist()


def check(folder: Path) -> str:
    """Load the checkpoint that `checkpoint` wrote, and compare its log-probs."""
    from transformers import AutoModelForCausalLM

    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    wanted = json.loads((folder / "logprobs.json").read_text())
    got = fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    largest = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    if largest > 1e-3:
        raise SystemExit(f"{folder}: log-probs differ by {largest:.2g} from those of the machine that wrote it.")
    return f"{folder} loads here; log-probs differ by {largest:.2g} at most."
