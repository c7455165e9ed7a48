"""A tiny PPO run that tests vary."""

from datasets import Dataset
from transformers import TrainerCallback

from lifecycle_hf.trainers.policy.config import PPOConfig
from lifecycle_hf.trainers.policy.ppo import PPOTrainer

PROMPTS = ["Tell me", "The capital", "Please", "Two and", "I am", "Of course", "Here is", "hello"]


def count_e(prompts, completions, **columns):
    """How many letters e a completion has."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text.count("e")) for text in texts]


def config(tmp_path, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 2, "ppo_epochs": 1, "num_mini_batches": 1,
        "learning_rate": 1e-3, "max_completion_length": 6, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "log_completions": False, "activation_checkpointing": False, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return PPOConfig(str(tmp_path), **(defaults | options))


def trainer(tiny_llama, tmp_path, model=None, reward_funcs=count_e, dataset=None, trainer_options=None, **options):
    """A PPOTrainer over the tiny Llama; `options` go to its config."""
    make_model, tokenizer = tiny_llama
    return PPOTrainer(
        make_model() if model is None else model,
        reward_funcs,
        config(tmp_path, **options),
        Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset,
        processing_class=tokenizer,
        **(trainer_options or {}),
    )


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


class KeepGradients(TrainerCallback):
    """The gradients of every optimizer step, by parameter name."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
