"""Who forgets? Three methods on general text with right answers and with 70% wrong answers."""

from plots import forgetting, runs, style
from plots.runs import Run
from plots.tables import SKILLS, skill, table

TEXTS = {"right answers": {"general_errors": 0.0},
         "70% wrong": {"general_errors": 0.7, "error_kind": "bias"},
         "70% noise": {"general_errors": 0.7, "error_kind": "noise"}}
RUNS = {"ce": Run("ce", {"eval_every": 25})}
RUNS |= {f"{method}, {text}": Run(method, {**settings, "eval_every": 25})
         for method in ("replay", "mol") for text, settings in TEXTS.items()}
SHOWN = ["ce", "replay, right answers", "replay, 70% wrong", "mol, 70% wrong"]


def tell(results):
    """All measures, then each skill."""
    base = {"base": [rows[:1] for rows in results(RUNS["ce"])]}
    lines = base | {label: results(run) for label, run in RUNS.items()}
    skills = {title: (skill(name), 0) for name, title in SKILLS.items()}
    return table("method", lines) + "\n\n" + table("method", lines, skills)


def draw(results, picture, note):
    methods = {label: {seeds[0]["step"]: seeds for seeds in zip(*results(RUNS[label]))}
               for label in SHOWN}  # {label: {step: a row of each seed}}
    figure, (axes,) = style.panels(1, len(SHOWN), 10, 3.6, sharey=True)
    forgetting.draw_methods(axes, methods, base=methods["ce"][0])
    style.save(figure, picture, "ce forgets, replay imitates wrong answers, mol does neither",
               f"{note}; dashed: the base")


if __name__ == "__main__":
    runs.main("headline", RUNS, draw, __doc__, tell)
