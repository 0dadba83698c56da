import json
import subprocess
import sys
from pathlib import Path

import pytest

from plots import forgetting, style, tradeoff

PLOTS = Path(__file__).parent.parent / "plots"


def made_up(marked, seeds=(0, 1)):
    """A base at 100% and 1 nat; ce ends at 0% and 3 nats, mol at 90% and 1.1; two seeds differ."""
    rows = []
    for seed in seeds:
        for method, share, loss in [("base", 1.0, 1.0), ("ce", 0.0, 3.0), ("mol", 0.9, 1.1)]:
            for step in (0,) if method == "base" else (0, 10, 20):
                t = step / 20
                accuracy = dict.fromkeys(("no_think", "think", "facts"), 1 + t * (share - 1))
                rows.append({
                    "method": method, "seed": seed, "step": step, "domain_loss": 5 - 4 * t,
                    "general_loss": 1 + t * (loss - 1) + 0.02 * seed * t, "kl_to_base": t,
                    "accuracy": accuracy | {"domain": t} if marked else {},
                    "probability": accuracy | {"domain": t} if marked else {}})
    return rows


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up(marked=True)))
    return path


def test_the_title_tells_what_the_metrics_say():
    for marked, told in [
            (True, "General skills, exact answers (half wrong): base 100%; ce 0%; mol 90%"),
            (False, "General loss, nats above the base: ce +2.01, mol +0.11")]:
        methods = style.by_step(made_up(marked))
        base = methods.pop("base")[0]
        assert style.message(methods, base, marked, " (half wrong)") == told


@pytest.mark.parametrize("figure", [forgetting, tradeoff])
@pytest.mark.parametrize("marked", [True, False])
def test_each_figure_from_metrics_alone(tmp_path, figure, marked):
    picture = tmp_path / "picture.png"
    figure.draw(made_up(marked), picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_a_curve_shows_the_mean_and_the_spread_over_seeds():
    _, ((axes,),) = style.panels(1, 1, 3, 3)
    style.curve(axes, {0: [1, 1, 1], 10: [2, 3, 7]}, "black", 2)
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [10, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({tuple(corner) for corner in band.tolist()}) == [(0, 1), (10, 2), (10, 7)]


def test_as_a_program(tmp_path, metrics):
    def program(*arguments):
        return subprocess.run([sys.executable, PLOTS / "forgetting.py", *arguments], cwd=tmp_path,
                              capture_output=True, text=True)

    assert program(metrics).returncode == 0 and (tmp_path / "forgetting.png").exists()
    metrics.write_text('{"method": "ba')
    for refused in (program(metrics), program(), program("--foo"), program("nowhere.jsonl")):
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, metrics):
    limited = f"ulimit -f 8; exec {sys.executable} {PLOTS / 'forgetting.py'} {metrics}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_labels_stand_beside_their_curves_and_never_touch():
    for low, high in [(0, 1), (1, 0)]:  # an axis may be upside down
        _, ((axes,),) = style.panels(1, 1, 3, 3)
        axes.set_ylim(low, high)
        ends = {"a": ("black", 0.5), "b": ("black", 0.51), "c": ("black", 0.1)}
        style.label_ends(axes, ends, apart=0.1)
        placed = {text.get_text(): text.get_position()[1] for text in axes.texts}
        assert placed["c"] == pytest.approx(0.1 if low == 0 else 0.9)
        assert abs(placed["a"] - placed["b"]) == pytest.approx(0.1)
        assert (placed["b"] > placed["a"]) == (low == 0)
