"""The picture at the door: who forgets, on general text whose answers are right or mostly wrong.

    python plots/headline.py        makes the runs that are missing, draws headline.png; --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import forgetting, style
from plots.runs import Run, ask, labelled

TEXTS = {
    "right answers": {"general_errors": 0.0},
    "70% wrong": {"general_errors": 0.7, "error_kind": "bias"},  # the default
    "70% noise": {"general_errors": 0.7, "error_kind": "noise"},
}
OFTEN = {"eval_every": 25}
SEEDS = (0, 1, 2, 3, 4)
RUNS = {"ce": Run("ce", OFTEN)}
RUNS |= {f"{method}, {text}": Run(method, settings | OFTEN)
         for method in ("replay", "mol") for text, settings in TEXTS.items()}
SHOWN = ["ce", "replay, right answers", "replay, 70% wrong", "mol, 70% wrong"]


def with_base(found, runs):
    """The rows of {label: Run}, and before them those of the bases that they started from."""
    return labelled(lambda run: [rows[:1] for rows in found(run)], {"base": RUNS["ce"]}) + labelled(
        found, runs)


def tell(found):
    return style.table(with_base(found, RUNS))


def at_the_door(found):
    """The README's table: exact answers alone, the mean over seeds with lowest and highest."""
    lines = [["method", *style.SKILLS.values()], ["---"] * (len(style.SKILLS) + 1)]
    for label in SHOWN:
        ends = style.last(found(RUNS[label]))
        lines.append([label])
        lines[-1] += [style.cell([row["accuracy"][skill] for row in ends], 2)
                      for skill in style.SKILLS]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(found, picture):
    kept = {label: style.last(found(RUNS[label])) for label in SHOWN}
    what = style.title("General skills answered exactly, after learning the domain", kept)
    rows = with_base(found, {label: RUNS[label] for label in SHOWN})
    forgetting.draw(rows, picture, message=what)


if __name__ == "__main__":
    ask("headline", RUNS, draw, __doc__, tell, seeds=SEEDS)
