"""The parts `decode` and `profile` of gpu.py: tokens/s against the bandwidth floor, the longest kernels, host gaps."""

import tempfile
from collections.abc import Callable, Iterator

import torch
from gpu_fast import options_for
from gpu_models import llama, pairs, parameters, release, tokens, wait
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from transformers import GenerationConfig


def decode(args) -> Iterator[dict]:
    """Tokens/s of every sampler at several batch sizes, prompts of 512 tokens, 128 new ones."""
    cuda = args.device.type == "cuda"
    shape, prompt, new = ("tiny", 16, 8) if args.smoke else ("1B", 512, 128)
    model = llama(shape, args.device, torch.bfloat16 if cuda else torch.float32).eval()
    speed = bandwidth(args.device, 2**22 if args.smoke else 2**30)
    yield {"measured": "memory bandwidth of a copy", "gb_per_s": speed / 1e9}
    for batch in (1, 4) if args.smoke else (1, 16, 64, 256):
        prompts = tokens(batch, prompt, 400)
        floor = decoding_bytes(model, batch, prompt, new) / speed
        for name, sampler in samplers(model, new).items():
            try:
                seconds = best_of(2, sampler, prompts, args.device) - best_of(
                    2, sampler, prompts, args.device, steps=1
                )
            except Exception as error:  # a sampler of transformers may not run on this machine
                if name.startswith("ours"):
                    raise
                yield {
                    "measured": f"decoding, batch {batch}, {name}",
                    "missing": f"{type(error).__name__}: {error}"[:160],
                }
                continue
            share = floor * (new - 1) / new / seconds if cuda else None
            yield {"measured": f"decoding, batch {batch}, {name}", "tokens_per_s": batch * (new - 1) / seconds,
                   "share_of_the_floor": share}  # fmt: skip
            release()


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written per second by copies within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = wait(device)
        target.copy_(source)
        seconds.append(wait(device) - start)
    return 2 * size / min(seconds)


def decoding_bytes(model, batch: int, prompt: int, new: int) -> float:
    """What the steps must read: all weights in each, and the keys and values of the tokens before."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    size = next(model.parameters()).element_size()
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * size
    return new * (parameters(model) * size + batch * (prompt + new / 2) * of_a_token)


def samplers(model, new: int) -> dict[str, Callable]:
    """{name: function (prompts, steps)}, which decode greedily so that every one does the same work."""
    from lifecycle_hf.completions.sampling import generate

    device = next(model.parameters()).device

    def ours(captured):
        options = {"temperature": 0.0, "stop_token_ids": [model.config.vocab_size - 1], "pad_token_id": 0}
        return lambda prompts, steps: generate(model, prompts, max_new_tokens=steps, captured=captured, **options)

    def config(steps):
        return GenerationConfig(
            max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=2
        )

    def transformers(prompts, steps, **more):
        ids = torch.tensor(prompts, device=device)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config(steps), **more)

    def batched(prompts, steps):
        model.generate_batch(inputs=prompts, generation_config=config(steps), progress_bar=False)

    found = {"ours, plain": ours(False), "ours, captured": ours(True), "transformers, generate": transformers}
    if device.type == "cuda":
        found["transformers, static cache"] = lambda *given: transformers(*given, cache_implementation="static")
        found["transformers, generate_batch"] = batched
    return {name: with_steps(sampler, new) for name, sampler in found.items()}


def with_steps(sampler, new: int):
    return lambda prompts, steps=None: sampler(prompts, new if steps is None else steps)


@torch.no_grad()
def best_of(rounds: int, sampler, prompts, device: torch.device, steps: int | None = None) -> float:
    seconds = []
    for _ in range(rounds):
        start = wait(device)
        sampler(prompts, steps)
        seconds.append(wait(device) - start)
    return min(seconds)


def profile(args) -> Iterator[dict]:
    """The ten longest kernels of a DPO step and of a decoding step, and the share of the time without a kernel."""
    from lifecycle_hf.completions.captured import DecodingStep, can_be_captured, prefill

    cuda = args.device.type == "cuda"
    shape, long = ("tiny", 32) if args.smoke else ("1B", 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    yield from kernels("a step of DPO", dpo_step(args, shape, dtype, long), args.device)
    release()
    model = llama(shape, args.device, dtype).eval()
    ids = torch.tensor(tokens(4 if args.smoke else 64, long, 400), device=args.device)
    assert can_be_captured(model)
    with torch.no_grad():
        batch, _ = prefill(model, ids, torch.ones_like(ids), room=16)
        stop = torch.tensor([model.config.vocab_size - 1], device=args.device)
        step = DecodingStep(model, batch, lambda logits: logits.argmax(-1, True), stop, 0)
        for _ in range(4):
            step.run()
        yield from kernels("a decoding step, captured", step.run, args.device)
        yield from kernels("a decoding step, not captured", step.step, args.device)


def dpo_step(args, shape: str, dtype: torch.dtype, long: int) -> Callable:
    """A function that makes a forward and a backward pass of DPO, after two that warm up."""
    from lifecycle_hf import DPOConfig, DPOTrainer
    from lifecycle_hf.toyworld.model import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**options_for(args, folder, 4, 2), max_length=None)
        data = pairs(8, long // 2, long // 4, 400)
        run = DPOTrainer(llama(shape, args.device, dtype), args=config, train_dataset=data,
                         processing_class=build_tokenizer())  # fmt: skip
        run.train()
    inputs = run._prepare_inputs(run._collate([data[i] for i in range(4)]))
    run.model.train()

    def step():
        run.compute_loss(run.model, inputs).backward()
        run.model.zero_grad()

    return step


def kernels(name: str, step: Callable, device: torch.device) -> Iterator[dict]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    step()
    start = wait(device)
    step()
    seconds = wait(device) - start
    with torch_profile(activities=activities) as found:
        step()
        wait(device)
    of_device = device.type == "cuda"

    def own(event) -> float:
        return event.self_device_time_total if of_device else event.self_cpu_time_total

    events = sorted((e for e in found.key_averages() if not of_device or own(e) > 0), key=own, reverse=True)
    busy = sum(map(own, events)) / 1e6
    yield {
        "profile": name,
        "seconds": seconds,
        "busy_s": busy,
        "gaps": max(0.0, 1 - busy / seconds) if of_device else None,
    }
    for event in events[:10]:
        yield {"profile": name, "kernel": event.key[:90], "ms": own(event) / 1e3, "calls": event.count}
