"""The forgetting curves: a panel per method, what it learns and what it loses along the steps.

    python plots/forgetting.py out/metrics.jsonl [picture.png]
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style

# What is drawn: its label, colour and width. The widths differ so that lines on each other all
# show.
SKILLS = {
    "domain": ("domain", "#D55E00", 2.4),
    "facts": ("facts", "#56B4E9", 5.0),
    "think": ("think sums", "#0072B2", 3.2),
    "no_think": ("no-think sums", "#000000", 1.4),
}
LOSSES = {
    "domain_loss": ("domain text", "#D55E00", 2.4),
    "general_loss": ("general text", "#0072B2", 2.4),
}


def draw(rows, picture, remark="", message=None):
    """Rows with accuracies give curves of exact match; those of your own text give held-out losses.

    The title is read off the rows, with the remark in it, unless there is another message.
    """
    methods = style.by_step(rows)
    base = methods.pop("base")[0]
    marked = bool(base[0]["accuracy"])
    lines = SKILLS if marked else LOSSES

    def value(row, name):
        return 100 * row["accuracy"][name] if marked else row[name]

    width = 3.6 * len(methods) + 1
    figure, (panels,) = style.panels(1, len(methods), width, 4.2, sharey=True)
    for panel, (method, steps) in zip(panels, methods.items()):
        for name, (_, colour, width) in lines.items():
            points = {step: [value(row, name) for row in seeds] for step, seeds in steps.items()}
            style.curve(panel, points, colour, width)
            level = mean(value(row, name) for row in base)
            panel.axhline(level, color=colour, lw=1, ls="--", alpha=0.7)
        panel.set_title(method, fontweight="bold")
        panel.set_xlabel("steps on the domain")
        panel.grid(axis="y", alpha=0.25)
        panel.margins(x=0.02)
    panels[0].set_ylabel("exact answers, %" if marked else "held-out loss, nats per token")
    ends = list(steps.values())[-1]
    style.label_ends(panels[-1], {label: (colour, mean(value(row, name) for row in ends))
                                  for name, (label, colour, _) in lines.items()})
    what = message or style.message(methods, base, marked, remark)
    style.save(figure, picture, what, f"dashed: the base; {style.spread(len(base))}")


if __name__ == "__main__":
    style.main(draw, __file__)
