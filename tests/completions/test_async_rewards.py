"""Test reward functions that are `async def`: they overlap, and fail as other reward functions do."""

import asyncio
import functools
import json
import threading
import time

import pytest
import torch
from ppo_setting import count_e, logged, trainer

from lifecycle_hf.completions.rewards import CallableReward, Samples, score_together

SAMPLES = Samples(["a", "b"], ["x", "y"], {"bonus": [1.0, 2.0]})


class Meeting:
    """Two calls that each end only after the other has begun: if they ran one after the other, none would end."""

    def __init__(self):
        self.begun = [asyncio.Event(), asyncio.Event()]

    async def first(self, prompts, completions):
        self.begun[0].set()
        await asyncio.wait_for(self.begun[1].wait(), 10)
        return [1.0] * len(prompts)

    async def second(self, prompts, completions):
        self.begun[1].set()
        await asyncio.wait_for(self.begun[0].wait(), 10)
        return [3.0] * len(prompts)


def test_async_rewards_of_a_rollout_overlap_and_keep_their_weights(tiny_llama, tmp_path):
    meeting = Meeting()
    run = trainer(
        tiny_llama, tmp_path, reward_funcs=[meeting.first, count_e, meeting.second], reward_weights=[1.0, 0.0, 10.0]
    )
    run.train()
    assert logged(run, "score") == [31.0, 31.0]  # 1·1 + 0·e + 10·3
    assert logged(run, "reward/first") == [1.0, 1.0] and logged(run, "reward/second") == [3.0, 3.0]


def test_an_async_reward_gets_its_columns_and_one_loop_for_all_calls():
    loops = []

    async def paid(prompts, completions, bonus, factor):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [factor * b for b in bonus]

    class Judge:
        async def __call__(self, completions, **columns):
            return torch.tensor([float(len(columns["prompts"])), float(torch.is_grad_enabled())])

    reward = CallableReward(functools.partial(paid, factor=2.0))
    assert reward.is_async and reward(SAMPLES) == [2.0, 4.0] == reward(SAMPLES)
    assert loops[0] is loops[1]  # clients for HTTP keep connections that belong to their loop
    with torch.no_grad():
        assert score_together([reward, CallableReward(Judge())], SAMPLES) == [[2.0, 4.0], [2.0, 0.0]]

    async def in_a_notebook():
        return reward(SAMPLES)

    assert asyncio.run(in_a_notebook()) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("away"), "'broken' raised ConnectionError: away. Its batch has 2 prompts: "),
        (SystemExit("no key"), "'broken' raised SystemExit: no key"),
        (TimeoutError("of its own"), "'broken' raised TimeoutError: of its own"),
        (None, "'broken' returned nan for row 0"),
    ],
)
def test_an_async_reward_that_fails_says_what_others_say(error, message):
    async def broken(prompts, completions):
        if error is not None:
            raise error
        return [float("nan")] * 2

    with pytest.raises(ValueError, match=message):
        CallableReward(broken, 5.0)(SAMPLES)


def test_a_timeout_is_for_each_call_and_cancels_it():
    calls, cancelled = [], threading.Event()

    async def slow_at_first(prompts, completions):
        calls.append(1)
        try:
            await asyncio.sleep(30 if len(calls) == 1 else 0)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0, 1.0]

    async def quick(prompts, completions):
        return [2.0, 2.0]

    rewards = [CallableReward(slow_at_first, 0.1, retries=1), CallableReward(quick, 0.1)]
    with pytest.warns(UserWarning, match=r"took longer than 0.1 s \(reward_timeout\).*Trying again, 1 times"):
        assert score_together(rewards, SAMPLES) == [[1.0, 1.0], [2.0, 2.0]]
    assert len(calls) == 2 and cancelled.wait(5)


def test_a_call_that_blocks_the_loop_does_not_hang_the_run():
    release = threading.Event()

    async def blocking(prompts, completions):
        release.wait(30)
        return [0.0, 0.0]

    async def fine(prompts, completions):
        return [1.0, 1.0]

    start = time.monotonic()
    with pytest.raises(ValueError, match=r"'blocking' took longer than 0.1 s.*blocks its event loop: `await` in it"):
        CallableReward(blocking, 0.1)(SAMPLES)
    assert time.monotonic() - start < 10 and CallableReward(fine)(SAMPLES) == [1.0, 1.0]
    await_free, blocked = score_together([CallableReward(fine, 0.1), CallableReward(blocking, 0.1)], SAMPLES)
    for error in (await_free, blocked):
        assert "'blocking' took longer" in str(error) and "'fine'" not in str(error)
    release.set()


def test_scores_of_async_rewards_are_kept_when_another_fails(tiny_llama, tmp_path):
    async def good(prompts, completions):
        return [0.5] * len(prompts)

    async def away(prompts, completions):
        raise ConnectionError("away")

    with pytest.raises(ValueError, match="'away' raised ConnectionError.*and 1 of 2 columns of scores are in"):
        trainer(tiny_llama, tmp_path, reward_funcs=[away, good]).train()
    rows = [json.loads(line) for line in (tmp_path / "_unscored_rollout_rank0.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [{"good": 0.5}] * 4
