"""How much general text is needed per domain text?

Both methods read right answers. On the left, general text is added to the same domain text. On the
right the total is fixed, and the ratios are the nearest in whole numbers: 1:8 is 4:28, 4:1 is 26:6.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import differences_table, domain_loss, kept, metrics_table

RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
DOMAIN, TOTAL = 16, 32  # domain sequences per step, or sequences in total
METHODS = ("replay", "mol")
COLOURS = style.COLOURS | {"replay": style.COLOURS["replay, right answers"]}


def same_domain(ratio):
    return {"batch_size": DOMAIN, "ratio": ratio}


def same_total(ratio):
    """The whole numbers of sequences that come closest to the ratio."""
    domain = round(TOTAL / (1 + ratio))
    return {"batch_size": domain, "ratio": (TOTAL - domain) / domain}


BUDGETS = {"same domain text": same_domain, "same total": same_total}


def run(method, ratio, budget):
    return Run(method, {"general_errors": 0.0, **BUDGETS[budget](RATIOS[ratio])})


RUNS = {f"{name}, {ratio}, {budget}": run(name, ratio, budget)
        for budget in BUDGETS for ratio in RATIOS for name in METHODS}


def tell(results):
    """The usual table, and how 1:2, 2:1 and 4:1 differ from 1:1."""
    tables = [metrics_table(runs.labelled(results, RUNS))]
    for name in (f"{method}, {{}}, {budget}" for budget in BUDGETS for method in METHODS):
        alike = {name.format(ratio): RUNS[name.format(ratio)] for ratio in list(RATIOS)[2:]}
        tables.append(differences_table(results, alike, name.format("1:1")))
    return "\n\n".join(tables)


def draw(results, picture, note):
    figure, rows = style.panels(2, 2, 10, 6.4, sharex=True, sharey="row")
    values = ((kept, "general skills:\nexact answers, %"),
              (domain_loss, "domain loss,\nnats per token"))
    for panel, budget in zip(rows[0], BUDGETS):
        panel.set_title(budget)
    for axes, (value, of_what) in zip(rows, values):
        axes[0].set_ylabel(of_what)
        for panel, budget in zip(axes, BUDGETS):
            style.sweep(panel, {method: (COLOURS[method], "-", {
                i: results(run(method, ratio, budget)) for i, ratio in enumerate(RATIOS)}, value)
                for method in METHODS}, label=panel is axes[1])
            panel.set_xticks(range(len(RATIOS)), RATIOS)
    for panel in rows[1]:
        panel.set_xlabel("general to domain sequences")
    style.save(figure, picture, "1:1 keeps the skills; at 4:1 the domain is learnt less", note)


if __name__ == "__main__":
    runs.main("ratio", RUNS, draw, __doc__, tell)
