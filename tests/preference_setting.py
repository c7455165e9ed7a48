"""A tiny preference run that tests vary."""

from datasets import Dataset

from lifecycle_hf import DPOTrainer

WORDS = ("hello", "Paris", "seven", "fox", "story", "two", "red", "small")
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"Tell me {word}" + " please" * (i % 3) for i, word in enumerate(WORDS)],
        "chosen": [f" Of course! {word}" for word in WORDS],
        "rejected": [" I am sorry" * (1 + i % 2) for i in range(len(WORDS))],
    }
)
ANSWERS = Dataset.from_list(
    [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(PAIRS)
    ]
)
OPTIONS = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    "activation_checkpointing": False, "max_length": 64,
}  # fmt: skip


def trainer(tiny_llama, tmp_path, cls=DPOTrainer, model=None, dataset=PAIRS, trainer_options=None, **options):
    """A preference trainer over the tiny Llama; `options` go to its config."""
    make_model, tokenizer = tiny_llama
    return cls(
        make_model() if model is None else model,
        args=cls.config_class(str(tmp_path), **(OPTIONS | options)),
        train_dataset=dataset,
        processing_class=tokenizer,
        **(trainer_options or {}),
    )


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]
