"""Two steps of a stage and an evaluation; prints what must not depend on the number of processes.

Arguments: output folder, per-device batch, a name in STAGES, "full", "lora" or "constrained" (a capability loss under
a ceiling), path of the base model.
"""

import json

from datasets import Dataset
from peft import LoraConfig

from lifecycle_hf import (
    ClassificationConfig,
    ClassificationTrainer,
    QuestionAnsweringConfig,
    QuestionAnsweringTrainer,
    RewardConfig,
    RewardTrainer,
    Seq2SeqConfig,
    Seq2SeqTrainer,
    SFTConfig,
    SFTTrainer,
)
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.trainers.base.capability import CapabilityLoss

STAGES = {
    "sft": (SFTConfig, SFTTrainer),
    "reward": (RewardConfig, RewardTrainer),
    "classification": (ClassificationConfig, ClassificationTrainer),
    "qa": (QuestionAnsweringConfig, QuestionAnsweringTrainer),
    "seq2seq": (Seq2SeqConfig, Seq2SeqTrainer),
    "t5": (Seq2SeqConfig, Seq2SeqTrainer),
}
GENERATION = {"seq2seq": {"generation_max_length": 8}, "t5": {"generation_max_length": 8, "generation_num_beams": 2}}
WORDS = ["Paris", "a small red fox", "seven is a prime number", "hello"]


def rows(number, stage):
    """Ragged rows; `number` need not divide by the batch."""
    texts = [" ".join([WORDS[i % 4]] * (i % 5 + 1)) for i in range(number)]
    if stage in ("sft", "seq2seq", "t5"):
        return Dataset.from_list([{"prompt": f"word {i}:", "completion": text} for i, text in enumerate(texts)])
    if stage == "classification":
        return Dataset.from_list([{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    if stage == "qa":
        answers, asked = (
            [{"text": [text], "answer_start": [0]} for text in texts],
            [f"word {i}" for i in range(number)],
        )
        return Dataset.from_dict({"question": list(asked), "context": texts, "answers": list(answers)})
    return Dataset.from_list([{"chosen": f"{i} {text}", "rejected": f"no {i}"} for i, text in enumerate(texts)])


def main(output, batch, stage, mode, model):
    config, trainer_class = STAGES[stage]
    args = config(
        output, per_device_train_batch_size=int(batch), per_device_eval_batch_size=2, max_steps=2, learning_rate=1e-3,
        logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", **GENERATION.get(stage, {}),
    )  # fmt: skip
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if mode == "lora" else None
    trainer = trainer_class(model, args, rows(16, stage), rows(7, stage), peft_config=peft)
    names = ["loss", "grad_norm"]
    if mode == "constrained":  # of one length, so that the mean of the ranks' means is that over all tokens
        texts = Dataset.from_dict({"text": [f"{word} is {word}" for word in "abcdefgh"]})
        loss = CapabilityLoss(texts, trainer.processing_class, batch_size=int(batch))
        trainer.add_auxiliary_loss("capability", loss, LagrangeMultiplier(1.0, rate=0.1))
        names += ["loss/capability", "lambda/capability"]
    trainer.train()
    metrics = trainer.finalize() if stage == "reward" else trainer.evaluate()
    if mode != "constrained":
        trainer.save_model()
    steps = [{name: entry[name] for name in names} for entry in trainer.state.log_history[:2]]
    held_out = {k: v for k, v in metrics.items() if k.split("_")[-1] not in ("runtime", "second", "time", "tokens")}
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        launched = {"world_size": args.world_size, "engine": trainer.accelerator.distributed_type.value}
        print("RESULT run " + json.dumps({"steps": steps, "held_out": held_out} | launched))
    return trainer
