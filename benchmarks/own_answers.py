"""What learning from its own answers does in the toy world: four questions, each over seeds that no tuning saw.

    python benchmarks/own_answers.py                          # all: about 100 runs of one to three CPU minutes
    python benchmarks/own_answers.py --only best_of_n spin
    python benchmarks/own_answers.py --only ensemble --seeds 5 6

- equal_kl: does online DPO end above DPO on given pairs in gold reward at equal KL? β is swept on both sides.
- ensemble: does the `min` of four small reward models lower over-optimisation against one? Gold reward where the proxy
  is at its peak, and at the end, of the PPO run that over-optimises; paired by seed.
- best_of_n: does the curve that is estimated from N samples agree with the best of n samples of other prompts?
- spin: does it raise the log-prob of its targets over that of its own samples?

A run that stands in --output_dir is kept. The printed tables are Markdown; docs/online.md holds them.
"""

import argparse
import ast
import json
import os
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from measuring import prepare
from scipy import stats
from toyworld_runs import ROOT, Run, complete, make_all, train, values_of

BETAS = {"dpo": (0.1, 0.3, 1.0), "online_dpo": (0.3, 1.0, 3.0)}
QUIET = {"log_completions": "false"}
MEMBERS, PAIRS_SEEN = 4, 20 * 32
ROWS = 256


def interval(values) -> str:
    """Mean and Student's 95 % interval over seeds."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return f"{values.mean():.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ({values.mean() - half:.3f} to {values.mean() + half:.3f})"


def prompts(start: int = 0, rows: int = ROWS):
    """Held-out requests of the toy world, as dataset rows."""
    import random

    from datasets import Dataset

    from lifecycle_hf.toyworld.data import draw_request

    rng = random.Random(f"own answers {start}")
    asked = [draw_request(rng, held_out=True) for _ in range(rows)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r.text}], "kind": r.kind, "answer": r.answer} for r in asked]
    )


@torch.no_grad()
def logps(model, tokenizer, asked: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t) of each answer, [B]."""
    from lifecycle_hf.completions.scoring import Completions, completion_logprobs

    batch = Completions.from_lists(asked, answers, tokenizer.pad_token_id)
    return completion_logprobs(model.eval(), batch).logprobs.sum(1)


def loaded(folder):
    from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

    return load_causal_lm(str(folder)).eval(), load_tokenizer(str(folder))


def sampled(model, tokenizer, asked, seed=0):
    from lifecycle_hf.completions.sampling import generate, stop_token_ids

    return generate(
        model, asked, max_new_tokens=32, temperature=1.0, stop_token_ids=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id, generator_seed=seed,
    )  # fmt: skip


def kept(path: Path, find) -> dict:
    """What `find` returns, from `path` where it stands there."""
    if not path.exists():
        path.write_text(json.dumps(find()))
    return json.loads(path.read_text())


def kl(run: Run) -> float:
    """Mean over held-out requests of log π(y|x) − log π_SFT(y|x), y from the run's policy; in nats."""

    def find():
        from lifecycle_hf import toyworld

        (model, tokenizer), (sft, _) = loaded(run.folder), loaded(toyworld.stage_checkpoint("sft"))
        asked = tokenizer.apply_chat_template(list(prompts()["prompt"]), add_generation_prompt=True)["input_ids"]
        answers = sampled(model, tokenizer, asked)
        ratios = logps(model, tokenizer, asked, answers) - logps(sft, tokenizer, asked, answers)
        return {"kl": ratios.mean().item()}

    return kept(run.folder / "kl.json", find)["kl"]


def equal_kl(args, folder: Path) -> None:
    runs = {
        side: {
            beta: [
                Run(side, {"measure_rows": 8, **(QUIET if side != "dpo" else {}), "beta": beta, "seed": s},
                    folder / side / f"beta_{beta}" / f"seed_{s}")
                for s in args.seeds
            ]
            for beta in betas
        }
        for side, betas in BETAS.items()
    }  # fmt: skip
    make_all([run for side in runs.values() for kind in side.values() for run in kind], args.rows, args.workers)
    points = {}
    print("\n| | β | KL (nats) | gold reward ↑ | benign accuracy ↑ |\n|---|---:|---:|---:|---:|")
    for side, swept in runs.items():
        for beta, kind in swept.items():
            ends = [values_of(run) for run in kind]
            points[side, beta] = [(kl(run), float(end["gold_reward"])) for run, end in zip(kind, ends, strict=True)]
            kls, gold = zip(*points[side, beta], strict=True)
            accuracy = interval([end["benign_accuracy"] for end in ends])
            print(f"| {side} | {beta} | {interval(kls)} | {interval(gold)} | {accuracy} |")
    print("\n| KL (nats) | online − offline, gold reward | seeds |\n|---:|---:|---:|")
    for at in args.kls:
        differences = []
        for i in range(len(args.seeds)):
            found = [at_kl([points[side, beta][i] for beta in betas], at) for side, betas in BETAS.items()]
            if None not in found:
                differences.append(found[1] - found[0])
        print(f"| {at} | {interval(differences) if differences else '–'} | {len(differences)} |")


def at_kl(points: list[tuple[float, float]], at: float) -> float | None:
    """Gold reward at a KL, by linear interpolation between runs; None outside them."""
    kls, gold = zip(*sorted(points), strict=True)
    return float(np.interp(at, kls, gold)) if kls[0] <= at <= kls[-1] else None


def train_member(run: Run) -> None:
    os.chdir(ROOT)
    prepare()
    if not complete(run, "model.safetensors"):
        train(run)


def build_ensemble(members: list[Path], folder: Path) -> None:
    """Put the members on a common scale on the SFT model's answers to held-out requests, and save their `min`."""
    from lifecycle_hf import RewardEnsemble, toyworld
    from lifecycle_hf.completions.rewards import Samples

    if (folder / "ensemble.json").exists():
        return
    model, tokenizer = loaded(toyworld.stage_checkpoint("sft"))
    rows = list(prompts(start=1)["prompt"])
    asked = tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    texts = tokenizer.batch_decode(sampled(model, tokenizer, asked), skip_special_tokens=True)
    ensemble = RewardEnsemble([str(member) for member in members], reduction="min")
    ensemble.fit(Samples(rows, texts).encode(tokenizer), batch_size=64).save_pretrained(folder)


def course(run: Run) -> np.ndarray:
    """[measurements, 3]: KL, proxy reward and gold reward on the way, from what the recipe printed."""
    rows = [ast.literal_eval(line) for line in (run.folder / "log.txt").read_text().splitlines() if "'tax/kl'" in line]
    return np.array([[float(row[f"tax/{name}"]) for name in ("kl", "proxy_reward", "gold_reward")] for row in rows])


def ensemble(args, folder: Path) -> None:
    config = {"config": str(ROOT / "recipes" / "configs" / "ppo_toyworld_overoptimized.yaml"), "measure_updates": 3}
    steps = {"max_steps": PAIRS_SEEN // 32}
    members = {
        s: [Run("reward", steps | {"seed": 100 * s + k}, folder / "members" / f"seed_{s}_{k}") for k in range(MEMBERS)]
        for s in args.seeds
    }
    with get_context("spawn").Pool(args.workers) as pool:
        pool.map(train_member, [run for kind in members.values() for run in kind])
    for s, kind in members.items():
        build_ensemble([run.folder for run in kind], folder / "ensembles" / f"seed_{s}")
    rewards = {
        "one": lambda s: members[s][0].folder,
        "min of 4": lambda s: folder / "ensembles" / f"seed_{s}",
    }
    runs = {
        name: [
            Run("ppo", config | QUIET | {"max_kl": 1000, "measure_rows": 256, "reward_funcs": str(of(s)), "seed": s},
                folder / name.replace(" ", "_") / f"seed_{s}")
            for s in args.seeds
        ]
        for name, of in rewards.items()
    }  # fmt: skip
    make_all([run for kind in runs.values() for run in kind], args.rows, args.workers)
    found = {}
    print("\n| proxy | gold at the proxy's peak ↑ | highest gold ↑ | lost by the end ↓ | KL at the peak |")
    print("|---|---:|---:|---:|---:|")
    for name, kind in runs.items():
        courses = [course(run) for run in kind]
        peaks = [c[c[:, 1].argmax()] for c in courses]
        found[name] = np.array([[p[2], c[:, 2].max(), c[:, 2].max() - c[-1, 2], p[0]] for p, c in zip(peaks, courses)])
        print(f"| {name} | {' | '.join(interval(column) for column in found[name].T)} |")
    difference = found["min of 4"] - found["one"]
    print(f"| difference | {' | '.join(interval(column) for column in difference.T)} |")


def best_of(args, folder: Path) -> None:
    from lifecycle_hf import toyworld
    from lifecycle_hf.completions.best_of_n import best_of_n
    from lifecycle_hf.evaluation.bootstrap import Measurement, bootstrap_interval

    model, tokenizer = loaded(toyworld.stage_checkpoint("sft"))
    proxy = str(toyworld.stage_checkpoint("reward"))

    def sample(n, start, rows):
        made = best_of_n(
            model, tokenizer, prompts(start, rows), [proxy, toyworld.gold_reward], reward_weights=[1.0, 0.0], n=n,
            output_dir=folder / f"n_{n}_{start}", max_completion_length=32, batch_size=32, seed=start,
        )  # fmt: skip
        return made.curves()["gold_reward"]

    estimated = sample(8, 10, 1024)
    print(
        "\n| n | estimated from N = 8, 1,024 prompts | measured, 1,024 other prompts, n samples of each | difference |"
    )
    print("|---:|---:|---:|---:|")
    for n in (1, 2, 4, 8):
        curves = estimated[:, n - 1], sample(n, 10 + n, 1024)[:, n - 1]
        cells = [(float(m), *bootstrap_interval(m)) for m in (Measurement(curve.tolist()) for curve in curves)]
        half = 1.96 * sum(curve.var().item() / len(curve) for curve in curves) ** 0.5
        difference = cells[1][0] - cells[0][0]
        cells.append((difference, difference - half, difference + half))
        print(f"| {n} | {' | '.join(f'{mean:.3f} ({low:.3f} to {high:.3f})' for mean, low, high in cells)} |")


def spin(args, folder: Path) -> None:
    runs = [Run("spin", {"measure_rows": 8} | QUIET | {"seed": s}, folder / f"seed_{s}") for s in args.seeds]
    make_all(runs, args.rows, args.workers)
    columns = [target_over_own(run) for run in runs]
    print("\n| | SFT model | after SPIN |\n|---|---:|---:|")
    labels = ("log-prob of the target", "log-prob of an own sample", "target − own sample (nats)")
    for i, label in enumerate(labels):
        before, after = (interval([c[when][i] for c in columns]) for when in ("before", "after"))
        print(f"| {label} | {before} | {after} |")
    gain = [c["after"][2] - c["before"][2] for c in columns]
    print(f"| rise of target − own sample | | {interval(gain)} |")


def target_over_own(run: Run) -> dict:
    """Mean log-probs of held-out targets and of fresh samples, and their difference, before and after."""

    def find():
        from lifecycle_hf import toyworld

        rows, found = toyworld.dataset("reward")["test"], {}
        for when, place in (("before", toyworld.stage_checkpoint("sft")), ("after", run.folder)):
            model, tokenizer = loaded(place)
            asked = tokenizer.apply_chat_template(list(rows["prompt"]), add_generation_prompt=True)["input_ids"]
            chats = [row["prompt"] + row["chosen"] for row in rows]
            whole = tokenizer.apply_chat_template(chats)["input_ids"]
            targets = [ids[len(first) :] for first, ids in zip(asked, whole, strict=True)]
            own = sampled(model, tokenizer, asked)
            means = [logps(model, tokenizer, asked, answers).mean().item() for answers in (targets, own)]
            found[when] = [*means, means[0] - means[1]]
        return found

    return kept(run.folder / "targets.json", find)


QUESTIONS = {"equal_kl": equal_kl, "ensemble": ensemble, "best_of_n": best_of, "spin": spin}
SEEDS = {"equal_kl": range(5, 10), "ensemble": range(5, 15), "best_of_n": range(1), "spin": range(5, 10)}


def main(args):
    wanted = args.seeds
    for name in args.only:
        args.seeds = wanted or list(SEEDS[name])
        folder = Path(args.output_dir).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n## {name}", flush=True)
        QUESTIONS[name](args, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", help="5 to 9, of the ensembles 5 to 14, by default")
    parser.add_argument("--kls", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0], help="of equal_kl, in nats")
    parser.add_argument("--rows", type=int, default=512, help="held-out requests per model")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--output_dir", default="output/benchmark_own_answers")
    prepare()
    main(parser.parse_args())
