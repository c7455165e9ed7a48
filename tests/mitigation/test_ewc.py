"""EWC's Fisher and penalty against numbers worked out by hand, its file, and its runs with trainers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from ppo_setting import trainer as ppo_trainer
from safetensors.torch import save_file
from torch import nn
from trainer_setting import MAKE
from transformers import AutoModelForCausalLM

from lifecycle_hf import SFTConfig, SFTTrainer
from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.objectives.language import causal_lm_loss

LOAD = """
import torch
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained("me/held")(torch.tensor([[7, 8, 9]])).logits.double().sum().item())
"""


def scalar_model(value=3.0, dtype=torch.float32):
    model = nn.Linear(2, 1, bias=False).to(dtype)
    model.weight.data = torch.tensor([[value, -1.0]], dtype=dtype)
    return model


def row_losses(model, rows):
    return ((model(row) ** 2).sum() / 2 for row in rows)


def test_fisher_is_the_mean_square_and_not_the_square_of_the_mean():
    """ℓ = ½(w·x)², ∇ℓ = (w·x)x. At w = (3, −1): x = (1, 1) gives (2, 2) and x = (−1, 1) gives (4, −4); the mean of
    the squares is (10, 10), the square of the mean (9, 1)."""
    model, rows = scalar_model(), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    one_by_one = EWC.estimate(model, row_losses(model, rows))
    at_once = EWC.estimate(model, [(model(rows) ** 2)[:, 0] / 2])
    for ewc in (one_by_one, at_once):
        assert ewc.fisher["weight"].tolist() == [[10.0, 10.0]] and ewc.anchor["weight"].tolist() == [[3.0, -1.0]]
    assert model.weight.grad is None and model.training


def test_penalty_and_its_gradient_by_hand():
    """λ = 4, F = (10, 10), θ − θ* = (½, −1): 4/2·10·(¼ + 1) = 25, gradient 4·10·(½, −1) = (20, −40)."""
    model = scalar_model()
    ewc = EWC.estimate(model, row_losses(model, torch.tensor([[1.0, 1.0], [-1.0, 1.0]])), strength=4)
    assert ewc(model).item() == 0
    model.weight.data += torch.tensor([[0.5, -1.0]])  # which leaves the anchor as it was
    (3 * ewc(model)).backward()
    assert ewc(model).item() == 25 and model.weight.grad.tolist() == [[60.0, -120.0]]


def test_bf16_weights_are_subtracted_and_squared_in_fp32():
    """In bf16 1 + 2⁻⁷ is next to 1; its square is not representable. F = 1: ½·2⁻¹⁴, gradient 2⁻⁷."""
    model = scalar_model(1.0, torch.bfloat16)
    ewc = EWC({"weight": torch.ones(1, 2)}, {"weight": model.weight.detach().clone()})
    model.weight.data[0, 0] = 1 + 2**-7
    penalty = ewc(model)
    penalty.backward()
    assert penalty.dtype == torch.float32 and penalty.item() == 2**-15
    assert model.weight.grad.dtype == torch.bfloat16 and model.weight.grad.tolist() == [[2**-7, 0.0]]
    small = EWC.estimate(model, [model(torch.tensor([[1e-3, 0.0]], dtype=torch.bfloat16))[0, 0]])
    gradient = torch.tensor(1e-3, dtype=torch.bfloat16).float()
    assert small.fisher["weight"].dtype == torch.float32 and small.fisher["weight"][0, 0] == gradient.square()


def test_fisher_of_softmax_regression_in_closed_form():
    """∂/∂W_cj of −log softmax(Wx)_y is (p_c − [c = y])·x_j, so that F = mean over rows of (p − e_y)² ⊗ x²."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(40, 5).double(), torch.randint(0, 3, (40,))
    expected = model(x).softmax(-1).detach() - nn.functional.one_hot(y, 3)
    weight = torch.einsum("nc,nj->cj", expected.square(), x.square()) / 40
    naive = torch.zeros(3, 5).double()
    for i in range(40):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        naive += model.weight.grad.square() / 40
    slices = zip(x.split(8), y.split(8), strict=True)
    ewc = EWC.estimate(model, (nn.functional.cross_entropy(model(a), b, reduction="none") for a, b in slices))
    torch.testing.assert_close(naive, weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(ewc.fisher["weight"].double(), weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(ewc.fisher["bias"].double(), expected.square().mean(0), rtol=1e-6, atol=0)


def test_gradient_is_strength_times_fisher_times_difference():
    model = nn.Linear(3, 2).double()
    constants = [(torch.rand(2, 3).double(), torch.randn(2, 3).double()), (torch.rand(2).double(), torch.zeros(2))]
    ewc = EWC(*({"weight": constants[0][i], "bias": constants[1][i]} for i in (0, 1)), strength=0.7)
    ewc(model).backward()
    for name, parameter in model.named_parameters():
        expected = 0.7 * ewc.fisher[name] * (parameter.detach() - ewc.anchor[name])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)


def test_strength_walks_between_the_two_solutions():
    """min ½(w − 5)² + λ/2·F·(w − 1)² at w = (5 + λF) / (1 + λF): with F = 4 and λ = ¼ that is 3."""
    weight = nn.Parameter(torch.tensor([1.0]))
    model = nn.ParameterDict({"w": weight})
    ewc = EWC({"w": torch.tensor([4.0])}, {"w": torch.tensor([1.0])}, strength=0.25)
    optimizer = torch.optim.SGD([weight], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        ((weight - 5).square().sum() / 2 + ewc(model)).backward()
        optimizer.step()
    assert weight.item() == pytest.approx(3, abs=1e-5)


def token_losses(model, rows):
    return (causal_lm_loss(model(row).logits, row).sum() for row in rows)


ROWS = torch.arange(5, 35).view(3, 1, 10)


def test_tied_weights_count_once_with_both_of_their_gradients(tiny_llama):
    model = tiny_llama[0](tie_word_embeddings=True)
    ewc = EWC.estimate(model, token_losses(model, ROWS))
    assert "model.embed_tokens.weight" in ewc.fisher and "lm_head.weight" not in ewc.fisher
    expected = torch.zeros_like(model.lm_head.weight)
    for row in ROWS:
        model.zero_grad()
        next(token_losses(model, [row])).backward()
        expected += model.lm_head.weight.grad.square() / len(ROWS)
    torch.testing.assert_close(ewc.fisher["model.embed_tokens.weight"], expected)


def test_of_lora_only_the_adapter_is_held_and_a_has_no_fisher_at_the_start(tiny_llama):
    model = get_peft_model(tiny_llama[0](), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ewc = EWC.estimate(model, token_losses(model, ROWS), device="cpu")
    assert len(ewc.fisher) == 4 and all("lora_" in name for name in ewc.fisher)
    for name, fisher in ewc.fisher.items():  # ∂ℓ/∂A = s·Bᵀ(∂ℓ/∂ΔW) and B = 0
        assert bool(fisher.any()) == ("lora_B" in name), name
        parameter = model.get_parameter(name.replace(".weight", ".default.weight"))
        torch.testing.assert_close(ewc.anchor[name], parameter.detach(), rtol=0, atol=0)


def test_saved_and_loaded_the_same(tmp_path, tiny_llama):
    model = tiny_llama[0](dtype=torch.bfloat16, tie_word_embeddings=True)
    ewc = EWC.estimate(model, token_losses(model, ROWS), strength=0.1)
    ewc.save(tmp_path / "new" / "ewc.safetensors")
    again = EWC.load(tmp_path / "new" / "ewc.safetensors", model)
    assert again.strength == 0.1 and [path.name for path in (tmp_path / "new").iterdir()] == ["ewc.safetensors"]
    for part in ("fisher", "anchor"):
        torch.testing.assert_close(getattr(again, part), getattr(ewc, part), rtol=0, atol=0)


def test_what_does_not_fit_is_named(tmp_path, tiny_llama):
    model = scalar_model()
    ewc, path = EWC.estimate(model, row_losses(model, torch.ones(1, 2))), tmp_path / "ewc.safetensors"
    ewc.save(path)
    with pytest.raises(ValueError, match=r"weight is \(1, 2\) in the Fisher and \(1, 3\) in the model"):
        ewc(nn.Linear(3, 1, bias=False))
    with pytest.raises(ValueError, match=r"weight is \(1, 2\) in the Fisher and missing in the model"):
        ewc(nn.Sequential(model))
    with pytest.raises(ValueError, match=r"bias is missing in .*ewc.safetensors and \(1,\) in what trains"):
        EWC.load(path, nn.Linear(2, 1))
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not written by EWC.save"):
        EWC.load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        EWC.load(path)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (lambda m: [], "no losses"),
        (lambda m: [m(torch.ones(2, 2))], r"loss 0 has shape \(2, 1\)"),
        (lambda m: [m(torch.tensor([float("nan"), 0.0]))], "finite"),
    ],
)
def test_bad_losses(losses, words):
    model = scalar_model()
    with pytest.raises(ValueError, match=words):
        EWC.estimate(model, losses(model))
    with pytest.raises(ValueError, match="nothing to hold"):
        EWC.estimate(model.requires_grad_(False), [])
    with pytest.raises(ValueError, match="strength=-1"):
        EWC({}, {}, -1)


def sft(model, tokenizer, folder, **options):
    rows = Dataset.from_dict({"prompt": [f"word {i}" for i in range(8)], "completion": [" Paris"] * 8})
    quiet = {"report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "max_steps": 8}
    defaults = {"gradient_checkpointing": False, "learning_rate": 1e-2, "save_strategy": "no"}
    args = SFTConfig(str(folder), **(quiet | defaults | options))
    return SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)


def test_sft_with_ewc_stays_closer_and_reloads_and_pushes(hub, tiny_llama, tmp_path):
    make_model, tokenizer = tiny_llama
    start = make_model()
    ewc = EWC.estimate(start, token_losses(start, ROWS), strength=1e3)
    moved = {}
    for name in ("free", "held"):
        trainer = sft(make_model(), tokenizer, tmp_path / name, save_strategy="steps", save_steps=8)
        if name == "held":
            trainer.add_auxiliary_loss("ewc", ewc)
        trainer.train()
        moved[name] = ewc(trainer.model).item()
    assert 0 < moved["held"] < moved["free"] / 4
    logged = [entry["loss/ewc"] for entry in trainer.state.log_history if "loss/ewc" in entry]
    assert logged[0] == 0 < logged[-1]
    trainer.save_model()
    trainer.create_model_card()
    push = "import sys; from huggingface_hub import HfApi; a = HfApi(); a.create_repo('me/held'); "
    hub.run(push + "a.upload_folder(repo_id='me/held', folder_path=sys.argv[1])", tmp_path / "held")
    ids = torch.tensor([[7, 8, 9]])
    expected = trainer.model.eval()(ids).logits.detach()
    for folder in (tmp_path / "held", tmp_path / "held" / "checkpoint-8"):
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected)
    assert float(hub.run(LOAD)) == pytest.approx(expected.double().sum().item(), abs=1e-4)


def test_ppo_gives_the_policy(tiny_llama, tmp_path):
    run = ppo_trainer(tiny_llama, tmp_path)
    policy = run.model.policy
    run.add_auxiliary_loss("ewc", EWC.estimate(policy, token_losses(policy, ROWS), strength=10))
    run.train()
    logged = [entry["loss/ewc"] for entry in run.state.log_history if "loss/ewc" in entry]
    assert logged[0] == 0 < logged[-1]


LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("name", ["dpo", "ppo"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_sft_saved_of_its_adapter_holds_that_of_the_next_stage(tiny_llama, tmp_path, name, fresh):
    """SFT's adapter is named "default", one that DPO or PPO starts "policy", and PPO trains "value" beside it."""
    model = get_peft_model(tiny_llama[0](), LoraConfig(**LORA))
    ewc = EWC.estimate(model, token_losses(model, ROWS))
    ewc.save(tmp_path / "ewc.safetensors")
    start = {"trainer_options": {"peft_config": LoraConfig(**LORA)}} if fresh else {"model": model}
    options = {"ewc": str(tmp_path / "ewc.safetensors"), "ewc_coef": 1.0, "max_steps": 2, "learning_rate": 0.01}
    run = MAKE[name](tiny_llama, tmp_path / "run", **start, **options)
    held, role = run._auxiliary["ewc"][0], "policy" if fresh else "default"
    assert run.model.policy_role == role and held.fisher.keys() == ewc.fisher.keys()
    run.train()
    named, expected = dict(run.model.policy.named_parameters()), 0.0
    for key, fisher in ewc.fisher.items():
        moved = named[key.replace(".weight", f".{role}.weight")].double() - ewc.anchor[key]
        expected += (fisher * moved.square()).sum().item() / 2
    assert held(run.model.policy).item() == pytest.approx(expected, rel=1e-5) and expected > 0


def test_beside_a_value_adapter_the_policys_is_held(tiny_llama, tmp_path):
    options = {"ptx_dataset": Dataset.from_dict({"text": ["word is word"] * 4}), "peft_config": LoraConfig(**LORA)}
    run = ppo_trainer(tiny_llama, tmp_path, trainer_options=options, ewc_coef=1.0, ewc_rows=2)
    ewc, policy = run._auxiliary["ewc"][0], run.model.policy
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert any(".value." in name for name in trained) and len(ewc.fisher) == len(trained) / 2 == 4
    assert all(fisher.any() for fisher in ewc.fisher.values())
