"""Who forgets? ce, replay and mol on a right, a wrong and a differently worded general text."""

from plots import details, runs, style, wordings
from plots.runs import Run
from plots.tables import HELDOUT, SKILLS, SUMMARY, kept, skill, table

TEXTS = {"right answers": {"general_errors": 0.0}, "70% wrong answers": {"general_errors": 0.7},
         "right, in other words": None}
METHODS = ("ce", "replay", "mol")
CE = Run("ce", {"eval_every": 25})


def curve(method, text):
    """A run with a row every 25 steps. ce reads no general text."""
    if method == "ce":
        return CE
    if text == "right, in other words":
        return wordings.run(method, "other beginnings", eval_every=25)
    return Run(method, {**TEXTS[text], "eval_every": 25})


CURVES = {(text, method): curve(method, text) for text in TEXTS for method in METHODS}
ENDS = {details.label(*case): details.run(*case) for case in details.CASES}
ENDS |= {f"{method}, other words": wordings.run(method, "other beginnings")
         for method in ("replay", "mol")}
RUNS = ENDS | {f"{method}, {text}, curve": run for (text, method), run in CURVES.items()}


def tell(results):
    """All measures, then each skill."""
    base = {"base": [rows[:1] for rows in results(ENDS["ce"])]}
    lines = base | {label: results(run) for label, run in ENDS.items()}
    skills = {title: (skill(name), 0) for name, title in SKILLS.items()}
    return table("method", lines, SUMMARY | HELDOUT) + "\n\n" + table("method", lines, skills)


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, len(TEXTS), 10, 3.6, sharey=True)
    for panel, text in zip(axes, TEXTS):
        ends = {}
        for method in METHODS:
            steps = {seeds[0]["step"]: [*map(kept, seeds)]
                     for seeds in zip(*results(CURVES[text, method]))}
            colour = style.COLOURS[method]
            ends[method] = colour, style.curve(panel, steps, colour, {"replay": 5}.get(method, 2.4))
        panel.set(title=text, xlabel="steps", ylim=(-4, 104))
    axes[0].set_ylabel("general skills: exact answers, %")
    style.label_ends(axes[-1], ends)
    style.save(figure, picture, "Right text: replay and mol keep the skills. Wrong: only mol. "
               "Other words: neither", note)


if __name__ == "__main__":
    runs.main("headline", RUNS, draw, __doc__, tell)
