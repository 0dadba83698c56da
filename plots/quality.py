"""How many answers of the general text can be wrong, and in which way?"""

from plots import runs, style
from plots.runs import Run
from plots.tables import ends, kept, p_right

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
METHODS = ("replay", "mol")
KINDS = {"noise": "noise: a new wrong answer each time", "bias": "bias: always the same one"}


def run(method, share, kind):
    """Without wrong answers both kinds are the same run."""
    return Run(method, {"general_errors": share, **({"error_kind": kind} if share else {})})


RUNS = {f"{method}, {share:.0%} {kind if share else 'wrong'}": run(method, share, kind)
        for kind in KINDS for share in SHARES for method in METHODS}


def draw(results, picture):
    figure, rows = style.panels(2, 2, 10, 6.4, sharex=True, sharey=True)
    for axes, kind in zip(rows, KINDS):
        for panel, (of_what, value) in zip(axes, (("exact answers, %", kept),
                                                  ("p(right), %", p_right))):
            last = {}
            for method in METHODS:
                points = {100 * share: ends(results(run(method, share, kind)), value)
                          for share in SHARES}
                colour = style.COLOURS[method]
                last[method] = colour, style.curve(panel, points, colour, marker="o")
            panel.set(ylabel=of_what)
        axes[0].set_title(KINDS[kind], fontweight="bold")
        axes[1].axline((0, 100), (100, 0), color="black", lw=1, ls="--")
        style.label_ends(axes[1], last)
    for panel in rows[1]:
        panel.set_xlabel("wrong answers in the general text, %")
    style.save(figure, picture, "Replay imitates wrong answers, mol does not",
               f"{style.seeds_note(len(results(run('mol', 0.0, 'bias'))))}; dashed: the share of "
               "right answers in the text")


if __name__ == "__main__":
    runs.main("quality", RUNS, draw, __doc__)
