"""How much general text beside the domain text? From none to four general sequences a domain one.

    python plots/ratio.py        makes the runs that are missing, draws ratio.png; --help

General text is not free, so the question is asked twice: with the same domain text for every ratio,
the general text on top; and with the same text in all, where general sequences take the place of
domain ones. Replay reads right answers, or its share of wrong ones would be in question too; MoL
reads the default's, most of them wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
DOMAIN, TOTAL = 16, 32  # sequences per step: of the domain, or in all
METHODS = {"replay, right answers": ("replay", {"general_errors": 0.0}),
           "mol, 70% wrong": ("mol", {"general_errors": 0.7})}


def same_domain(ratio):
    return {"batch_size": DOMAIN, "ratio": ratio}


def same_total(ratio):
    """Sequences of both kinds that add up to TOTAL, as near to the ratio as whole ones allow."""
    domain = round(TOTAL / (1 + ratio))
    return {"batch_size": domain, "ratio": (TOTAL - domain) / domain}


BUDGETS = {"same domain text": same_domain, "same text in all": same_total}
WITHOUT = {"same domain text": Run("ce", {"batch_size": DOMAIN}),
           "same text in all": Run("ce", {"batch_size": TOTAL})}


def run(name, ratio, budget):
    method, settings = METHODS[name]
    return Run(method, settings | BUDGETS[budget](RATIOS[ratio]))


RUNS = {f"{name}, {ratio}, {budget}": run(name, ratio, budget)
        for budget in BUDGETS for ratio in RATIOS for name in METHODS}
RUNS |= {f"ce, {budget}": run for budget, run in WITHOUT.items()}


def draw(found, picture):
    figure, panels = style.panels(2, 2, 9.5, 7, sharex=True, sharey=True)
    for line, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for panel, budget in zip(line, BUDGETS):
            for name, (method, _) in METHODS.items():
                points = {0: style.ends(found(WITHOUT[budget]), value)}
                for i, ratio in enumerate(RATIOS, 1):
                    points[i] = style.ends(found(run(name, ratio, budget)), value)
                style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method],
                            marker="o", label=name)
            panel.grid(axis="y", alpha=0.25)
        line[0].set_ylabel(of_what)
    for panel, budget in zip(panels[0], BUDGETS):
        panel.set_title(budget, fontweight="bold")
    for panel in panels[1]:
        panel.set_xticks(range(len(RATIOS) + 1), ["0", *RATIOS])
        panel.set_xlabel("general to domain sequences")
    panels[0][1].legend(loc="lower right", frameon=False)
    kept = {name: style.last(found(run(name, "1:8", "same domain text"))) for name in METHODS}
    what = style.title("One general sequence to eight, general skills kept", kept)
    style.save(figure, picture, what, style.spread(len(kept["mol, 70% wrong"])))


if __name__ == "__main__":
    ask("ratio", RUNS, draw, __doc__)
