"""Does replay recover from wrong answers with more training and more text?

Each point is a run of its own. Its learning rate decays to nearly zero at its last step.
"""

from plots import runs, style
from plots.quality import KINDS
from plots.runs import Run
from plots.tables import kept, kl, p_right

STEPS = (150, 300, 600, 1200, 2400)
DOCUMENTS = {2_000: ":", 40_000: "-"}
METHODS = ("replay", "mol")


def run(method, kind, documents, steps):
    return Run(method, {"general_errors": 0.7, "error_kind": kind, "steps": steps,
                        "general_documents": documents, "eval_every": steps})


RUNS = {f"{method}, {kind}, {documents:,} documents, {steps:,} steps":
        run(method, kind, documents, steps)
        for steps in STEPS for kind in KINDS for documents in DOCUMENTS for method in METHODS}


def draw(results, picture, note):
    values = {"exact answers, %": kept, "p(right), %": p_right, "KL to the base, nats": kl}
    figure, rows = style.panels(2, 3, 10, 6.4, sharex=True, sharey="col")
    for axes, kind in zip(rows, KINDS):
        for panel, (of_what, value) in zip(axes, values.items()):
            panel.set(xscale="log", ylabel=of_what)
            style.sweep(panel, {f"{method} {documents // 1000}k": (
                style.COLOURS[method], dashes,
                {steps: results(run(method, kind, documents, steps)) for steps in STEPS}, value)
                for method in METHODS for documents, dashes in DOCUMENTS.items()},
                label=panel is axes[2])
            panel.set_xticks(STEPS, [f"{steps:,}" for steps in STEPS], fontsize=10, rotation=30)
            panel.minorticks_off()
        axes[0].set_title(KINDS[kind], fontweight="bold")
    for panel in rows[1]:
        panel.set_xlabel("steps")
    style.save(figure, picture, "More text and training together help replay on noise, not on bias",
               f"{note}; solid: 40,000 general documents, dotted: 2,000")


if __name__ == "__main__":
    runs.main("budget", RUNS, draw, __doc__, defaults=runs.FEW_SEEDS)
