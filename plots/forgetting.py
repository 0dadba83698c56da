"""The figure of one run: what each method learns and forgets, and the two parts of its loss."""

from collections import defaultdict
from statistics import mean

from plots import style
from plots.tables import SKILLS, kept, of, skill

LOSSES = {"domain_loss": ("domain text", "domain"), "general_loss": ("general text", "no_think")}


def by_step(rows):
    """Rows of metrics -> {method: {step: [a row per seed]}}."""
    methods = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods[row["method"]][row["step"]].append(row)
    return methods


def draw_methods(axes, methods, base):
    """A panel per method: exact answers against steps, or held-out losses of your own text."""
    accuracy = base[0]["accuracy"]
    lines = {name: (SKILLS.get(name, name), name) for name in accuracy} or LOSSES
    for panel, (method, steps) in zip(axes, methods.items()):
        ends = {}
        for i, (name, (shown, colour)) in enumerate(lines.items()):
            value = skill(name) if accuracy else of(name)
            colour = style.SKILL_COLOURS.get(colour, f"C{i}")
            # Wide lines below narrow ones, so that lines on top of each other are seen.
            width = {"facts": 6, "think": 3.5}.get(name, 1.6)
            style.curve(panel, {step: list(map(value, seeds)) for step, seeds in steps.items()},
                        colour, width, zorder=3 - width / 10)
            panel.axhline(mean(map(value, base)), color=colour, lw=1, ls="--")
            ends[shown] = colour, mean(map(value, list(steps.values())[-1]))
        panel.set(title=method, xlabel="steps")
    axes[0].set_ylabel("exact answers, %" if accuracy else "held-out loss, nats per token")
    style.label_ends(axes[-1], ends)


def draw_parts(axes, methods):
    """A panel per method: the CE part and the KL part of the training loss against steps."""
    for panel, (method, steps) in zip(axes, methods.items()):
        ends = {}
        for part, dashes in (("ce", "-"), ("kl", ":")):
            points = {step: [row[part] for row in seeds] for step, seeds in steps.items()
                      if seeds[0].get(part)}  # only MoL has a KL part
            if points:
                colour = style.colour_of(method)
                ends[f"{part.upper()} part"] = colour, style.curve(panel, points, colour, ls=dashes)
        panel.set(yscale="log", xlabel="steps")
        panel.minorticks_off()
    axes[0].set_ylabel("nats per token")
    style.label_ends(axes[-1], ends, apart=0.15)


def draw(rows, picture):
    methods = by_step(rows)
    base = methods.pop("base")[0]
    figure, (upper, lower) = style.panels(2, len(methods), min(10, 2.6 * len(methods) + 1.8), 6,
                                          sharey="row", sharex=True, height_ratios=(2, 1))
    draw_methods(upper, methods, base)
    draw_parts(lower, methods)
    ends = {method: list(steps.values())[-1] for method, steps in methods.items()}
    if base[0]["accuracy"]:
        subject = "General skills" if "facts" in base[0]["accuracy"] else "Your questions"
        title = f"{subject} (base {mean(map(kept, base)):.0f}%): " + ", ".join(
            f"{method} {mean(map(kept, seeds)):.0f}%" for method, seeds in ends.items())
    else:
        loss = of("general_loss")
        title = "General loss, compared with the base: " + ", ".join(
            f"{method} {mean(map(loss, seeds)) - mean(map(loss, base)):+.2f}"
            for method, seeds in ends.items())
    style.save(figure, picture, title,
               f"{style.seeds_note(len(base))}; dashed: the base; below: the training loss")
