"""The look of all figures: colours, curves, labels, and saving. Sets matplotlib defaults."""

import io
import os
from contextlib import suppress
from pathlib import Path
from statistics import mean

backend = os.environ.pop("MPLBACKEND", None)  # a notebook's may be missing in a program it starts
import matplotlib  # noqa: E402
if backend:
    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
from matplotlib.figure import Figure  # noqa: E402

from eval import write_file  # noqa: E402
from plots.tables import ends  # noqa: E402

# One colour, one meaning, from palettes for colour-blind readers (Okabe and Ito, Tol).
COLOURS = {"base": "#000000", "ce": "#D55E00", "replay": "#0072B2",
           "replay, right answers": "#56B4E9", "mol": "#009E73"}
SKILL_COLOURS = {"domain": "#AA3377", "facts": "#CCAA33", "think": "#888888",
                 "no_think": "#222222"}

matplotlib.rcParams.update({
    "font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.titlelocation": "left", "axes.titlesize": 12, "grid.alpha": 0.25, "savefig.dpi": 150,
    "figure.constrained_layout.use": True})


def colour_of(label):
    """The colour of the method with which a label begins; grey if it has none."""
    known = [method for method in COLOURS
             if f"{label.removeprefix('LoRA ')},".startswith(f"{method},")]
    return COLOURS[max(known, key=len)] if known else "dimgrey"


def panels(rows, columns, width, height, **options):
    """A figure in inches -> (figure, axes[row][column])."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def curve(axes, points, colour, width=2.4, **line):
    """The mean and range over seeds as a line and a band, points {x: [values]} -> the last mean."""
    x = list(points)
    axes.fill_between(x, [min(points[at]) for at in x], [max(points[at]) for at in x],
                      color=colour, alpha=0.2, lw=0)
    axes.plot(x, [mean(points[at]) for at in x], color=colour, lw=width, **line)
    return mean(points[x[-1]])


def sweep(axes, lines, value, label=True):
    """Curves of the last rows, {label: (colour, line style, {x: rows of each seed})}."""
    last = {}
    for name, (colour, dashes, points) in lines.items():
        points = {x: ends(seeds, value) for x, seeds in points.items()}
        last[name] = colour, curve(axes, points, colour, marker="o", ms=5, ls=dashes)
    if label:
        label_ends(axes, last)


def label_ends(axes, last, apart=0.08):
    """Names beside the ends of curves, moved apart if they touch; last {name: (colour, y)}."""
    axes.get_ylim()  # else the limits may not be up to date
    to_axes = axes.transScale + axes.transLimits
    height = {name: to_axes.transform((1, y))[1] for name, (_, y) in last.items()}
    highest = 1.0 + apart
    for name in sorted(last, key=height.get, reverse=True):
        highest = min(height[name], highest - apart)
        axes.text(1.02, highest, name, color=last[name][0], transform=axes.transAxes, va="center",
                  fontweight="bold")


def seeds_note(count):
    return "one seed" if count == 1 else f"mean of {count} seeds, with the lowest and the highest"


def save(figure, picture, title, note):
    """Write the figure with its finding as the title. The file name decides the format."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=10, color="dimgrey")
    content = io.BytesIO()
    figure.savefig(content, format=Path(picture).suffix[1:])
    write_file(picture, content.getvalue())
