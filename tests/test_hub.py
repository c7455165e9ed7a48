"""The stand-in hub takes a push and gives it back, through huggingface_hub's and transformers' own clients."""

import pytest
import torch

PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, repository = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder).push_to_hub(repository)
AutoTokenizer.from_pretrained(folder).push_to_hub(repository)
"""
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.tensor([tokenizer("Hello Paris")["input_ids"]])).logits.double().sum().item())
"""
VALIDATE = """
import sys
from huggingface_hub import ModelCard
ModelCard(open(sys.argv[1]).read()).validate()
"""


def test_pushed_model_comes_back_with_the_same_logits(hub, tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hub.run(PUSH, tmp_path, "me/tiny")
    assert hub.files("me/tiny")["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    logits = model(torch.tensor([tokenizer("Hello Paris")["input_ids"]])).logits
    assert float(hub.run(RELOAD, "me/tiny")) == pytest.approx(logits.double().sum().item(), abs=1e-6)


def test_missing_repository_is_an_error(hub):
    code = "from huggingface_hub import file_exists; print(file_exists('me/none', 'config.json'))"
    assert hub.run(code).strip() == "False"


def test_card_with_a_local_path_as_base_model_is_refused(hub, tmp_path):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("---\nbase_model: HuggingFaceTB/SmolLM2-135M\n---\n# Model\n")
    bad.write_text("---\nbase_model: /tmp/some/folder\n---\n# Model\n")
    hub.run(VALIDATE, good)
    with pytest.raises(AssertionError, match="/tmp/some/folder"):
        hub.run(VALIDATE, bad)
