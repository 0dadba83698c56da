"""Four domains in turn, the paper's open question: what is left of the first after the last?

    python plots/domains.py        makes the runs that are missing, draws domains.png; --help

Alarms, drugs and ships are facts; "larger" is a rule, asked on pairs that were held out (the
mirrored pair may be trained). All general answers are right, so that only the domains are in
question. A chain continues the model that the stage before left. Average forgetting is Chaudhry et
al.'s (arXiv 1801.10112): how far each earlier domain is below the best it ever was. Backward
transfer is Lopez-Paz and Ranzato's (arXiv 1706.08840): how far it is from where its own stage left
it.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

DOMAINS = ["alarms", "drugs", "ships", "larger"]  # the keys of data.DOMAINS
GENERAL = ["no_think", "think", "facts"]
DOCUMENTS = 2_000  # of each domain


def chain(method, s, seed, world, base, latest=False, earlier=False):
    """One stage per domain -> a row after each, and one of the base.

    latest: the KL is to the model that the stage began with, instead of the first base.
    earlier: text of the earlier domains is added to the general text, as many tokens of it as of
    the other, while there are as many. A step reads as many sequences as before, so a stage costs
    the same, and each earlier domain's share shrinks.
    """
    import torch  # drawing does without
    import data
    from eval import evaluate
    from train import train

    manuals = {name: make(random.Random(f"{name} {seed}")) for name, make in data.DOMAINS.items()}

    def text(name, purpose, count, part):
        rng = random.Random(f"{purpose} {name} {seed}")
        written = data.write({name: manuals[name]}, count, rng, part)
        return data.encode(world.tokenizer, written).to(world.general.device)

    texts = {name: text(name, "manual", DOCUMENTS, "train") for name in DOMAINS}
    probes = {skill: world.probes[skill] for skill in GENERAL}
    world = replace(world, probes=probes | {name: manuals[name].probes for name in DOMAINS})
    rows = [{"step": 0, "domain": "", **evaluate(base, base, world)}]
    model = base
    for stage, name in enumerate(DOMAINS, 1):
        world = replace(world, domain=texts[name],
                        heldout_domain=text(name, "heldout", 200, "heldout"))
        read = world
        if earlier and stage > 1:
            share = len(world.general) // (stage - 1)
            seen = [texts[done][:share] for done in DOMAINS[:stage - 1]]
            read = replace(world, general=torch.cat([world.general, *seen]))
        held = model.requires_grad_(False) if latest else base
        marks = replace(s, eval_every=s.steps)  # a stage is marked at its end
        model, marked = train(method, marks, seed + 1000 * stage, read, held,  # other batches
                              lambda model: evaluate(model, base, world), start=model)
        rows.append({**marked[-1], "step": stage, "domain": name})
    return [{**row, "method": method, "seed": seed} for row in rows]


RIGHT = {"general_errors": 0.0}
RUNS = {
    "ce": Run("ce", RIGHT, chain),
    "replay": Run("replay", RIGHT, chain),
    "replay, earlier domains too": Run("replay", RIGHT, chain, {"earlier": True}),
    "mol to the first base": Run("mol", RIGHT, chain),
    "mol to the latest model": Run("mol", RIGHT, chain, {"latest": True}),
    "mol to the latest model, earlier domains too":
        Run("mol", RIGHT, chain, {"latest": True, "earlier": True}),
}


def matrix(rows):
    """Rows of one run -> {stage: {domain: share}}, by the number of domains learnt."""
    return {row["step"]: {name: row["accuracy"][name] for name in DOMAINS} for row in rows}


def forgetting(rows):
    """Average forgetting after the last domain, 1801.10112 eq. 3-4: 0 is none, 1 is all."""
    at = matrix(rows)
    last = len(DOMAINS)
    best = {name: max(at[stage][name] for stage in range(1, last)) for name in DOMAINS[:-1]}
    return mean(best[name] - at[last][name] for name in best)


def backward_transfer(rows):
    """Backward transfer after the last domain, 1706.08840 eq. 3: below 0 is forgetting."""
    at = matrix(rows)
    return mean(at[len(DOMAINS)][name] - at[i][name] for i, name in enumerate(DOMAINS[:-1], 1))


def tell(found):
    """A Markdown table: accuracy after the last domain, average forgetting, backward transfer."""
    lines = [["after four domains", "general", *DOMAINS, "average forgetting", "backward transfer"],
             ["---"] * (len(DOMAINS) + 4)]
    for label, run in RUNS.items():
        seeds, ends = found(run), style.last(found(run))
        kept = [mean(row["accuracy"][skill] for skill in GENERAL) for row in ends]
        lines.append([label, style.cell(kept, 2)])
        lines[-1] += [style.cell([row["accuracy"][name] for row in ends], 2) for name in DOMAINS]
        lines[-1] += [style.cell([measure(rows) for rows in seeds], 2)
                      for measure in (forgetting, backward_transfer)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_matrix(panel, seeds):
    """A line per stage, a column per skill: the mean over seeds, the range where they differ."""
    columns = [GENERAL, *([name] for name in DOMAINS)]
    for y in range(len(DOMAINS) + 1):
        for x, names in enumerate(columns):
            values = [100 * mean(rows[y]["accuracy"][name] for name in names) for rows in seeds]
            low, high = f"{min(values):.0f}", f"{max(values):.0f}"
            colour = "white" if mean(values) < 60 else "black"
            panel.text(x, y, f"{mean(values):.0f}", ha="center", color=colour,
                       va="center" if low == high else "bottom")
            if low != high:
                panel.text(x, y + 0.08, f"{low}-{high}", ha="center", va="top", fontsize=7,
                           color=colour)
    means = [[100 * mean(rows[y]["accuracy"][name] for name in names for rows in seeds)
              for names in columns] for y in range(len(DOMAINS) + 1)]
    panel.imshow(means, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    panel.set_xticks(range(len(columns)), ["general", *DOMAINS], rotation=60)


def draw(found, picture):
    figure, (panels,) = style.panels(1, len(RUNS), 15, 4.6, sharey=True)
    for panel, (label, run) in zip(panels, RUNS.items()):
        draw_matrix(panel, found(run))
        shown = label.replace(", ", ",\n").replace(" to ", "\nto ")
        lost = mean(map(forgetting, found(run)))
        panel.set_title(f"{shown}\nforgets {lost:.0%}", fontsize=10, fontweight="bold")
    panels[0].set_yticks(range(len(DOMAINS) + 1), ["base", *(f"after {name}" for name in DOMAINS)])

    def kept(label):
        ends = style.last(found(RUNS[label]))
        shares = [mean(row["accuracy"][name] for row in ends for name in names)
                  for names in (GENERAL, DOMAINS[:-1])]
        return " and ".join(f"{share:.0%}" for share in shares)

    what = ("With earlier domains' text kept, general skills and earlier domains after four: "
            f"replay {kept('replay, earlier domains too')}, "
            f"mol {kept('mol to the latest model, earlier domains too')}")
    style.save(figure, picture, what, "exact answers, %, small: lowest to highest; above: average "
                                      "forgetting of the earlier domains")


if __name__ == "__main__":
    ask("domains", RUNS, draw, __doc__, tell)
