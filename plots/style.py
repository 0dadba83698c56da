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
SPARE = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # for methods of your own

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                     "savefig.dpi": 150, "figure.constrained_layout.use": True})


def read(path):
    """metrics.jsonl -> {method: {step: [one row a seed]}}."""
    methods = defaultdict(lambda: defaultdict(list))
    with open(path) as file:
        for line in file:
            row = json.loads(line)
            methods[row["method"]][row["step"]].append(row)
    return {method: dict(steps) for method, steps in methods.items()}


def colour(method, methods):
    others = [name for name in methods if name not in COLOURS and name != "base"]
    return COLOURS.get(method) or SPARE[others.index(method) % len(SPARE)]


def general(row):
    """The mean exact match over the general skills, 0 to 1."""
    return mean(share for skill, share in row["accuracy"].items() if skill != "domain")


def curve(axes, points, colour, width):
    """The mean over seeds as a line, the lowest to the highest as a band; points {step: [one value a seed]}."""
    steps = list(points)
    axes.fill_between(steps, [min(points[s]) for s in steps], [max(points[s]) for s in steps], color=colour, alpha=0.2, lw=0)
    axes.plot(steps, [mean(points[s]) for s in steps], color=colour, lw=width)


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
    except (OSError, ValueError, KeyError) as problem:
        print(f"{Path(script).name}: cannot draw {options.metrics} as {picture}: {problem!r}", file=sys.stderr)
        sys.exit(2)
    print(picture)
