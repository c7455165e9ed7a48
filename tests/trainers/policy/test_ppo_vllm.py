"""Test rollouts of a vLLM server, which a stand-in replaces: what it receives, and how its answers are used."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_setting import trainer

from lifecycle_hf.completions.sampling import generate
from lifecycle_hf.trainers.base.sampler import check_vllm


class StandIn:
    """A stand-in of TRL's client, with a model in place of the server."""

    model, made = None, []

    def __init__(self, base_url, connection_timeout):
        assert (base_url, connection_timeout) == ("http://gpu:8000", 7.0)
        self.pushes, self.requests, self.resets = [], [], 0
        StandIn.made.append(self)

    def init_communicator(self, device):
        assert device == torch.device("cpu")

    def update_named_params(self, kinds, tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors}
        assert [(n, str(t.dtype), list(t.shape)) for n, t in tensors.items()] == [
            (name, f"torch.{dtype}", shape) for name, dtype, shape in kinds
        ]
        missing, unexpected = self.model.load_state_dict(tensors, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self.pushes.append(self.model(torch.tensor([[7, 8, 9]])).logits.detach())

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, max_tokens, temperature, logprobs, n, generation_kwargs):
        self.requests.append((len(prompts), max_tokens, temperature, generation_kwargs))
        options = {"stop_token_ids": generation_kwargs["stop_token_ids"], "pad_token_id": 0, "generator_seed": 0}
        options["num_generations"] = n
        found = generate(self.model, prompts, max_new_tokens=max_tokens, temperature=temperature, **options)
        return {"completion_ids": [[*ids, 99] for ids in found]}  # tokens after a stop token must be cut


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", StandIn)
    StandIn.made = []
    return StandIn


SERVER = {"use_vllm": True, "vllm_server_base_url": "http://gpu:8000", "vllm_server_timeout": 7.0}


@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_server_gets_the_policys_weights_before_every_rollout(tiny_llama, tmp_path, stand_in, with_peft, tied):
    make_model, tokenizer = tiny_llama
    stand_in.model = make_model(seed=5, tie_word_embeddings=tied)
    policy = make_model(tie_word_embeddings=tied)
    if with_peft:
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    policy.eval()
    before = policy(torch.tensor([[7, 8, 9]])).logits.detach()
    run = trainer(tiny_llama, tmp_path, policy, temperature=0.7, max_steps=2, **SERVER)
    run.train()
    (client,) = stand_in.made
    torch.testing.assert_close(client.pushes[0], before, atol=1e-5, rtol=1e-4)
    assert len(client.pushes) == client.resets == 2
    assert not torch.allclose(client.pushes[1], client.pushes[0], atol=1e-4)
    assert client.requests[0][:3] == (4, 6, 0.7)
    assert client.requests[0][3] == {"stop_token_ids": [tokenizer.eos_token_id]}
    (batch,), end = run.buffer.batches, tokenizer.eos_token_id
    rows = list(zip(batch["input_ids"].tolist(), batch["prompt_lengths"], batch["completion_lengths"], strict=True))
    sent = generate(  # as the server did, whose model still has the weights of the last push
        stand_in.model, [ids[:start] for ids, start, _ in rows], max_new_tokens=6, temperature=0.7,
        stop_token_ids=[end], pad_token_id=0, generator_seed=0,
    )  # fmt: skip
    expected = [ids if ids[-1] == end else [*ids, 99] for ids in sent]
    assert [ids[start : start + length] for ids, start, length in rows] == expected


def test_weights_that_can_not_be_sent_whole_are_refused(tiny_llama, tmp_path, stand_in):
    run = trainer(tiny_llama, tmp_path)
    run.model.policy.is_quantized = True
    with pytest.raises(ValueError, match="use_vllm needs weights that can be sent whole: no quantised policy"):
        check_vllm(run.model, fsdp=False)
    saved = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])}
    with pytest.raises(ValueError, match="none with modules_to_save, which merging leaves out"):
        trainer(tiny_llama, tmp_path, trainer_options=saved, **SERVER)


def test_without_vllm_the_client_says_what_to_install(tiny_llama, tmp_path):
    with pytest.raises(ImportError, match="vLLM is not installed"):
        trainer(tiny_llama, tmp_path, use_vllm=True)
