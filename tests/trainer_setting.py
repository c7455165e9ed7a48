"""One small run of every trainer, made alike."""

import torch
from datasets import Dataset
from ppo_setting import trainer as ppo_trainer
from preference_setting import ANSWERS, PAIRS
from preference_setting import trainer as preference_trainer
from transformers import LlamaForSequenceClassification

from lifecycle_hf import (
    ClassificationConfig,
    ClassificationTrainer,
    DPOTrainer,
    KTOTrainer,
    LifecycleConfig,
    LifecycleForQuestionAnswering,
    PretrainingConfig,
    PretrainingTrainer,
    QuestionAnsweringConfig,
    QuestionAnsweringTrainer,
    RewardConfig,
    RewardTrainer,
    Seq2SeqConfig,
    Seq2SeqTrainer,
    SFTConfig,
    SFTTrainer,
)
from lifecycle_hf.completions.scoring import Completions, completion_logprobs

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "max_steps": 1, "lr_scheduler_type": "constant"}
LABELLED = Dataset.from_dict({"text": [row["chosen"] for row in PAIRS], "label": [i % 2 for i in range(len(PAIRS))]})
QUESTIONS = Dataset.from_list(
    [
        {"question": row["prompt"], "context": row["chosen"], "answers": {"text": ["course"], "answer_start": [4]}}
        for row in PAIRS
    ]
)
WRITTEN = PAIRS.rename_column("chosen", "completion").remove_columns("rejected")
TEXTS = Dataset.from_dict({"prompt": [f"word {i}" for i in range(8)], "completion": [" Paris"] * 8})


def sft(tiny_llama, tmp_path, **options):
    return stage(SFTTrainer, SFTConfig, tiny_llama[0](), TEXTS, tiny_llama, tmp_path, options)


def reward(tiny_llama, tmp_path, **options):
    config = tiny_llama[0]().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    return stage(RewardTrainer, RewardConfig, model, PAIRS, tiny_llama, tmp_path, options)


def classification(tiny_llama, tmp_path, **options):
    config = tiny_llama[0]().config
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    return stage(ClassificationTrainer, ClassificationConfig, model, LABELLED, tiny_llama, tmp_path, options)


def question_answering(tiny_llama, tmp_path, **options):
    config = LifecycleConfig.from_llama(tiny_llama[0]().config, attention="bidirectional")
    torch.manual_seed(0)
    model, options = LifecycleForQuestionAnswering(config), {"max_length": 64, "doc_stride": 8} | options
    given = (QuestionAnsweringTrainer, QuestionAnsweringConfig, model, QUESTIONS)
    return stage(*given, tiny_llama, tmp_path, options)


def seq2seq(tiny_llama, tmp_path, **options):
    options = {"generation_max_length": 4} | options
    return stage(Seq2SeqTrainer, Seq2SeqConfig, tiny_llama[0](), WRITTEN, tiny_llama, tmp_path, options)


def pretraining(tiny_llama, tmp_path, **options):
    data = Dataset.from_dict({"text": [row["chosen"] * 20 for row in PAIRS]})
    options = {"max_length": 32, "weight_decay": 0.0} | options
    return stage(PretrainingTrainer, PretrainingConfig, tiny_llama[0](), data, tiny_llama, tmp_path, options)


def stage(cls, config, model, data, tiny_llama, tmp_path, options):
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    given = options.pop("trainer_options", {})
    args = config(str(tmp_path), gradient_checkpointing=False, **(quiet | options))
    return cls(model, args=args, train_dataset=data, processing_class=tiny_llama[1], **given)


MAKE = {
    "pretraining": pretraining,
    "sft": sft,
    "reward": reward,
    "classification": classification,
    "qa": question_answering,
    "seq2seq": seq2seq,
    "dpo": lambda *given, **options: preference_trainer(*given, DPOTrainer, **options),
    "kto": lambda *given, **options: preference_trainer(*given, KTOTrainer, dataset=ANSWERS, **options),
    "ppo": lambda *given, **options: ppo_trainer(*given, **options),
}

SCORED = [[3, 8, 9], [70, 11]], [[5, 70, 20], [6, 3]]


def scores(model):
    """log π of the answers in SCORED, packed: [2, 3]."""
    with torch.no_grad():
        return completion_logprobs(model, Completions.from_lists(*SCORED, 0)).logprobs


def plain_scores(model):
    """log π of the answers, one row at a time, from the logits of the model's own forward pass."""
    rows = []
    for prompt, answer in zip(*SCORED, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        values = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(values, (0, 3 - len(answer))))
    return torch.stack(rows)
