"""How wrong may the general text be, and in which way? From no wrong answer to nothing else.

    python plots/quality.py        makes the runs that are missing, draws quality.png; --help

Noise: a wrong answer is another one each time. Bias: it is the same mistake every time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
METHODS = ("replay", "mol")
KINDS = {"noise": "another wrong answer each time", "bias": "the same mistake every time"}


def run(method, share, kind):
    """Without errors they are of no kind: the same run serves both."""
    return Run(method, {"general_errors": share, **({"error_kind": kind} if share else {})})


RUNS = {f"{method}, {share:.0%} {kind if share else 'wrong'}": run(method, share, kind)
        for kind in KINDS for share in SHARES for method in METHODS}


def draw(found, picture):
    values = {"exact answers, %": lambda row: 100 * style.general(row),
              "probability of the right one, %": lambda row: 100 * style.probability(row)}
    figure, lines = style.panels(2, 2, 9.5, 7, sharex=True, sharey=True)
    for line, (kind, meaning) in zip(lines, KINDS.items()):
        for panel, (of_what, value) in zip(line, values.items()):
            for method in METHODS:
                points = {100 * share: style.ends(found(run(method, share, kind)), value)
                          for share in SHARES}
                style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method],
                            marker="o", label=method)
            panel.set(ylim=(-4, 104), ylabel=of_what)
            panel.grid(axis="y", alpha=0.25)
        line[1].axline((0, 100), (100, 0), color="black", lw=1, ls="--")
        line[0].set_title(f"{kind}: {meaning}", fontweight="bold")
    for panel in lines[1]:
        panel.set_xlabel("wrong answers in the general text, %")
    lines[0][1].text(38, 64, "dashed: a perfect imitator", fontsize=9)
    lines[0][0].legend(loc="lower left", frameon=False)
    kept = {method: style.last(found(run(method, 0.7, "bias"))) for method in METHODS}
    what = style.title("General skills answered exactly where 70% is biased", kept)
    style.save(figure, picture, what, style.spread(len(kept["mol"])))


if __name__ == "__main__":
    ask("quality", RUNS, draw, __doc__)
