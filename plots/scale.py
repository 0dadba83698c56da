"""Do the results change with the size of the model, or if the base has learnt little?

All sizes, in million parameters, have the same steps, batches and texts. Learning rates are those
of the default model times 128 / width.
"""

from plots import runs
from plots.runs import Run
from plots.tables import sweep_tables

SIZES = {0.2: (2, 80), 0.5: (2, 128), 0.7: (2, 160), 3: (4, 240), 10: (6, 368)}  # layers, width
METHODS = {"ce": ("ce", {}), "replay, right answers": ("replay", {"general_errors": 0.0}),
           "replay, 70% wrong": ("replay", {}), "mol, 70% wrong": ("mol", {})}
BASE_STEPS = (200, 300, 400, 550)
WEAK = ("replay, right answers", "mol, 70% wrong")  # with other rates and less trained bases too
LINES = {name: (name, 1) for name in METHODS}
LINES |= {f"{name}, {factor:g} times the rate": (name, factor) for name in WEAK
          for factor in (0.5, 2)}


def run(line, size, **more):
    name, factor = LINES[line]
    method, settings = METHODS[name]
    layers, width = SIZES[size]
    rates = {"lr": 3e-3 * 128 / width * factor, "base_lr": 4e-3 * 128 / width}
    return Run(method, {"n_layer": layers, "n_embd": width, "eval_every": 25, **rates, **settings,
                        **more})


def weak(name, steps):
    return run(name, 0.5, base_steps=steps)


RUNS = {f"{line}, {size:g} million": run(line, size) for size in SIZES for line in LINES}
RUNS |= {f"{name}, base of {steps} steps": weak(name, steps)
         for steps in BASE_STEPS for name in WEAK}


def tell(results):
    tables = []
    for heading, names, values, run_of in (("million parameters", LINES, SIZES, run),
                                           ("steps of pretraining", WEAK, BASE_STEPS, weak)):
        lines = {name: {x: results(run_of(name, x)) for x in values} for name in names}
        base = {x: [rows[:1] for rows in seeds] for x, seeds in lines[WEAK[0]].items()}
        tables.append(sweep_tables(heading, {"base": base} | lines))
    return "\n\n".join(tables)


if __name__ == "__main__":
    runs.main("scale", RUNS, None, __doc__, tell, defaults=runs.FEW_SEEDS)
