"""How many answers of the general text can be wrong, and in which way?

With `bias` the wrong answer to a question is always the same, with `noise` it is new each time.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import kept, p_right, sweep_table

SHARES = (0.0, 0.1, 0.25, 0.5, 0.7, 0.85, 1.0)
KINDS = {"noise": "noise: a new wrong answer each time", "bias": "bias: always the same one"}
METHODS = ("replay", "mol")


def run(method, kind, share):
    """Without wrong answers both kinds are the same run."""
    return Run(method, {"general_errors": share, **({"error_kind": kind} if share else {})})


def points(results, method, kind):
    return {100 * share: results(run(method, kind, share)) for share in SHARES}


RUNS = {f"{method}, {kind}, {share:.0%} wrong": run(method, kind, share)
        for kind in KINDS for share in SHARES for method in METHODS}


def tell(results):
    return sweep_table("wrong answers", {
        f"{of_what}{method}, {kind}": (points(results, method, kind), value, 0)
        for of_what, value in (("", kept), ("p(right): ", p_right))
        for method in METHODS for kind in KINDS}, "{:.0f}%".format)


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4.2, sharey=True)
    for panel, kind in zip(axes, KINDS):
        panel.plot([0, 100], [100, 0], color="black", lw=1.4, ls="--")
        style.sweep(panel, {method: (style.COLOURS[method], "-", points(results, method, kind),
                                     kept) for method in METHODS}, label=panel is axes[1])
        panel.set(title=KINDS[kind], xlabel="wrong answers in the general text, %")
    axes[0].set_ylabel("general skills: exact answers, %")
    style.save(figure, picture, "The more answers are wrong, the less replay keeps; mol keeps 95%",
               f"{note}; dashed: the share of right answers in the text")


if __name__ == "__main__":
    runs.main("quality", RUNS, draw, __doc__, tell)
