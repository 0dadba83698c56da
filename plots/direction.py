"""Which direction of the KL: reverse, forward, or the mean of both?"""

from plots import forgetting, runs, style
from plots.runs import Run
from plots.tables import kept, learnt

SHADES = {"reverse": "#009E73", "forward": "#004D40", "mean": "#7BC8A4"}  # all of them are mol
RUNS = {f"mol, {direction}": Run("mol", {"kl": direction}) for direction in SHADES}


def draw(results, picture):
    figure, ((panel,),) = style.panels(1, 1, 8, 4.2)
    methods = forgetting.by_step(runs.labelled(results, RUNS))
    for direction, colour in SHADES.items():
        steps = methods[f"mol, {direction}"]
        for value, dashes in ((kept, "-"), (learnt, ":")):
            style.curve(panel, {step: list(map(value, rows)) for step, rows in steps.items()},
                        colour, ls=dashes)
    panel.set(xlabel="steps", ylabel="exact answers, %")
    style.label_ends(panel, {f"{direction} KL": (colour, 60 - 12 * i)
                             for i, (direction, colour) in enumerate(SHADES.items())})
    style.save(figure, picture, "The direction of the KL does not change what is kept",
               f"{style.seeds_note(len(steps[0]))}; solid: general skills, dotted: domain")


if __name__ == "__main__":
    runs.main("direction", RUNS, draw, __doc__)
