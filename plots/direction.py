"""Which way round? Reverse KL, forward KL and their mean: what is kept, and how fast one learns.

    python plots/direction.py        makes the runs that are missing, draws direction.png; --help

Below the curves both divergences stand token by token, on the first seed and early in training,
when most is forgotten.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask, labelled

DIRECTIONS = {"reverse": "#0072B2", "forward": "#D55E00", "mean": "#009E73"}
EARLY = 100  # the step at which sentences are looked at


def by_token(model, base, world):
    """Both divergences at each token of a document of each kind, in nats.

    -> [{"tokens", "reverse", "forward"}]
    """
    import torch  # drawing does without
    from losses import kl_divergence

    tokenizer, sentences = world.tokenizer, []
    for skill in ("no_think", "think", "facts"):
        tokens = tokenizer.encode_ordinary("\n" + "".join(world.probes[skill][0]))
        batch = torch.tensor([tokens[:-1]], device=world.general.device)  # (1, T)
        logits, base_logits = model(batch), base(batch)  # (1, T, V)
        sentence = {"tokens": [tokenizer.decode([token]) for token in tokens[1:]]}
        for direction in ("reverse", "forward"):
            nats = kl_divergence(logits, base_logits, direction)[0].tolist()
            sentence[direction] = [round(value, 4) for value in nats]
        sentences.append(sentence)
    return sentences


def marked_by_token(method, s, seed, world, base):
    """A run that is also marked token by token -> its rows."""
    from eval import evaluate
    from train import train

    def mark(model):
        return {**evaluate(model, base, world), "sentences": by_token(model, base, world)}

    return train(method, s, seed, world, base, mark)[1]


RUNS = {f"mol, {direction}": Run("mol", {"kl": direction}, marked_by_token)
        for direction in DIRECTIONS}


def draw_sentences(figure, grid, line, trained, rows):
    """A line of panels: each sentence's tokens with both divergences, for one model."""
    places = (grid[line, :3], grid[line, 3:8], grid[line, 8:])
    for place, sentence in zip(places, rows["sentences"]):
        panel = figure.add_subplot(place)
        x = range(len(sentence["tokens"]))
        for shift, direction in ((-0.2, "reverse"), (0.2, "forward")):
            panel.bar([i + shift for i in x], sentence[direction], 0.4,
                      color=DIRECTIONS[direction])
        panel.set_xticks(x, map(style.visible, sentence["tokens"]), fontsize=8, rotation=90)
        if sentence is rows["sentences"][0]:
            panel.set_title(f"trained with {trained} KL, step {rows['step']}", fontsize=10)
            panel.set_ylabel("nats per token")


def draw(found, picture):
    figure = style.figure(11, 8.4)
    grid = figure.add_gridspec(3, 12, height_ratios=(1.5, 1, 1))
    by_step = style.by_step(labelled(found, RUNS))
    for place, (of_what, value) in zip((grid[0, :6], grid[0, 6:]), style.KEPT_AND_LEARNT.items()):
        panel = figure.add_subplot(place)
        for direction, colour in DIRECTIONS.items():
            steps = by_step[f"mol, {direction}"]
            points = {step: list(map(value, seeds)) for step, seeds in steps.items()}
            style.curve(panel, points, colour, 2.4, label=direction)
        panel.set(title=of_what, xlabel="steps on the domain", ylim=(-4, 104))
        panel.grid(axis="y", alpha=0.25)
    panel.legend(title="trained with KL", loc="lower right", frameon=False)
    early = min(list(steps)[1:], key=lambda step: abs(step - EARLY))
    for line, trained in ((1, "reverse"), (2, "forward")):
        draw_sentences(figure, grid, line, trained, by_step[f"mol, {trained}"][early][0])
    kept = {f"{direction} KL": style.last(found(RUNS[f"mol, {direction}"]))
            for direction in DIRECTIONS}
    style.save(figure, picture, style.title("General skills answered exactly", kept),
               f"{style.spread(len(kept['mean KL']))}; bars: at each token, on the first seed, the "
               "reverse KL to the base (blue) and the forward KL (orange)")


if __name__ == "__main__":
    ask("direction", RUNS, draw, __doc__)
