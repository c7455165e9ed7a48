"""OrthogonalProjection against numbers worked out by hand, and against its definition in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lifecycle_hf.mitigation.projection import OrthogonalProjection, multipliers


def lion(parameters, **options):
    return pytest.importorskip("bitsandbytes").optim.Lion(parameters, **options)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lion": lion}


def vector(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


class Point(nn.Module):
    """Two tensors of parameters, a and b."""

    def __init__(self, a, b=()):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.as_tensor(a)), nn.Parameter(torch.as_tensor(b, dtype=torch.float32))


def along(*directions):
    """A capability loss with the given gradients for `a`, one after the other, over and over."""
    queue = list(directions)

    def loss(model):
        queue.append(queue.pop(0))
        return (model.a * queue[-1]).sum()

    return loss


def step(model, gradient, optimizer):
    """(gradient of `a` as the optimizer had it, realised step of `a`)."""
    before = model.a.detach().clone()
    model.a.grad = gradient.clone()
    optimizer.step()
    return model.a.grad, model.a.detach() - before


def gradient_after(gradient, *directions, dtype=torch.float32, **options):
    model = Point(torch.zeros_like(gradient, dtype=dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    projection = OrthogonalProjection(model, along(*directions), k=len(directions), **options).attach(optimizer)
    projected, moved = step(model, gradient, optimizer)
    assert torch.equal(moved, -projected)
    return projected, projection.metrics()


def test_a_gradient_loses_its_part_along_the_direction():
    """g = (3, 4), c = (2, 0): ⟨g, c⟩ = 6, cosine 3/5, what is removed is (3, 0)."""
    projected, metrics = gradient_after(vector(3, 4), vector(2, 0))
    assert projected.tolist() == [0, 4]
    assert metrics == pytest.approx({"cosine": 0.6, "removed": 0.6, "loss": 0})


@pytest.mark.parametrize(("sign", "expected"), [(1, [3, 4]), (-1, [0, 4])])
def test_on_conflict_only_a_gradient_that_raises_the_capability_loss_changes(sign, expected):
    projected, metrics = gradient_after(vector(3, 4), sign * vector(2, 0), when="conflict")
    assert projected.tolist() == expected
    assert metrics["cosine"] == pytest.approx(sign * 0.6) and metrics["removed"] == (0 if sign > 0 else 0.6)


# The first step of Adam and Lion is −lr·(sign g + decay·θ), that of SGD −lr·(g + decay·θ).
STEPS = {"sgd": [-0.35, -0.5], "adamw": [-0.15, -0.2], "lion": [-0.15, -0.2]}
# Off c ∝ (1, 1), which takes away the mean.
PROJECTED = {"sgd": [0.075, -0.075], "adamw": [0.025, -0.025], "lion": [0.025, -0.025]}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("c", "when", "changes"), [(1, "always", True), (1, "conflict", False), (-1, "conflict", True)]
)
def test_the_realised_update_is_projected(name, c, when, changes):
    """g = (3, 4), θ = (1, 2), lr 0.1, decay 0.5. Every step is downhill for c = (1, 1), uphill for (−1, −1)."""
    model = Point(vector(1, 2))
    optimizer = OPTIMIZERS[name]([model.a], lr=0.1, weight_decay=0.5)
    projection = OrthogonalProjection(model, along(vector(c, c)), level="update", when=when).attach(optimizer)
    gradient, moved = step(model, vector(3, 4), optimizer)
    assert gradient.tolist() == [3, 4]
    torch.testing.assert_close(moved, torch.tensor((PROJECTED if changes else STEPS)[name]), atol=2e-7, rtol=0)
    cosine = c * sum(STEPS[name]) / math.hypot(*STEPS[name]) / math.sqrt(2)
    assert projection.metrics()["cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("level", ["gradient", "update"])
@pytest.mark.parametrize("k", [1, 2])
def test_orthogonal_to_1e_6_over_many_steps(name, level, k):
    """⟨g, c⟩ ≤ 1e-6 ‖g‖‖c‖ in float64, for both tensors together, with momentum and decay."""
    model, seen = Point(torch.randn(40, 50), torch.randn(300)), []
    options = {"sgd": {"lr": 0.1, "momentum": 0.9}}.get(name, {"lr": 0.05})
    optimizer = OPTIMIZERS[name](model.parameters(), weight_decay=0.1, **options)

    def loss(model):
        seen.append([torch.randn_like(model.a), torch.randn_like(model.b)])
        return (model.a * seen[-1][0]).sum() + (model.b * seen[-1][1]).sum()

    OrthogonalProjection(model, loss, k=k, level=level).attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        ((model.a - 2) ** 2).sum().add(model.b.cos().sum()).backward()
        before, seen[:] = [p.detach().double() for p in model.parameters()], []
        optimizer.step()
        moved = [p.detach().double() - old for p, old in zip(model.parameters(), before)]
        found = flat(moved if level == "update" else [p.grad for p in model.parameters()])
        assert len(seen) == k
        for c in map(flat, seen):
            assert abs(found @ c) <= 1e-6 * found.norm() * c.norm()


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_parallel_gradient_becomes_exactly_0(dtype):
    """Not a residue, which Adam would blow up to a whole step."""
    c = torch.randn(1000, dtype=dtype)
    projected, metrics = gradient_after(-0.3 * c, c, dtype=dtype)
    assert not projected.any() and metrics["removed"] == pytest.approx(1)


def test_a_parallel_update_leaves_the_parameters_untouched():
    model = Point(torch.randn(100))
    start, c = model.a.detach().clone(), torch.randn(100)
    optimizer = torch.optim.SGD([model.a], lr=0.5)
    OrthogonalProjection(Point(start), along(c))
    OrthogonalProjection(model, along(c), level="update").attach(optimizer)
    model.a.data.zero_()
    step(model, c, optimizer)
    assert not model.a.any()


def test_nearly_parallel_stays_orthogonal_to_what_remains():
    """‖g′‖ is 1e-4 of ‖g‖: once subtracted, rounding alone would leave 1e-4 of g′ along c."""
    c = torch.randn(5000)
    projected, _ = gradient_after(1e4 * c + torch.randn(5000), c)
    found = projected.double()
    assert 60 < found.norm() < 80 and abs(found @ c.double()) <= 1e-6 * found.norm() * c.norm()


def test_bf16_is_orthogonal_to_its_rounding():
    """|⟨g, c⟩| ≤ 2⁻⁸ Σ|g||c|, and at the update level 2⁻⁸ Σ|θ||c|; the inner products themselves are exact."""
    g, c = torch.randn(2, 1000).bfloat16()
    projected, _ = gradient_after(g, c, dtype=torch.bfloat16)
    assert projected.dtype == torch.bfloat16 and not torch.equal(projected, g)
    found, direction = projected.double(), c.double()
    assert abs(found @ direction) <= 2**-8 * (found.abs() @ direction.abs())
    exact = g.double() - (g.double() @ direction) / (direction @ direction) * direction
    torch.testing.assert_close(found, exact, rtol=2**-8, atol=1e-6)

    model = Point(torch.randn(1000).bfloat16())
    optimizer = torch.optim.SGD([model.a], lr=0.1)
    OrthogonalProjection(model, along(c), level="update").attach(optimizer)
    _, moved = step(model, g, optimizer)
    assert abs(moved.double() @ direction) <= 2**-8 * (model.a.detach().double().abs() @ direction.abs())


def test_gem_where_removing_one_direction_after_the_other_would_fail():
    """c₁ = (1, 0), c₂ = (−.6, .8), g = (−1, −1): the nearest point of the cone is its tip, v = (1.75, 1.25)."""
    c = np.array([[1.0, 0.0], [-0.6, 0.8]])
    np.testing.assert_allclose(multipliers(c @ c.T, c @ [-1.0, -1.0], conflict=True), [1.75, 1.25])
    projected, _ = gradient_after(vector(-1, -1), *torch.tensor(c).float(), when="conflict")
    assert projected.abs().max() < 1e-6


def test_gem_removes_the_violated_direction_alone():
    """c₁ = (1, 0, 0) is violated by g = (−1, 2, 5), c₂ = (1, 1, 0) is not: only the first part goes."""
    projected, metrics = gradient_after(vector(-1, 2, 5), vector(1, 0, 0), vector(1, 1, 0), when="conflict")
    assert projected.tolist() == pytest.approx([0, 2, 5], abs=1e-6)
    assert metrics["removed"] == pytest.approx(1 / math.sqrt(30))
    assert gradient_after(vector(-1, 2, 5), vector(1, 0, 0), vector(1, 1, 0))[0].tolist() == pytest.approx([0, 0, 5])


@pytest.mark.parametrize("seed", range(30))
def test_gem_meets_the_conditions_of_its_optimum(seed):
    """v ≥ 0, C(g + Cᵀv) ≥ 0, and their product is 0; also with directions that repeat or oppose each other."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(6, 8)) * 10.0 ** rng.integers(-4, 4, size=(6, 1))
    c[4], c[5] = 3 * c[0], (-c[1] if seed % 2 else 0)
    g = rng.normal(size=8)
    v = multipliers(c @ c.T, c @ g, conflict=True)
    slack, lengths = c @ (g + c.T @ v), np.linalg.norm(c, axis=1)
    assert (v >= 0).all() and (slack >= -1e-7 * lengths).all() and abs(v @ slack) < 1e-7


def test_dependent_and_empty_directions_do_no_harm():
    """(1, 0, 0) twice and 0: what is left is off (1, 0, 0) and (1, 1, 0), so off the plane."""
    c = vector(1, 0, 0), vector(1, 1, 0)
    projected, _ = gradient_after(vector(1, 2, 3), c[0], 2 * c[0], torch.zeros(3), c[1])
    assert projected.tolist() == pytest.approx([0, 0, 3], abs=1e-6)
    assert gradient_after(vector(1, 2, 3), torch.zeros(3))[0].tolist() == [1, 2, 3]


def both(model, a=True, b=True):
    return model.a.sum() * a + (2 * model.b.sum() if b else 0)


@pytest.mark.parametrize("level", ["gradient", "update"])
def test_parameters_without_one_of_the_gradients_are_matched_by_name(level):
    """c = (1 for a, 2 for b): where only b has a gradient of the loss, b's step is off b's part of c, a rests."""
    model = Point(vector(1, 1), [1.0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    OrthogonalProjection(model, both, level=level).attach(optimizer)
    model.b.grad = vector(1, 3)
    optimizer.step()
    assert model.a.grad is None and model.a.tolist() == [1, 1]
    assert (model.b - 1).tolist() == [1, -1]


def test_parameters_without_a_capability_gradient_are_untouched():
    model = Point(vector(0, 0), [0.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    projection = OrthogonalProjection(model, lambda m: both(m, b=False)).attach(optimizer)
    model.a.grad, model.b.grad = vector(3, 1), vector(100)
    optimizer.step()
    assert model.a.tolist() == [-1, 1] and model.b.tolist() == [-100]
    assert projection.metrics()["cosine"] == pytest.approx(4 / math.sqrt(20))  # b's gradient does not water it down


def test_scope_tensor_projects_each_by_itself():
    """a: (3, 1) off (1, 1) is (1, −1). b: (5, 7) off (2, 2) is (−1, 1). Together: ⟨g, c⟩ = 28, ⟨c, c⟩ = 10."""
    for scope, a, b in (("tensor", [1, -1], [-1, 1]), ("global", [0.2, -1.8], [-0.6, 1.4])):
        model = Point(vector(0, 0), [0.0, 0.0])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        OrthogonalProjection(model, both, scope=scope).attach(optimizer)
        model.a.grad, model.b.grad = vector(3, 1), vector(5, 7)
        optimizer.step()
        assert model.a.grad.tolist() == pytest.approx(a) and model.b.grad.tolist() == pytest.approx(b)


def test_gradients_outside_the_optimizer_come_back():
    model = Point(vector(0, 0), [0.0])
    optimizer = torch.optim.SGD([model.a], lr=1.0)
    OrthogonalProjection(model, both).attach(optimizer)
    model.a.grad, model.b.grad = vector(3, 1), vector(7)
    kept = model.a.grad, model.b.grad
    optimizer.step()
    assert model.a.grad is kept[0] and model.b.grad is kept[1] and kept[1].tolist() == [7]
    assert kept[0].tolist() == [1, -1]


def test_eight_micro_batches_of_one_are_one_of_eight():
    x, y, held = torch.randn(8, 5), torch.randn(8), torch.randn(4, 5)
    ends = []
    for cut in (1, 8):
        model = Point(torch.ones(5))
        optimizer = torch.optim.AdamW([model.a], lr=0.1, weight_decay=0.1)
        OrthogonalProjection(model, lambda m: (held @ m.a).square().mean(), level="update").attach(optimizer)
        for _ in range(5):
            for xs, ys in zip(x.chunk(cut), y.chunk(cut)):
                ((xs @ model.a - ys).square().mean() / cut).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.a.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("refresh", "drawn"), [("fresh", [4, 4, 8, 8, 12]), ("running", [2, 2, 4, 4, 6])])
def test_refreshes(refresh, drawn):
    """k = 2 directions of 2 batches, every second step: 4 batches at a fresh refresh, 2 at a running one."""
    model, batches = Point(torch.zeros(9)), []

    def loss(model):
        batches.append(torch.randn(9))
        return (model.a * batches[-1]).sum()

    optimizer = torch.optim.SGD([model.a], lr=1.0)
    OrthogonalProjection(model, loss, k=2, batches=2, every=2, refresh=refresh).attach(optimizer)
    counts = []
    for _ in range(5):
        found, _ = step(model, torch.randn(9), optimizer)
        counts.append(len(batches))
        means = [sum(batches[i : i + 2]) for i in range(0, len(batches), 2)]
        for c in means[-2:]:
            assert abs(found @ c) < 1e-5
    assert counts == drawn


def test_directions_in_bf16_and_in_cpu_memory():
    """What is kept is what is protected: c = 1 + 2⁻¹⁰ rounds to 1 in bf16."""
    model = Point(vector(0, 0))
    optimizer = torch.optim.SGD([model.a], lr=1.0)
    c = vector(1 + 2**-10, 1)
    projection = OrthogonalProjection(model, along(c), every=2, storage=torch.bfloat16, offload=True).attach(optimizer)
    found, _ = step(model, vector(3, 1), optimizer)
    assert found.tolist() == [1, -1]
    assert {c.dtype for name, c in projection.state_dict().items() if name != "step"} == {torch.bfloat16}


def test_state_goes_on_where_it_was_taken():
    def run(state=None, steps=range(6)):
        model = Point(torch.full((7,), 0.5))
        optimizer = torch.optim.SGD([model.a], lr=1.0)
        directions = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
        gradients = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
        now = [0]
        projection = OrthogonalProjection(
            model, lambda m: (m.a * directions[now[0]]).sum(), k=2, every=2, refresh="running"
        )
        if state is not None:
            projection.load_state_dict(state)
        projection.attach(optimizer)
        found = []
        for now[0] in steps:
            found.append(step(model, gradients[now[0]], optimizer)[0])
        return found, projection.state_dict()

    whole, _ = run()
    _, state = run(steps=range(3))
    rest, _ = run(state, range(3, 6))
    assert state["step"] == 3 and state.keys() == {"step", "0.a", "1.a"}
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
    with pytest.raises(ValueError, match=r"the state holds a of shape \(7,\)"):
        OrthogonalProjection(Point(vector(1)), both).load_state_dict(state)


def test_a_scaler_gives_unscaled_gradients_and_a_skipped_step_draws_no_batch():
    model, calls = Point(vector(0, 0)), []

    def loss(model):
        calls.append(1)
        return (model.a * vector(2, 0)).sum()

    optimizer = torch.optim.SGD([model.a], lr=1.0)
    OrthogonalProjection(model, loss).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for gradient, expected in ((vector(3, 4), [0, -4]), (vector(math.inf, 1), [0, -4])):
        optimizer.zero_grad()
        scaler.scale((model.a * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert model.a.tolist() == expected
    assert len(calls) == 1


def test_attaching_anew_and_detaching():
    model = Point(vector(0, 0))
    optimizer = torch.optim.SGD([model.a], lr=1.0)
    projection = OrthogonalProjection(model, along(vector(1, 0))).attach(optimizer).attach(optimizer)
    assert step(model, vector(3, 4), optimizer)[0].tolist() == [0, 4] and projection.step == 1
    projection.detach()
    assert step(model, vector(3, 4), optimizer)[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"batches": 0}, "batches=0 must be at least 1"),
        ({"when": "never"}, "when='never'; choose one of always, conflict"),
        ({"level": "step"}, "level='step'; choose one of gradient, update"),
        ({"scope": "layer"}, "scope='layer'; choose one of global, tensor"),
        ({"refresh": "old"}, "refresh='old'; choose one of fresh, running"),
        ({"storage": torch.int8}, "storage=torch.int8 is no floating-point type"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OrthogonalProjection(Point(vector(0)), both, **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model: model.a.detach().sum(), "must give a scalar tensor that depends on parameters that train"),
        (lambda model: model.a * 2, "must give a scalar tensor"),
        (lambda model: 1.0, "must give a scalar tensor"),
        (lambda model: model.b.sum(), "no gradient for any of the 1 tensors"),
        (lambda model: model.a.sum() * math.nan, "capability loss is nan at optimizer step 1"),
        (
            lambda model: (model.a * 0).sum().sqrt(),
            "capability gradient of optimizer step 1 is not finite",
        ),
    ],
)
def test_a_useless_capability_loss_stops_the_run(loss, message):
    model = Point(vector(0, 0), [1.0])
    optimizer = torch.optim.SGD([model.a], lr=1.0)
    OrthogonalProjection(model, loss).attach(optimizer)
    with pytest.raises(ValueError, match=message):
        step(model, vector(1, 1), optimizer)
    assert model.a.tolist() == [0, 0] and model.a.grad.tolist() == [1, 1]


def test_optimizers_that_cannot_work_are_refused():
    class DeepSpeedOptimizerWrapper:
        __module__, optimizer = "accelerate.utils.deepspeed", None

    model, other = Point(vector(0, 0)), Point(vector(0, 0))
    with pytest.raises(ValueError, match="does not run under DeepSpeed.*use DDP or FSDP2"):
        OrthogonalProjection(model, both).attach(DeepSpeedOptimizerWrapper())
    with pytest.raises(ValueError, match="trains no parameter of the model"):
        OrthogonalProjection(model, both).attach(torch.optim.SGD(other.parameters(), lr=1.0))
    optimizer = torch.optim.LBFGS([model.a])
    OrthogonalProjection(model, along(vector(1, 1))).attach(optimizer)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: model.a.sum())
