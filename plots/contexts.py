"""Which contexts does the general text need? The same two methods on eight texts.

The text decides after which beginnings MoL keeps the base's predictions. `on the base's path` is
the share of tokens before which the base expects every token of the document.
"""

from plots import runs
from plots.runs import Run
from plots.tables import SUMMARY, of, skill, table
from plots.texts import from_source

RIGHT = {"general_errors": 0.0}
TEXTS = {  # name: (settings, source, how)
    "right answers": (RIGHT, "open", {}),
    "70% wrong": ({}, "open", {}),
    "70% wrong, answered by the base": ({}, "answered", {}),
    "written by the base": ({}, "own samples", {}),
    "right, other format": (RIGHT, "other format", {}),
    "other format, 10,000 documents": (RIGHT | {"general_documents": 10_000}, "other format", {}),
    "other format, a tenth in base format": (RIGHT, "other format", {"own": 0.1}),
    "other format, answered by the base": (RIGHT, "other format, answered", {})}
METHODS = ("replay", "mol")


def run(method, text, **more):
    settings, source, how = TEXTS[text]
    return Run(method, {**settings, **more}, from_source, {"source": source, **how})


RUNS = {f"{text}: {method}": run(method, text) for text in TEXTS for method in METHODS}
# The time of 250 steps of mol, generation included. A step of mol takes about 1.2 of replay, the
# base's answers about 40 steps, its own text about 180 (python tests/benchmark.py --methods).
RUNS |= {f"{text}: {method}, {steps} steps": run(method, text, steps=steps, eval_every=steps)
         for text, of_replay, of_mol in [("70% wrong, answered by the base", 265, 214),
                                         ("written by the base", 90, 73)]
         for method, steps in (("replay", of_replay), ("mol", of_mol))}


def tell(results):
    columns = {"on the base's path": (of("on_path", 100), 0), "think sums": (skill("think"), 0),
               "last number": (of("final", 100), 0), "other format": (skill("other format"), 0)}
    lines = {label: results(run) for label, run in RUNS.items()}
    return table("%, KL and loss in nats", lines, columns | SUMMARY)


if __name__ == "__main__":
    runs.main("contexts", RUNS, None, __doc__, tell)
