"""Estimate the bytes per GPU of a PPO run from counts alone: `python -m lifecycle_hf.scaling.memory --help`."""

import math
from dataclasses import dataclass, field, replace

from transformers import AutoConfig, HfArgumentParser

from lifecycle_hf.models.lm_head import CHUNK_LOGITS

CHOICES = {
    "method": ("full", "lora", "qlora"),
    "value": ("head", "adapter", "model", "none"),
    "reward": ("none", "adapter", "model"),
    "sharding": ("ddp", "zero1", "zero2", "zero3", "fsdp2"),
    "dtype": ("float32", "bfloat16"),
}
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a Llama-like decoder: gated MLP, grouped-query attention, RMSNorm, no biases."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    @classmethod
    def from_config(cls, config) -> "Shape":
        """Return the sizes that a transformers config names.

        Raises:
            ValueError: if it does not name them as Llama's does, or has several experts per layer.
        """
        c = config.get_text_config()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        odd = [f"no {name}" for name in names if not isinstance(getattr(c, name, None), int)]
        odd += [name for name in c.to_dict() if "expert" in name]
        if odd:
            raise ValueError(
                f"The config of {c.model_type!r} has {odd[0]}: memory is worked out for Llama-like models."
            )
        *sizes, heads = (getattr(c, name) for name in names)
        kv, dim = getattr(c, "num_key_value_heads", None), getattr(c, "head_dim", None)
        return cls(*sizes, heads, kv or heads, dim or sizes[1] // heads, c.tie_word_embeddings)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's q, k, v, o, gate, up and down projections."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    def parameters(self, head: int | None = None) -> tuple[int, int]:
        """(in linear layers, in embeddings, norms and a head of `head` outputs, by default the LM head's)."""
        head = (0 if self.tied else self.vocab) if head is None else head
        return self.layers * sum(a * b for a, b in self.linears), (
            self.vocab + head + 2 * self.layers + 1
        ) * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Σ rank·(inputs + outputs) over the linear layers."""
        return self.layers * rank * sum(a + b for a, b in self.linears)

    def nf4_bytes(self) -> tuple[int, int]:
        """(codes, constants) of the linear layers in NF4 with double quantisation: n/2 for n weights; an 8-bit scale
        for 64 weights, an fp32 one for 256 scales, and 1092 per matrix for its code tables and offset."""
        scales = [math.ceil(a * b / 64) for a, b in self.linears]
        return self.parameters()[0] // 2, self.layers * sum(n + 4 * math.ceil(n / 256) + 1092 for n in scales)

    def kv_cache_bytes(self, rows: int, tokens: int, w: int = 2) -> int:
        """2·layers·kv_heads·head_dim·w·tokens·rows, `w` the bytes of a weight, which autocast leaves to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * w * tokens * rows

    def activation_bytes(self, tokens, method, w=2, b=2, adapter=4, rank=16, checkpointing=False) -> int:
        """What a forward pass keeps for the backward pass, attention without a score matrix (SDPA, flash).

        Per token and layer, with hidden H, intermediate I, Q = heads·head_dim, K = kv_heads·head_dim, and bytes `w` of
        a weight, `b` of a product and `adapter` of a LoRA weight: norms 2H(4 + w if full), inputs of linear layers
        b(2H + Q + I), or b(5H + Q + I) where each casts a copy, attention b(2Q + 2K) + 4·heads, MLP 3bI (3wI
        with qlora), LoRA 7b·rank. With checkpointing a layer keeps its input, wH, and one layer at a time the rest.
        """
        h, i, q, k = (self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim)
        full = method == "full"
        inputs = (5 if w != b or (not full and adapter != b) else 2) * h + q + i
        layer = 2 * h * (4 + w * full) + b * (inputs + 2 * q + 2 * k + 7 * rank * (not full)) + 4 * self.heads
        layer += 3 * i * (w if method == "qlora" else b)
        return tokens * (self.layers * w * h + layer if checkpointing else self.layers * layer)


SHAPES = {
    "7B": Shape(32000, 4096, 11008, 32, 32, 32, 128),
    "13B": Shape(32000, 5120, 13824, 40, 40, 40, 128),
    "70B": Shape(32000, 8192, 28672, 80, 64, 8, 128),
}
"""Llama 2."""


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Run:
    """Hold the options of a run that decide its memory.

    Raises:
        ValueError: for an option that no run can have, naming it.
    """

    model: str = _option("7B", "7B, 13B or 70B of Llama 2, or the name or path of a Llama-like model.")
    method: str = _option("lora", "full, lora or qlora (NF4, double quantisation); adapters on all linear layers.")
    value: str | None = _option(None, "head, adapter, model or none; by default adapter, model with method full.")
    reward: str = _option("none", "none for a function, adapter of the policy's base, model of the policy's size.")
    sharding: str = _option("ddp", "ddp, zero1, zero2, zero3 or fsdp2.")
    gpus: int = _option(1, "GPUs of all machines.")
    dtype: str | None = _option(None, "float32 or bfloat16 weights; by default bfloat16, float32 with method full.")
    bf16: bool = _option(True, "Multiply in bfloat16 (mixed_precision of accelerate).")
    rank: int = _option(16, "Rank of LoRA.")
    optimizer_8bit: bool = _option(False, "8-bit moments (optim=adamw_bnb_8bit).")
    micro_batch: int = _option(1, "per_device_train_batch_size.")
    prompt: int = _option(512, "Tokens of a prompt.")
    completion: int = _option(256, "Tokens of a completion.")
    ptx_tokens: int = _option(0, "Pretraining tokens of a micro-batch.")
    checkpointing: bool = _option(True, "activation_checkpointing.")
    generation_rows: int = _option(16, "Prompts decoded together (generation_batch_size).")
    merge_adapter: bool | None = _option(None, "As in PPOConfig: decode with LoRA merged into a copy of its layers.")
    use_vllm: bool = _option(False, "A vLLM server on other GPUs decodes; it is sent gathered, merged weights.")

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (*choices, type(self).__dataclass_fields__[name].default):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        if self.method == "full" and "adapter" in (self.value, self.reward):
            raise ValueError("method='full' has no base to share: value and reward can't be adapters.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Hold the bytes per GPU by part: what is always there, and what training and decoding add."""

    resident: dict[str, int]
    training: dict[str, int]
    decoding: dict[str, int]

    @property
    def total(self) -> int:
        """What is always there and the larger of the two phases; without CUDA's context and fragmentation."""
        return sum(self.resident.values()) + max(sum(self.training.values()), sum(self.decoding.values()))

    def __str__(self) -> str:
        rows = [(f"{phase}: {name}", n) for phase, parts in vars(self).items() for name, n in parts.items() if n]
        return "\n".join(f"{name:<34}{n / GIB:>9.2f} GiB" for name, n in [*rows, ("total", self.total)])


def estimate_memory(shape: Shape, run: Run | None = None, **options) -> MemoryEstimate:
    """Estimate the bytes per GPU of a PPO run on models of `shape`: its parts, and the larger of its two phases.

    Weights, gradients and AdamW of every role are divided by the GPUs where they are sharded: AdamW from ZeRO-1,
    gradients from ZeRO-2, weights from ZeRO-3 and with FSDP2 (NF4's constants never). A gradient has the bytes of its
    weight, AdamW twice these (in 8 bits 65/32 a weight, 8 in embeddings). Adapters and heads are fp32. DeepSpeed with
    bf16 makes all weights bf16, and AdamW fp32 with an fp32 copy of them.

    Args:
        options: fields of [`Run`] that replace those of `run`.

    Raises:
        ValueError: as [`Run`].
    """
    run = replace(run or Run(), **options)
    full, deepspeed = run.method == "full", run.sharding.startswith("zero")
    value = run.value or ("model" if full else "adapter")
    stage = int(run.sharding[-1]) if deepspeed else 3 * (run.sharding == "fsdp2")
    fp32 = (run.dtype or ("float32" if full else "bfloat16")) == "float32"
    w, a = (2, 2) if deepspeed and run.bf16 else (4 if fp32 else 2, 4)
    b = 2 if run.bf16 else w
    linear, other = shape.parameters()
    codes, constants = shape.nf4_bytes() if run.method == "qlora" else (linear * w, 0)
    classifier, lora = sum(shape.parameters(head=1)), 0 if full else shape.lora_parameters(run.rank)
    heads = {"head": shape.hidden**2 + 4 * shape.hidden + 1, "adapter": lora + shape.hidden + 1}
    frozen = {
        "base": 0 if full else codes + other * w,
        "reference": (linear + other) * w if full else 0,
        "reward": {"adapter": (lora + shape.hidden) * a, "model": classifier * w}.get(run.reward, 0),
    }
    trained = {  # (weights, bytes of one, whether embeddings are among them)
        "policy": (linear + other, w, True) if full else (lora, a, False),
        "value": (classifier, w, True) if value == "model" else (heads.get(value, 0), a, False),
    }

    def shard(size: float, first: int) -> int:
        return round(size / run.gpus) if stage >= first else round(size)

    def adamw(count: int, size: int, whole: bool) -> float:
        if not run.optimizer_8bit:
            return count * (12 if deepspeed else 2 * size)
        return count * (65 / 32 + 4 * deepspeed) + whole * (8 - 65 / 32) * shape.vocab * shape.hidden

    resident = {name: shard(size, 3) for name, size in frozen.items()} | {"NF4 constants": constants}
    for name, (count, size, whole) in trained.items():
        resident[f"{name}, trained"] = shard(count * size, 3)
        resident[f"{name}, gradients"] = shard(count * size, 2)
        resident[f"{name}, AdamW"] = shard(adamw(count, size, whole), 1)
    gradients = sum(count * size for count, size, _ in trained.values())
    training = _training(shape, run, full, value, (w, b, a), stage)
    training["buckets"] = (min(gradients, 5 * 10**8 * w) if deepspeed else gradients) * (run.gpus > 1 and stage < 3)
    policy = codes + other * w + lora * a
    return MemoryEstimate(resident, training, _decoding(shape, run, policy, (w, b), stage))


def _decoding(shape: Shape, run: Run, policy: int, widths: tuple[int, int], stage: int) -> dict:
    """Bytes that decoding adds; under sharding it gathers the `policy` (its bytes) and merges nothing by default."""
    w, b = widths
    merges = run.use_vllm or (stage < 3 and (w == 4 if run.merge_adapter is None else run.merge_adapter))
    parts = {
        "gathered policy": round(policy * (1 - 1 / run.gpus)) if stage == 3 else 0,
        "merged copy": shape.parameters()[0] * w if merges and run.method == "lora" else 0,
    }
    if not run.use_vllm:
        parts["KV cache"] = shape.kv_cache_bytes(run.generation_rows, run.prompt + run.completion, w)
        parts["prefill"] = run.generation_rows * run.prompt * b * (3 * shape.intermediate + 2 * shape.hidden)
    return parts


def _training(shape: Shape, run: Run, full: bool, value: str, widths: tuple[int, int, int], stage: int) -> dict:
    """Bytes that a micro-batch adds. Values are differentiated before the policy's forward, but not under sharding."""
    (w, b, a), linear = widths, shape.parameters()[0]
    batch = run.micro_batch * (run.prompt + run.completion)
    keep = {"w": w, "b": b, "adapter": a, "rank": run.rank, "checkpointing": run.checkpointing}
    policy = shape.activation_bytes(batch + run.ptx_tokens, run.method, **keep)
    critic = {"adapter": run.method, "model": "full"}.get(value)
    critic = shape.activation_bytes(batch, critic, **keep) if critic else 0
    casts = w > b and stage < 3 and linear * b
    gathered = {
        "zero3": min(10**9, sum(shape.parameters())),
        "fsdp2": 2 * linear // shape.layers + shape.parameters()[1],
    }
    logits = 8 * min(CHUNK_LOGITS["cuda"], max(run.micro_batch * run.completion, run.ptx_tokens) * shape.vocab)
    return {
        "activations": policy + critic if stage == 3 else max(policy, critic),
        "logits": logits + full * 6 * shape.vocab * shape.hidden,
        "autocast copies": casts * ((full or not run.checkpointing) + (value == "model")),
        "gathered weights": gathered.get(run.sharding, 0) * b * (run.gpus > 1),
    }


def main(arguments: list[str] | None = None) -> None:
    (run,) = HfArgumentParser(Run, description=__doc__).parse_args_into_dataclasses(arguments)
    shape = SHAPES[run.model] if run.model in SHAPES else Shape.from_config(AutoConfig.from_pretrained(run.model))
    print(estimate_memory(shape, run))


if __name__ == "__main__":
    main()
