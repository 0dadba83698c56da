"""Does it change with size? The same experiment on models of 0.2 to 10 million parameters.

    python plots/scale.py        makes the runs that are missing, draws scale.png; --help

Every size has the same steps, batches and texts, and rates by one rule, the usual one for Adam:
those of the default model, 128 wide, times 128 / width. To see whether the rule favours a size,
`replay` and `mol` also run at half and at twice its rate. Some bases of the smallest and the
largest size are not done; so both also run, at 0.5 million, from bases that had fewer steps.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask, labelled

SIZES = {  # millions of parameters: layers, width
    0.2: (2, 80),
    0.5: (2, 128),
    0.7: (2, 160),
    3: (4, 240),
    10: (6, 368),
}
LINES = {
    "ce": ("ce", {}),
    "replay, right answers": ("replay", {"general_errors": 0.0}),
    "replay, 70% wrong": ("replay", {}),
    "mol, 70% wrong": ("mol", {}),
}
COLOURS = style.COLOURS | {f"{method}, 70% wrong": style.COLOURS[method]
                           for method in ("replay", "mol")}
FACTORS = {"replay, right answers": (0.5, 2), "mol, 70% wrong": (0.5, 2)}
BASE_STEPS = (200, 300, 400, 550)  # where all others have 1,000
LEARNT = 0.9  # of the domain's questions


def run(name, size, factor=1, **more):
    method, settings = LINES[name]
    layers, width = SIZES[size]
    rates = {"lr": 3e-3 * 128 / width * factor, "base_lr": 4e-3 * 128 / width}
    return Run(method, {"n_layer": layers, "n_embd": width, "eval_every": 25, **rates, **settings,
                        **more})


RUNS = {f"{name}, {size:g} million": run(name, size) for size in SIZES for name in LINES}
RUNS |= {f"{name}, {size:g} million, {factor:g} times the rate": run(name, size, factor)
         for size in SIZES for name in FACTORS for factor in FACTORS[name]}
RUNS |= {f"{name}, 0.5 million, a base of {steps} steps": run(name, 0.5, base_steps=steps)
         for steps in BASE_STEPS for name in FACTORS}


def step_learnt(rows):
    """The first step at which a run answers LEARNT of the domain's questions; never is its last."""
    return next((row["step"] for row in rows if row["accuracy"]["domain"] >= LEARNT),
                rows[-1]["step"])


def tell(found):
    bases = {f"base, {size:g} million": run("ce", size) for size in SIZES}
    bases |= {f"base, 0.5 million, {steps} steps": run("mol, 70% wrong", 0.5, base_steps=steps)
              for steps in BASE_STEPS}
    return style.table(labelled(lambda run: [rows[:1] for rows in found(run)], bases)
                       + labelled(found, RUNS))


def draw(found, picture):
    figure, ((exact, likely, learnt),) = style.panels(1, 3, 12, 4.6)
    marks = {exact: ("general skills: exact answers, %", lambda row: 100 * style.general(row)),
             likely: ("probability of the right answer, %",
                      lambda row: 100 * style.probability(row))}
    for panel, (of_what, value) in marks.items():
        for name in LINES:
            points = {size: style.ends(found(run(name, size)), value) for size in SIZES}
            style.curve(panel, points, COLOURS[name], 2.4, marker="o", label=name)
        base = [mean(value(rows[0]) for rows in found(run("ce", size))) for size in SIZES]
        panel.plot(list(SIZES), base, color="black", lw=1.4, ls="--", label="base")
        panel.set(ylabel=of_what, ylim=(-4, 104), xscale="log")
        panel.set_xticks(list(SIZES), [f"{size:g}" for size in SIZES])
        panel.minorticks_off()
    for beside, name in enumerate(LINES):  # a little apart, or they would hide each other
        steps = [list(map(step_learnt, found(run(name, size)))) for size in SIZES]
        means = list(map(mean, steps))
        reach = [[mean(at) - min(at) for at in steps], [max(at) - mean(at) for at in steps]]
        learnt.errorbar([at + 0.16 * (beside - 1.5) for at in range(len(SIZES))], means, reach,
                        fmt="o", color=COLOURS[name])
    learnt.set(ylabel=f"step at which {LEARNT:.0%} of the domain is learnt", ylim=(0, None))
    learnt.set_xticks(range(len(SIZES)), [f"{size:g}" for size in SIZES])
    for panel in (exact, likely, learnt):
        panel.set_xlabel("million parameters")
        panel.grid(axis="y", alpha=0.25)
    exact.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.55))
    smallest, largest = min(SIZES), max(SIZES)
    kept = {name: [mean(style.ends(found(run(name, size)), style.general))
                   for size in (smallest, largest)] for name in LINES}
    what = (f"General skills answered exactly with {smallest:g} and with {largest:g} million "
            "parameters: " + "; ".join(f"{name} {low:.0%} and {high:.0%}"
                                       for name, (low, high) in kept.items()))
    spread = style.spread(len(found(run("ce", largest))))
    style.save(figure, picture, what, spread + "; on the right, dots and lines likewise")


if __name__ == "__main__":
    ask("scale", RUNS, draw, __doc__, tell)
