"""Do the results change with the size of the model, from 0.2 to 10 million parameters?

All sizes have the same steps, batches and texts. Learning rates are those of the default model
times 128 / width. replay and mol also run at half and twice this rate, and from less trained bases.
"""

from statistics import mean

from plots import runs, style
from plots.runs import Run
from plots.tables import kept, metrics_table, p_right

SIZES = {0.2: (2, 80), 0.5: (2, 128), 0.7: (2, 160), 3: (4, 240), 10: (6, 368)}  # layers, width
METHODS = {"ce": ("ce", {}), "replay, right answers": ("replay", {"general_errors": 0.0}),
           "replay, 70% wrong": ("replay", {}), "mol, 70% wrong": ("mol", {})}
FACTORS = {"replay, right answers": (0.5, 2), "mol, 70% wrong": (0.5, 2)}
BASE_STEPS = (200, 300, 400, 550)


def run(name, size, factor=1, **more):
    method, settings = METHODS[name]
    layers, width = SIZES[size]
    rates = {"lr": 3e-3 * 128 / width * factor, "base_lr": 4e-3 * 128 / width}
    return Run(method, {"n_layer": layers, "n_embd": width, "eval_every": 25, **rates, **settings,
                        **more})


RUNS = {f"{name}, {size:g} million": run(name, size) for size in SIZES for name in METHODS}
RUNS |= {f"{name}, {size:g} million, {factor:g} times the rate": run(name, size, factor)
         for size in SIZES for name in FACTORS for factor in FACTORS[name]}
RUNS |= {f"{name}, 0.5 million, a base of {steps} steps": run(name, 0.5, base_steps=steps)
         for steps in BASE_STEPS for name in FACTORS}


def tell(results):
    bases = {f"base, {size:g} million": run("ce", size) for size in SIZES}
    bases |= {f"base, 0.5 million, {steps} steps": run("mol, 70% wrong", 0.5, base_steps=steps)
              for steps in BASE_STEPS}
    return metrics_table(runs.labelled(lambda base: [rows[:1] for rows in results(base)], bases)
                         + runs.labelled(results, RUNS))


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4.2, sharey=True)
    for panel, (of_what, value) in zip(axes, (("exact answers, %", kept),
                                              ("p(right), %", p_right))):
        base = [mean(value(rows[0]) for rows in results(run("ce", size))) for size in SIZES]
        panel.plot(list(SIZES), base, color=style.COLOURS["base"], lw=1.4, ls="--")
        panel.set(xscale="log", xlabel="million parameters", ylabel=of_what)
        style.sweep(panel, {name: (style.colour_of(name), "-", {size: results(run(name, size))
                                                        for size in SIZES}, value)
                            for name in METHODS}, label=panel is axes[1])
        panel.set_xticks(list(SIZES), [f"{size:g}" for size in SIZES], fontsize=9)
        panel.minorticks_off()
    style.save(figure, picture, "From 0.2 to 10 million parameters mol keeps most",
               f"general skills; {note}; dashed: the base")


if __name__ == "__main__":
    runs.main("scale", RUNS, draw, __doc__, tell, defaults=runs.FEW_SEEDS)
