"""Noise against bias, and the budget: does replay come back from wrong answers with more training?

    python plots/budget.py        makes the runs that are missing, draws budget.png; --help

Seven answers in ten are wrong. As noise, another one each time: the right answer is still the most
frequent, so a perfect imitator of the text gives it 30% and answers rightly. As bias, the same
mistake every time: a perfect imitator gives the right answer 30% too, and answers wrongly. Each
point is a run of its own, its rate going down to zero at its last step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

STEPS = (150, 300, 600, 1200, 2400)
DOCUMENTS = {2_000: ":", 40_000: "-"}
METHODS = ("replay", "mol")
WRONG = 0.7
KINDS = {"noise": "another wrong answer each time", "bias": "the same mistake every time"}


def run(method, kind, documents, steps):
    return Run(method, {"general_errors": WRONG, "error_kind": kind, "steps": steps,
                        "general_documents": documents, "eval_every": steps})


RUNS = {f"{method}, {kind}, {documents:,} documents, {steps:,} steps":
        run(method, kind, documents, steps)
        for steps in STEPS for kind in KINDS for documents in DOCUMENTS for method in METHODS}


def draw(found, picture):
    values = {"exact answers, %": lambda row: 100 * style.general(row),
              "probability of the right answer, %": lambda row: 100 * style.probability(row),
              "KL to the base, nats per token": lambda row: row["kl_to_base"]}
    figure, lines = style.panels(2, 3, 12, 7, sharex=True)
    for line, (kind, meaning) in zip(lines, KINDS.items()):
        for panel, (of_what, value) in zip(line, values.items()):
            for method in METHODS:
                for documents, dashes in DOCUMENTS.items():
                    points = {steps: style.ends(found(run(method, kind, documents, steps)), value)
                              for steps in STEPS}
                    style.curve(panel, points, style.COLOURS[method], 2.4, marker="o", ls=dashes,
                                label=f"{method}, {documents:,} documents")
            panel.set_xscale("log")
            panel.set_xticks(STEPS, [f"{steps:,}" for steps in STEPS])
            panel.minorticks_off()
            panel.set_ylabel(of_what)
            panel.grid(axis="y", alpha=0.25)
        for panel, imitator in zip(line, (100 * (kind == "noise"), 100 * (1 - WRONG))):
            panel.set_ylim(-4, 104)
            panel.axhline(imitator, color="black", lw=1, ls="--")
            panel.text(STEPS[0], 88 if imitator == 100 else imitator + 2,
                       "dashed: a perfect imitator", fontsize=9)
        line[0].set_title(f"{kind}: {meaning}", fontweight="bold")
    highest = max(line[2].get_ylim()[1] for line in lines)
    for line in lines:
        line[2].set_ylim(0, highest)
    for panel in lines[1]:
        panel.set_xlabel("steps on the domain, a run for each")
    lines[1][0].legend(loc="center right", frameon=False, fontsize=9)
    longest = {f"{method} on {kind}": style.last(found(run(method, kind, 40_000, STEPS[-1])))
               for method in METHODS for kind in KINDS}
    what = style.title(f"General skills answered exactly after {STEPS[-1]:,} steps on 40,000 "
                       "documents", longest)
    style.save(figure, picture, what, style.spread(len(longest["mol on bias"])))


if __name__ == "__main__":
    ask("budget", RUNS, draw, __doc__)
