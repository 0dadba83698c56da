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
from losses import cross_entropy
from plots import runs, style
from plots.runs import Run
from plots.tables import GENERAL_SKILLS, HELDOUT, SUMMARY, skill, sweep_tables, table
from plots.texts import kinds_of
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
    if name == "countries":  # new ones, in the wordings that the base knows
        rng = random.Random(f"{name} {seed}")
        known = "".join(prompt + answer for prompt, answer in kinds_of(seed)["facts"].train)
        names = [new for new in invented_names(rng, 60) if new not in known]
        return facts(zip(names[:20], names[20:40]), data.CAPITAL_WORDINGS, rng)
    return DOMAINS[name](random.Random(f"{name} {seed}"))


def text(name, seed, world, purpose="manual", count=2_000, part="train"):
    """`count` documents of a domain -> tokens (N,)."""
    documents = data.draw_text({name: manual(name, seed)}, count,
                               random.Random(f"{purpose} {name} {seed}"), part)
    return data.encode(world.tokenizer, documents).to(world.general.device)


# --- the runs ------------------------------------------------------------------------------------

class Bases(torch.nn.Module):
    """Of several bases the one that predicts a row best, (B, T) -> logits (B, T, V).

    Its copy, where training starts, is a copy of `model`.
    """
    def __init__(self, model, bases):
        super().__init__()
        self.model, self.bases = model, torch.nn.ModuleList(bases)

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.model)

    def forward(self, tokens):
        logits = torch.stack([base(tokens) for base in self.bases])  # (bases, B, T, V)
        nats = [cross_entropy(some[:, :-1], tokens[:, 1:]).mean(dim=1) for some in logits]
        return logits[torch.stack(nats).argmin(dim=0), torch.arange(len(tokens))]


def chain(method, settings, seed, world, base, latest=False, each=False, earlier=False, domains=4,
          documents=2_000):
    """One stage per domain -> a row of the base and one after each stage.

    The KL is to the base; with latest to the model at the start of the stage; with each to that of
    all models so far which predicts a row best. earlier: half of the general text is from the
    earlier domains, in equal parts, and of each only so many documents, again and again.
    """
    names = list(DOMAINS)[:domains]
    texts, few = ({name: text(name, seed, world, count=count) for name in names}
                  for count in (2_000, documents))
    world = replace(world, probes={name: world.probes[name] for name in GENERAL_SKILLS}
                    | {name: manual(name, seed).probes for name in names})
    rows, models = [{"step": 0, "domain": "", **evaluate(base, base, world)}], [base]
    for stage, name in enumerate(names, 1):
        world = replace(world, domain=texts[name],
                        heldout_domain=text(name, seed, world, "heldout", 200, "heldout"))
        training = world
        if earlier and stage > 1:
            share = len(world.general) // (stage - 1)
            old = [few[done].repeat(1 + share // len(few[done]))[:share]
                   for done in names[:stage - 1]]
            training = replace(world, general=torch.cat([world.general, *old]))
        start = models[-1] if latest else Bases(models[-1], models if each else models[:1])
        model, of_stage = continue_pretraining(
            method, replace(settings, eval_every=settings.steps), seed + 1000 * stage, training,
            start, lambda model: evaluate(model, base, world))
        models.append(model.requires_grad_(False))
        rows.append({**of_stage[-1], "step": stage, "domain": name})
    return [{**row, "method": method, "seed": seed} for row in rows]


def one_domain(method, settings, seed, world, base, name, documents=2_000):
    """One domain, learnt from so many documents -> the last row."""
    kind = manual(name, seed)
    probes = {skill: world.probes[skill] for skill in GENERAL_SKILLS} | {"domain": kind.probes}
    world = replace(world, domain=text(name, seed, world, count=documents),
                    heldout_domain=text(name, seed, world, "heldout", 200, "heldout"),
                    probes=probes | {"held-out wordings": kind.heldout})
    return continue_pretraining(method, settings, seed, world, base,
                                lambda model: evaluate(model, base, world))[1][-1:]


def run(method, **how):
    return Run(method, {"general_errors": 0.0}, chain, how, 3)


def single(method, **how):
    return Run(method, {"general_errors": 0.0, "eval_every": 250}, one_domain, how)


KEEP = {"latest": True, "earlier": True}
FOUR = {"ce": run("ce"), "replay": run("replay"),
        "replay, earlier domains too": run("replay", earlier=True),
        "mol to the first base": run("mol"), "mol to the latest model": run("mol", latest=True),
        "mol to the latest model, earlier domains too": run("mol", **KEEP)}
EIGHT = {"mol to the latest model": run("mol", **KEEP, domains=8),
         "replay": run("replay", earlier=True, domains=8),
         "mol to one base per domain": run("mol", each=True, earlier=True, domains=8)}
EIGHT |= {f"mol to the latest model, documents per earlier domain: {count}": run(
    "mol", **KEEP, domains=8, documents=count) for count in (100, 10, 1)}
METHODS, DOCUMENTS = ("ce", "replay", "mol"), (100, 500, 2_000)
NEAR = {method: single(method, name="countries") for method in METHODS}
FEW = {method: {count: single(method, name="alarms", documents=count) for count in DOCUMENTS}
       for method in METHODS}
RUNS = FOUR | {f"eight domains, {label}": run for label, run in EIGHT.items()}
RUNS |= {f"countries, {method}": run for method, run in NEAR.items()}
RUNS |= {f"{method}, {count} documents": FEW[method][count] for method in METHODS
         for count in DOCUMENTS}


def earlier_domains(row):
    """Exact answers on the domains before the latest one, mean over these, %."""
    names = list(DOMAINS)[:row["step"] - 1]
    return 100 * mean(row["accuracy"][name] for name in names) if names else None


EARLIER = earlier_domains, 0


def tell(results):
    domains = {f"{name}, %": (skill(name), 0) for name in list(DOMAINS)[:4]}
    general = {name: SUMMARY[name] for name in ("general skills, %", "KL")}
    stages = {label: {stage: [rows[:stage + 1] for rows in results(run)] for stage in range(1, 9)}
              for label, run in EIGHT.items()}
    few = {method: {count: results(run) for count, run in FEW[method].items()} for method in FEW}
    return "\n\n".join([
        table("four domains", {label: results(run) for label, run in FOUR.items()},
              domains | general),
        sweep_tables("domains", stages, columns=general | {"earlier domains, %": EARLIER}),
        table("new countries", {method: results(run) for method, run in NEAR.items()},
              SUMMARY | HELDOUT),
        sweep_tables("domain documents", few, "{:,}".format, SUMMARY | HELDOUT)])


def draw(results, picture, note):
    colours = {"mol to the latest model": (style.COLOURS["mol"], "-"),
               "mol to one base per domain": (style.COLOURS["mol"], ":"),
               "replay": (style.COLOURS["replay"], "-")}
    figure, (axes,) = style.panels(1, 2, 10, 4, sharey=True)
    for panel, (title, (value, _), first) in zip(axes, [
            ("general skills", SUMMARY["general skills, %"], 1), ("earlier domains", EARLIER, 2)]):
        style.sweep(panel, {label: (*colours[label], {
            stage: [rows[:stage + 1] for rows in results(EIGHT[label])]
            for stage in range(first, 9)}) for label in colours}, value, label=panel is axes[1])
        panel.set(title=title, xlabel="domains learnt in turn", ylim=(-4, 104))
    axes[0].set_ylabel("exact answers, %")
    style.save(figure, picture, "Eight domains: replay keeps the earlier ones better than mol",
               note)


if __name__ == "__main__":
    runs.main("domains", RUNS, draw, __doc__, tell, defaults=runs.FEW_SEEDS)
