"""The models and rows of gpu.py: random weights in memory, random tokens."""

import gc
import math
import time

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 2048},
    "0.2B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32_000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip


def llama(shape: str, device="cpu", dtype=torch.float32, implementation="sdpa", seed=0) -> LlamaForCausalLM:
    """A Llama with random weights that depend on the seed alone, not on the device."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True, attn_implementation=implementation,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.04,
    )  # fmt: skip
    with torch.device(device if shape == "1B" else "cpu"):  # large ones are drawn where they live
        return LlamaForCausalLM(config).to(device, dtype)


def tokens(rows: int, length: int, top: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, top, (rows, length), generator=draw).tolist()


def pairs(rows: int, prompt: int, answer: int, top: int) -> Dataset:
    """Tokenised preference pairs, as PreferenceTrainer makes them."""
    columns = {"prompt_ids": tokens(rows, prompt, top), "chosen_ids": tokens(rows, answer, top, 1)}
    return Dataset.from_dict(columns | {"rejected_ids": tokens(rows, answer, top, 2)})


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def wait(device: torch.device) -> float:
    """The clock, once all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bf16_peak(device: torch.device) -> float:
    """FLOP/s of the device, NaN where it is not known."""
    from lifecycle_hf.trainers.supervised.pretraining import peak_flops

    return peak_flops(device) or math.nan


def release() -> None:
    """Return what is no longer used to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
