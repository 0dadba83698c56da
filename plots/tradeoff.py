"""The trade-off: each method's path from the base, domain gained (right), general skill kept (up).

    python plots/tradeoff.py out/metrics.jsonl [picture.png]
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style


def draw(rows, picture, remark=""):
    """Thick: the mean over seeds, with a dot at each evaluation. Thin: each seed."""
    methods = style.by_step(rows)
    base = methods.pop("base")[0]
    marked = bool(base[0]["accuracy"])

    def place(row):
        if marked:
            return 100 * row["accuracy"]["domain"], 100 * style.general(row)
        return row["domain_loss"], row["general_loss"]

    def middle(places):
        return tuple(mean(values) for values in zip(*places))

    figure, ((axes,),) = style.panels(1, 1, 7.2, 5.2)
    ends = {}
    for method, steps in methods.items():
        colour = style.colour(method, methods)
        places = [[place(row) for row in seeds] for seeds in steps.values()]  # [evaluation][seed]
        for seed in zip(*places):
            axes.plot(*zip(*seed), color=colour, lw=0.8, alpha=0.35)
        means = [middle(seeds) for seeds in places]
        axes.plot(*zip(*means), color=colour, lw=2.4, marker="o", ms=4)
        axes.plot(*means[-1], color=colour, marker="o", ms=9)
        ends[method] = colour, means[-1][1]
    start = middle(map(place, base))
    axes.plot(*start, color="black", marker="*", ms=14, ls="none")
    axes.annotate("base", start, xytext=(0, 12), textcoords="offset points", ha="center",
                  fontweight="bold")
    if marked:
        axes.set(xlabel="domain learnt: exact answers, %", xlim=(-5, 104), ylim=(-5, 112),
                 ylabel="general skills kept: exact answers, mean of three, %")
    else:
        axes.set(xlabel="held-out domain loss, nats per token (better to the right)",
                 ylabel="held-out general loss, nats per token (better upwards)")
        axes.invert_xaxis()
        axes.invert_yaxis()
        axes.margins(0.12)
    style.label_ends(axes, ends)
    axes.grid(alpha=0.25)
    thin = f"thin: each of {len(base)} seeds" if len(base) > 1 else "one seed"
    style.save(figure, picture, style.message(methods, base, marked, remark),
               f"a dot at each evaluation; {thin}")


if __name__ == "__main__":
    style.main(draw, __file__)
