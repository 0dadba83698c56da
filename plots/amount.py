"""How few general documents suffice, when the same ones are seen again and again?

    python plots/amount.py        makes the runs that are missing, draws amount.png; --help

All answers are right here, so that only the amount is in question. Replay can learn a small text
by heart. MoL never imitates it, but it could come to agree with the base on those contexts alone.
So each run is marked on the general text that it saw, and on 2,000 documents drawn anew: the
difference is what was learnt by heart. It is a lower bound: the more documents were seen, the more
of those drawn anew are among them by chance.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask

AMOUNTS = (30, 100, 300, 1000, 3000, 10_000)
METHODS = ("replay", "mol")
GAPS = {"replay": ("replay: loss", "loss"), "mol": ("mol: KL", "kl")}


def on_text(name, model, base, stream, block_size):
    """Loss and KL to the base on a stream of tokens (N,), in nats per token.

    -> {"seen_loss", "seen_kl"}, or of another name
    """
    import losses
    from eval import heldout_windows

    windows = heldout_windows(stream, block_size)  # (B, T + 1)
    logits, base_logits = model(windows[:, :-1]), base(windows[:, :-1])  # (B, T, V)
    return {f"{name}_loss": losses.cross_entropy(logits, windows[:, 1:]).mean().item(),
            f"{name}_kl": losses.kl_divergence(logits, base_logits).mean().item()}


def marked_on_seen(method, s, seed, world, base):
    """A run that is also marked on the text that it saw, and on unseen text that is no better."""
    import data
    from eval import evaluate
    from train import train

    kinds = data.general_kinds(random.Random(f"general {seed}"))
    rng = random.Random(f"unseen {seed}")
    unseen = data.write(kinds, 2000, rng, errors=s.general_errors, error_kind=s.error_kind)
    unseen = data.encode(world.tokenizer, unseen).to(world.general.device)

    def mark(model):
        return {**evaluate(model, base, world),
                **on_text("seen", model, base, world.general, s.block_size),
                **on_text("unseen", model, base, unseen, s.block_size)}

    return train(method, s, seed, world, base, mark)[1]


def run(method, amount):
    return Run(method, {"general_documents": amount, "general_errors": 0.0}, marked_on_seen)


RUNS = {f"{method}, {amount}": run(method, amount) for amount in AMOUNTS for method in METHODS}


def draw(found, picture):
    figure, (panels,) = style.panels(1, 3, 13, 4.4)
    for panel, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for method in METHODS:
            points = {n: style.ends(found(run(method, n)), value) for n in AMOUNTS}
            style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method], marker="o",
                        label=method)
        panel.set(title=of_what, ylim=(-4, 104), ylabel="exact answers, %")
    for method, (shown, key) in GAPS.items():
        for text, dashes in (("unseen", "-"), ("seen", ":")):
            points = {n: [row[f"{text}_{key}"] for row in style.last(found(run(method, n)))]
                      for n in AMOUNTS}
            style.curve(panels[2], points, style.COLOURS[method], 2.4, marker="o", ls=dashes,
                        label=f"{shown} on {text} text")
    panels[2].set(title="by heart?", ylabel="nats per token")
    panels[2].legend(frameon=False, fontsize=9)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("general documents")
        panel.grid(axis="y", alpha=0.25)
    panels[0].legend(loc="lower right", frameon=False)
    kept = {method: style.last(found(run(method, AMOUNTS[1]))) for method in METHODS}
    what = style.title(f"{AMOUNTS[1]} general documents, general skills answered exactly", kept)
    style.save(figure, picture, what, style.spread(len(kept["mol"])))


if __name__ == "__main__":
    ask("amount", RUNS, draw, __doc__)
