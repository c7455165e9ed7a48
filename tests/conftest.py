import gc
import os
import runpy
import sys

# Set before any import of torch, transformers or datasets, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_server import StandIn
from hub_standin import HubStandin

# torch and transformers are imported by what uses them: pytest's process that only deals out the tests needs neither.
REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

SENTENCES = [
    "The capital of France is Paris.",
    "Two and three make five, and seven is a prime number.",
    "Please tell me a story about a small red fox.",
    "I am sorry, I cannot help with that request.",
    "Of course! Here is the answer you asked for.",
    "user assistant system question answer hello goodbye thanks",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA device, and make what all tests call often cheaper."""
    import accelerate.utils.imports
    import accelerate.utils.memory
    import torch

    torch.set_num_threads(1)
    # accelerate reads a package's files again whenever it unwraps a model, and collects garbage after each `train()`.
    accelerate.utils.imports._is_package_available = cache(accelerate.utils.imports._is_package_available)
    accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: gc.collect(0))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Spare the garbage collector what was imported: half a million objects, which every `train()` makes it read."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state."""
    from transformers import set_seed

    set_seed(0)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture
def quick_stages(shared_folder, monkeypatch):
    """The toy world's SFT and reward model after a few steps: for tests in which any model will do."""
    from lifecycle_hf.toyworld import data, stages

    steps = {"sft": 40, "reward": 8}

    def few_steps(stage, folder):
        recipe, (make, *_) = REPOSITORY / "recipes" / f"{stage}.py", data._STAGES[stage]
        options = ("--output_dir", str(folder), "--use_cpu", "true", "--eval_on_start", "false", "--max_steps")
        data.dataset.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(data._STAGES, stage, (make, 32 * steps[stage], 64))  # the rows that these steps see
            patch.setattr(sys, "argv", [str(recipe), *options, str(steps[stage])])
            runpy.run_path(str(recipe), run_name="__main__")
        data.dataset.cache_clear()

    monkeypatch.setenv("LIFECYCLE_HF_CACHE", str(shared_folder / "quick_stages"))
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_build_init", stages.write_init)
        patch.setattr(stages, "_run_recipe", few_steps)
        stages.stage_checkpoint("reward")


@pytest.fixture(scope="session")
def shared_data():
    """Folder of small real data sets; the test is skipped where it is absent (in a user's clone)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def hub_server():
    with HubStandin() as server:
        yield server


@pytest.fixture
def hub(hub_server):
    """A running and empty stand-in hub on loopback (see tests/hub_standin.py)."""
    hub_server.clear()
    return hub_server


def _train_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<bos>", "<eos>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def stand_in():
    """A chat server on the loopback whose answers a test sets (see tests/chat_server.py)."""
    made = StandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="session")
def tiny_llama():
    """(make_model, tokenizer): make_model(seed=0, **config) gives a fresh random LlamaForCausalLM in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer()

    def make_model(seed=0, **overrides):
        torch.manual_seed(seed)
        config = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | overrides
        return LlamaForCausalLM(LlamaConfig(**config)).eval()

    return make_model, tokenizer


@pytest.fixture
def reward_model(tiny_llama):
    """A reward model of the tiny Llama's shape, with random weights."""
    from transformers import LlamaForSequenceClassification

    from lifecycle_hf.models.heads import RewardModel

    make_model, tokenizer = tiny_llama
    config = make_model().config
    config.num_labels = 1
    return RewardModel(LlamaForSequenceClassification(config), tokenizer).eval()
