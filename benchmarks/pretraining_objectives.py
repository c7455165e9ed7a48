"""What each pretraining objective learns of one text, and whether UL2 fills and continues better than causal LM.

    export OMP_NUM_THREADS=1
    python benchmarks/pretraining_objectives.py tinyshakespeare.txt          # six models, ten CPU minutes each
    python benchmarks/pretraining_objectives.py tinyshakespeare.txt --objectives causal ul2 --seeds 0 1 2

Each objective trains a new model of the same shape from the same start, by the same optimizer and for the same CPU
time, all of its process counted; one that stands in --output_dir is kept. A seed draws the start, the order and the
noise of the training. "ul2r" is causal LM at first and UL2 for the rest of that time (UL2R,
https://arxiv.org/abs/2210.11399). Losses are nats per target on held-out text. The unigram entropy is that of the
held-out targets themselves, which no model that ignores the context can beat. In the tables of hidden tokens both
models predict the same held-out tokens: UL2 reads the row as its denoiser shows it, with the text to both sides of a
span; the causal model reads all that stands to the left in the plain text. UL2's nats for a token hold the doubt
whether the span goes on, which is the noise's and not the text's; without it they stand beside. Intervals are 95 %,
over rows for one seed and Student's t over several.
"""

import argparse
import json
import math
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import torch
from measuring import interval_over_seeds, prepare, show
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from lifecycle_hf import PretrainingConfig
from lifecycle_hf.data.corpora import python_documentation, read_corpus, split_tail, train_tokenizer
from lifecycle_hf.data.denoising import IGNORED, is_any_of
from lifecycle_hf.evaluation.bootstrap import Measurement, ratio
from lifecycle_hf.trainers.supervised.pretraining import OBJECTIVES, PretrainingTrainer, new_model, row_plan, sample

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
PHASES = {"ul2r": "ul2"}
"""What follows causal LM, in the same CPU time."""
RESERVE = 10
"""CPU seconds in which a model is saved."""


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (https://arxiv.org/abs/2502.16982) for the layers' matrices, AdamW for the rest, at one learning rate."""

    def __init__(self, model, *, lr, betas, weight_decay):
        matrices = {name: x for name, x in model.model.layers.named_parameters() if x.ndim == 2}
        kept = {id(x) for x in matrices.values()}
        others = [x for x in model.parameters() if id(x) not in kept]
        super().__init__([*matrices.values(), *others], {"lr": lr})
        options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        self.parts = (
            torch.optim.Muon(list(matrices.values()), **options),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0, fused=True),
        )

    def step(self, closure=None):
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()


class Budget(TrainerCallback):
    """Ends training `until` these CPU seconds of the process, of `seconds` in all, by which goes the learning rate."""

    def __init__(self, seconds, until, warmup, start):
        self.start, self.end, self.until, self.warmup = start, seconds - RESERVE, until, warmup

    def rate(self, step):
        """Of the peak: linear warm-up by steps, then a cosine to 0 by CPU time."""
        spent = (time.process_time() - self.start) / (self.end - self.start)
        return min(1, (step + 1) / self.warmup) * (1 + math.cos(math.pi * min(1, spent))) / 2

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.process_time() > min(self.end, self.until)


@torch.no_grad()
def look_around_and_match(model, *, local, match):
    """Attention that starts where text makes it end: at neighbours in the first layer, at equal tokens in the others.

    By RoPE the score of two biases depends on the distance alone. Each head of the first layer starts with a maximum
    at another one: -2 to 2 for five heads, 0 to -4 in a causal model. The other layers' keys start as their queries,
    as in mimetic initialisation (https://arxiv.org/abs/2305.09828).
    """
    heads, speed = model.config.num_attention_heads, model.model.rotary_emb.inv_freq
    first = 1 - heads if model.config.attention == "causal" else -(heads // 2)
    size = local * (speed > 0.05)
    for number, layer in enumerate(model.model.layers):
        queries, keys = layer.self_attn.q_proj, layer.self_attn.k_proj
        if number == 0:
            angles = torch.outer(torch.arange(first, first + heads), speed)
            queries.bias.copy_(torch.cat((size * angles.cos(), size * angles.sin()), 1).flatten())
            keys.bias.copy_(torch.cat((size, 0 * size)).repeat(heads))
        else:
            queries.weight *= match
            keys.weight.copy_(queries.weight)


def options_of(objective, folder, args):
    weights = args.denoiser_weights if objective == "ul2" else None
    masks = {"random_roll": False} if objective in ("span_corruption", "ul2") else {}  # as the figures in docs
    return PretrainingConfig(str(folder), objective=objective, max_length=args.max_length, denoiser_weights=weights,
                             per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
                             learning_rate=args.learning_rate, weight_decay=args.weight_decay, seed=int(folder.name),
                             num_train_epochs=1000, save_strategy="no", report_to="none", use_cpu=True,
                             bf16=args.bf16, disable_tqdm=True, **masks)  # fmt: skip


def train(objective, texts, args, folder):
    """A new model in `folder`, within the CPU time of the process that calls this."""
    torch.set_num_threads(1)
    options = options_of(PHASES.get(objective, objective), folder, args)
    tokenizer = train_tokenizer(texts[0]["text"], args.vocab_size)
    row_plan(options, tokenizer, False)  # its tokens
    sizes = {name: getattr(args, name) for name in SIZES} | {"attention_bias": True}
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    model = new_model(options, tokenizer, **sizes, rope_parameters=rope)
    look_around_and_match(model, local=args.local, match=args.match)
    model.set_attn_implementation("eager")  # quicker than "sdpa" for rows as short as these
    adam = {"lr": args.learning_rate, "betas": (0.9, options.adam_beta2), "weight_decay": options.weight_decay}
    optimizer, steps, begun = MuonAndAdamW(model, **adam), 0, time.process_time()
    phases = [(options, math.inf)]
    if objective in PHASES:
        phases.insert(0, (options_of("causal", folder, args), 60 * args.causal_minutes))
    for option, until in phases:
        budget = Budget(60 * args.minutes, until, args.warmup_steps, begun)
        given = {"callbacks": [budget], "optimizers": (optimizer, LambdaLR(optimizer, budget.rate))}
        trainer = PretrainingTrainer(model, option, texts[0], processing_class=tokenizer, **given)
        trainer.train()
        steps += trainer.state.global_step
    trainer.save_model()
    report = {
        "steps": steps,
        "tokens": steps * args.batch_size * args.max_length,
        "parameters": model.num_parameters(),
    }
    (folder / "training.json").write_text(json.dumps(report | {"log": trainer.state.log_history}))


def trained(objective, texts, args, folder):
    """What the training in a process of its own said, and its CPU minutes; a finished one is not done again."""
    taken = folder / "cpu_minutes.json"
    if not taken.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        worker = multiprocessing.get_context("spawn").Process(target=train, args=(objective, texts, args, folder))
        worker.start()
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"{objective}: training ended with exit code {worker.exitcode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        taken.write_text(json.dumps(seconds / 60))
    return json.loads((folder / "training.json").read_text()), json.loads(taken.read_text())


def trainer_of(objective, folder, texts, args):
    """The trained model and its held-out rows."""
    kind = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    options = options_of(PHASES.get(objective, objective), folder, args)
    options.bf16, options.seed, tokenizer = False, 0, AutoTokenizer.from_pretrained(folder)
    return PretrainingTrainer(kind.from_pretrained(folder), options, *texts, tokenizer)


def entropy(labels):
    counts = np.bincount(labels)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@torch.no_grad()
def log_probs(model, ids, special, **given):
    """Of every token but the first [T-1]: as it is; if it is not `special`; whether it is then the likeliest."""
    scores = model(input_ids=torch.as_tensor(ids)[None], **given).logits[0, :-1].float().log_softmax(-1)
    following = torch.as_tensor(ids)[1:, None]
    plain = scores.index_fill(1, special[special < scores.shape[1]], -math.inf).log_softmax(-1)
    right = plain.argmax(-1) == following[:, 0]
    return scores.gather(1, following)[:, 0].numpy(), plain.gather(1, following)[:, 0].numpy(), right.numpy()


def hidden_places(denoiser, length, rng, tokens):
    """Positions in the text of the targets that `denoiser` makes with `rng`, in their order."""
    _, targets = denoiser.corrupt(np.arange(length) + tokens.vocab_size, rng, tokens)
    return targets[targets >= tokens.vocab_size] - tokens.vocab_size


def compare(ul2, causal, rows):
    """{(denoiser, mode): sums by row} of tokens, nats, right guesses.

    The nats are UL2's, UL2's when it is told that the span goes on, and the causal model's, which has no spans to end.
    """
    plan, ids = ul2.eval_dataset.plan, ul2.eval_dataset.stream.ids
    special, found = torch.as_tensor(plan.tokens.special_ids).long(), {}
    for kind, denoiser in enumerate(plan.denoisers):
        sums, length = found.setdefault((denoiser.name, denoiser.mode), []), plan.lengths[kind]
        for number in range(rows):
            first = int(np.random.default_rng((kind, number)).integers(len(ids) - length))
            text = ids[first : first + length].astype(np.int64)
            row = plan.row(kind, text, np.random.default_rng(number))
            hidden = hidden_places(denoiser, length, np.random.default_rng(number), plan.tokens)
            prefix, targets = row["prefix_length"], row["input_ids"][row["prefix_length"] :]
            words = prefix - 1 + np.flatnonzero(~is_any_of(targets, plan.tokens.special_ids))
            assert np.array_equal(row["input_ids"][words + 1], text[hidden])
            filled = log_probs(ul2.model, row["input_ids"], special, prefix_lengths=torch.tensor([prefix]))
            read = log_probs(causal.model, text, special)
            mine, told, right = (part[words].sum() for part in filled)
            _, theirs, guessed = (part[hidden - 1].sum() for part in read)
            sums.append([len(hidden), -mine, -told, -theirs, right, guessed])
    return {name: np.array(sums) for name, sums in found.items()}


def means(sums):
    """Of the tokens of rows from `compare`: their number, three losses, two shares of right guesses in per cent."""
    total = sums.sum(0)
    return [int(total[0]), *(total[1:] / total[0] * [1, 1, 1, 100, 100])]


def by_mode(found):
    """The sums of rows of `compare` by mode, for each seed: {mode: [sums [rows, 6] of a seed]}."""
    modes = dict.fromkeys(mode for _, mode in found[0])
    return {
        wanted: [np.concatenate([sums for (_, mode), sums in one.items() if mode == wanted]) for one in found]
        for wanted in modes
    }


def compared(name, found):
    """Prints what `compare` found for each seed: by denoiser, by mode, and the differences with their intervals."""
    columns = f"tokens | {name} | {name} told that the span goes on | causal | {name} right, % | causal right, %"
    pattern = "{} | {} | {} | {:.2f} | {:.2f} | {:.2f} | {:.1f} | {:.1f}"
    kinds = {kind: np.concatenate([one[kind] for one in found.values()]) for kind in next(iter(found.values()))}
    table = [[*kind, *means(sums)] for kind, sums in kinds.items()]
    show("The same hidden tokens, nats per token, all seeds", f"denoiser | mode | {columns}", pattern, table)
    modes, table, differences = by_mode(list(found.values())), [], []
    for mode, parts in modes.items():
        together = [("all", parts)] if len(parts) > 1 else []
        for seeds, chosen in [*((str(seed), [sums]) for seed, sums in zip(found, parts)), *together]:
            table.append([mode, seeds, *means(np.concatenate(chosen))])
            plain, told, causal = (
                [Measurement(sums[:, [column, 0]], ratio) for sums in chosen] for column in (1, 2, 3)
            )
            differences.append([mode, seeds, *interval_over_seeds(plain, causal), *interval_over_seeds(told, causal)])
    show("The same by mode", f"mode | seed | {columns}", pattern, table)
    header = f"mode | seed | {name} − causal | {name}, told − causal"
    show(
        "Differences, nats per token",
        header,
        "{} | {} | " + " | ".join(2 * ["{:+.3f} ({:+.3f} to {:+.3f})"]),
        differences,
    )


def main(args):
    texts = split_tail(read_corpus(Path(args.text)) if args.text else python_documentation())
    rows, found = [], {}
    for seed in args.seeds:
        trainers = {}
        for objective in args.objectives:
            folder = Path(args.output_dir) / objective / str(seed)
            report, minutes = trained(objective, texts, args, folder)
            trainer = trainers[objective] = trainer_of(objective, folder, texts, args)
            loss = trainer.evaluate()["eval_loss"]
            first = 0 if objective == "masked" else 1
            targets = np.concatenate([row["labels"][first:] for row in trainer.eval_dataset])
            unigram = entropy(targets[targets != IGNORED])
            sizes = [report["parameters"] / 1e6, report["steps"], report["tokens"] / 1e6]
            rows.append([objective, seed, *sizes, minutes, loss, unigram, unigram - loss])
        for name in ("ul2", *PHASES):
            if {name, "causal"} <= trainers.keys():
                found.setdefault(name, {})[seed] = compare(trainers[name], trainers["causal"], args.rows)
    sizes = "parameters, M | steps | tokens, M | CPU minutes"
    header = f"objective | seed | {sizes} | held-out loss | unigram entropy | below it"
    show("Nats per target", header, "{} | {} | {:.2f} | {} | {:.2f} | {:.1f} | {:.2f} | {:.2f} | {:.2f}", rows)
    for name, by_seed in found.items():
        compared(name, by_seed)
    for objective in (name for name in args.objectives if name not in ("masked", "span_corruption")):
        print(f"\n## {objective} continues {args.prompt!r}\n\n{sample(trainers[objective], args.prompt)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="a text file or folder; Python's documentation by default")
    parser.add_argument("--objectives", nargs="+", default=[*OBJECTIVES, *PHASES], choices=[*OBJECTIVES, *PHASES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes of a model, start and saving included")
    parser.add_argument("--causal_minutes", type=float, default=3, help="CPU minutes of them that ul2r is causal LM")
    parser.add_argument("--vocab_size", type=int, default=3072)
    parser.add_argument("--max_length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=48, help="rows of an optimizer step")
    for name, value in zip(SIZES, (288, 4, 6, 6, 800)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rope_theta", type=float, default=1e6)
    parser.add_argument("--local", type=float, default=3.5, help="how sharply the first layer starts with neighbours")
    parser.add_argument("--match", type=float, default=2.0, help="how much the others start with equal tokens")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--weight_decay", type=float, default=1.5, help="of the layers' matrices")
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--denoiser_weights", nargs="+", type=float, default=[2, 1, 1, 3, 2, 0.5, 0.5])
    parser.add_argument("--bf16", type=lambda word: word.lower() == "true", default=True, metavar="true|false")
    parser.add_argument("--rows", type=int, default=200, help="rows per denoiser in the comparison")
    parser.add_argument("--prompt", default="KING RICHARD III:\nNow, my good lord, ")
    parser.add_argument("--output_dir", default="output/objectives")
    prepare()
    main(parser.parse_args())
