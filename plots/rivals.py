"""MoL and other methods that protect a model, each at the best of its settings.

Most methods have four values of one setting. The best is chosen on three of the five seeds shown.
All read the same domain sequences and, unless their name says otherwise, have the same steps.
"""

import copy
from statistics import mean

import torch

import data
import losses
import plots.teacher  # noqa: F401  adds its methods to METHODS
from eval import evaluate
from plots import runs, style
from plots.runs import Run
from plots.tables import differences_table, ends, kept, kl, learnt, metrics_table
from plots.texts import from_source
from train import METHODS, Method, ce, train

# --- the methods ---------------------------------------------------------------------------------

def weight_distance(weights, base_weights, importance=None):
    """Half the squared distance between two lists of tensors, weighted by importance -> scalar.

    With importance 1 this is L2-SP (arXiv 1802.01483, eq. 2 without a new head), with the diagonal
    Fisher it is EWC (arXiv 1612.00796, eq. 3).
    """
    weights, base_weights = list(weights), [w.detach() for w in base_weights]
    importance = [1.0] * len(weights) if importance is None else importance
    terms = zip(importance, weights, base_weights, strict=True)
    return sum((f * (w - w0) ** 2).sum() for f, w, w0 in terms) / 2


def ewc(model, base, batch, settings, importance=None):
    """Cross-entropy on domain text plus weight_distance: EWC with importance, else L2-SP."""
    loss, nats, no_kl = ce(model, base, batch, settings)
    distance = weight_distance(model.parameters(), base.parameters(), importance)
    return loss + settings.strength * distance, nats, no_kl


def diagonal_fisher(model, tokens, generator=None):
    """How much predictions on tokens (B, T) depend on each weight -> a tensor per parameter.

    F_i = E[ (d log p(y | s) / d theta_i)^2 ] per token, with y drawn from the model.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    fisher = [torch.zeros_like(w) for w in model.parameters()]
    # Independent draws, gradients of mean 0: the square of their sum is right on average.
    for row in tokens:
        logits = model(row[None])  # (1, T, V)
        p = losses.log_probs(logits[0].detach()).exp().cpu()  # (T, V)
        drawn = torch.multinomial(p, 1, generator=generator).T.to(row.device)  # (1, T)
        loss = losses.cross_entropy(logits, drawn).sum()
        for f, gradient in zip(fisher, torch.autograd.grad(loss, list(model.parameters()))):
            f += gradient ** 2 / tokens.numel()
    return fisher


def fisher_of_base(base, world, settings, seed):
    """The diagonal Fisher on 256 rows of general text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = data.windows(world.general, 256, settings.block_size, generator)[:, :-1]
    return diagonal_fisher(base, tokens, generator)


def only(part):
    """Cross-entropy on domain text that trains only the weights with `part` in their name."""
    def method(model, base, batch, settings):
        for name, weight in model.named_parameters():
            weight.requires_grad_(part in name)
        return ce(model, base, batch, settings)
    return method


def interpolated(method, settings, seed, world, base, a):
    """Train, then go back to base + a (trained - base), as in WiSE-FT (arXiv 2109.01903)."""
    model, rows = train(method, settings, seed, world, base, lambda model: {})
    with torch.no_grad():
        for weight, base_weight in zip(model.parameters(), base.parameters()):
            weight.copy_(base_weight + a * (weight - base_weight))
    return [{**rows[-1], **evaluate(model, base, world)}]


# l2sp and ewc have no weight decay: it would pull the weights to zero instead of to the base.
METHODS |= {"l2sp": Method(ewc, weight_decay=0.0),
            "ewc": Method(ewc, weight_decay=0.0, prepare=fisher_of_base)}
PARTS = {"embedding": "embedding", "attention": "attn", "mlp": "mlp", "last block": "blocks.1"}
METHODS |= {f"ce, {part}": Method(only(weights)) for part, weights in PARTS.items()}


# --- the runs ------------------------------------------------------------------------------------

def over(method, setting, values, source=None, **settings):
    """Four values of a setting -> {value: Run}, on another general text if it has a name."""
    work = (from_source, {"source": source}) if source else (None, {})
    return {f"{setting} {value:g}": Run(method, {**settings, setting: value}, *work)
            for value in values}


RATES = (3e-3, 6e-3, 1.5e-3, 7e-4)
SEARCHES = {  # the best value of each comes first
    "mol": over("mol", "strength", (1.0, 0.3, 3.0, 10.0)),
    "LoRA mol": over("mol", "lr", (4e-2, 2e-2, 1e-2, 5e-3), lora_rank=8),
    "replay": over("replay", "lr", (6e-3, 3e-3, 1.5e-3, 7e-4)),
    "LoRA replay": over("replay", "lr", (2e-2, 4e-2, 1e-2, 5e-3), lora_rank=8),
    "replay, base's answers": over("replay", "lr", RATES, "answered"),
    "base's best token": over("argmax", "lr", RATES),
    "base's sampled token": over("sampled", "lr", (1.5e-3, 3e-3, 6e-3, 7e-4)),
    "replay and mol": over("ce_and_kl", "strength", (3.0, 0.3, 1.0, 10.0)),
    "replay, likely tokens": over("likely_tokens", "strength", (1.0, 2.0, 4.0, 8.0)),
    "replay, likely documents": {
        f"limit {limit:g}": Run("replay", {}, from_source, {"source": "likely documents",
                                                            "limit": limit})
        for limit in (4.0, 3.0, 5.0, 7.0)},
    "replay, right answers": over("replay", "lr", (1.5e-3, 3e-3, 6e-3, 7e-4), general_errors=0.0),
    "replay, own samples": over("replay", "lr", (1.5e-3, 3e-3, 6e-3, 7e-4), "own samples"),
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
    "l2sp": over("l2sp", "strength", (0.03, 0.003, 0.01, 0.1)),
    "ewc": over("ewc", "strength", (1000.0, 100.0, 300.0, 3000.0)),
    "ewc, 1,000 steps": over("ewc", "strength", (1000.0, 300.0, 3000.0, 10_000.0), steps=1000,
                             eval_every=200),
}
BEST = {name: next(iter(values)) for name, values in SEARCHES.items()}
RUNS = {f"{name}, {value}": SEARCHES[name][value] for name, value in BEST.items()}
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
    reference = f"mol, {BEST['mol']}"
    return (f"{metrics_table(runs.labelled(results, SEARCH | RUNS))}\n\nbest: "
            f"{best_values(results)}\n\n{differences_table(results, RUNS, reference)}")


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 3, 10, 8, sharey=True)
    lines = {label: (style.colour_of(label), results(run)) for label, run in RUNS.items()}
    style.dot_rows(axes, lines, {
        "general skills kept": (kept, "exact answers, %"),
        "domain learnt": (learnt, "exact answers, %"),
        "KL to the base": (kl, "nats per token")})
    axes[2].set_xscale("log")
    style.save(figure, picture, "Targets from the base on general text keep the skills", note)


if __name__ == "__main__":
    runs.main("rivals", SEARCH | RUNS, draw, __doc__, tell)
