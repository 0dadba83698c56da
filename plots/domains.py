"""Four domains one after another, the paper's open question: what is left of the first when the last is learnt?

    python plots/domains.py        the runs that are missing, domains.jsonl, domains.png; --help lists the settings

Alarms, drugs and ships are facts; "larger" is a rule, asked on pairs that were held out (the mirrored pair may be trained). A chain continues the model that
the stage before left. Average forgetting is Chaudhry et al.'s (arXiv 1801.10112): how far each earlier domain is below the
best it ever was. Backward transfer is Lopez-Paz and Ranzato's (arXiv 1706.08840): how far it is from where its own stage left it.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
import data
import train
from eval import cell, evaluate
from plots import style
from plots.style import plt
from plots.sweep import Run, main

DOMAINS = list(data.DOMAINS)
GENERAL = ["no_think", "think", "facts"]
DOCUMENTS = 2_000  # of each domain


def chain(s, seed, method, world, base, dtype, latest=False, earlier=False):
    """One stage a domain -> a row after each, and one of the base.

    latest: the KL is to the model that the stage began with, instead of the first base.
    earlier: text of the earlier domains is added to the general text, as many tokens of it as of the other, while there are
    as many. A step reads as many sequences as before, so a stage costs the same, and each earlier domain's share shrinks.
    """
    manuals = {name: {name: make(random.Random(f"{name} {seed}"))} for name, make in data.DOMAINS.items()}
    device = world.general.device

    def text(kinds, purpose, count, part):
        written = data.write(kinds, count, random.Random(f"{purpose} {seed}"), part)
        return data.encode(world.tokenizer, written).to(device)

    texts = {name: text(kinds, f"manual {name}", DOCUMENTS, "train") for name, kinds in manuals.items()}
    world = replace(world, probes={skill: world.probes[skill] for skill in GENERAL} | {name: manuals[name][name].probes for name in DOMAINS})
    rows, model = [], base
    for stage, name in enumerate(["", *DOMAINS]):
        if name:
            seen = [texts[done][:len(world.general) // (stage - 1)] for done in DOMAINS[:stage - 1]]
            world = replace(world, domain=texts[name], heldout_domain=text(manuals[name], f"heldout {name}", 200, "heldout"))
            read = replace(world, general=torch.cat([world.general, *seen])) if earlier else world
            held = model.requires_grad_(False) if latest else base
            model = train.continue_training(method, s, seed, read, model, dtype, lambda model, step: None, held)
        rows.append({"step": stage, "domain": name, **evaluate(model, base, world, s.block_size)})
        train.finite(f"{method}, after {name or 'base'}", s.steps, rows[-1]["general_loss"] + rows[-1]["domain_loss"])
    return rows


RUNS = [
    Run("ce", "ce", {}, chain),
    Run("replay", "replay", {}, chain),
    Run("replay, earlier domains too", "replay", {}, chain, {"earlier": True}),
    Run("mol to the first base", "mol", {}, chain),
    Run("mol to the latest model", "mol", {}, chain, {"latest": True}),
    Run("mol to the latest model, earlier domains too", "mol", {}, chain, {"latest": True, "earlier": True}),
]


def matrix(rows):
    """Rows of one run -> {stage: {domain: share}}, by the number of domains learnt."""
    return {row["step"]: {name: row["accuracy"][name] for name in DOMAINS} for row in rows}


def forgetting(rows):
    """Average forgetting after the last domain, 1801.10112 eq. 3-4: 0 is none, 1 is all."""
    at = matrix(rows)
    stages = len(DOMAINS)
    return mean(max(at[stage][name] for stage in range(1, stages)) - at[stages][name] for name in DOMAINS[:-1])


def backward_transfer(rows):
    """Backward transfer after the last domain, 1706.08840 eq. 3: below 0 is forgetting."""
    at = matrix(rows)
    stages = len(DOMAINS)
    return mean(at[stages][name] - at[i][name] for i, name in enumerate(DOMAINS[:-1], 1))


def by_run(rows):
    """-> {label: [one list of rows a seed]}."""
    runs = {}
    for row in rows:
        runs.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    return {label: list(seeds.values()) for label, seeds in runs.items()}


def tell(rows):
    """A Markdown table: accuracy after the last domain, average forgetting, backward transfer."""
    lines = [["after four domains", "general", *DOMAINS, "average forgetting", "backward transfer"], ["---"] * (len(DOMAINS) + 4)]
    for label, seeds in by_run(rows).items():
        ends = [rows[-1] for rows in seeds]
        lines.append([label, cell([mean(row["accuracy"][skill] for skill in GENERAL) for row in ends], 2),
                      *(cell([row["accuracy"][name] for row in ends], 2) for name in DOMAINS),
                      cell(list(map(forgetting, seeds)), 2), cell(list(map(backward_transfer, seeds)), 2)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows, picture):
    """One matrix a run: a line a stage, a column a skill; the mean over seeds, and lowest to highest where they differ."""
    runs = by_run(rows)
    figure, panels = plt.subplots(1, len(runs), figsize=(15, 4.6), sharey=True)

    def seeds_at(seeds, stage, names):
        return [100 * mean(rows[stage]["accuracy"][name] for name in names) for rows in seeds]

    for panel, (label, seeds) in zip(panels, runs.items()):
        columns = [GENERAL, *([name] for name in DOMAINS)]
        cells = [[seeds_at(seeds, stage, names) for names in columns] for stage in range(len(DOMAINS) + 1)]
        panel.imshow([[mean(values) for values in line] for line in cells], cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(cells):
            for x, values in enumerate(line):
                low, high = f"{min(values):.0f}", f"{max(values):.0f}"
                colour = "white" if mean(values) < 60 else "black"
                panel.text(x, y, f"{mean(values):.0f}", ha="center", va="center" if low == high else "bottom", color=colour)
                if low != high:
                    panel.text(x, y + 0.08, f"{low}-{high}", ha="center", va="top", fontsize=7, color=colour)
        panel.set_xticks(range(len(columns)), ["general", *DOMAINS], rotation=60)
        shown = label.replace(", ", ",\n").replace(" to ", "\nto ")
        panel.set_title(f"{shown}\nforgets {mean(map(forgetting, seeds)):.0%}", fontsize=10, fontweight="bold")
    panels[0].set_yticks(range(len(DOMAINS) + 1), ["base", *(f"after {name}" for name in DOMAINS)])
    figure.suptitle("With earlier domains' text kept, general skills and earlier domains after four: " + ", ".join(
        f"{method} {mean(seeds_at(runs[label], -1, GENERAL)):.0f}% and {mean(seeds_at(runs[label], -1, DOMAINS[:-1])):.0f}%"
        for method, label in (("replay", "replay, earlier domains too"), ("mol", "mol to the latest model, earlier domains too"))), x=0.01, ha="left")
    style.save(figure, picture, rows, "exact answers, %, small: lowest to highest; above: average forgetting of the earlier domains")


if __name__ == "__main__":
    sys.exit(main("domains", RUNS, draw, __doc__, tell))
