"""How wrong may the general text be? From no wrong answer to nothing but wrong answers.

    python plots/quality.py        makes the runs that are missing, draws quality.png; --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
METHODS = ("replay", "mol")


def run(method, share):
    return Run(method, {"general_errors": share})


RUNS = {f"{method}, {share:.0%} wrong": run(method, share)
        for share in SHARES for method in METHODS}


def draw(found, picture):
    figure, (panels,) = style.panels(1, 2, 9.5, 4.4, sharey=True)
    for panel, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for method in METHODS:
            points = {100 * share: style.ends(found(run(method, share)), value) for share in SHARES}
            style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method], marker="o",
                        label=method)
        panel.set(xlabel="wrong answers in the general text, %", title=of_what, ylim=(-4, 104))
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("exact answers, %")
    panels[0].legend(loc="lower left", frameon=False)
    kept = {method: style.last(found(run(method, 1.0))) for method in METHODS}
    what = style.title("With every answer wrong, general skills answered exactly", kept)
    style.save(figure, picture, what, style.spread(len(kept["mol"])))


if __name__ == "__main__":
    ask("quality", RUNS, draw, __doc__)
