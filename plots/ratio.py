"""How much general text beside the domain text? From none to four general sequences for each domain one.

    python plots/ratio.py        the runs that are missing, ratio.jsonl, ratio.png; --help lists the settings

General text is not free, so the question is asked twice: with the same domain text for every ratio, the general text on
top; and with the same text in all, where general sequences take the place of domain ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.style import plt
from plots.sweep import Run, main

RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}  # general to domain
DOMAIN, TOTAL = 16, 32  # sequences a step: of the domain in the first budget, in all in the second


def same_total(ratio):
    """Domain and general sequences that add up to TOTAL, as near to the ratio as whole sequences allow."""
    domain = round(TOTAL / (1 + ratio))
    return {"batch_size": domain, "ratio": (TOTAL - domain) / domain}


BUDGETS = {"same domain text": lambda ratio: {"batch_size": DOMAIN, "ratio": ratio}, "same text in all": same_total}
RUNS = [Run(f"{method}, {name}, {budget}", method, settings(ratio))
        for budget, settings in BUDGETS.items() for name, ratio in RATIOS.items() for method in ("replay", "mol")]
RUNS += [Run("ce, same domain text", "ce", {"batch_size": DOMAIN}), Run("ce, same text in all", "ce", {"batch_size": TOTAL})]


def draw(rows, picture):
    last = style.last(rows)
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 7), sharex=True, sharey=True)
    for line, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for panel, budget in zip(line, BUDGETS):
            for method in ("replay", "mol"):
                points = {0: list(map(value, last[f"ce, {budget}"]))}
                points |= {i: list(map(value, last[f"{method}, {name}, {budget}"])) for i, name in enumerate(RATIOS, 1)}
                style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method], marker="o", label=method)
            panel.grid(axis="y", alpha=0.25)
        line[0].set_ylabel(of_what)
    for panel, budget in zip(panels[0], BUDGETS):
        panel.set_title(budget, fontweight="bold")
    for panel in panels[1]:
        panel.set_xticks(range(7), ["0", *RATIOS])
        panel.set_xlabel("general to domain sequences")
    panels[0][1].legend(loc="lower right", frameon=False)
    figure.suptitle(style.title("At one general sequence to eight, on the same domain text, general skills answered exactly", {
        method: last[f"{method}, 1:8, same domain text"] for method in ("replay", "mol")}), x=0.01, ha="left")
    style.save(figure, picture, rows)


if __name__ == "__main__":
    sys.exit(main("ratio", RUNS, draw, __doc__))
