"""How few general documents suffice, when the same ones are seen again and again?

    python plots/amount.py        the runs that are missing, amount.jsonl, amount.png; --help lists the settings

Replay can learn a small text by heart, wrong answers and all. MoL never imitates it, but it could come to agree with
the base on those contexts alone. So each run is marked on the general text that it saw, and on 2,000 documents drawn anew with the
same share of wrong answers: the difference is what was learnt by heart. It is a lower bound: the more documents were seen,
the more of those drawn anew are among them by chance.
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
import data
import losses
from eval import heldout_windows
from plots import style
from plots.style import plt
from plots.sweep import Run, main, train_and_mark

AMOUNTS = (30, 100, 300, 1000, 3000, 10_000)


@torch.no_grad()
def on_text(name, model, base, stream, block_size):
    """Loss and KL to the base on a stream of tokens (N,), in nats per token -> {"seen_loss", "seen_kl"}, or of another name."""
    windows = heldout_windows(stream, block_size)
    logits, base_logits = model(windows[:, :-1]), base(windows[:, :-1])  # (B, T, V)
    return {f"{name}_loss": losses.cross_entropy(logits, windows[:, 1:]).mean().item(),
            f"{name}_kl": losses.kl_divergence(logits, base_logits).mean().item()}


def marked_on_seen(s, seed, method, world, base, dtype):
    """train_and_mark, and marked on the general text that was seen and on unseen text that is no better."""
    kinds = data.general_kinds(random.Random(f"general {seed}"))
    unseen = data.write(kinds, 2000, random.Random(f"unseen {seed}"), errors=s.general_errors)
    unseen = data.encode(world.tokenizer, unseen).to(world.general.device)
    texts = {"seen": world.general, "unseen": unseen}
    return train_and_mark(s, seed, method, world, base, dtype, lambda model: {
        key: nats for name, stream in texts.items() for key, nats in on_text(name, model, base, stream, s.block_size).items()})


RUNS = [Run(f"{method}, {amount}", method, {"general_documents": amount}, marked_on_seen)
        for amount in AMOUNTS for method in ("replay", "mol")]
GAPS = {"replay": ("replay: loss", "loss"), "mol": ("mol: KL", "kl")}


def draw(rows, picture):
    last = style.last(rows)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4))
    for panel, (of_what, value) in zip(panels, style.KEPT_AND_LEARNT.items()):
        for method in ("replay", "mol"):
            points = {amount: list(map(value, last[f"{method}, {amount}"])) for amount in AMOUNTS}
            style.curve(panel, points, style.COLOURS[method], style.WIDTHS[method], marker="o", label=method)
        panel.set(title=of_what, ylim=(-4, 104), ylabel="exact answers, %")
    for method, (shown, key) in GAPS.items():
        for text, dashes in (("unseen", "-"), ("seen", ":")):
            points = {amount: [row[f"{text}_{key}"] for row in last[f"{method}, {amount}"]] for amount in AMOUNTS}
            style.curve(panels[2], points, style.COLOURS[method], 2.4, marker="o", ls=dashes, label=f"{shown} on {text} text")
    panels[2].set(title="by heart?", ylabel="nats per token")
    panels[2].legend(frameon=False, fontsize=9)
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("general documents")
        panel.grid(axis="y", alpha=0.25)
    panels[0].legend(loc="lower right", frameon=False)
    figure.suptitle(style.title(f"{AMOUNTS[1]} general documents, general skills answered exactly", {
        method: last[f"{method}, {AMOUNTS[1]}"] for method in ("replay", "mol")}), x=0.01, ha="left")
    style.save(figure, picture, rows)


if __name__ == "__main__":
    sys.exit(main("amount", RUNS, draw, __doc__))
