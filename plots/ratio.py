"""How much general text is needed per domain text?

Replay reads right answers here, so that only the amount matters to it. MoL reads 70% wrong ones.
The left panel adds general text to the same domain text. In the right panel the total is fixed.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import ends, kept

RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
DOMAIN, TOTAL = 16, 32  # domain sequences per step, or sequences in total
METHODS = {"replay, right answers": ("replay", {"general_errors": 0.0}),
           "mol, 70% wrong": ("mol", {"general_errors": 0.7})}
COLOURS = {"replay, right answers": style.COLOURS["replay, right answers"],
           "mol, 70% wrong": style.COLOURS["mol"]}


def same_domain(ratio):
    return {"batch_size": DOMAIN, "ratio": ratio}


def same_total(ratio):
    """The whole numbers of sequences that come closest to the ratio."""
    domain = round(TOTAL / (1 + ratio))
    return {"batch_size": domain, "ratio": (TOTAL - domain) / domain}


BUDGETS = {"same domain text": same_domain, "same total": same_total}
WITHOUT = {"same domain text": Run("ce", {"batch_size": DOMAIN}),
           "same total": Run("ce", {"batch_size": TOTAL})}


def run(name, ratio, budget):
    method, settings = METHODS[name]
    return Run(method, settings | BUDGETS[budget](RATIOS[ratio]))


RUNS = {f"{name}, {ratio}, {budget}": run(name, ratio, budget)
        for budget in BUDGETS for ratio in RATIOS for name in METHODS}
RUNS |= {f"ce, {budget}": WITHOUT[budget] for budget in BUDGETS}


def draw(results, picture):
    figure, (axes,) = style.panels(1, 2, 10, 4, sharey=True)
    for panel, budget in zip(axes, BUDGETS):
        last = {}
        for name in METHODS:
            seeds = [results(WITHOUT[budget])] + [results(run(name, ratio, budget))
                                                  for ratio in RATIOS]
            points = {i: ends(rows, kept) for i, rows in enumerate(seeds)}
            last[name] = COLOURS[name], style.curve(panel, points, COLOURS[name], marker="o")
        panel.set_xticks(range(len(RATIOS) + 1), ["0", *RATIOS])
        panel.set(title=budget, xlabel="general to domain sequences")
    axes[0].set_ylabel("general skills: exact answers, %")
    style.label_ends(axes[1], last)
    style.save(figure, picture, "One general sequence per domain sequence is enough",
               style.seeds_note(len(seeds[0])))


if __name__ == "__main__":
    runs.main("ratio", RUNS, draw, __doc__)
