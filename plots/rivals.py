"""MoL against its rivals, each at the best of its settings: domain gained against general skills kept.

    python plots/rivals.py        the runs that are missing, rivals.jsonl, rivals.png; --help lists the settings

Every method but the plain `ce` gets four values of one knob, on the same seeds, steps and domain sequences: a strength, at the
learning rate used everywhere else, or where the learning rate itself is in question, that. Its best is the one with the
highest mean of general skills and domain, on the same questions that are shown. The first value of `ce`, `replay` and `mol` is
the default.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from eval import table
from plots import style
from plots.style import plt
from plots.sweep import Run, main

LORA = {"lora_rank": 8}
KNOBS = {  # name: (method, settings, knob, its values)
    "ce": ("ce", {}, "lr", (2e-3,)),
    "ce, low rate": ("ce", {}, "lr", (1e-3, 5e-4, 3e-4, 1e-4)),
    "replay": ("replay", {}, "lr", (2e-3, 4e-3, 1e-3, 5e-4)),
    "mol": ("mol", {}, "strength", (1.0, 0.3, 3.0, 10.0)),
    "lwf": ("lwf", {}, "strength", (0.03, 0.1, 0.3, 1.0)),
    "l2sp": ("l2sp", {}, "strength", (0.003, 0.01, 0.03, 0.1)),
    "ewc": ("ewc", {}, "strength", (100.0, 300.0, 1000.0, 3000.0)),
    "LoRA ce": ("ce", LORA, "lr", (5e-3, 1e-2, 2e-2, 4e-2)),
    "LoRA mol": ("mol", LORA, "lr", (5e-3, 1e-2, 2e-2, 4e-2)),
}


def label(name, value):
    return f"{name}, {KNOBS[name][2]} {value:g}"


RUNS = [Run(label(name, value), method, {**settings, knob: value})
        for name, (method, settings, knob, values) in KNOBS.items() for value in values]
COLOURS = style.COLOURS | {"ce, low rate": "#999999", "lwf": "#CC79A7", "l2sp": "#E69F00", "ewc": "#56B4E9", "LoRA ce": "#7F3B08", "LoRA mol": "#004D40"}


def places(rows):
    """-> {name: {label: [(domain, general) exact answers in %, one a seed]}}."""
    last = style.last(rows)
    (_, kept), (_, learnt) = style.KEPT_AND_LEARNT.items()
    return {name: {label(name, value): [(learnt(row), kept(row)) for row in last[label(name, value)]] for value in values}
            for name, (*_, values) in KNOBS.items()}


def best(rows):
    """Each method's best setting -> {name: label}."""
    return {name: max(settings, key=lambda setting: mean(map(sum, settings[setting]))) for name, settings in places(rows).items()}


def tell(rows):
    """The table of all settings, and that of the best."""
    bests = list(best(rows).values())
    of_best = sorted((row for row in rows if row["method"] in bests), key=lambda row: bests.index(row["method"]))
    edges = [label(name, end(values)) for name, (*_, values) in KNOBS.items() if len(values) > 1 for end in (min, max)]
    edges.remove(label("ce, low rate", max(KNOBS["ce, low rate"][-1])))  # beyond it is ce itself
    edge = [setting for setting in bests if setting in edges]
    return (f"{table(rows)}\n\nthe best of each\n{table(of_best)}\n\n"
            f"at the lowest or highest of their values, so perhaps better beyond: {'; '.join(edge) or 'none'}")


def draw(rows, picture):
    figure, axes = plt.subplots(figsize=(8.4, 5.6))
    ends, bests = {}, best(rows)
    for name, settings in places(rows).items():
        chosen = bests[name]
        for setting, seeds in settings.items():
            x, y = (mean(values) for values in zip(*seeds))
            axes.plot(x, y, color=COLOURS[name], marker="o", ms=9 if setting == chosen else 4, alpha=1 if setting == chosen else 0.5)
            if setting == chosen:
                for seed in seeds:
                    axes.plot(*zip((x, y), seed), color=COLOURS[name], lw=0.8)
                ends[chosen] = COLOURS[name], y
    axes.set(xlabel="domain learnt: exact answers, %", ylabel="general skills kept: exact answers, mean of three, %",
             xlim=(-5, 104), ylim=(-5, 104))
    style.label_ends(axes, ends, apart=0.055)
    axes.grid(alpha=0.25)
    figure.suptitle(style.title("General skills answered exactly, each at its best", {
        name: style.last(rows)[bests[name]] for name in ("ce", "replay", "ewc", "mol")}), x=0.01, ha="left")
    style.save(figure, picture, rows, "large: the best setting, with each seed; small: the others of the same colour")


if __name__ == "__main__":
    sys.exit(main("rivals", RUNS, draw, __doc__, tell))
