"""How much general text is needed per domain text, and how few documents are enough?

All answers are right. The documents are read again and again. The ratio changes in two ways: either
general text is added to the same domain text, or the total is fixed. Then the ratios are the
nearest in whole numbers: 1:8 is 4:28, 4:1 is 26:6.
"""

from plots import runs
from plots.runs import Run
from plots.tables import SUMMARY, of, sweep_tables

DOCUMENTS = (30, 100, 300, 1000, 3000, 10_000)
RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
DOMAIN, TOTAL = 16, 32  # domain sequences per step, or sequences in total
METHODS = ("replay", "mol")


def of_documents(method, count):
    return Run(method, {"general_errors": 0.0, "general_documents": count})


def same_domain(method, ratio):
    return Run(method, {"general_errors": 0.0, "batch_size": DOMAIN, "ratio": RATIOS[ratio]})


def same_total(method, ratio):
    """The whole numbers of sequences that come closest to the ratio."""
    domain = round(TOTAL / (1 + RATIOS[ratio]))
    return Run(method, {"general_errors": 0.0, "batch_size": domain,
                        "ratio": (TOTAL - domain) / domain})


SWEEPS = {"documents": (of_documents, DOCUMENTS), "same domain text": (same_domain, RATIOS),
          "same total": (same_total, RATIOS)}
RUNS = {f"{method}, {name} {x}": run(method, x)
        for name, (run, values) in SWEEPS.items() for x in values for method in METHODS}


def tell(results):
    columns = SUMMARY | {"general loss": (of("general_loss"), 2)}
    return "\n\n".join(sweep_tables(name, {
        method: {x: results(run(method, x)) for x in values} for method in METHODS},
        columns=columns) for name, (run, values) in SWEEPS.items())


if __name__ == "__main__":
    runs.main("amount", RUNS, None, __doc__, tell)
