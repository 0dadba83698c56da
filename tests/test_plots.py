import json
import subprocess
import sys
from pathlib import Path

import pytest

from plots import forgetting, style, tradeoff

PLOTS = Path(__file__).parent.parent / "plots"


def write_metrics(path, marked, seeds=(0, 1)):
    """A base at 100% and 1 nat; ce ends at 0% and 3 nats, mol at 90% and 1.1 nats, seed 1 a little apart."""
    rows = []
    for seed in seeds:
        for method, share, loss in [("base", 1.0, 1.0), ("ce", 0.0, 3.0), ("mol", 0.9, 1.1)]:
            for step in (0,) if method == "base" else (0, 10, 20):
                t = step / 20
                accuracy = {skill: 1 + t * (share - 1) for skill in ("no_think", "think", "facts")} | {"domain": t}
                rows.append({"method": method, "seed": seed, "step": step, "general_loss": 1 + t * (loss - 1) + 0.02 * seed * t,
                             "domain_loss": 5 - 4 * t, "kl_to_base": t, "accuracy": accuracy if marked else {}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_title_tells_what_the_metrics_say(tmp_path):
    for marked, told in [(True, "General skills, exact answers: base 100%, ce 0%, mol 90%"),
                         (False, "General loss, nats above the base: ce +2.01, mol +0.11")]:
        methods = style.read(write_metrics(tmp_path / "metrics.jsonl", marked))
        assert style.message(methods, methods.pop("base")[0], marked) == told


@pytest.mark.parametrize("figure", [forgetting, tradeoff])
@pytest.mark.parametrize("marked", [True, False])
def test_each_figure_from_metrics_alone(tmp_path, figure, marked):
    picture = tmp_path / "picture.png"
    figure.draw(write_metrics(tmp_path / "metrics.jsonl", marked), picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_a_curve_shows_the_mean_and_the_spread_over_seeds():
    figure, axes = style.plt.subplots()
    style.curve(axes, {0: [1, 1, 1], 10: [2, 3, 7]}, "black", 2)
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [10, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({tuple(corner) for corner in band.tolist()}) == [(0, 1), (10, 2), (10, 7)]
    style.plt.close(figure)


def test_as_a_program(tmp_path):
    metrics = write_metrics(tmp_path / "metrics.jsonl", marked=True)

    def program(*arguments):
        return subprocess.run([sys.executable, PLOTS / "forgetting.py", *arguments], cwd=tmp_path, capture_output=True, text=True)

    assert program(metrics).returncode == 0 and (tmp_path / "forgetting.png").exists()
    metrics.write_text('{"method": "ba')
    refused = program(metrics)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_labels_stand_beside_their_curves_and_never_touch():
    figure, axes = style.plt.subplots()
    for low, high in [(0, 1), (1, 0)]:  # an axis may be upside down
        axes.clear()
        axes.set_ylim(low, high)
        style.label_ends(axes, {"a": ("black", 0.5), "b": ("black", 0.51), "c": ("black", 0.1)}, apart=0.1)
        placed = {text.get_text(): text.get_position()[1] for text in axes.texts}
        assert placed["c"] == pytest.approx(0.1 if low == 0 else 0.9)
        assert abs(placed["a"] - placed["b"]) == pytest.approx(0.1)
        assert (placed["b"] > placed["a"]) == (low == 0)
    style.plt.close(figure)
