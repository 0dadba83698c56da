"""What the figures share: reading metrics.jsonl, one colour a method, curves with their spread over seeds."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {"ce": "#D55E00", "replay": "#0072B2", "mol": "#009E73"}
WIDTHS = {"replay": 5.0, "mol": 2.0}  # so that both show where they lie on each other
SPARE = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # for methods of your own

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                     "savefig.dpi": 150, "figure.constrained_layout.use": True})


def read(path):
    """metrics.jsonl -> {method: {step: [one row a seed]}}."""
    with open(path) as file:
        return by_step(map(json.loads, file))


def colour(method, methods):
    others = [name for name in methods if name not in COLOURS and name != "base"]
    return COLOURS.get(method) or SPARE[others.index(method) % len(SPARE)]


def general(row):
    """The mean exact match over the general skills, 0 to 1."""
    return mean(share for skill, share in row["accuracy"].items() if skill != "domain")


KEPT_AND_LEARNT = {"general skills kept: exact answers, %": lambda row: 100 * general(row),
                   "domain learnt: exact answers, %": lambda row: 100 * row["accuracy"]["domain"]}


def by_step(rows):
    """Rows of metrics -> {method or label: {step: [one row a seed]}}."""
    methods = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods[row["method"]][row["step"]].append(row)
    return {method: dict(steps) for method, steps in methods.items()}


def last(rows):
    """Rows of a sweep -> {label: [each seed's last row]}."""
    ends = {(row["method"], row["seed"]): row for row in rows}
    labels = defaultdict(list)
    for (label, _), row in ends.items():
        labels[label].append(row)
    return labels


def title(what, ends):
    """The message of a figure, with the numbers read off the metrics: ends {name: [each seed's row]}."""
    return what + ": " + ", ".join(f"{name} {mean(map(general, rows)):.0%}" for name, rows in ends.items())


def save(figure, picture, rows, remark="bands: lowest to highest"):
    """Say what was averaged, and write the file."""
    seeds = len({row["seed"] for row in rows})
    figure.supxlabel((f"the mean of {seeds} seeds; " if seeds > 1 else "one seed; ") + remark, fontsize=10, color="dimgrey")
    figure.savefig(picture)
    plt.close(figure)


def curve(axes, points, colour, width, **line):
    """The mean over seeds as a line, the lowest to the highest as a band; points {step: [one value a seed]}."""
    steps = list(points)
    axes.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=colour, alpha=0.2, lw=0)
    axes.plot(steps, [mean(points[s]) for s in steps], color=colour, lw=width, **line)


def dots(axes, points, colour, label):
    """The mean over seeds as a dot, the lowest to the highest as a line through it; points {height: [one value a seed]}."""
    heights = list(points)
    axes.hlines(heights, [min(points[h]) for h in heights], [max(points[h]) for h in heights], color=colour, lw=2)
    axes.plot([mean(points[h]) for h in heights], heights, color=colour, marker="o", ms=7, ls="none", label=label)


def label_ends(axes, ends, apart=0.07):
    """Names beside the right end of the curves, moved apart where they would touch; ends {name: (colour, y)}."""
    low, high = axes.get_ylim()
    height = {name: (y - low) / (high - low) for name, (_, y) in ends.items()}  # 0 at the bottom, 1 at the top
    ceiling = 1.0 + apart
    for name in sorted(ends, key=height.get, reverse=True):
        ceiling = min(height[name], ceiling - apart)
        axes.text(1.03, ceiling, name, color=ends[name][0], transform=axes.transAxes, va="center", fontweight="bold")


def message(methods, base, marked):
    """The figure's title, read off the metrics: what each method ends with, the mean over seeds."""
    ends = {method: list(steps.values())[-1] for method, steps in methods.items()}
    if marked:
        return "General skills, exact answers: " + ", ".join(
            f"{method} {mean(map(general, rows)):.0%}" for method, rows in {"base": base, **ends}.items())

    def loss(rows):
        return mean(row["general_loss"] for row in rows)

    return "General loss, nats above the base: " + ", ".join(
        f"{method} {loss(rows) - loss(base):+.2f}" for method, rows in ends.items())


def main(draw, script):
    """Command line of a figure: draw it from the metrics beside the script, or from those that are named."""
    parser = argparse.ArgumentParser(description="Draw a figure again from a metrics.jsonl.")
    parser.add_argument("metrics", nargs="?", type=Path, default=Path(script).with_name("metrics.jsonl"))
    parser.add_argument("picture", nargs="?", type=Path, help="default: beside the metrics")
    options = parser.parse_args()
    picture = options.picture or options.metrics.with_name(Path(script).stem + ".png")
    try:
        draw(options.metrics, picture)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        print(f"{Path(script).name}: cannot draw {options.metrics} as {picture}: {problem!r}", file=sys.stderr)
        sys.exit(2)
    print(picture)
