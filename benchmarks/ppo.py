"""PPO of this library against TRL's last, that of trl==1.12.0: time of every phase of an update, memory, first losses.

    export OMP_NUM_THREADS=1
    python benchmarks/ppo.py                                       # every configuration, CPU seconds; an hour and more
    python benchmarks/ppo.py --compare lora_head --updates 5
    python benchmarks/ppo.py --compare lora_head --ragged          # completions end by themselves
    python benchmarks/ppo.py --device cuda --compare lora_head     # ours alone, a random Llama of 1B, bf16
    python benchmarks/ppo.py --smoke                               # a tiny random Llama, to see that it runs

One process per side runs the real `trainer.train()`. A callback holds it before each update until the parent says go,
so the updates of the two sides alternate and never run at the same time. The first update is a warm-up: in the metrics
and the peak memory, not in the times. Both sides get the same checkpoints and the same prompts in the same order, and
sample from the same seed. Phases: *rollout* is generation, *scoring* all else before the first optimization step.

The default model is made as docs/real_runs.md tells; the prompts are transcripts of Anthropic's hh-rlhf of at most 64
tokens, up to the last answer.
By default an unused special token is what ends a completion, so that all have --new-tokens tokens; it pads, too, since
TRL takes every padding token for the end. TRL 1.12.0 goes into a folder of its own under ~/.cache; it is taken as it
comes, but its batches are not shuffled (rows are, once). It has no value function under PEFT: there, too, its value
model is a whole one that trains. TRL does not clip gradients, so ours are not clipped here.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import peft
import torch
import transformers
from datasets import Dataset
from measuring import alternate, bf16_peak, clocks, installed, matrix_rate, memory, prepare, read_rows, show
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

TRL = "1.12.0"
PHASES = ("rollout", "scoring", "optimization")
RANK, SEED = 16, 42
ANSWER = "\n\nAssistant:"
METRICS = {  # ours, TRL's
    "score": ("score", "objective/scores"),
    "KL": ("kl", "objective/kl"),
    "policy loss": ("loss/policy", "loss/policy_avg"),
    "value loss": ("loss/value", "loss/value_avg"),
}
NOTE = """
Losses are means over the epochs of an update. Our reward model reads the finished text, an EOS at its end; TRL's reads
the sampled tokens. TRL's value model starts as the reward model, as ours does with value="model"; the others at 0."""


class Setting(NamedTuple):
    """What is compared: TRL has LoRA or not as ours, and a value model of its own always."""

    lora: bool
    value: str
    bf16: bool = False  # ours; TRL stays in fp32
    epochs: int | None = None
    micro_batch: int | None = None


SETTINGS = {
    "lora_head": Setting(True, "head"),
    "lora_adapter": Setting(True, "adapter"),
    "lora_model": Setting(True, "model"),
    "full_head": Setting(False, "head"),
    "full_model": Setting(False, "model"),
    "lora_bf16": Setting(True, "head", bf16=True, epochs=1, micro_batch=4),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, flag = parser.add_argument, {"action": "store_true"}
    add("--model", default="smollm2", help="causal LM with a chat template; docs/real_runs.md makes one")
    add(
        "--prompts",
        default="../shared/data/hh_harmless_1500.jsonl.gz",
        help='.jsonl(.gz) with transcripts in "chosen"',
    )
    add("--compare", choices=[*SETTINGS, "all"], help="all by default, lora_head with --smoke")
    add("--updates", type=int, default=3, help="updates that are timed, after one warm-up")
    add("--batch", type=int, default=16, help="prompts per update")
    add("--micro-batch", type=int, default=8)
    add("--epochs", type=int, default=4)
    add("--prompt-tokens", type=int, default=64, help="longer prompts are left out")
    add("--new-tokens", type=int, default=32)
    add("--ragged", **flag, help="let EOS end a completion")
    add("--checkpointing", **flag, help="gradient checkpointing on both sides")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--smoke", **flag, help="a tiny random Llama and one update")
    add("--output", default="output/bench_ppo.json", help="JSON with every figure of every update")
    args = parser.parse_args(argv)
    args.compare = args.compare or ("lora_head" if args.smoke else "all")
    args.updates, args.cuda = 1 if args.smoke else args.updates, args.device == "cuda"
    args.sides = ("ours",) if args.cuda else ("ours", "trl")
    if not args.smoke:
        for name, path in (("--model", args.model), ("--prompts", args.prompts)):
            if not Path(path).exists():
                parser.error(f"{name} {path} is not there: see the docstring of this script")
    return args


def make_tokenizer(args):
    """The model's tokenizer, with a special token that nothing else uses to pad."""
    from lifecycle_hf.toyworld.model import build_tokenizer

    tokenizer = build_tokenizer() if args.smoke else AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        taken = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
        free = [i for i in sorted(tokenizer.added_tokens_decoder) if i not in taken]
        if not free:
            raise SystemExit(f"The tokenizer of {args.model} has no special token left to pad with.")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[-1])
    return tokenizer


def make_models(args, tokenizer, folder: str) -> dict[str, str]:
    """Checkpoints of the policy and of a reward model, the policy's backbone with a random head."""
    policy, dtype = args.model, torch.bfloat16 if args.cuda else torch.float32
    torch.manual_seed(SEED)
    if args.smoke or args.cuda:
        sizes = (64, 2, 4, 2, 128, 0) if args.smoke else (2048, 16, 32, 8, 8192, 32_000)
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        tokens["vocab_size"] = max(sizes[-1], len(tokenizer))
        config = transformers.LlamaConfig(**dict(zip(names, sizes)), **tokens)
        policy = f"{folder}/policy"
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(policy)
    reward = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=dtype)
    reward.score.weight.data.normal_(std=reward.config.hidden_size**-0.5)
    reward.config.pad_token_id = tokenizer.pad_token_id
    for name in ("reward", "tokenizer"):
        tokenizer.save_pretrained(f"{folder}/{name}")
    reward.save_pretrained(f"{folder}/reward")
    return {"policy": policy, "reward": f"{folder}/reward", "tokenizer": f"{folder}/tokenizer"}


def make_prompts(args, tokenizer) -> list[dict]:
    """Rows of "prompt" (text) and "prompt_ids", one update more than is run: with the last batch of its loader in hand
    TRL would step the optimizer after every micro-batch."""
    from lifecycle_hf.data.tokenize import tokenize_prompts
    from lifecycle_hf.toyworld.data import dataset

    if args.smoke:
        texts = [row["prompt"][-1]["content"] for row in dataset("ppo")["train"].select(range(100))]
    else:
        # Without the first "Human:" they are plain text, which both sides take as it is.
        chosen = [row["chosen"].removeprefix("\n\nHuman: ") for row in read_rows(args.prompts)]
        texts = [text[: text.rindex(ANSWER) + len(ANSWER)] for text in chosen if ANSWER in text]
    texts = [text for text in texts if len(tokenizer(text)["input_ids"]) <= args.prompt_tokens]
    data, count = Dataset.from_dict({"prompt": texts}), args.batch * (args.updates + 2)
    rows = list(tokenize_prompts(data, tokenizer, max_length=args.prompt_tokens, where="--prompts"))
    if len(rows) < count:
        raise SystemExit(f"--prompts has {len(rows)} usable prompts: {args.updates} updates need {count}.")
    return rows[:count]


class Probe(TrainerCallback):
    """Waits for the parent's go before each update, and sends what the update took, by phases."""

    def __init__(self, args, connection, steps_per_update: int):
        self.args, self.connection, self.steps_per_update = args, connection, steps_per_update
        self.imports_mib, self.steps, self.logs = memory(False)[0], 0, []

    def go(self) -> None:
        self.connection.recv()
        self.scored, self.start = None, clocks(self.args.cuda)

    def generating(self, generate, completions):
        """`generate`, seeded and timed; `completions` reads token lists off its arguments and its result."""

        def call(*args, **kwargs):
            torch.manual_seed(SEED + self.steps // self.steps_per_update)
            start = clocks(self.args.cuda)
            result = generate(*args, **kwargs)
            self.rollout = [end - begin for begin, end in zip(start, clocks(self.args.cuda))]
            self.completions = completions(args, result)
            return result

        return call

    def marking(self, function):
        """`function`, after whose first call in an update its scoring is done."""

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            self.scored = self.scored or clocks(self.args.cuda)
            return result

        return call

    def on_train_begin(self, args, state, control, **kwargs):
        self.connection.send("ready")
        self.go()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps % self.steps_per_update:
            return
        end = clocks(self.args.cuda)
        found = {"peak_mib": memory(self.args.cuda)[1], "imports_mib": 0.0 if self.args.cuda else self.imports_mib}
        for clock, *at, rollout in zip(("cpu_s", "wall_s"), self.start, self.scored, end, self.rollout):
            phases = (rollout, at[1] - at[0] - rollout, at[2] - at[1])
            found[clock] = dict(zip(PHASES, phases)) | {"total": at[2] - at[0]}
        self.connection.send(found | {"completions": self.completions, "logs": self.logs})
        self.go()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({name: float(x) for name, x in (logs or {}).items() if isinstance(x, int | float)})


def options(setting: Setting, args, folder: str) -> dict:
    """What both trainers take."""
    micro = setting.micro_batch or args.micro_batch
    found = {"output_dir": folder, "per_device_train_batch_size": micro, "num_mini_batches": 1, "temperature": 1.0}
    found |= {"gradient_accumulation_steps": args.batch // micro, "seed": SEED, "kl_coef": 0.05}
    found |= {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    return found | {"use_cpu": not args.cuda, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def lora(setting: Setting) -> peft.LoraConfig | None:
    shape = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**shape) if setting.lora else None


def ours(setting: Setting, args, paths: dict, rows: list[dict], connection, folder: str):
    from lifecycle_hf import PPOConfig, PPOTrainer
    from lifecycle_hf.trainers.base import sampler
    from lifecycle_hf.trainers.policy import rollout

    epochs, tokenizer = setting.epochs or args.epochs, AutoTokenizer.from_pretrained(paths["tokenizer"])
    probe, half = Probe(args, connection, epochs), setting.bf16 or args.cuda
    sampler.generate = probe.generating(sampler.generate, lambda given, ids: ids)
    rollout.RolloutMaker.make = probe.marking(rollout.RolloutMaker.make)
    own = {"value": setting.value, "ppo_epochs": epochs, "max_steps": epochs * (args.updates + 1)}
    own |= {"max_prompt_length": args.prompt_tokens, "max_completion_length": args.new_tokens}
    own |= {"stop_tokens": [tokenizer.eos_token if args.ragged else tokenizer.pad_token], "bf16": half}
    own |= {"logging_steps": epochs, "log_completions": False, "activation_checkpointing": args.checkpointing}
    own |= {"max_grad_norm": 0.0}
    given = {"reward_funcs": paths["reward"], "args": PPOConfig(**options(setting, args, folder), **own)}
    given |= {"train_dataset": Dataset.from_list(rows).select_columns("prompt"), "processing_class": tokenizer}
    given |= {"peft_config": lora(setting), "model_init_kwargs": {"dtype": "bfloat16" if half else "float32"}}
    return probe, PPOTrainer(paths["policy"], **given, callbacks=[probe])


def theirs(setting: Setting, args, paths: dict, rows: list[dict], connection, folder: str):
    sys.path.insert(0, str(installed("trl", TRL)))
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__ == TRL, trl.__file__
    probe, tokenizer = Probe(args, connection, 1), AutoTokenizer.from_pretrained(paths["tokenizer"])
    tokenizer.padding_side = "left"
    end = tokenizer.eos_token_id if args.ragged else tokenizer.pad_token_id

    def completions(given, result):
        found = result[0][:, given[1].shape[1] :].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in found]

    ppo_trainer.batch_generation = probe.generating(ppo_trainer.batch_generation, completions)
    policy = AutoModelForCausalLM.from_pretrained(paths["policy"], dtype=torch.float32)
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    classifier = AutoModelForSequenceClassification.from_pretrained
    reward, value = (classifier(paths["reward"], dtype=torch.float32) for _ in range(2))
    if args.checkpointing:  # the option alone does nothing: TRL's loop is its own
        policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable()
        value.gradient_checkpointing_enable()
    own = {"num_ppo_epochs": setting.epochs or args.epochs, "total_episodes": args.batch * (args.updates + 1)}
    own |= {"response_length": args.new_tokens, "stop_token": "eos" if args.ragged else None, "bf16": False}
    own |= {"num_sample_generations": 0, "logging_steps": 1, "gradient_checkpointing": args.checkpointing}
    config = PPOConfig(**options(setting, args, folder), **own)
    data = Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in rows])
    models = {"model": policy, "ref_model": None, "reward_model": reward, "value_model": value}
    given = {"train_dataset": data, "peft_config": lora(setting), "callbacks": [probe]}
    trainer = PPOTrainer(args=config, processing_class=tokenizer, **models, **given)
    in_order = torch.utils.data.DataLoader(data, args.batch, collate_fn=trainer.data_collator, drop_last=True)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    trainer.accelerator.accumulate = probe.marking(trainer.accelerator.accumulate)
    return probe, trainer


def work(side: str, setting: Setting, args, paths: dict, rows: list[dict], connection, folder: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.set_seed(SEED)  # TRL seeds neither its adapters nor the order of its micro-batches
    probe, trainer = (ours if side == "ours" else theirs)(setting, args, paths, rows, connection, folder)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def measure(name: str, args, paths: dict, rows: list[dict]) -> dict:
    from lifecycle_hf.trainers.policy.buffer import shuffled

    setting = SETTINGS[name]
    in_order = [rows[i] for i in shuffled(len(rows), SEED)]  # as our trainer will shuffle them
    given = {side: (setting, args, paths, rows if side == "ours" else in_order) for side in args.sides}
    _, updates = alternate(work, given, args.updates + 1)
    prompts = [[len(row["prompt_ids"]) for row in in_order[i:][: args.batch]] for i in range(0, len(rows), args.batch)]
    rates = {} if args.cuda else {dtype: matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for side in args.sides:
        half = args.cuda or (setting.bf16 and side == "ours")
        for update, lengths in zip(updates[side], prompts):
            ends = [len(ids) for ids in update["completions"]]
            kind = setting if side == "ours" else setting._replace(value="model")
            update["flop"] = operations(kind, args, paths, lengths, ends)
            update["rate"] = rates[torch.bfloat16 if half else torch.float32] if rates else bf16_peak()
            update["tokens"] = sum(lengths) + sum(ends)
    logs = {side: [update.pop("logs") for update in sent][-1] for side, sent in updates.items()}
    starts = [sent[0]["completions"] for sent in updates.values()]
    first = {"same completions": [sum(a == b for a, b in zip(starts[0], starts[-1]))]}
    for metric, keys in METRICS.items():
        found = [[log[key] for log in logs[side] if key in log] for side, key in zip(logs, keys)]
        first[metric] = [values[0] for values in found]
    summary = summarise(updates, args)
    return {"compare": name, "setting": setting._asdict(), "first": first, "summary": summary, "updates": updates}


def summarise(updates: dict, args) -> dict:
    """Medians over the timed updates of each side, and the ratios ours / TRL of the updates."""
    clock, found = "wall_s" if args.cuda else "cpu_s", {}
    for side, all_of in updates.items():
        timed, peak = all_of[1:], max(update["peak_mib"] for update in all_of)
        found[side] = {phase: median(update[clock][phase] for update in timed) for phase in (*PHASES, "total")}
        found[side] |= {"peak_mib": peak, "above_imports_mib": peak - all_of[0]["imports_mib"]}
        found[side] |= {"samples_per_s": args.batch / found[side]["total"]}
        found[side] |= {"tokens_per_s": median(update["tokens"] / update[clock]["total"] for update in timed)}
        found[side] |= {"tflop": median(update["flop"] for update in timed) / 1e12, "rate": timed[0]["rate"]}
        found[side]["floor_s"] = found[side]["tflop"] * 1e12 / timed[0]["rate"]
    totals = [[update[clock]["total"] for update in updates[side][1:]] for side in updates]
    ratios = [a / b for a, b in zip(totals[0], totals[-1])]
    return found | {"clock": clock, "ratio": [median(ratios), min(ratios), max(ratios)]}


def operations(setting: Setting, args, paths: dict, prompts: list[int], completions: list[int]) -> float:
    """The floating-point operations that an update can't do without, for sequences of L = prompt + completion tokens.

    A backbone of N weights in its linear layers, LoRA's A weights beside them, `d` = heads × head size:
    forward = 2·(N + A)·Σ(L − 1) + 4·layers·d·Σ(L − 1)·L / 2, the latter the causal attention;
    head = 2·hidden·vocabulary·Σ completion tokens, the rows that predict them.
    Rollout: forward + head (prefill, and decoding with a cache). Scoring: policy and reference, forward + head each,
    the reward's forward, and the value's where it has weights or an adapter of its own. Optimization, every epoch:
    forward and head with their backward, which costs 1× the forward for frozen weights and 2× for those that train
    and for attention; the same for such a value function, without a head. Element-wise work and AdamW do not count.
    """
    config = transformers.AutoConfig.from_pretrained(paths["policy"])
    with torch.device("meta"):
        layers = [m for m in AutoModelForCausalLM.from_config(config).base_model.modules() if isinstance(m, nn.Linear)]
    weights, adapters = sum(m.weight.numel() for m in layers), sum(sum(m.weight.shape) for m in layers)
    lengths = [p + c - 1 for p, c in zip(prompts, completions)]
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size)
    base, adapter = 2 * weights * sum(lengths), 2 * RANK * adapters * sum(lengths) * setting.lora
    attention = 2 * config.num_hidden_layers * width * sum(n * (n + 1) for n in lengths)
    head, frozen = 2 * config.hidden_size * config.vocab_size * sum(completions), 2 if setting.lora else 3
    forward, plain = base + adapter + attention, base + attention
    value = {"head": 0, "adapter": forward, "model": plain}[setting.value]
    value_step = {"head": 0, "adapter": 2 * base + 3 * (adapter + attention), "model": 3 * plain}[setting.value]
    scoring = forward + plain + 2 * head + plain + value
    step = frozen * (base + head) + 3 * (adapter + attention) + value_step
    return forward + head + scoring + (setting.epochs or args.epochs) * step


def show_updates(result: dict, args) -> None:
    clock, rows = result["summary"]["clock"], []
    for i, sides in enumerate(zip(*result["updates"].values())):
        times = [update[clock] for update in sides]
        cells = [(*(time[phase] for phase in (*PHASES, "total")), u["peak_mib"]) for time, u in zip(times, sides)]
        rows.append([i + 1, *sum(cells, ()), times[0]["total"] / times[-1]["total"]])
    header, names = "update (1: warm-up)", (*PHASES, f"total {clock}", "peak MiB")
    header += "".join(f" | {side} {name}" for side in args.sides for name in names) + " | ratio"
    pattern = "{}" + (" | {:.3f}" * 4 + " | {:.0f}") * len(args.sides) + " | {:.3f}"
    show(result["compare"], header, pattern, rows)


def show_summary(results: list[dict], args) -> None:
    header = f"configuration | side | {' | '.join(PHASES)} | total | samples/s | tokens/s | peak MiB | above imports "
    keys = (*PHASES, "total", "samples_per_s", "tokens_per_s", "peak_mib", "above_imports_mib")
    keys += ("tflop", "rate", "floor_s")
    rows = []
    for result in results:
        for side in args.sides:
            found = result["summary"][side] | {"rate": result["summary"][side]["rate"] / 1e9}
            rows.append([result["compare"], side, *(found[key] for key in keys), found["floor_s"] / found["total"]])
    floor = "MFU" if args.cuda else "floor / time"
    pattern = "{} | {}" + " | {:.2f}" * 6 + " | {:.0f} | {:.0f} | {:.3f} | {:.0f} | {:.2f} | {:.3f}"
    show("Phases, memory, floor", header + f"| floor TFLOP | GFLOP/s | floor s | {floor}", pattern, rows)
    if len(args.sides) == 2:
        summaries = [(r["compare"], r["summary"]) for r in results]
        rows = [
            [name, *(summary[side]["total"] for side in args.sides), *summary["ratio"]] for name, summary in summaries
        ]
        pattern = "{}" + " | {:.2f}" * len(args.sides) + " | {:.3f} ({:.3f}–{:.3f})"
        names = " | ".join(f"{side} {results[0]['summary']['clock']}" for side in args.sides)
        show("An update: medians without the first", f" | {names} | ours / {args.sides[-1]} (min–max)", pattern, rows)
        rows = [[r["compare"], *(x for values in r["first"].values() for x in values)] for r in results]
        header = f" | same completions of {args.batch}" + "".join(f" | {name} ours | TRL" for name in METRICS)
        show("First update", header, "{} | {}" + " | {:.5g} | {:.5g}" * len(METRICS), rows)
        print(NOTE)


def main() -> None:
    args, results = parse_args(), []
    prepare()
    environment = {module.__name__: module.__version__ for module in (torch, transformers, peft)} | {"trl": TRL}
    environment["device"] = torch.cuda.get_device_name() if args.cuda else "CPU"
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(args)
        paths, rows = make_models(args, tokenizer, folder), make_prompts(args, tokenizer)
        for name in SETTINGS if args.compare == "all" else [args.compare]:
            results.append(measure(name, args, paths, rows))
            show_updates(results[-1], args)
            kept = {"options": vars(args), "environment": environment, "results": results}
            Path(args.output).write_text(json.dumps(kept, indent=1))
    show_summary(results, args)


if __name__ == "__main__":
    main()
