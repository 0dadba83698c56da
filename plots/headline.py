"""Who forgets? Three methods on general text with right answers and with 70% wrong answers."""

from plots import forgetting, runs, style
from plots.runs import Run
from plots.tables import SKILLS, metrics_table, skill, table

TEXTS = {"right answers": {"general_errors": 0.0},
         "70% wrong": {"general_errors": 0.7, "error_kind": "bias"},
         "70% noise": {"general_errors": 0.7, "error_kind": "noise"}}
RUNS = {"ce": Run("ce", {"eval_every": 25})}
RUNS |= {f"{method}, {text}": Run(method, {**settings, "eval_every": 25})
         for method in ("replay", "mol") for text, settings in TEXTS.items()}
SHOWN = ["ce", "replay, right answers", "replay, 70% wrong", "mol, 70% wrong"]


def with_base(results):
    """The rows of all runs, and before them those of the bases."""
    bases = [{**rows[0], "method": "base"} for rows in results(RUNS["ce"])]
    return bases + runs.labelled(results, RUNS)


def tell(results):
    """The table of plots/README.md, and the short one of README.md."""
    columns = {title: (skill(name), 0) for name, title in SKILLS.items()}
    short = table("method", columns, {label: results(RUNS[label]) for label in SHOWN})
    return f"{metrics_table(with_base(results))}\n\n{short}"


def draw(results, picture, note):
    methods = forgetting.by_step(with_base(results))
    base = methods.pop("base")[0]
    figure, (axes,) = style.panels(1, len(SHOWN), 10, 3.6, sharey=True)
    forgetting.draw_methods(axes, {label: methods[label] for label in SHOWN}, base)
    style.save(figure, picture, "ce forgets, replay imitates wrong answers, mol does neither",
               f"{note}; dashed: the base")


if __name__ == "__main__":
    runs.main("headline", RUNS, draw, __doc__, tell)
