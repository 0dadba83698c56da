"""Think and no-think: how much of each mode survives under each method, along training, and where an answer breaks.

    python plots/modes.py        the runs that are missing, modes.jsonl, modes.png; --help lists the settings

The same sums in both modes. An answer worked out first is 21 tokens long, each of which must be right; an answer given at
once is 3. So two shares are drawn: of exact answers, and of the tokens that are right after a right beginning. Below them,
the token at which answers first go wrong.
"""

import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.style import plt
from plots.sweep import Run, main, train_and_mark

MODES = {"no_think": ("no-think", "-"), "think": ("think", "--")}


@torch.no_grad()
def by_position(model, world):
    """-> {mode: {"tokens": of the first answer, "right": share right at each, "first_wrong": share of answers that break there}}."""
    tokenizer, found = world.tokenizer, {}
    for mode in MODES:
        prompts, answers = zip(*((tokenizer.encode_ordinary("\n" + prompt), tokenizer.encode_ordinary(answer))
                                 for prompt, answer in world.probes[mode]))
        rows = torch.tensor([p + a for p, a in zip(prompts, answers)], device=world.general.device)  # (P, L): all are as long
        right = (model(rows[:, :-1]).argmax(dim=-1) == rows[:, 1:])[:, len(prompts[0]) - 1:]  # (P, A)
        whole = right.cumprod(dim=1).float().mean(dim=0).tolist()  # right up to and with each token
        found[mode] = {"tokens": [tokenizer.decode([token]) for token in answers[0]],
                       "right": [round(share, 4) for share in right.float().mean(dim=0).tolist()],
                       "first_wrong": [round(before - after, 4) for before, after in zip([1.0, *whole], whole)]}
    return found


def marked_by_position(s, seed, method, world, base, dtype):
    """train_and_mark, and where the answers of both modes break."""
    return train_and_mark(s, seed, method, world, base, dtype, lambda model: {"modes": by_position(model, world)})


RUNS = [Run(f"{method}, {share:.0%} wrong", method, {"general_errors": share, "eval_every": 25}, marked_by_position)
        for method, share in (("ce", 0.7), ("replay", 0.0), ("replay", 0.7), ("mol", 0.0), ("mol", 0.7))]
SHOWN = [run.label for run in RUNS if run.label != "ce, 70% wrong"]


def draw(rows, picture):
    by_step = style.by_step(rows)
    figure = plt.figure(figsize=(13, 9))
    grid = figure.add_gridspec(3, len(SHOWN))
    for column, label in enumerate(SHOWN):
        colour = style.COLOURS[label.partition(",")[0]]
        top, middle, bottom = (figure.add_subplot(grid[line, column]) for line in range(3))
        for mode, (shown, dashes) in MODES.items():
            steps = by_step[label]
            style.curve(top, {step: [100 * row["accuracy"][mode] for row in seeds] for step, seeds in steps.items()},
                        colour, 2, ls=dashes, label=shown)
            style.curve(middle, {step: [100 * mean(row["modes"][mode]["right"]) for row in seeds] for step, seeds in steps.items()},
                        colour, 2, ls=dashes)
        ends = steps[max(steps)]
        breaks = [mean(row["modes"]["think"]["first_wrong"][i] for row in ends) for i in range(len(ends[0]["modes"]["think"]["tokens"]))]
        bottom.bar(range(len(breaks)), [100 * share for share in breaks], color=colour)
        bottom.set_xticks(range(len(breaks)), [token.replace("\n", "\u21b5").replace(" ", "\u00b7") for token in ends[0]["modes"]["think"]["tokens"]])
        top.set_title(label, fontweight="bold")
        for panel in (top, middle):
            panel.set(ylim=(-4, 104), xlabel="steps on the domain")
            panel.grid(axis="y", alpha=0.25)
        bottom.set(xlabel="think answer, token by token", ylim=(0, 60))
        if column == 0:
            top.set_ylabel("exact answers, %")
            middle.set_ylabel("right tokens, %")
            bottom.set_ylabel("answers that first\nbreak here, %")
            top.legend(frameon=False, loc="lower right")
    ends = style.last(rows)
    figure.suptitle("Where seven answers in ten are wrong, exact no-think and think sums: " + ", ".join(
        f"{method} " + " and ".join(f"{mean(row['accuracy'][mode] for row in ends[f'{method}, 70% wrong']):.0%}" for mode in MODES)
        for method in ("replay", "mol")), x=0.01, ha="left")
    style.save(figure, picture, rows)


if __name__ == "__main__":
    sys.exit(main("modes", RUNS, draw, __doc__))
