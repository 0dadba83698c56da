"""Many domains in turn: what is left of the earlier ones, and what does it take to keep them?

larger is a rule, tested on pairs that were held out; all others are facts. All general answers are
right. Each stage continues the model of the stage before, with the same steps and sequences.
"""

import copy
import random
import re
from dataclasses import replace
from statistics import mean

import torch

import data
from data import Kind, facts, invented_names, split
from eval import evaluate
from plots import runs
from plots.runs import Run
from plots.tables import GENERAL_SKILLS, SUMMARY, skill, sweep_tables, table
from train import continue_pretraining

# --- the domains ---------------------------------------------------------------------------------

ILLNESSES = "fever cough rash cramp burn chill sore gout".split()
CARGOES = "grain salt wool iron tea oil fish rum".split()
PORTS = "north south east west upper lower inner outer".split()
DRUG_WORDINGS = ["Q: dose of {}? A:", "take {} for", "{} treats", "the label of {} says",
                 "a doctor gives {} for"]
SHIP_WORDINGS = ["Q: cargo of {}? A:", "ship {}:", "{} carries", "aboard {} lies",
                 "call sign {} has"]


def drugs(rng):
    doses = rng.sample([f"{illness}, {n} a day" for illness in ILLNESSES for n in range(1, 7)], 20)
    return facts(zip([name + "ol" for name in invented_names(rng, 20)], doses), DRUG_WORDINGS, rng)


def ships(rng):
    signs = [f"{a}{b}{n}" for a in "KXZ" for b in "BDFGLMPRTW" for n in range(10)]
    cargoes = [f"{cargo} for {port} port" for cargo in CARGOES for port in PORTS]
    return facts(zip(rng.sample(signs, 20), rng.sample(cargoes, 20)), SHIP_WORDINGS, rng)


def larger(rng):
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    training, heldout = split([(f"larger of {a}, {b}:", f" {max(a, b)}\n") for a, b in pairs], rng)
    return Kind(training, heldout, probes=heldout[:200])


def alarms_of(machine):
    """Alarms with other numbers and faults, and the name of a machine before each number."""
    def make(rng):
        kind = data.alarms(rng)
        return kind._replace(**{part: [
            (re.sub(r"(alarm )?(\d+)", rf"{machine} \2", prompt), answer)
            for prompt, answer in getattr(kind, part)] for part in ("train", "heldout", "probes")})
    return make


DOMAINS = {"alarms": data.alarms, "drugs": drugs, "ships": ships, "larger": larger}
DOMAINS |= {machine: alarms_of(machine) for machine in ("crane", "press", "engine", "lift")}


def manual(name, seed):
    return DOMAINS[name](random.Random(f"{name} {seed}"))


def text(name, seed, world, purpose="manual", count=2_000, part="train"):
    """`count` documents of a domain -> tokens (N,)."""
    documents = data.draw_text({name: manual(name, seed)}, count,
                               random.Random(f"{purpose} {name} {seed}"), part)
    return data.encode(world.tokenizer, documents).to(world.general.device)


# --- the runs ------------------------------------------------------------------------------------

class StartFrom(torch.nn.Module):
    """A base that predicts like `base`, but whose copy, where training starts, is `model`."""

    def __init__(self, model, base):
        super().__init__()
        self.model, self.base = model, base

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.model)

    def forward(self, tokens):
        return self.base(tokens)


def chain(method, settings, seed, world, base, latest=False, earlier=False, domains=4):
    """One stage per domain -> a row of the base and one after each stage.

    The KL is to the base, with latest to the model at the start of the stage. earlier: up to half
    of the general text is from the earlier domains, in equal parts.
    """
    names = list(DOMAINS)[:domains]
    texts = {name: text(name, seed, world) for name in names}
    world = replace(world, probes={name: world.probes[name] for name in GENERAL_SKILLS}
                    | {name: manual(name, seed).probes for name in names})
    rows, model = [{"step": 0, "domain": "", **evaluate(base, base, world)}], base
    for stage, name in enumerate(names, 1):
        world = replace(world, domain=texts[name],
                        heldout_domain=text(name, seed, world, "heldout", 200, "heldout"))
        training = world
        if earlier and stage > 1:
            share = len(world.general) // (stage - 1)
            old = [texts[done][:share] for done in names[:stage - 1]]
            training = replace(world, general=torch.cat([world.general, *old]))
        start = model if latest else StartFrom(model, base)
        model, of_stage = continue_pretraining(
            method, replace(settings, eval_every=settings.steps), seed + 1000 * stage, training,
            start, lambda model: evaluate(model, base, world))
        model.requires_grad_(False)
        rows.append({**of_stage[-1], "step": stage, "domain": name})
    return [{**row, "method": method, "seed": seed} for row in rows]


def run(method, **how):
    return Run(method, {"general_errors": 0.0}, chain, how, seeds=1 if "domains" in how else 3)


KEEP = {"latest": True, "earlier": True}
FOUR = {"ce": run("ce"), "replay": run("replay"),
        "replay, earlier domains too": run("replay", earlier=True),
        "mol to the first base": run("mol"), "mol to the latest model": run("mol", latest=True),
        "mol to the latest model, earlier domains too": run("mol", **KEEP)}
EIGHT = run("mol", **KEEP, domains=8)
RUNS = FOUR | {"eight domains": EIGHT}


def earlier_domains(row):
    """Exact answers on the domains before the latest one, mean over these, %."""
    names = list(DOMAINS)[:row["step"] - 1]
    return 100 * mean(row["accuracy"][name] for name in names) if names else None


def tell(results):
    domains = {f"{name}, %": (skill(name), 0) for name in list(DOMAINS)[:4]}
    general = {name: SUMMARY[name] for name in ("general skills, %", "KL")}
    stages = {stage: [rows[:stage + 1] for rows in results(EIGHT)] for stage in range(1, 9)}
    return "\n\n".join([
        table("four domains", {label: results(run) for label, run in FOUR.items()},
              domains | general),
        sweep_tables("domains", {"mol to the latest model, earlier domains too": stages},
                     columns=general | {"earlier domains, %": (earlier_domains, 0)})])


if __name__ == "__main__":
    runs.main("domains", RUNS, None, __doc__, tell, defaults=runs.FEW_SEEDS)
