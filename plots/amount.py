"""How much general text is needed per domain text, and how few documents are enough?

All answers are right. The documents are read again and again. Each of these runs is also tested on
the text that it read and on 2,000 new documents, some of which it may have read too: the difference
is what it learnt by heart. The ratio changes in two ways: either general text is added to the same
domain text, or the total is fixed. Then the ratios are the nearest in whole numbers: 1:8 is 4:28.
"""

import random

import data
from eval import evaluate
from plots import runs
from plots.runs import Run
from plots.tables import SUMMARY, of, sweep_tables
from plots.texts import kinds_of, test_on_text, to_tokens
from train import continue_pretraining

DOCUMENTS = (30, 100, 300, 1000, 3000, 10_000)
RATIOS = {"1:8": 1 / 8, "1:4": 1 / 4, "1:2": 1 / 2, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
DOMAIN, TOTAL = 16, 32  # domain sequences per step, or sequences in total
METHODS = ("replay", "mol")
RIGHT = {"general_errors": 0.0}


def marked_on_seen(method, settings, seed, world, base):
    """A run that is also tested on the text that it read and on new text."""
    new = to_tokens(data.draw_text(kinds_of(seed), 2000, random.Random(f"unseen {seed}")), world)

    def test(model):
        return {**evaluate(model, base, world),
                **test_on_text("seen", model, base, world.general),
                **test_on_text("unseen", model, base, new)}

    return continue_pretraining(method, settings, seed, world, base, test)[1]


def of_documents(method, count):
    return Run(method, RIGHT | {"general_documents": count}, marked_on_seen)


def same_domain(method, ratio):
    return Run(method, RIGHT | {"batch_size": DOMAIN, "ratio": RATIOS[ratio]})


def same_total(method, ratio):
    """The whole numbers of sequences that come closest to the ratio."""
    domain = round(TOTAL / (1 + RATIOS[ratio]))
    return Run(method, RIGHT | {"batch_size": domain, "ratio": (TOTAL - domain) / domain})


SWEEPS = {"documents": (of_documents, DOCUMENTS), "same domain text": (same_domain, RATIOS),
          "same total": (same_total, RATIOS)}
RUNS = {f"{method}, {name} {x}": run(method, x)
        for name, (run, values) in SWEEPS.items() for x in values for method in METHODS}


def tell(results):
    tables, by_heart = [], {f"{what} on {text} text": (of(f"{text}_{what.lower()}"), 2)
                            for what in ("loss", "KL") for text in ("seen", "unseen")}
    for name, (run, values) in SWEEPS.items():
        lines = {method: {x: results(run(method, x)) for x in values} for method in METHODS}
        more = by_heart if name == "documents" else {}
        tables.append(sweep_tables(name, lines, columns=SUMMARY | more))
    return "\n\n".join(tables)


if __name__ == "__main__":
    runs.main("amount", RUNS, None, __doc__, tell)
