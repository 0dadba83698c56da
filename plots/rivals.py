"""MoL and other methods that protect a model, each at the best of its settings.

Every method except plain ce has four values of one setting: a strength, or the learning rate. The
best value has the highest mean of general skills kept and domain learnt, on the same questions that
are shown. All methods have the same steps, seeds and domain sequences.
"""

import copy
from statistics import mean

import torch

import data
import losses
from plots import runs, style
from plots.runs import Run
from plots.tables import ends, kept, learnt, metrics_table
from train import METHODS, Method

# --- the methods ---------------------------------------------------------------------------------

def domain_kl(model, base, batch, settings):
    """Cross-entropy and forward KL to the base, both on domain text (LwF, arXiv 1606.09282).

    LwF gives the new task a head of its own. With one head both terms act on the same logits.
    """
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens)
    ce = losses.mean_cross_entropy(logits, batch.targets)
    kl = losses.kl_divergence(logits, base_logits, "forward").mean()
    return ce + settings.strength * kl, ce, kl


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
    ce = losses.mean_cross_entropy(model(batch.tokens), batch.targets)
    distance = weight_distance(model.parameters(), base.parameters(), importance)
    return ce + settings.strength * distance, ce, torch.zeros(())


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


# l2sp and ewc have no weight decay: it would pull the weights to zero instead of to the base.
METHODS["domain_kl"] = Method(domain_kl)
METHODS["l2sp"] = Method(ewc, weight_decay=0.0)
METHODS["ewc"] = Method(ewc, weight_decay=0.0, prepare=fisher_of_base)


# --- the runs ------------------------------------------------------------------------------------

LORA, LORA_RATES, RATES = {"lora_rank": 8}, (5e-3, 1e-2, 2e-2, 4e-2), (3e-3, 6e-3, 1.5e-3, 7e-4)
SEARCHES = {  # name: (method, settings, the setting that is searched, its values)
    "ce": ("ce", {}, "lr", (3e-3,)),
    "ce, low rate": ("ce", {}, "lr", (1e-3, 5e-4, 3e-4, 1e-4)),
    "replay": ("replay", {}, "lr", RATES),
    "replay, right answers": ("replay", {"general_errors": 0.0}, "lr", RATES),
    "mol": ("mol", {}, "strength", (1.0, 0.3, 3.0, 10.0)),
    "domain_kl": ("domain_kl", {}, "strength", (0.03, 0.1, 0.3, 1.0)),
    "l2sp": ("l2sp", {}, "strength", (0.003, 0.01, 0.03, 0.1)),
    "ewc": ("ewc", {}, "strength", (100.0, 300.0, 1000.0, 3000.0)),
    "LoRA ce": ("ce", LORA, "lr", LORA_RATES),
    "LoRA replay": ("replay", LORA, "lr", LORA_RATES),
    "LoRA mol": ("mol", LORA, "lr", LORA_RATES),
}


def run(name, value):
    method, settings, searched, _ = SEARCHES[name]
    return Run(method, {**settings, searched: value})


def label(name, value):
    return f"{name}, {SEARCHES[name][2]} {value:g}"


RUNS = {label(name, value): run(name, value)
        for name, (*_, values) in SEARCHES.items() for value in values}


def best_values(results):
    """The best value of each method -> {name: value}."""
    def score(name, value):
        return mean(ends(results(run(name, value)), lambda row: kept(row) + learnt(row)))

    return {name: max(values, key=lambda value: score(name, value))
            for name, (*_, values) in SEARCHES.items()}


def tell(results):
    """The table of all values, the table of the best, and best values at the end of their range."""
    best = best_values(results)
    of_best = {label(name, value): run(name, value) for name, value in best.items()}
    at_edge = [label(name, best[name]) for name, (*_, values) in SEARCHES.items()
               if best[name] in (min(values), max(values))
               and not name.startswith("ce")]  # a higher rate of "ce, low rate" is ce
    return (f"{metrics_table(runs.labelled(results, RUNS))}\n\nthe best of each\n"
            f"{metrics_table(runs.labelled(results, of_best))}\n\n"
            f"best at the lowest or highest value tried: {'; '.join(at_edge) or 'none'}")


def draw(results, picture):
    best = best_values(results)
    order = sorted(best, key=lambda name: mean(ends(results(run(name, best[name])), kept)))
    figure, (axes,) = style.panels(1, 2, 10, 5, sharey=True)
    for panel, (of_what, value) in zip(axes, (("general skills kept", kept),
                                              ("domain learnt", learnt))):
        for y, name in enumerate(order):
            colour = style.colour_of(name if name in style.COLOURS else SEARCHES[name][0])
            style.dots(panel, {y: ends(results(run(name, best[name])), value)}, colour)
        panel.set(title=of_what, xlabel="exact answers, %", xlim=(-4, 104))
        panel.set_yticks(range(len(order)), order)
    style.save(figure, picture, "On 70% wrong answers only mol keeps the general skills",
               "each method at its best setting; "
               + style.seeds_note(len(results(run("mol", 1.0)))))


if __name__ == "__main__":
    runs.main("rivals", RUNS, draw, __doc__, tell)
