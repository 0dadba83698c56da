"""Which part of MoL protects the model: the targets from the base, the KL, or its direction?

The general text has 70% wrong answers. One method reads the base's answers to its prompts instead,
one only some of its documents, and the last one no general text.
"""

from functools import partial

import torch

import losses
from losses import PADDING
from plots import runs, style
from plots.runs import Run
from plots.tables import differences_table, domain_loss, kept, kl, metrics_table, p_right
from plots.texts import from_source
from train import METHODS, Method

# --- the methods ---------------------------------------------------------------------------------

def with_targets(pick):
    """Replay with other targets on general rows, pick(base_logits, targets, settings, prepared)."""
    def method(model, base, batch, settings, prepared=None):
        with torch.no_grad():
            base_logits = base(batch.tokens[batch.general])  # (G, T, V)
        targets = batch.targets.clone()  # (B, T)
        targets[batch.general] = pick(base_logits, targets[batch.general], settings, prepared)
        loss = losses.mean_cross_entropy(model(batch.tokens), targets)
        return loss, loss, torch.zeros(())
    return method


def sampled(base_logits, targets, settings, generator):
    p = losses.log_probs(base_logits).exp().flatten(0, 1)  # (G * T, V)
    return torch.multinomial(p, 1, generator=generator).view(targets.shape)


def likely_tokens(base_logits, targets, settings, _):
    """The text's tokens, without those over `strength` nats (2501.14315, for new data)."""
    nats = losses.cross_entropy(base_logits, targets)
    return targets.masked_fill(nats > settings.strength, PADDING)


def ce_and_kl(model, base, batch, settings):
    """MoL, and replay at the same time: half of each."""
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens[batch.general])  # (G, T, V)
    loss, ce, kl = losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits,
                                            settings.kl, settings.strength)
    replay = losses.mean_cross_entropy(logits, batch.targets)
    return (loss + replay) / 2, (ce + replay) / 2, kl / 2


def domain_kl(model, base, batch, settings, masked=False):
    """Cross-entropy and forward KL to the base, both on domain text (LwF, arXiv 1606.09282).

    LwF gives the new task a head of its own, and its KL a temperature of 2.
    masked: the target is removed from both distributions, and the rest divided by its sum (arXiv
    2605.29498, whose abstract does not give the direction of the KL).
    """
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens)
    ce = losses.mean_cross_entropy(logits, batch.targets)
    if masked:
        target = batch.targets.unsqueeze(-1)  # (B, T, 1)
        logits, base_logits = (x.float().scatter(-1, target, -1e4) for x in (logits, base_logits))
    kl = losses.kl_divergence(logits, base_logits, "forward").mean()
    return ce + settings.strength * kl, ce, kl


METHODS |= {"argmax": Method(with_targets(lambda logits, *_: logits.argmax(dim=-1)),
                             reads_general=True),
            "sampled": Method(with_targets(sampled), reads_general=True,
                              prepare=lambda base, world, settings, seed:
                              torch.Generator(settings.device).manual_seed(seed)),
            "likely_tokens": Method(with_targets(likely_tokens), reads_general=True),
            "ce_and_kl": Method(ce_and_kl, reads_general=True),
            "domain_kl": Method(domain_kl), "masked_kl": Method(partial(domain_kl, masked=True))}


# --- the runs ------------------------------------------------------------------------------------

RUNS = {"mol": Run("mol"), "mol, forward KL": Run("mol", {"kl": "forward"}),
        "mol, mean of both KL": Run("mol", {"kl": "mean"}),
        "replay, base's answers": Run("replay", {}, from_source, {"source": "answered"}),
        "base's best token": Run("argmax"), "base's sampled token": Run("sampled"),
        "replay and mol": Run("ce_and_kl"),
        "replay, likely tokens": Run("likely_tokens", {"strength": 4.0}),
        "replay, likely documents": Run("replay", {}, from_source,
                                        {"source": "likely documents", "limit": 5.0}),
        "replay": Run("replay"),
        "masked KL, domain only": Run("masked_kl")}


def tell(results):
    return (f"{metrics_table(runs.labelled(results, RUNS))}\n\n"
            f"{differences_table(results, RUNS, 'mol')}")


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 4, 10, 4.2, sharey=True)
    lines = {label: (style.colour_of(label), results(run)) for label, run in RUNS.items()}
    style.dot_rows(axes, lines, {
        "general skills kept": (kept, "exact answers, %"),
        "p(right)": (p_right, "probability, %"),
        "KL to the base": (kl, "nats per token"),
        "domain loss": (domain_loss, "nats per token")})
    axes[2].set_xscale("log")
    style.save(figure, picture, "Targets from the base on general text keep the answers", note)


if __name__ == "__main__":
    runs.main("teacher", RUNS, draw, __doc__, tell)
