"""How many answers of the general text can be wrong? Does replay recover with more training?

With `bias` the wrong answer to a question is always the same, with `noise` it is new each time.
Each point is a run of its own. Its learning rate decays to nearly zero at its last step.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import kept, sweep_tables

SHARES = (0.0, 0.1, 0.25, 0.5, 0.7, 0.85, 1.0)
KINDS = {"noise": "noise: a new wrong answer each time", "bias": "bias: always the same one"}
METHODS = ("replay", "mol")
STEPS = (150, 300, 600, 1200, 2400)  # at 70% wrong
DOCUMENTS = (2_000, 40_000)


def run(method, kind, share):
    """Without wrong answers both kinds are the same run."""
    return Run(method, {"general_errors": share, **({"error_kind": kind} if share else {}),
                        **({"eval_every": 250} if method == "replay" else {})})


def longer(method, kind, documents, steps):
    return Run(method, {"general_errors": 0.7, "error_kind": kind, "steps": steps,
                        "general_documents": documents, "eval_every": steps}, seeds=3)


RUNS = {f"{method}, {kind}, {share:.0%} wrong": run(method, kind, share)
        for kind in KINDS for share in SHARES for method in METHODS}
RUNS |= {f"{method}, {kind}, {documents:,} documents, {steps:,} steps":
         longer(method, kind, documents, steps)
         for steps in STEPS for kind in KINDS for documents in DOCUMENTS for method in METHODS}


def points(results, method, kind):
    return {100 * share: results(run(method, kind, share)) for share in SHARES}


def tell(results):
    wrong = {f"{method}, {kind}": points(results, method, kind)
             for method in METHODS for kind in KINDS}
    steps = {f"{method}, {kind}, {documents:,} documents": {
        at: results(longer(method, kind, documents, at)) for at in STEPS}
        for method in METHODS for kind in KINDS for documents in DOCUMENTS}
    return "\n\n".join([sweep_tables("wrong answers", wrong, "{:.0f}%".format),
                        sweep_tables("steps", steps, "{:,}".format)])


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4.2, sharey=True)
    for panel, kind in zip(axes, KINDS):
        panel.plot([0, 100], [100, 0], color="black", lw=1.4, ls="--")
        style.sweep(panel, {method: (style.COLOURS[method], "-", points(results, method, kind))
                            for method in METHODS}, kept, label=panel is axes[1])
        panel.set(title=KINDS[kind], xlabel="wrong answers in the general text, %")
    axes[0].set_ylabel("general skills: exact answers, %")
    style.save(figure, picture, "The more answers are wrong, the less replay keeps; mol keeps 95%",
               f"{note}; dashed: the share of right answers in the text")


if __name__ == "__main__":
    runs.main("quality", RUNS, draw, __doc__, tell)
