"""The forgetting curves: one panel a method, what it learns and what it loses against the steps on domain text.

    python plots/forgetting.py [metrics.jsonl [picture.png]]      default: the committed metrics beside this file
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script, from any folder
from plots import style
from plots.style import plt

# What is drawn: its label, colour and width. The widths differ so that lines on top of each other all show.
SKILLS = {"domain": ("domain", "#D55E00", 2.4), "facts": ("facts", "#56B4E9", 5.0),
          "think": ("think sums", "#0072B2", 3.2), "no_think": ("no-think sums", "#000000", 1.4)}
LOSSES = {"domain_loss": ("domain text", "#D55E00", 2.4), "general_loss": ("general text", "#0072B2", 2.4)}


def draw(metrics, picture):
    """Metrics with accuracies give curves of exact match; those of your own text give held-out losses."""
    methods = style.read(metrics)
    base = methods.pop("base")[0]
    marked = bool(base[0]["accuracy"])
    lines = SKILLS if marked else LOSSES

    def value(row, name):
        return 100 * row["accuracy"][name] if marked else row[name]

    figure, panels = plt.subplots(1, len(methods), figsize=(3.6 * len(methods) + 1, 4.2), sharey=True, squeeze=False)
    for panel, (method, steps) in zip(panels[0], methods.items()):
        for name, (_, colour, width) in lines.items():
            style.curve(panel, {step: [value(row, name) for row in rows] for step, rows in steps.items()}, colour, width)
            panel.axhline(mean(value(row, name) for row in base), color=colour, lw=1, ls="--", alpha=0.7)
        panel.set_title(method, fontweight="bold")
        panel.set_xlabel("steps on the domain")
        panel.grid(axis="y", alpha=0.25)
        panel.margins(x=0.02)
    panels[0][0].set_ylabel("exact answers, %" if marked else "held-out loss, nats per token")
    style.label_ends(panels[0][-1], {label: (colour, mean(value(row, name) for row in list(steps.values())[-1]))
                                     for name, (label, colour, _) in lines.items()})
    seeds = f", curves: the mean of {len(base)} seeds, bands: lowest to highest" if len(base) > 1 else ""
    figure.supxlabel("dashed: the base" + seeds, fontsize=10, color="dimgrey")
    figure.suptitle(style.message(methods, base, marked), x=0.01, ha="left", wrap=True)
    figure.savefig(picture)
    plt.close(figure)


if __name__ == "__main__":
    style.main(draw, __file__)
