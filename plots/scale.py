"""Does it change with size? The same experiment on models of 0.2 to 3 million parameters.

    python plots/scale.py        makes the runs that are missing, draws scale.png; --help

Every size has the same steps, batches and texts, and rates by one rule, the usual one for Adam:
those of the default model, 128 wide, times 128 / width. To see whether the rule favours a size,
`replay` and `mol` also run at half and at twice its rate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask, labelled

SIZES = {  # millions of parameters: layers, width
    0.2: (2, 80),
    0.5: (2, 128),
    0.7: (2, 160),
    3: (4, 240),
}
LINES = {
    "ce": ("ce", {}),
    "replay, right answers": ("replay", {"general_errors": 0.0}),
    "replay, 70% wrong": ("replay", {}),
    "mol, 70% wrong": ("mol", {}),
}
COLOURS = {"ce": style.COLOURS["ce"], "replay, right answers": "#56B4E9",
           "replay, 70% wrong": style.COLOURS["replay"], "mol, 70% wrong": style.COLOURS["mol"]}
FACTORS = {"replay, right answers": (0.5, 2), "mol, 70% wrong": (0.5, 2)}
LEARNT = 0.9  # of the domain's questions


def run(name, size, factor=1):
    method, settings = LINES[name]
    layers, width = SIZES[size]
    rates = {"lr": 3e-3 * 128 / width * factor, "base_lr": 4e-3 * 128 / width}
    return Run(method, {"n_layer": layers, "n_embd": width, "eval_every": 25, **rates, **settings})


RUNS = {f"{name}, {size:g} million": run(name, size) for size in SIZES for name in LINES}
RUNS |= {f"{name}, {size:g} million, {factor:g} times the rate": run(name, size, factor)
         for size in SIZES for name in FACTORS for factor in FACTORS[name]}


def step_learnt(rows):
    """The first step at which a run answers LEARNT of the domain's questions; never is its last."""
    return next((row["step"] for row in rows if row["accuracy"]["domain"] >= LEARNT),
                rows[-1]["step"])


def tell(found):
    bases = {f"base, {size:g} million": run("ce", size) for size in SIZES}
    return style.table(labelled(lambda run: [rows[:1] for rows in found(run)], bases)
                       + labelled(found, RUNS))


def draw(found, picture):
    values = {"general skills: exact answers, %": lambda rows: 100 * style.general(rows[-1]),
              "probability of the right one, %": lambda rows: 100 * style.probability(rows[-1]),
              f"step at which {LEARNT:.0%} of the domain is learnt": step_learnt}
    figure, (panels,) = style.panels(1, 3, 12, 4.6)
    for panel, (of_what, value) in zip(panels, values.items()):
        for name in LINES:
            points = {size: list(map(value, found(run(name, size)))) for size in SIZES}
            style.curve(panel, points, COLOURS[name], 2.4, marker="o", label=name)
        panel.set_xscale("log")
        panel.set_xticks(list(SIZES), [f"{size:g}" for size in SIZES])
        panel.minorticks_off()
        panel.set(xlabel="million parameters", ylabel=of_what)
        panel.grid(axis="y", alpha=0.25)
    for panel in panels[:2]:
        panel.set_ylim(-4, 104)
    panels[2].set_ylim(bottom=0)
    panels[2].legend(frameon=False, loc="lower left")
    largest = max(SIZES)
    kept = {name: style.last(found(run(name, largest))) for name in LINES}
    what = style.title(f"At {largest:g} million parameters, general skills answered exactly", kept)
    style.save(figure, picture, what, style.spread(len(kept["ce"])))


if __name__ == "__main__":
    ask("scale", RUNS, draw, __doc__, tell)
