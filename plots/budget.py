"""Does replay recover from wrong answers with more training and more text?

70% of the answers are wrong. Each point is a run of its own. Its learning rate decays to nearly
zero at its last step.
"""

from plots import runs, style
from plots.quality import KINDS, METHODS
from plots.runs import Run
from plots.tables import kept, of, p_right, sweep_table

STEPS = (150, 300, 600, 1200, 2400)
DOCUMENTS = {2_000: ":", 40_000: "-"}


def run(method, kind, documents, steps):
    return Run(method, {"general_errors": 0.7, "error_kind": kind, "steps": steps,
                        "general_documents": documents, "eval_every": steps})


def points(results, method, kind, documents):
    return {steps: results(run(method, kind, documents, steps)) for steps in STEPS}


RUNS = {f"{method}, {kind}, {documents:,} documents, {steps:,} steps":
        run(method, kind, documents, steps)
        for steps in STEPS for kind in KINDS for documents in DOCUMENTS for method in METHODS}


def tell(results):
    lines = {f"{method}, {kind}, {documents:,} documents":
             (points(results, method, kind, documents), kept, 0)
             for method in METHODS for kind in KINDS for documents in DOCUMENTS}
    for title, value, digits in (("p(right)", p_right, 0), ("KL", of("kl_to_base"), 2),
                                 ("domain loss", of("domain_loss"), 2)):
        lines |= {f"{title}: {method}, {kind}": (points(results, method, kind, 40_000), value,
                                                 digits)
                  for method in METHODS for kind in KINDS}
    return sweep_table("steps", lines, "{:,}".format)


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4.2, sharey=True)
    for panel, kind in zip(axes, KINDS):
        panel.set(xscale="log", xlabel="steps", title=KINDS[kind])
        style.sweep(panel, {f"{method} {documents // 1000}k": (
            style.COLOURS[method], dashes, points(results, method, kind, documents), kept)
            for method in METHODS for documents, dashes in DOCUMENTS.items()},
            label=panel is axes[1])
        panel.set_xticks(STEPS, [f"{steps:,}" for steps in STEPS])
        panel.minorticks_off()
    axes[0].set_ylabel("general skills: exact answers, %")
    style.save(figure, picture, "More text and training together help replay on noise, not on bias",
               f"{note}; solid: 40,000 general documents, dotted: 2,000")


if __name__ == "__main__":
    runs.main("budget", RUNS, draw, __doc__, tell, defaults=runs.FEW_SEEDS)
