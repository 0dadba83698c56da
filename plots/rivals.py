"""MoL against its rivals, each at the best of its settings: domain gained, general skills kept.

    python plots/rivals.py        makes the runs that are missing, draws rivals.png; --help

Every method except the plain `ce` gets four values of one knob, on the same seeds, steps and domain
sequences: a strength, at the learning rate used everywhere else, or where the learning rate itself
is in question, that. Its best is the one with the highest mean of general skills and domain, on the
same questions that are shown. The first value of `ce`, `replay` and `mol` is the default.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask, labelled

LORA, LORA_RATES = {"lora_rank": 8}, (5e-3, 1e-2, 2e-2, 4e-2)
KNOBS = {  # name: (method, settings, knob, its values)
    "ce": ("ce", {}, "lr", (3e-3,)),
    "ce, low rate": ("ce", {}, "lr", (1e-3, 5e-4, 3e-4, 1e-4)),
    "replay": ("replay", {}, "lr", (3e-3, 6e-3, 1.5e-3, 7e-4)),
    "replay, right answers": ("replay", {"general_errors": 0.0}, "lr", (3e-3, 6e-3, 1.5e-3, 7e-4)),
    "mol": ("mol", {}, "strength", (1.0, 0.3, 3.0, 10.0)),
    "domain_kl": ("domain_kl", {}, "strength", (0.03, 0.1, 0.3, 1.0)),
    "l2sp": ("l2sp", {}, "strength", (0.003, 0.01, 0.03, 0.1)),
    "ewc": ("ewc", {}, "strength", (100.0, 300.0, 1000.0, 3000.0)),
    "LoRA ce": ("ce", LORA, "lr", LORA_RATES),
    "LoRA replay": ("replay", LORA, "lr", LORA_RATES),
    "LoRA mol": ("mol", LORA, "lr", LORA_RATES),
}
COLOURS = style.COLOURS | {
    "ce, low rate": "#999999", "domain_kl": "#CC79A7", "l2sp": "#E69F00", "ewc": "#56B4E9",
    "LoRA ce": "#7F3B08", "LoRA replay": "#999933", "LoRA mol": "#004D40"}


def run(name, value):
    method, settings, knob, _ = KNOBS[name]
    return Run(method, {**settings, knob: value})


def label(name, value):
    return f"{name}, {KNOBS[name][2]} {value:g}"


RUNS = {label(name, value): run(name, value)
        for name, (*_, values) in KNOBS.items() for value in values}


def places(found, name, value):
    """Where a setting ends on each seed -> [(domain learnt, general skills kept), ...], in %."""
    (_, kept), (_, learnt) = style.KEPT_AND_LEARNT.items()
    return [(learnt(row), kept(row)) for row in style.last(found(run(name, value)))]


def best(found):
    """Each method's best setting -> {name: value}."""
    def score(name, value):
        return mean(map(sum, places(found, name, value)))

    return {name: max(values, key=lambda value: score(name, value))
            for name, (*_, values) in KNOBS.items()}


def tell(found):
    """The table of all settings, and that of the best."""
    bests = best(found)
    of_best = {label(name, value): run(name, value) for name, value in bests.items()}
    edge = [label(name, value) for name, value in bests.items()
            if len(KNOBS[name][-1]) > 1 and value in (min(KNOBS[name][-1]), max(KNOBS[name][-1]))
            # beyond the highest of the low rates is ce itself
            and (name, value) != ("ce, low rate", max(KNOBS[name][-1]))]
    return (f"{style.table(labelled(found, RUNS))}\n\nthe best of each\n"
            f"{style.table(labelled(found, of_best))}\n\nat the lowest or highest of their values, "
            f"so perhaps better beyond: {'; '.join(edge) or 'none'}")


def draw(found, picture):
    figure, ((axes,),) = style.panels(1, 1, 8.4, 5.6)
    names, bests, drawn = {}, best(found), []
    for name, (*_, values) in KNOBS.items():
        for value in values:
            seeds = places(found, name, value)
            x, y = (mean(shares) for shares in zip(*seeds))
            if value == bests[name]:
                hidden = sum(abs(x - at) < 3 and abs(y - height) < 3 for at, height in drawn)
                drawn.append((x, y))
                axes.plot(x, y, color=COLOURS[name], marker="o", ms=8 + 6 * hidden, mew=2.5,
                          fillstyle="none")  # a ring around those that are there already
                for seed in seeds:
                    axes.plot(*zip((x, y), seed), color=COLOURS[name], lw=0.8)
                names[label(name, value)] = COLOURS[name], y
            else:
                axes.plot(x, y, color=COLOURS[name], marker="o", ms=4, alpha=0.5)
    axes.set(xlabel="domain learnt: exact answers, %", xlim=(-5, 104), ylim=(-5, 104),
             ylabel="general skills kept: exact answers, mean of three, %")
    style.label_ends(axes, names, apart=0.055)
    axes.grid(alpha=0.25)
    kept = {name: style.last(found(run(name, bests[name])))
            for name in ("ce", "replay", "ewc", "mol")}
    style.save(figure, picture,
               style.title("From general text 70% wrong, general skills answered exactly, each at "
                           "its best", kept),
               f"the mean of {len(kept['mol'])} seeds; rings: the best setting, with each seed; "
               "dots: the others of the same colour")


if __name__ == "__main__":
    ask("rivals", RUNS, draw, __doc__, tell)
