"""How few general documents are enough, when the same ones are read again and again?

All answers are right here. Each run is also tested on the text that it read and on 2,000 new
documents, some of which it may have read too. The difference is what it learnt by heart.
"""

import random

import torch

import data
import losses
from eval import evaluate, heldout_windows
from plots import runs, style
from plots.runs import Run
from plots.tables import kept
from plots.texts import kinds_of
from train import train

AMOUNTS = (30, 100, 300, 1000, 3000, 10_000)
METHODS = ("replay", "mol")
COLOURS = style.COLOURS | {"replay": style.COLOURS["replay, right answers"]}


@torch.no_grad()
def test_on_text(name, model, base, tokens, block_size):
    """Loss and KL on tokens (N,), in nats per token -> {"seen_loss", "seen_kl"} if name is seen."""
    windows = heldout_windows(tokens, block_size)  # (B, T + 1)
    logits, base_logits = model(windows[:, :-1]), base(windows[:, :-1])  # (B, T, V)
    return {f"{name}_loss": losses.cross_entropy(logits, windows[:, 1:]).mean().item(),
            f"{name}_kl": losses.kl_divergence(logits, base_logits).mean().item()}


def marked_on_seen(method, settings, seed, world, base):
    """A run that is also tested on the text that it read and on new text."""
    new = data.draw_text(kinds_of(seed), 2000, random.Random(f"unseen {seed}"),
                         errors=settings.general_errors, error_kind=settings.error_kind)
    new = data.encode(world.tokenizer, new).to(world.general.device)

    def test(model):
        return {**evaluate(model, base, world),
                **test_on_text("seen", model, base, world.general, settings.block_size),
                **test_on_text("unseen", model, base, new, settings.block_size)}

    return train(method, settings, seed, world, base, test)[1]


def run(method, amount):
    return Run(method, {"general_documents": amount, "general_errors": 0.0}, marked_on_seen)


RUNS = {f"{method}, {amount}": run(method, amount) for amount in AMOUNTS for method in METHODS}


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4.2)
    for panel in axes:
        panel.set(xscale="log", xlabel="general documents")
    sweeps = {method: {n: results(run(method, n)) for n in AMOUNTS} for method in METHODS}
    style.sweep(axes[0], {method: (COLOURS[method], "-", sweeps[method], kept)
                          for method in METHODS})
    style.sweep(axes[1], {f"{method}: {key}, {text}": (
        COLOURS[method], dashes, sweeps[method], lambda row, key=f"{text}_{key}": row[key])
        for method, key in (("replay", "loss"), ("mol", "kl"))
        for text, dashes in (("unseen", "-"), ("seen", ":"))})
    axes[0].set(title="general skills kept", ylabel="exact answers, %")
    axes[1].set(title="gap: learnt by heart", ylabel="nats per token")
    style.save(figure, picture, "About 1,000 general documents are enough", note)


if __name__ == "__main__":
    runs.main("amount", RUNS, draw, __doc__)
