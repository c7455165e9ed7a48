"""PPO with pretraining mix (InstructGPT Eq. 2).

The embedded default, some minutes on a CPU (`make ppo`):
    python recipes/ppo.py
    accelerate launch --config_file accelerate_configs/cpu_ddp.yaml recipes/ppo.py
Your own, in a YAML file or as options:
    accelerate launch recipes/ppo.py --config recipes/configs/ppo_smollm2.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/ppo.py --model_name_or_path MODEL
        --dataset_name PROMPTS --reward_funcs MODEL_OR_MODULE:FUNCTION --ptx_dataset_name TEXTS --ptx_coef 0.5
        --use_peft --output_dir output/mine
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from lifecycle_hf import PPOConfig, PPOTrainer, cli
from lifecycle_hf.alignment_tax.metrics import perplexity
from lifecycle_hf.alignment_tax.report import plot_history
from lifecycle_hf.trainers.callbacks import TaxMonitor

TOYWORLD = {"gold_reward": True, "refusal_rate": True, "benign_accuracy": True, "perplexity": False}


@dataclass
class PPOArguments(cli.RecipeArguments):
    """Data, rewards and measurements of the run."""

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward models by name or path, and callables as MODULE:FUNCTION."}
    )
    ptx_dataset_name: str | None = field(
        default=None, metadata={"help": "Text or chat data whose loss is mixed in with weight ptx_coef."}
    )
    measure_updates: int = field(
        default=5, metadata={"help": "Measure capability, reward and KL at both ends and every X updates; 0: never."}
    )
    measure_rows: int = field(default=128, metadata={"help": "Held-out prompts and texts per measurement."})


def make_monitor(trainer, script_args, texts, every):
    """Measures reward and KL on held-out prompts, capability, and the toyworld's truth."""
    toy = script_args.dataset_name == "toyworld"
    readable = texts is not None and {"text", "messages"}.intersection(texts.column_names)
    capability = TOYWORLD if toy else {"perplexity": False} if readable else {}

    def metrics(model, tokenizer):
        evaluation, values = trainer.evaluate(), {}
        if toy:
            from lifecycle_hf import toyworld

            values = toyworld.measure(model, tokenizer, n=script_args.measure_rows, seed=0)
        elif capability:
            rows = texts.select(range(min(len(texts), script_args.measure_rows)))
            chats = rows["messages"] if "messages" in rows.column_names else []
            rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats] or list(rows["text"])
            values = {"perplexity": perplexity(model, tokenizer, rendered)}
        return {"proxy_reward": evaluation["eval_score"], **values, "kl": evaluation["eval_kl"]}

    return TaxMonitor(metrics, every, {"proxy_reward": True, **capability, "kl": False}).attach(trainer)


def main(script_args, args, model_args):
    train, test = cli.load_splits(script_args, "ppo")
    texts = (None, None)
    if script_args.ptx_dataset_name:
        texts = cli.load_splits(cli.RecipeArguments(dataset_name=script_args.ptx_dataset_name), "ptx")
    trainer = PPOTrainer(
        model=cli.resolve_model(model_args.model_name_or_path, "sft"),
        reward_funcs=[cli.resolve_reward(name) for name in script_args.reward_funcs],
        args=args,
        train_dataset=train,
        eval_dataset=test.select(range(min(len(test), script_args.measure_rows))) if test else None,
        ptx_dataset=texts[0],
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        model_init_kwargs=cli.model_init_kwargs(model_args),
    )
    trainer.dataset_name = script_args.dataset_name
    every = script_args.measure_updates * args.steps_per_update
    if every and test:
        make_monitor(trainer, script_args, texts[1], every)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    report = trainer.tax_report
    if report and trainer.is_world_process_zero():
        plot_history(trainer.state.log_history, Path(args.output_dir) / "training.png")
    cli.finish(trainer, script_args, model_args, report.to_json() if report else {})
    if report:
        trainer.accelerator.print(report.to_terminal())
    trainer.accelerator.print(f"Model, report.json and pictures are in {args.output_dir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "ppo_toyworld.yaml"
    main(*cli.parse((PPOArguments, PPOConfig, ModelConfig), default, description=__doc__))
