"""How wrong may the general text be? From no wrong answer to nothing but wrong answers.

    python plots/quality.py        the runs that are missing, quality.jsonl, quality.png; --help lists the settings
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.style import plt
from plots.sweep import Run, main

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
RUNS = [Run(f"{method}, {share:.0%} wrong", method, {"general_errors": share}) for share in SHARES for method in ("replay", "mol")]


def draw(rows, picture):
    last = style.last(rows)
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True)
    for panel, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for method in ("replay", "mol"):
            points = {100 * share: list(map(value, last[f"{method}, {share:.0%} wrong"])) for share in SHARES}
            style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method], marker="o", label=method)
        panel.set(xlabel="wrong answers in the general text, %", title=of_what, ylim=(-4, 104))
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("exact answers, %")
    panels[0].legend(loc="lower left", frameon=False)
    figure.suptitle(style.title("With every answer wrong, general skills answered exactly", {
        method: last[f"{method}, 100% wrong"] for method in ("replay", "mol")}), x=0.01, ha="left")
    style.save(figure, picture, rows)


if __name__ == "__main__":
    sys.exit(main("quality", RUNS, draw, __doc__))
