"""What do the means hide? Rounding noise, single questions, the first steps, the KL and forgetting.

Noise: the same run again, from weights multiplied by (1 + 1e-6 times a normal number). A difference
below twice the standard deviation of such runs is no finding. A question is lost if the base
answers it and the model does not, and gained if it is the other way round.
"""

import copy
import functools
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import torch

from eval import evaluate, heldout_windows, score_probes
from losses import kl_divergence
from plots import runs, style
from plots.runs import Run
from plots.tables import (GENERAL_SKILLS, SUMMARY, cell, ends, kept, kl, learnt, markdown, of,
                          skill, sweep_tables, table)
from plots.texts import test_on_text
from plots.wordings import unseen_text
from train import continue_pretraining

TEXTS = {"right answers": {"general_errors": 0.0}, "10% wrong": {"general_errors": 0.1},
         "70% wrong": {"general_errors": 0.7},
         "70% noise": {"general_errors": 0.7, "error_kind": "noise"}}
CASES = [("ce", "70% wrong"), *((method, text) for text in TEXTS for method in ("replay", "mol"))]
NOISES = 5  # runs, the one without noise too
NOISY = [case for case in CASES if case[1] in ("right answers", "70% wrong")]


def in_detail(method, settings, seed, world, base, noise=0):
    """A run whose rows have items, {skill: "110..."}, a digit per question, and two more KL.

    other_kl: on text in other words, which no method reads. domain_kl: forward, on domain text, as
    in arXiv 2509.04259. Both are in nats per token.
    """
    unseen, start = unseen_text("other beginnings", seed, world), copy.deepcopy(base)
    generator = torch.Generator().manual_seed(noise)
    with torch.no_grad():
        for weight in start.parameters() if noise else ():
            weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)

    @torch.no_grad()
    def test(model):
        domain = heldout_windows(world.heldout_domain, settings.block_size)[:, :-1]  # (B, T)
        of_domain = kl_divergence(model(domain), base(domain), "forward").mean().item()
        items = {name: "".join(f"{score_probes(model, world.tokenizer, [probe])[0]:.0f}"
                               for probe in world.probes[name]) for name in GENERAL_SKILLS}
        return {**evaluate(model, base, world), "items": items, "domain_kl": of_domain,
                **test_on_text("other", model, base, unseen)}

    return continue_pretraining(method, settings, seed, world, start, test)[1]


def importance_of(method, settings, seed, world, base, text):
    """EWC whose importance is computed on another text than the general one."""
    generator = torch.Generator().manual_seed(seed)
    texts = {"domain text": world.domain, "random tokens": torch.randint(
        world.tokenizer.n_vocab, world.general.shape, generator=generator)}
    return continue_pretraining(method, settings, seed, replace(world, general=texts[text]), base,
                                lambda model: evaluate(model, base, world))[1]


def early(method, settings, seed, world, base):
    """The rows of the first 60 steps."""
    rows = []

    def watch(step, model):
        if step <= 60 and step % 4 == 0:
            rows.append({"method": method, "seed": seed, "step": step,
                         **evaluate(model, base, world)})

    continue_pretraining(method, settings, seed, world, base, lambda model: {}, watch)
    return rows


def label(method, text):
    return method if method == "ce" else f"{method}, {text}"


def run(method, text, noise=0):
    how = {"noise": noise} if noise else {}
    return Run(method, {**TEXTS[text], "eval_every": 250}, in_detail, how, 1 if noise else 5)


EWC = {f"ewc, importance on {text}, strength {strength:g}": Run(
    "ewc", {"strength": strength, "eval_every": 250}, importance_of, {"text": text})
    for text in ("domain text", "random tokens") for strength in (1e2, 1e3)}
# A tenth of the steps is warmup: 10 or 100.
DIP = {f"{method}, warmup of {steps // 10} steps": Run(
    method, {"general_errors": 0.0, "steps": steps, "eval_every": steps}, early, {}, 3)
    for method in ("replay", "mol") for steps in (100, 1000)}
RUNS = {label(*case): run(*case) for case in CASES}
RUNS |= EWC | DIP | {f"{label(*case)}, noise {n}": run(*case, n)
                     for case in NOISY for n in range(1, NOISES)}


# --- the tables ----------------------------------------------------------------------------------

VALUES = {name: (value, digits + 1) for name, (value, digits) in SUMMARY.items()} | {
    "domain, held-out wordings, %": (skill("held-out wordings"), 1),
    "KL on text in other words": (of("other_kl"), 2),
    "forward KL on domain text": (of("domain_kl"), 2)}


def changed(rows, before, after):
    """Of the questions of all skills, how many went from one digit to the other in a run."""
    return sum(pair == (before, after) for name in GENERAL_SKILLS
               for pair in zip(rows[0]["items"][name], rows[-1]["items"][name]))


@functools.cache
def against_kl(least=90):
    """Of all stored runs, the settings that learnt the domain -> [(method, KL to the base, general
    skills)], means over seeds."""
    points = {}
    for line in runs.read_runs(runs.HERE / "runs.jsonl").values():
        row = line["rows"][-1]
        settings = runs.of_run(runs.DEFAULTS) | line["settings"] | {"eval_every": 0}
        if (settings["base_steps"], settings["n_embd"]) != (1000, 128):
            continue  # another base
        if "domain" in row.get("accuracy", ()):  # not on a real model
            key = line["method"], str(line["how"]), *settings.values()
            points.setdefault(key, {})[line["seed"]] = kl(row), kept(row), learnt(row)
    points = [(key[0], *map(mean, zip(*seeds.values()))) for key, seeds in points.items()]
    return [point[:3] for point in points if point[3] >= least]


def tell(results):
    lines = {label(*case): results(run(*case)) for case in CASES}
    noise = [["standard deviation, seed 0", *VALUES]]
    items = [["of 430 questions, against the base", "lost", "gained"]]
    for case in NOISY:
        seeds = [results(run(*case, n))[0] for n in range(NOISES)]
        noise.append([label(*case), *(f"{stdev(ends(seeds, value)):.{digits}f}"
                                      for value, digits in VALUES.values())])
    for name, seeds in lines.items():
        items.append([name, *(cell([changed(rows, *pair) for rows in seeds], 1)
                              for pair in ("10", "01"))])
    others = {name: results(run) for name, run in EWC.items()}
    dip = {name: {4 * i: [rows[:i + 1] for rows in results(run)] for i in range(16)}
           for name, run in DIP.items()}
    return "\n\n".join([table("method", lines, VALUES), markdown(noise), markdown(items),
                        sweep_tables("steps", dip, columns={"general skills, %": (kept, 0)}),
                        table("one setting changed", others), "rank correlation of KL and skills: "
                        "{:.2f} over {} settings".format(*rank_correlation())])


def rank_correlation():
    """The rank correlation of KL and skills -> the correlation, the number of settings."""
    ranks = np.array([point[1:] for point in against_kl()]).argsort(axis=0).argsort(axis=0)
    return np.corrcoef(ranks.T)[0, 1], len(ranks)


def draw(results, picture, note):
    """All stored runs, not only those of this experiment."""
    figure, ((panel,),) = style.panels(1, 1, 8.5, 4.2)
    for method, nats, skills in against_kl():
        panel.plot(nats, skills, "o", color=style.colour_of(method), alpha=0.6, ms=6)
    wrong = [mean(ends(results(run("replay", "70% wrong")), value)) for value in (kl, kept)]
    best_token = max(place for method, *place in against_kl() if method == "argmax")
    for text, place, offset in (("replay, 70% wrong", wrong, (-130, -4)),
                                ("the base's best token", best_token, (8, 5))):
        panel.annotate(text, place, offset, textcoords="offset points", fontweight="bold")
    panel.set(xscale="log", xlabel="KL to the base on held-out general text, nats per token",
              ylabel="general skills: exact answers, %")
    style.save(figure, picture, "The lower the KL, the more is kept, with exceptions both ways",
               "a point: a setting that learnt the domain; green: mol, blue: replay, orange: ce")


if __name__ == "__main__":
    runs.main("details", RUNS, draw, __doc__, tell)
