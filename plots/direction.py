"""Which way round? Reverse KL, forward KL and their mean: what is kept, how fast the domain is learnt, and where they differ.

    python plots/direction.py        the runs that are missing, direction.jsonl, direction.png; --help lists the settings

Below the curves both divergences stand token by token, on the first seed and early in training, when most is forgotten.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from losses import kl_divergence
from plots import style
from plots.style import plt
from plots.sweep import Run, main, train_and_mark

DIRECTIONS = {"reverse": "#0072B2", "forward": "#D55E00", "mean": "#009E73"}
EARLY = 100  # the step at which sentences are looked at


@torch.no_grad()
def by_token(model, base, world):
    """Both divergences at every token of a document of each kind -> [{"tokens", "reverse", "forward"}], in nats."""
    tokenizer, sentences = world.tokenizer, []
    for text in ("".join(world.probes[skill][0]) for skill in ("no_think", "think", "facts")):
        tokens = tokenizer.encode_ordinary("\n" + text)
        batch = torch.tensor([tokens[:-1]], device=world.general.device)  # (1, T)
        logits, base_logits = model(batch), base(batch)  # (1, T, V)
        sentences.append({"tokens": [tokenizer.decode([token]) for token in tokens[1:]]} | {
            direction: [round(nats, 4) for nats in kl_divergence(logits, base_logits, direction)[0].tolist()]
            for direction in ("reverse", "forward")})
    return sentences


def marked_by_token(s, seed, method, world, base, dtype):
    """train_and_mark, and both divergences token by token."""
    return train_and_mark(s, seed, method, world, base, dtype, lambda model: {"sentences": by_token(model, base, world)})


RUNS = [Run(f"mol, {direction}", "mol", {"kl": direction}, marked_by_token) for direction in DIRECTIONS]


def draw(rows, picture):
    figure = plt.figure(figsize=(11, 8.4))
    grid = figure.add_gridspec(3, 12, height_ratios=(1.5, 1, 1))
    by_step = style.by_step(rows)
    for place, (of_what, value) in zip((grid[0, :6], grid[0, 6:]), style.KEPT_AND_LEARNT.items()):
        panel = figure.add_subplot(place)
        for direction, colour in DIRECTIONS.items():
            style.curve(panel, {step: list(map(value, seeds)) for step, seeds in by_step[f"mol, {direction}"].items()},
                        colour, 2.4, label=direction)
        panel.set(title=of_what, xlabel="steps on the domain", ylim=(-4, 104))
        panel.grid(axis="y", alpha=0.25)
    panel.legend(title="trained with KL", loc="lower right", frameon=False)
    steps = sorted(by_step["mol, reverse"])
    early = min(steps[1:], key=lambda step: abs(step - EARLY))
    for line, trained in zip((1, 2), ("reverse", "forward")):
        sentences = by_step[f"mol, {trained}"][early][0]["sentences"]
        for place, sentence in zip((grid[line, :3], grid[line, 3:8], grid[line, 8:]), sentences):
            panel = figure.add_subplot(place)
            for shift, direction in ((-0.2, "reverse"), (0.2, "forward")):
                panel.bar([i + shift for i in range(len(sentence["tokens"]))], sentence[direction], 0.4, color=DIRECTIONS[direction])
            panel.set_xticks(range(len(sentence["tokens"])), [token.replace("\n", "\u21b5").replace(" ", "\u00b7") for token in sentence["tokens"]],
                             fontsize=8, rotation=90)
            if sentence is sentences[0]:
                panel.set_title(f"trained with {trained} KL, step {early}", fontsize=10)
                panel.set_ylabel("nats per token")
    ends = style.last(rows)
    figure.suptitle(style.title("General skills answered exactly", {f"{direction} KL": ends[f"mol, {direction}"] for direction in DIRECTIONS}),
                    x=0.01, ha="left")
    style.save(figure, picture, rows, "bars: at each token, on the first seed, the reverse KL to the base (blue) and the forward KL (orange)")


if __name__ == "__main__":
    sys.exit(main("direction", RUNS, draw, __doc__))
