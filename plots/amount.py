"""How much general text is needed per domain text, and how few documents are enough?

All answers are right. The documents are read again and again. Each of these runs is also tested on
the text that it read and on 2,000 new documents, some of which it may have read too: the difference
is what it learnt by heart. With another ratio the total stays the same, so the ratios are the
nearest in whole numbers: 1:8 is 4:28.
"""

import random

import data
from eval import evaluate
from plots import runs
from plots.runs import Run
from plots.tables import domain_loss, kept, of, p_right, sweep_tables
from plots.texts import kinds_of, test_on_text, to_tokens
from train import continue_pretraining

DOCUMENTS = (30, 100, 300, 1000, 3000, 10_000)
RATIOS = {"1:8": 28, "1:4": 26, "1:2": 21, "1:1": 16, "2:1": 11, "4:1": 6}  # domain sequences
TOTAL = 32  # sequences per step
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


def of_ratio(method, ratio):
    domain = RATIOS[ratio]
    return Run(method, RIGHT | {"batch_size": domain, "ratio": (TOTAL - domain) / domain})


SWEEPS = {  # name: (run, values, {title of a table: (value, digits)})
    "documents": (of_documents, DOCUMENTS, {
        "general skills, %": (kept, 0), "KL on seen text": (of("seen_kl"), 2),
        "KL on unseen text": (of("unseen_kl"), 2)}),
    "general:domain": (of_ratio, RATIOS, {"p(right), %": (p_right, 0),
                                      "domain loss": (domain_loss, 2)})}
RUNS = {f"{method}, {name} {x}": run(method, x)
        for name, (run, values, _) in SWEEPS.items() for x in values for method in METHODS}


def tell(results):
    return "\n\n".join(
        sweep_tables(name, {method: {x: results(run(method, x)) for x in values}
                            for method in METHODS}, columns=shown)
        for name, (run, values, shown) in SWEEPS.items())


if __name__ == "__main__":
    runs.main("amount", RUNS, None, __doc__, tell)
