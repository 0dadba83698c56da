"""Think and no-think: which mode is kept, and at which token does an answer go wrong?

Both modes ask for the same sums. A think answer has 21 tokens, a no-think answer 3.
"""

from statistics import mean

import torch

from eval import evaluate
from plots import forgetting, runs, style
from plots.runs import Run
from train import train

MODES = {"no_think": "-", "think": ":"}  # line styles


@torch.no_grad()
def by_position(model, world):
    """Where answers go wrong -> {mode: {"tokens", "right", "first_wrong"}}, lists over tokens.

    tokens: of the first answer. right: share of answers with the right token there, given right
    ones before. first_wrong: share whose first error is there.
    """
    tokenizer, modes = world.tokenizer, {}
    for mode in MODES:
        prompts = [tokenizer.encode_ordinary("\n" + prompt) for prompt, _ in world.probes[mode]]
        answers = [tokenizer.encode_ordinary(answer) for _, answer in world.probes[mode]]
        rows = torch.tensor([p + a for p, a in zip(prompts, answers)],  # all have the same length
                            device=world.heldout_general.device)  # (P, L)
        right = model(rows[:, :-1]).argmax(dim=-1) == rows[:, 1:]
        right = right[:, len(prompts[0]) - 1:]  # (P, A), of the answers alone
        right_so_far = right.cumprod(dim=1).float().mean(dim=0).tolist()
        first_wrong = [before - after for before, after in zip([1.0, *right_so_far], right_so_far)]
        modes[mode] = {"tokens": [tokenizer.decode([token]) for token in answers[0]],
                       "right": [round(share, 4) for share in right.float().mean(dim=0).tolist()],
                       "first_wrong": [round(share, 4) for share in first_wrong]}
    return modes


def marked_by_position(method, settings, seed, world, base):
    """A run that is also tested token by token."""
    return train(method, settings, seed, world, base,
                 lambda model: {**evaluate(model, base, world),
                                "modes": by_position(model, world)})[1]


def run(method, share):
    return Run(method, {"general_errors": share, "eval_every": 25}, marked_by_position)


RUNS = {f"{method}, {share:.0%} wrong": run(method, share)
        for method, share in (("ce", 0.7), ("replay", 0.0), ("replay", 0.7), ("mol", 0.0),
                              ("mol", 0.7))}


def draw(results, picture):
    figure, (axes,) = style.panels(1, 3, 10, 3.8, width_ratios=(1, 1, 1.6))
    for panel, label in zip(axes, ("replay, 70% wrong", "mol, 70% wrong")):
        steps = forgetting.by_step(runs.labelled(results, {label: RUNS[label]}))[label]
        for mode, dashes in MODES.items():
            style.curve(panel, {step: [100 * row["accuracy"][mode] for row in seeds]
                                for step, seeds in steps.items()},
                        style.COLOURS[RUNS[label].method], ls=dashes)
        panel.set(title=label, xlabel="steps", ylabel="exact answers, %", ylim=(-4, 104))
    ends = [rows[-1]["modes"]["think"] for rows in results(RUNS["replay, 70% wrong"])]
    shares = [100 * mean(end["first_wrong"][i] for end in ends)
              for i in range(len(ends[0]["tokens"]))]
    axes[2].bar(range(len(shares)), shares, color=style.COLOURS["replay"])
    axes[2].set_xticks(range(len(shares)), [token.replace("\n", "\u21b5").replace(" ", "\u00b7")
                                            for token in ends[0]["tokens"]], fontsize=10)
    axes[2].set(title="replay: first wrong token", ylabel="think answers, %",
                xlabel="tokens of a think answer")
    style.save(figure, picture, "Replay fails in both modes at the digit where the text is wrong",
               f"{style.seeds_note(len(ends))}; solid: no-think, dotted: think")


if __name__ == "__main__":
    runs.main("modes", RUNS, draw, __doc__)
