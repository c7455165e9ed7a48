"""Detect reward hacking in rollouts: what they look like, and how that differs from the start of the run."""

import math
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from lifecycle_hf.completions.rewards import Samples

MEND = "Raise kl_coef or lower learning_rate, and look at the completions (docs/ppo.md#reward-hacking)."


@dataclass
class RolloutLook:
    """Hold what a rollout of all processes looks like.

    Attributes:
        prompts: number of different prompts.
        distinct: different texts / different pairs of prompt and text. With one completion for each prompt it is the
            share of different completions.
        distinct_first_half: the same for the first characters of each text, half as many as the mean text has.
        most_common: share of the prompts that got the most frequent text. Of a prompt with several completions it is
            the share of these.
        shared: this share of each text that two prompts or more got, the most frequent first.
        texts: all different texts.
        length: mean number of tokens.
        score: mean of the trained score, Σ weights × rewards.
        length_correlation: Pearson's correlation of score and length over completions; NaN where one is constant.
        held_out: mean of each held-out score, one of weight 0.
        held_out_correlation: its correlation with the trained score.
        score_error, held_out_error: standard errors of these means: deviation / √prompts.
    """

    prompts: int
    distinct: float
    distinct_first_half: float
    most_common: float
    shared: dict[str, float]
    texts: list[str]
    length: float
    score: float
    score_error: float
    length_correlation: float
    held_out: dict[str, float] = field(default_factory=dict)
    held_out_correlation: dict[str, float] = field(default_factory=dict)
    held_out_error: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Name of each metric in the log and its value, where it has one."""
        found = {
            f"completions/{name}": getattr(self, name) for name in ("distinct", "distinct_first_half", "most_common")
        }
        found["reward/length_correlation"] = self.length_correlation
        found |= {f"reward/{name}/correlation": value for name, value in self.held_out_correlation.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


def look_at(
    prompts: list[str], texts: list[str], lengths: list[int], scores: list[float], held_out: dict[str, list[float]]
) -> RolloutLook:
    """Return what a rollout looks like; each list has one entry per completion of all processes."""
    half = math.ceil(sum(map(len, texts)) / len(texts) / 2)
    of_each, shares, askers = Counter(prompts), Counter(), defaultdict(set)
    for prompt, text in zip(prompts, texts, strict=True):
        shares[text] += 1 / of_each[prompt]
        askers[text].add(prompt)
    score, length, *others = (torch.tensor(x, dtype=torch.float64) for x in (scores, lengths, *held_out.values()))
    held, root = dict(zip(held_out, others, strict=True)), len(of_each) ** 0.5
    return RolloutLook(
        prompts=len(of_each),
        distinct=_distinct(prompts, texts),
        distinct_first_half=_distinct(prompts, [text[:half] for text in texts]),
        most_common=max(shares.values()) / len(of_each),
        shared={text: n / len(of_each) for text, n in shares.most_common() if len(askers[text]) > 1},
        texts=list(shares),
        length=length.mean().item(),
        score=score.mean().item(),
        score_error=score.std(correction=0).item() / root,
        length_correlation=_correlation(score, length),
        held_out={name: x.mean().item() for name, x in held.items()},
        held_out_correlation={name: _correlation(score, x) for name, x in held.items()},
        held_out_error={name: x.std(correction=0).item() / root for name, x in held.items()},
    )


def look_at_all(samples: Samples, lengths: list[int], scores: list[float], held_out: dict) -> RolloutLook:
    """Return the same of the completions of all processes; every process must call it with its own ones."""
    columns = (map(str, samples.prompts), samples.texts, lengths, scores, *held_out.values())
    prompts, texts, lengths, scores, *held = map(
        list, zip(*gather_object(list(zip(*columns, strict=True))), strict=True)
    )
    return look_at(prompts, texts, lengths, scores, dict(zip(held_out, held, strict=True)))


def _distinct(prompts, texts) -> float:
    return len(set(texts)) / len(set(zip(prompts, texts, strict=True)))


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item() if len(a) > 1 else math.nan


class HackingDetector:
    """Compare each rollout with the run's own first ones, and say what looks like reward hacking.

    It finds:

    - "new_repeats": texts that many prompts share, and that were the answer of one prompt at most at the start.
    - "distinct": the share of different texts is a small part of the start's.
    - "held_out/NAME": the held-out score fell while the trained score rose since earlier rollouts, beyond noise.
    - "length": completions grew, and score and length became correlated, beyond noise.

    Each is reported once, and again when it is twice as bad as it was when reported.

    Attributes:
        START, PROMPTS: the start is that many rollouts, or more until they have so many prompts. `START` rollouts are
            averaged against noise for the last two findings.
        NEW_REPEATS: share of prompts with new repeats, the mean of this rollout and the one before. Such a text must
            make up `COMMON` of all, and 3 prompts.
        FALL: present value / start's of "distinct".
        NOISE: standard errors of a difference.
        GROWTH, CORRELATION: of "length": present length / start's, and the least correlation.
        may_be_missing: whether a run resumes from a checkpoint without its state, as older versions wrote them.
    """

    START, PROMPTS = 3, 50
    NEW_REPEATS, COMMON, FALL, NOISE, GROWTH, CORRELATION = 0.1, 0.04, 1 / 3, 3.0, 1.25, 0.3
    may_be_missing = True

    def __init__(self):
        # The texts of the start, and whether each was the answer of more than one prompt.
        self.usual: dict[str, bool] = {}
        self.start: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.reported: dict[str, float] = {}
        self.repeated = 0.0  # share of prompts with new repeats in the rollout before

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def new_repeats(self, look: RolloutLook) -> dict[str, float]:
        """Return the share of each text that is common now and was not shared at the start."""
        least = max(self.COMMON, 3 / look.prompts) - 1e-9
        return {text: share for text, share in look.shared.items() if share >= least and not self.usual.get(text)}

    def check(self, look: RolloutLook, step: int) -> list[str]:
        """Take the rollout that was made after `step` steps; return what is found and not reported yet."""
        kept = ("distinct", "most_common", "length", "length_correlation", "prompts")
        scores = {"score": [look.score, look.score_error]}
        scores |= {f"held_out/{name}": [mean, look.held_out_error[name]] for name, mean in look.held_out.items()}
        self.history.append({"step": step, **{name: getattr(look, name) for name in kept}, **scores})
        if not self.start:
            self.usual |= {text: text in self.usual or text in look.shared for text in look.texts}
            if len(self.history) >= self.START and sum(entry["prompts"] for entry in self.history) >= self.PROMPTS:
                self.start = {name: _mean(entry[name] for entry in self.history) for name in kept}
                self.usual = {text: True for text, often in self.usual.items() if often}
            return []
        found = [*self._repeats(look), *self._alike(look), *self._held_out(look), *self._longer()]
        if not look.held_out:
            del self.history[: -self.START]
        worse = [(kind, size, said) for kind, size, said in found if size >= 2 * self.reported.get(kind, 0.0)]
        self.reported |= {kind: size for kind, size, _ in worse}
        return [said for _, _, said in worse]

    def _repeats(self, look: RolloutLook):
        """Yield (kind, size, sentence), as the methods below do."""
        repeats = self.new_repeats(look)
        total, before = sum(repeats.values()), self.repeated
        self.repeated = total
        if repeats and (size := (total + before) / 2) >= self.NEW_REPEATS:
            text, share = next(iter(repeats.items()))
            which, most = "one text", ""
            if len(repeats) > 1:
                which, most = f"{len(repeats)} texts", f"; {share:.0%} are this one"
            said = f"{total:.0%} of the completions are {which} that no two prompts shared at the start{most}"
            yield "new_repeats", size, f"{said}: {_quoted(text)}"

    def _alike(self, look: RolloutLook):
        now, start = look.distinct, self.start["distinct"]
        if now <= self.FALL * start:
            said = f"only {now:.0%} of the completions are different ones, {start:.0%} at the start"
            if look.shared:
                text, most = next(iter(look.shared)), self.start["most_common"]
                said += f"; {look.most_common:.0%} are one text, {most:.0%} at the start: {_quoted(text)}"
            yield "distinct", start / now, said

    def _held_out(self, look: RolloutLook):
        n = self.START
        for name in look.held_out:
            key, falls = f"held_out/{name}", []
            history = [entry for entry in self.history if key in entry]
            for i in range(len(history) - 2 * n + 1):
                before, now = history[i : i + n], history[-n:]
                old_score, score, noise = _change(before, now, "score")
                old, new, held_noise = _change(before, now, key)
                if score - old_score > self.NOISE * noise and old - new > self.NOISE * held_noise:
                    falls.append((old - new, before[-1]["step"], old_score, score, old, new))
            if falls:
                fall, step, *means = max(falls)
                old_score, score, old, new = (f"{mean:.3g}" for mean in means)
                said = f"since step {step} the trained score rose from {old_score} to {score}, and the held-out "
                yield key, fall, f"{said}score {name!r} fell from {old} to {new}"

    def _longer(self):
        now, start = self.history[-self.START :], self.start
        length, prompts = _mean(x["length"] for x in now), now[-1]["prompts"]
        correlation = _mean(x["length_correlation"] for x in now)
        growth = length / start["length"]
        if prompts > 3 and growth >= self.GROWTH and correlation >= self.CORRELATION:
            # Fisher's transformation: the error of atanh of a correlation is 1 / √(prompts − 3)
            before = 0.0 if math.isnan(start["length_correlation"]) else start["length_correlation"]
            change = math.atanh(min(correlation, 0.999)) - math.atanh(max(before, -0.999))
            if change > self.NOISE * math.sqrt(2 / self.START / (prompts - 3)):
                said = f"completions have {length:.0f} tokens, {start['length']:.0f} at the start, and the trained "
                said += f"score is correlated with their length by {correlation:.2f}, {before:.2f} at the start"
                yield "length", growth - 1, said


class HackingAlarm(TrainerCallback):
    """Warn of what a [`HackingDetector`] finds in the rollouts of a trainer; with `on_hacking="stop"`, end the run.

    The run ends after the next optimizer step, as it would end after its last one, with a checkpoint from which it can
    go on. No older checkpoint is deleted for that one, as an older one may be from before the finding.
    """

    def __init__(self, trainer):
        self.trainer, self.detector, self.stops = trainer, HackingDetector(), False

    def check_rollout(self, look: RolloutLook) -> None:
        """Check what the rollout of all processes looks like; it must be the same on every process."""
        trainer, step = self.trainer, self.trainer.state.global_step
        found = self.detector.check(look, step)
        if self.detector.start:
            trainer.metrics["train"].add("completions/new_repeats", sum(self.detector.new_repeats(look).values()))
        self.stops = self.stops or (bool(found) and trainer.args.on_hacking == "stop")
        end = f" Training stops (on_hacking); checkpoint-{step + 1} holds the run." if self.stops else ""
        for finding in found if trainer.is_world_process_zero() else []:
            warnings.warn(f"Step {step}: {finding}. {MEND}{end}", stacklevel=3)

    def on_step_end(self, args, state, control, **kwargs):
        if self.stops:
            args.save_total_limit = None
            control.should_training_stop = control.should_save = True


def _mean(values) -> float:
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def _change(before: list[dict], now: list[dict], name: str) -> tuple[float, float, float]:
    """Return the mean over the rollouts of each list, and the standard error of the difference."""
    old, new = (_mean(entry[name][0] for entry in part) for part in (before, now))
    return old, new, math.sqrt(sum(entry[name][1] ** 2 for entry in before + now)) / len(now)


def _quoted(text: str) -> str:
    return f'"{text[:200]}"' if text.strip() else f"{text[:20]!r}, an empty text"
