import struct

import pytest

from lifecycle_hf.evaluation.pictures import (
    plot_history,
    plot_mixture,
    plot_overoptimization,
    plot_pareto,
    plot_reliability,
)


def width_of(png):
    return struct.unpack(">I", png.read_bytes()[16:20])[0]


def test_history_is_drawn_with_a_panel_per_group_that_has_data(tmp_path):
    history = [{"step": s, "score": s / 10, "kl": s / 5, "loss": 1.0} for s in range(1, 9)]
    plot_history(history, tmp_path / "two.png")
    plot_history(
        [*history, {"step": 0, "tax/perplexity": 9.0}, {"step": 8, "tax/perplexity": 9.5}], tmp_path / "three.png"
    )
    assert width_of(tmp_path / "three.png") == pytest.approx(1.5 * width_of(tmp_path / "two.png"), abs=2)
    plot_history(history, tmp_path / "own.png", panels={"Loss": {"loss": "mean"}}, title="A run")
    assert width_of(tmp_path / "own.png") == pytest.approx(width_of(tmp_path / "two.png") / 2, abs=2)


def test_history_without_the_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the rows have \['loss', 'step'\]"):
        plot_history([{"step": 1, "loss": 2.0}], tmp_path / "none.png")


def test_reliability_diagram(tmp_path):
    plot_reliability([0.6, 0.9], [True, False], tmp_path / "calibration.png")
    assert width_of(tmp_path / "calibration.png") == 660


def test_overoptimisation_is_drawn_against_the_root_of_kl(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: drawn.append((list(x), list(y))))
    monkeypatch.setattr(Axes, "legend", lambda *a, **k: None)
    plot_overoptimization([9.0, -0.01, 4.0], {"proxy": [3, 1, 2], "gold": [0, 1, 2]}, tmp_path / "kl.png")
    assert drawn == [([0, 2, 3], [1, 2, 3]), ([0, 2, 3], [1, 2, 0])]


def test_pareto_labels_stand_apart(tmp_path):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures = []
    save, Figure.savefig = Figure.savefig, lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    rows = [{"label": f"run number {i}", "alignment": 0.5 + i / 1e3, "capability": -2.0} for i in range(6)]
    rows += [{"label": "far", "alignment": 0.9, "capability": -3.0, "alignment_interval": (0.8, 0.95)}]
    try:
        plot_pareto(rows, tmp_path / "pareto.png", alignment="gold reward", capability="−NLL")
    finally:
        Figure.savefig = save
    (axes,) = figures[0].axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader lines
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert width_of(tmp_path / "pareto.png") == 1080


def test_many_runs_are_numbered_beside_a_pareto_front(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    rows = [{"label": f"run {i}", "alignment": i / 10, "capability": -i / 10} for i in range(9)]
    plot_pareto(rows, tmp_path / "pareto.png")
    key, *numbers = figures[0].axes[0].texts
    assert key.get_text().splitlines() == [f"{i}  run {i - 1}" for i in range(1, 10)]
    assert {text.get_text(): text.xy for text in numbers} == {str(i + 1): (i / 10, -i / 10) for i in range(9)}


def test_mixture_has_a_line_for_each_task(tmp_path):
    rows = [{"task": f"task {i} " * 8, "share": 0.1, "epochs": i} for i in range(2)]
    plot_mixture(rows, tmp_path / "two.png")
    plot_mixture([row | {"token_share": 0.1} for row in rows * 3], tmp_path / "six.png")
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("two", "six")]
    heights = [struct.unpack(">I", png[20:24])[0] for png in pictures]
    assert heights == pytest.approx([150 * (1.4 + 0.48), 150 * (1.4 + 1.44)], abs=2)
