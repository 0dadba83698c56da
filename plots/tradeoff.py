"""The trade-off: each method's path in the plane of domain gained (right) against general skill kept (up).

    python plots/tradeoff.py [metrics.jsonl [picture.png]]      default: the committed metrics beside this file
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script, from any folder
from plots import style
from plots.style import plt


def draw(metrics, picture):
    """Thick: the mean over seeds, a dot an evaluation. Thin: each seed."""
    methods = style.read(metrics)
    base = methods.pop("base")[0]
    marked = bool(base[0]["accuracy"])

    def place(row):
        if marked:
            return 100 * row["accuracy"]["domain"], 100 * style.general(row)
        return row["domain_loss"], row["general_loss"]

    figure, axes = plt.subplots(figsize=(7.2, 5.2))
    ends = {}
    for method, steps in methods.items():
        colour = style.colour(method, methods)
        places = [[place(row) for row in rows] for rows in steps.values()]  # [marking][seed] (x, y)
        for seed in zip(*places):
            axes.plot(*zip(*seed), color=colour, lw=0.8, alpha=0.35)
        means = [tuple(mean(values) for values in zip(*seeds)) for seeds in places]
        axes.plot(*zip(*means), color=colour, lw=2.4, marker="o", ms=4)
        axes.plot(*means[-1], color=colour, marker="o", ms=9)
        ends[method] = colour, means[-1][1]
    start = tuple(mean(values) for values in zip(*map(place, base)))
    axes.plot(*start, color="black", marker="*", ms=14, ls="none")
    axes.annotate("base", start, xytext=(0, 12), textcoords="offset points", ha="center", fontweight="bold")
    if marked:
        axes.set(xlabel="domain learnt: exact answers, %", ylabel="general skills kept: exact answers, mean of three, %",
                 xlim=(-5, 104), ylim=(-5, 112))
    else:
        axes.set(xlabel="held-out domain loss, nats per token (better to the right)",
                 ylabel="held-out general loss, nats per token (better upwards)")
        axes.invert_xaxis()
        axes.invert_yaxis()
        axes.margins(0.12)
    style.label_ends(axes, ends)
    if len(base) > 1:
        figure.supxlabel(f"thick: the mean of {len(base)} seeds, a dot an evaluation; thin: each seed", fontsize=10, color="dimgrey")
    axes.grid(alpha=0.25)
    figure.suptitle(style.message(methods, base, marked), x=0.01, ha="left", wrap=True)
    figure.savefig(picture)
    plt.close(figure)


if __name__ == "__main__":
    style.main(draw, __file__)
