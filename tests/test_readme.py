"""The figures that the prose quotes, recomputed from the committed runs.

Each claim is a piece of a sentence with gaps, and what stands in them. A run made anew, or a
sentence changed by hand, fails here until both agree again.
"""

from pathlib import Path
from statistics import mean

import pytest

from plots import headline, runs, style

ROOT = Path(__file__).parent.parent
LINES = runs.read(ROOT / "plots" / "runs.jsonl")


def rows(question, run, step=None):
    """A row per seed: the last, or that of a step."""
    run = question.RUNS[run] if isinstance(run, str) else run
    seeds = getattr(question, "SEEDS", runs.SEEDS)
    found = [runs.find(LINES, run, seed, runs.COMMON)["rows"] for seed in seeds]
    return [next(row for row in of_seed if step in (None, row["step"]))
            for of_seed in (reversed(rows) for rows in found)]


def kept(question, run, step=None):
    """The general skills answered exactly, mean over seeds."""
    return mean(map(style.general, rows(question, run, step)))


def p_right(question, run):
    return mean(map(style.probability, rows(question, run)))


def skill(question, run, name, step=None):
    return mean(row["accuracy"][name] for row in rows(question, run, step))


def value(question, run, name):
    return mean(row[name] for row in rows(question, run))


FRONT, ANSWERS = "README.md", "plots/README.md"
BASE = [skill(headline, "ce", name, step=0) for name in style.SKILLS]

CLAIMS = [
    (FRONT, "the bases answer {:.2f}, {:.2f}, {:.2f} and {:.2f}.", BASE),
    (FRONT, "a probability of {:.2f} for the right answer",
     [p_right(headline, "replay, 70% wrong")]),
    (FRONT, "at step 25 to {:.2f} of the general skills", [kept(headline, "mol, 70% wrong", 25)]),
    (FRONT, "`mol` and `replay` both end at {:.0%} of the general skills",
     [kept(headline, "mol, right answers")]),
    (FRONT, "`mol` and `replay` both end at {:.0%} of the general skills",
     [kept(headline, "replay, right answers")]),
    (FRONT, "a little higher ({:.2f}, `ce` {:.2f}, `replay` on right answers {:.2f})",
     [value(headline, run, "domain_loss")
      for run in ("mol, 70% wrong", "ce", "replay, right answers")]),
]


@pytest.mark.parametrize("file, sentence, values", CLAIMS)
def test_a_figure_in_the_prose_is_that_of_the_runs(file, sentence, values):
    text = " ".join((ROOT / file).read_text().split())
    assert sentence.format(*values) in text
