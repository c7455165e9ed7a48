"""Reward ensembles: reductions by hand, a common scale, one folder, one base for adapters."""

import pytest
import torch
from reward_setting import save_reward_adapter
from transformers import LlamaForSequenceClassification

from lifecycle_hf import RewardEnsemble, load_reward_model
from lifecycle_hf.models.ensemble import reduce_scores
from lifecycle_hf.models.heads import RewardModel

close = torch.testing.assert_close
ROWS = [[7, 8, 9, 10], [11, 12], [13, 14, 15], [16, 17, 18, 19, 20], [21]]


def test_reductions_by_hand():
    # columns (1, 3) and (4, 0): deviation 1 and 2
    scores = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    close(reduce_scores(scores, "min"), torch.tensor([1.0, 0.0]))
    close(reduce_scores(scores, "mean"), torch.tensor([2.0, 2.0]))
    close(reduce_scores(scores, "lower_bound", 0.5), torch.tensor([1.5, 1.0]))
    with pytest.raises(ValueError, match="reduction='max' is unknown"):
        reduce_scores(scores, "max")


def member(tiny_llama, seed, scale=1.0, shift=0.0):
    make_model, tokenizer = tiny_llama
    torch.manual_seed(seed)
    config = make_model().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.config.reward_center = -shift
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * scale)
    return RewardModel(model, tokenizer).eval()


def scores_of(model, rows=ROWS):
    return torch.cat([model(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])


def test_an_affine_change_of_a_member_changes_nothing(tiny_llama):
    found = []
    for scale, shift in ((1.0, 0.0), (5.0, 3.0)):
        members = [member(tiny_llama, 0, scale, shift), member(tiny_llama, 1)]
        for reduction in ("min", "mean", "lower_bound"):
            found.append(scores_of(RewardEnsemble(members, reduction=reduction).fit(ROWS)).detach())
    for before, after in zip(found[:3], found[3:], strict=True):
        close(before, after, rtol=1e-4, atol=1e-5)
    fitted = RewardEnsemble(members).fit(ROWS, batch_size=2)
    raw = torch.stack([scores_of(m) for m in members])
    z = (raw - raw.mean(1, keepdim=True)) / raw.std(1, correction=0, keepdim=True)
    close(scores_of(fitted), z.amin(0), rtol=1e-4, atol=1e-5)


def test_it_is_saved_as_one_folder_and_loaded_by_its_name(tiny_llama, tmp_path):
    own = RewardEnsemble([member(tiny_llama, 0), member(tiny_llama, 1)], reduction="lower_bound", coef=0.5).fit(ROWS)
    own.save_pretrained(tmp_path / "ensemble")
    loaded = load_reward_model(str(tmp_path / "ensemble"))
    assert isinstance(loaded, RewardEnsemble) and (loaded.reduction, loaded.coef) == ("lower_bound", 0.5)
    close(scores_of(loaded), scores_of(own))
    loaded.save_pretrained(tmp_path / "again")
    close(scores_of(load_reward_model(str(tmp_path / "again"))), scores_of(own))


@pytest.fixture
def adapters(tiny_llama, tmp_path):
    """The paths of two reward adapters with random weights over one base."""
    make_model, tokenizer = tiny_llama
    base, paths = tmp_path / "base", [tmp_path / "one", tmp_path / "two"]
    make_model().save_pretrained(base), tokenizer.save_pretrained(base)
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        save_reward_adapter(base, path, tokenizer)
    return [str(path) for path in paths]


def test_adapters_of_one_base_share_it(adapters, tmp_path):
    alone = torch.stack([scores_of(load_reward_model(path)) for path in adapters])
    ensemble = RewardEnsemble(adapters, reduction="mean")
    close(scores_of(ensemble), alone.mean(0), rtol=1e-4, atol=1e-5)
    bases = [p for n, p in ensemble.named_parameters() if "embed_tokens" in n]
    assert len(ensemble.members) == 1 and len(bases) == 1
    assert not any(p.requires_grad for p in ensemble.parameters())
    ensemble.fit(ROWS).save_pretrained(tmp_path / "saved")
    close(scores_of(load_reward_model(str(tmp_path / "saved"))), scores_of(ensemble))


def test_members_that_can_not_be(tiny_llama):
    first = member(tiny_llama, 0)
    with pytest.raises(ValueError, match="ensemble of 1 reward models is none"):
        RewardEnsemble([first])
    with pytest.raises(ValueError, match="reduction='max'"):
        RewardEnsemble([first, first], reduction="max")
    other = member(tiny_llama, 1)
    other.tokenizer = type("Other", (), {"get_vocab": lambda self: {"a": 0}})()
    with pytest.raises(ValueError, match="have different tokenizers"):
        RewardEnsemble([first, other])
    with pytest.raises(ValueError, match="1 answers have no deviation"):
        RewardEnsemble([first, first]).fit(ROWS[:1])
    flat = member(tiny_llama, 0, scale=0.0)
    with pytest.raises(ValueError, match="member 1 gives all 5 answers the score 0"):
        RewardEnsemble([first, flat]).fit(ROWS)
