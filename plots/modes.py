"""Think and no-think: how much of each mode survives along training, and where an answer breaks.

    python plots/modes.py        makes the runs that are missing, draws modes.png; --help

The same sums in both modes. An answer worked out first is 21 tokens long, each of which must be
right; an answer given at once is 3. So two shares are drawn: of exact answers, and of the tokens
that are right after a right beginning. Below them, the token at which answers first go wrong.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask, labelled

MODES = {"no_think": ("no-think", "-"), "think": ("think", "--")}


def by_position(model, world):
    """Where answers go wrong, token by token -> {mode: {"tokens", "right", "first_wrong"}}.

    tokens are those of the first answer; right is the share of answers that are right at each,
    after a right beginning; first_wrong is the share that break there.
    """
    import torch  # drawing does without

    tokenizer, found = world.tokenizer, {}
    for mode in MODES:
        prompts = [tokenizer.encode_ordinary("\n" + prompt) for prompt, _ in world.probes[mode]]
        answers = [tokenizer.encode_ordinary(answer) for _, answer in world.probes[mode]]
        rows = [p + a for p, a in zip(prompts, answers)]  # all are as long
        rows = torch.tensor(rows, device=world.heldout_general.device)  # (P, L)
        right = model(rows[:, :-1]).argmax(dim=-1) == rows[:, 1:]
        right = right[:, len(prompts[0]) - 1:]  # (P, A), the answers alone
        whole = right.cumprod(dim=1).float().mean(dim=0).tolist()  # right up to and with each
        broken = [before - after for before, after in zip([1.0, *whole], whole)]
        found[mode] = {"tokens": [tokenizer.decode([token]) for token in answers[0]],
                       "right": [round(share, 4) for share in right.float().mean(dim=0).tolist()],
                       "first_wrong": [round(share, 4) for share in broken]}
    return found


def marked_by_position(method, s, seed, world, base):
    """A run that is also marked by where the answers of both modes break -> its rows."""
    from eval import evaluate
    from train import train

    def mark(model):
        return {**evaluate(model, base, world), "modes": by_position(model, world)}

    return train(method, s, seed, world, base, mark)[1]


def run(method, share):
    return Run(method, {"general_errors": share, "eval_every": 25}, marked_by_position)


SHOWN = {f"{method}, {share:.0%} wrong": run(method, share)
         for method in ("replay", "mol") for share in (0.0, 0.7)}
RUNS = {"ce, 70% wrong": run("ce", 0.7), **SHOWN}


def draw(found, picture):
    figure = style.figure(13, 9)
    grid = figure.add_gridspec(3, len(SHOWN))
    for column, (label, shown_run) in enumerate(SHOWN.items()):
        colour = style.COLOURS[shown_run.method]
        steps = style.by_step(labelled(found, {label: shown_run}))[label]
        top, middle, bottom = (figure.add_subplot(grid[line, column]) for line in range(3))
        for mode, (shown, dashes) in MODES.items():
            exact = {step: [100 * row["accuracy"][mode] for row in seeds]
                     for step, seeds in steps.items()}
            right = {step: [100 * mean(row["modes"][mode]["right"]) for row in seeds]
                     for step, seeds in steps.items()}
            style.curve(top, exact, colour, 2, ls=dashes, label=shown)
            style.curve(middle, right, colour, 2, ls=dashes)
        ends = [row["modes"]["think"] for row in style.last(found(shown_run))]
        x = range(len(ends[0]["tokens"]))
        bottom.bar(x, [100 * mean(end["first_wrong"][i] for end in ends) for i in x], color=colour)
        bottom.set_xticks(x, map(style.visible, ends[0]["tokens"]))
        top.set_title(label, fontweight="bold")
        for panel in (top, middle):
            panel.set(ylim=(-4, 104), xlabel="steps on the domain")
            panel.grid(axis="y", alpha=0.25)
        bottom.set(xlabel="think answer, token by token", ylim=(0, 100))
        if column == 0:
            top.set_ylabel("exact answers, %")
            middle.set_ylabel("right tokens, %")
            bottom.set_ylabel("answers that first\nbreak here, %")
            top.legend(frameon=False, loc="lower right")

    def kept(label):
        ends = style.last(found(RUNS[label]))
        return " and ".join(f"{mean(row['accuracy'][mode] for row in ends):.0%}" for mode in MODES)

    what = ("Where seven answers in ten are wrong, exact no-think and think sums: "
            f"replay {kept('replay, 70% wrong')}, mol {kept('mol, 70% wrong')}")
    style.save(figure, picture, what, style.spread(len(ends)))


if __name__ == "__main__":
    ask("modes", RUNS, draw, __doc__)
