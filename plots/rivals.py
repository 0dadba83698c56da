"""MoL and other methods that protect a model. Which part of MoL protects: the base's targets, KL?

70% of the answers in the general text are wrong. Most methods have four values of one setting. The
best is chosen on three of the five seeds shown. All read the same domain sequences and, unless
their name says otherwise, have the same steps.
"""

from statistics import mean

import torch

from eval import evaluate
from plots import runs
from plots.methods import PARTS
from plots.runs import Run
from plots.tables import HELDOUT, SUMMARY, differences_table, ends, kept, learnt, table
from plots.texts import from_source
from train import continue_pretraining


def interpolated(method, settings, seed, world, base, a):
    """Train, then go back to base + a (trained - base), as in WiSE-FT (arXiv 2109.01903)."""
    model, rows = continue_pretraining(method, settings, seed, world, base, lambda model: {})
    with torch.no_grad():
        for weight, base_weight in zip(model.parameters(), base.parameters()):
            weight.copy_(base_weight + a * (weight - base_weight))
    return [{**rows[-1], **evaluate(model, base, world)}]


def over(method, setting, values, source=None, **settings):
    """Four values of a setting -> {value: Run}, on another general text if it has a name."""
    work = (from_source, {"source": source}) if source else (None, {})
    return {f"{setting} {value:g}": Run(method, {**settings, setting: value}, *work)
            for value in values}


RATES = (3e-3, 6e-3, 1.5e-3, 7e-4)
LOW_RATES = (1.5e-3, 3e-3, 6e-3, 7e-4)
SEARCHES = {  # the best value of each comes first
    "mol": over("mol", "strength", (1.0, 0.3, 3.0, 10.0)),
    "LoRA mol": over("mol", "lr", (4e-2, 2e-2, 1e-2, 5e-3), lora_rank=8),
    "replay": over("replay", "lr", (6e-3, 3e-3, 1.5e-3, 7e-4)),
    "LoRA replay": over("replay", "lr", (2e-2, 4e-2, 1e-2, 5e-3), lora_rank=8),
    "replay, base's answers": over("replay", "lr", RATES, "answered"),
    "base's best token": over("argmax", "lr", RATES),
    "base's sampled token": over("sampled", "lr", LOW_RATES),
    "replay and mol": over("ce_and_kl", "strength", (3.0, 0.3, 1.0, 10.0)),
    "replay, likely tokens": over("likely_tokens", "strength", (1.0, 2.0, 4.0, 8.0)),
    "replay, likely documents": {
        f"limit {limit:g}": Run("replay", {}, from_source, {"source": "likely documents",
                                                            "limit": limit})
        for limit in (4.0, 3.0, 5.0, 7.0)},
    "replay, right answers": over("replay", "lr", LOW_RATES, general_errors=0.0),
    "replay, own samples": over("replay", "lr", LOW_RATES, "own samples"),
    # without general text
    "ce": over("ce", "lr", (3e-3,)),
    "ce, low rate": over("ce", "lr", (1e-3, 5e-4, 3e-4, 1e-4)),
    "ce, low rate, 2,500 steps": over("ce", "lr", (1e-4, 3e-4), steps=2500, eval_every=500),
    "ce, one part": {part: Run(f"ce, {part}") for part in PARTS},
    "ce, then interpolated": {f"a {a:g}": Run("ce", {}, interpolated, {"a": a})
                              for a in (0.1, 0.2, 0.3, 0.5)},
    "LoRA ce": over("ce", "lr", (2e-2, 4e-2, 1e-2, 5e-3), lora_rank=8),
    "domain_kl": over("domain_kl", "strength", (0.1, 0.03, 0.3, 1.0)),
    "masked_kl": over("masked_kl", "strength", (1.0, 0.1, 0.3, 3.0)),
    "asft": {f"{kl} {strength:g}": Run("asft", {"kl": kl, "strength": strength})
             for kl in ("forward", "reverse") for strength in (0.3, 0.03)},
    "disc": over("disc", "lr", (7e-4, 3e-3, 6e-3, 1.5e-3), kl="forward"),
    "l2sp": over("l2sp", "strength", (0.03, 0.003, 0.01, 0.1)),
    "ewc": over("ewc", "strength", (1000.0, 100.0, 300.0, 3000.0)),
    "ewc, 1,000 steps": over("ewc", "strength", (1000.0, 300.0, 3000.0, 10_000.0), steps=1000,
                             eval_every=200),
}
BEST = {name: next(iter(values)) for name, values in SEARCHES.items()}
RUNS = {f"{name}, {value}": SEARCHES[name][value] for name, value in BEST.items()}
RUNS |= {"mol, forward KL": Run("mol", {"kl": "forward"}),
         "mol, mean of both KL": Run("mol", {"kl": "mean"}),
         **{f"mol, {k} stored tokens": Run(f"stored {k}") for k in (64, 8)}}
SEARCH = {f"search: {name}, {value}": run._replace(seeds=3)
          for name, values in SEARCHES.items() for value, run in values.items()}


def best_values(results):
    """The value of each method with the highest mean of general skills kept and domain learnt."""
    def score(name, value):
        return mean(ends(results(SEARCH[f"search: {name}, {value}"]),
                         lambda row: kept(row) + learnt(row)))

    return {name: max(values, key=lambda value: score(name, value))
            for name, values in SEARCHES.items()}


def tell(results):
    lines = {label: results(run) for label, run in (SEARCH | RUNS).items()}
    return (f"{table('best setting', lines, SUMMARY | HELDOUT)}\n\nbest: {best_values(results)}\n\n"
            f"{differences_table({label: lines[label] for label in RUNS}, 'mol, strength 1')}")


if __name__ == "__main__":
    runs.main("rivals", SEARCH | RUNS, None, __doc__, tell)
