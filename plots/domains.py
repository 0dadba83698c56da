"""Four domains in turn: what is left of the first after the last?

Alarms, drugs and ships are facts. larger is a rule, tested on pairs that were held out. All general
answers are right. Each stage continues the model of the stage before. Average forgetting (arXiv
1801.10112) is how far an earlier domain is below its best. Backward transfer (arXiv 1706.08840) is
how far it is from where its own stage left it.
"""

import random
from dataclasses import replace
from statistics import mean

import torch

import data
from data import Kind, facts, invented_names, split
from eval import evaluate
from plots import runs, style
from plots.runs import Run
from plots.tables import cell, markdown
from train import train

# --- the other domains ---------------------------------------------------------------------------

ILLNESSES = "fever cough rash cramp burn chill sore gout".split()
CARGOES = "grain salt wool iron tea oil fish rum".split()
PORTS = "north south east west upper lower inner outer".split()
DRUG_WORDINGS = ["Q: dose of {}? A:", "take {} for", "{} treats", "the label of {} says",
                 "a doctor gives {} for"]
SHIP_WORDINGS = ["Q: cargo of {}? A:", "ship {}:", "{} carries", "aboard {} lies",
                 "call sign {} has"]


def drugs(rng, count=20):
    """Invented medicines, each with an illness and a dose."""
    doses = rng.sample([f"{illness}, {n} a day" for illness in ILLNESSES for n in range(1, 7)],
                       count)
    names = [name + "ol" for name in invented_names(rng, count)]
    return facts(zip(names, doses), DRUG_WORDINGS, rng)


def ships(rng, count=20):
    """Call signs, each with a cargo and a port."""
    signs = [f"{a}{b}{n}" for a in "KXZ" for b in "BDFGLMPRTW" for n in range(10)]
    cargoes = [f"{cargo} for {port} port" for cargo in CARGOES for port in PORTS]
    return facts(zip(rng.sample(signs, count), rng.sample(cargoes, count)), SHIP_WORDINGS, rng)


def larger(rng):
    """The larger of two numbers."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    training, heldout = split([(f"larger of {a}, {b}:", f" {max(a, b)}\n") for a, b in pairs], rng)
    return Kind(training, heldout, probes=heldout[:200])


DOMAINS = {"alarms": data.alarms, "drugs": drugs, "ships": ships, "larger": larger}
GENERAL = ["no_think", "think", "facts"]


# --- the runs ------------------------------------------------------------------------------------

def chain(method, settings, seed, world, base, latest=False, earlier=False):
    """One stage per domain -> a row of the base and one after each stage.

    latest: the KL is to the model at the start of the stage, instead of the first base.
    earlier: up to half of the general text is from the earlier domains. The number of sequences per
    step stays the same.
    """
    manuals = {name: make(random.Random(f"{name} {seed}")) for name, make in DOMAINS.items()}

    def text(name, purpose, count, part):
        rng = random.Random(f"{purpose} {name} {seed}")
        documents = data.draw_text({name: manuals[name]}, count, rng, part)
        return data.encode(world.tokenizer, documents).to(world.general.device)

    texts = {name: text(name, "manual", 2_000, "train") for name in DOMAINS}
    probes = {skill: world.probes[skill] for skill in GENERAL}
    world = replace(world, probes=probes | {name: manuals[name].probes for name in DOMAINS})
    rows, model = [{"step": 0, "domain": "", **evaluate(base, base, world)}], base
    for stage, name in enumerate(DOMAINS, 1):
        world = replace(world, domain=texts[name],
                        heldout_domain=text(name, "heldout", 200, "heldout"))
        training = world
        if earlier and stage > 1:
            share = len(world.general) // (stage - 1)
            old = [texts[done][:share] for done in list(DOMAINS)[:stage - 1]]
            training = replace(world, general=torch.cat([world.general, *old]))
        target = model.requires_grad_(False) if latest else base
        model, of_stage = train(method, replace(settings, eval_every=settings.steps),
                                seed + 1000 * stage, training, target,
                                lambda model: evaluate(model, base, world), start=model)
        rows.append({**of_stage[-1], "step": stage, "domain": name})
    return [{**row, "method": method, "seed": seed} for row in rows]


def run(method, **how):
    return Run(method, {"general_errors": 0.0}, chain, how)


RUNS = {"ce": run("ce"), "replay": run("replay"),
        "replay, earlier domains too": run("replay", earlier=True),
        "mol to the first base": run("mol"), "mol to the latest model": run("mol", latest=True),
        "mol to the latest model, earlier domains too": run("mol", latest=True, earlier=True)}


def forgetting(rows):
    """Average forgetting after the last domain, 1801.10112 eq. 3-4: 0 is none, 1 is all."""
    *earlier, _ = DOMAINS
    best = {name: max(row["accuracy"][name] for row in rows[1:-1]) for name in earlier}
    return mean(best[name] - rows[-1]["accuracy"][name] for name in earlier)


def backward_transfer(rows):
    """Backward transfer after the last domain, 1706.08840 eq. 3: below 0 is forgetting."""
    return mean(rows[-1]["accuracy"][name] - rows[stage]["accuracy"][name]
                for stage, name in enumerate(list(DOMAINS)[:-1], 1))


def general(row):
    return mean(row["accuracy"][skill] for skill in GENERAL)


def tell(results):
    lines = [["after four domains", "general", *DOMAINS, "average forgetting", "backward transfer"]]
    for label in RUNS:
        seeds = results(RUNS[label])
        lines.append([label, cell([general(rows[-1]) for rows in seeds], 2)])
        lines[-1] += [cell([rows[-1]["accuracy"][name] for rows in seeds], 2) for name in DOMAINS]
        lines[-1] += [cell([measure(rows) for rows in seeds], 2)
                      for measure in (forgetting, backward_transfer)]
    return markdown(lines)


def draw(results, picture):
    figure, rows = style.panels(2, 3, 10, 7, sharex=True, sharey=True)
    for panel, label in zip([panel for axes in rows for panel in axes], RUNS):
        seeds = results(RUNS[label])
        means = [[100 * mean(general(rows[stage]) if name == "general" else
                             rows[stage]["accuracy"][name] for rows in seeds)
                  for name in ("general", *DOMAINS)] for stage in range(len(DOMAINS) + 1)]
        panel.imshow(means, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(means):
            for x, value in enumerate(line):
                panel.text(x, y, f"{value:.0f}", ha="center", va="center",
                           color="white" if value < 60 else "black")
        panel.set_title(label.replace(", ", ",\n"), fontweight="bold")
        panel.set_xticks(range(len(DOMAINS) + 1), ["general", *DOMAINS], rotation=45)
        panel.set_yticks(range(len(DOMAINS) + 1), ["base", *(f"after {name}" for name in DOMAINS)])
        panel.grid(False)
    style.save(figure, picture, "An earlier domain is kept only if its text is in the general text",
               "exact answers, %, means over seeds")


if __name__ == "__main__":
    runs.main("domains", RUNS, draw, __doc__, tell)
