"""The numbers in the READMEs, computed again from the committed runs.

A claim is a file, a piece of a sentence or a row of a table with gaps, and the values of the gaps.
"""

import re
from pathlib import Path
from statistics import mean, median

import pytest

from plots import (amount, budget, contexts, coverage, headline, quality, ratio, real, rivals, runs,
                   scale, teacher)
from plots.tables import GENERAL, difference, kept, learnt, p_right, skill

ROOT = Path(__file__).parent.parent
LINES = {experiment: runs.read_runs(ROOT / "plots" / "runs.jsonl", defaults)
         for experiment, defaults in (("toy", runs.DEFAULTS), ("real", real.Settings()))}
FRONT, RESULTS = "README.md", "plots/README.md"
LOSS, KL = "domain_loss", "kl_to_base"


FEW = {budget: 3, scale: 3, real: 3}  # the seeds of the experiments with fewer than five


def curves(experiment, run):
    """All rows of each seed."""
    run = experiment.RUNS[run] if isinstance(run, str) else run
    few = run.seeds or FEW.get(experiment, 5)
    defaults = experiment.Settings() if experiment is real else runs.DEFAULTS
    lines = LINES["real" if experiment is real else "toy"]
    return [lines[runs.identity_of(run, defaults, seed)]["rows"]
            for seed in range(few)]


def of_seeds(experiment, run, what=kept, step=None):
    """A value per seed, in the last row or at a step. what: a function or a key of the row."""
    get = what if callable(what) else lambda row: row[what]
    return [get(next(row for row in reversed(rows) if step in (None, row["step"])))
            for rows in curves(experiment, run)]


def value(*where, **more):
    return mean(of_seeds(*where, **more))


class Difference(list):
    """The mean, low and high of a paired difference. Its sentence must say so if 0 is within."""


def answers(label, title):
    """The table of real.py: right answers in %, over the questions of the table."""
    seeds = [curves(real, "ce")[0][:1]] if label == "base" else curves(real, label)
    return real.interval(seeds, *real.SCORES[title])


def change(label, title):
    base = curves(real, "ce")[0][:1]
    return Difference(real.interval(curves(real, label), *real.SCORES[title], base=base))


def minus(experiment, run, other, what=kept):
    return Difference(difference(of_seeds(experiment, run, what),
                                 of_seeds(experiment, other, what)))


def low_high(values):
    values = list(values)
    return [min(values), max(values)]


BASE = headline.RUNS["ce"]
LONGEST = budget.run("replay", "noise", 40_000, 2400)
SIZES = list(scale.SIZES)
WRONG_MOL, RIGHT_REPLAY, WRONG_REPLAY = ("mol, 70% wrong", "replay, right answers",
                                         "replay, 70% wrong")


def of_base(name, size):
    """The share of the base's right answers that a method keeps, %."""
    run = scale.run(name, size)
    return 100 * value(scale, run) / value(scale, run, step=0)


FEW_STEPS = [scale.run(WRONG_MOL, 0.5, base_steps=steps) for steps in scale.BASE_STEPS]
WRONG = {kind: quality.run("replay", 0.7, kind) for kind in quality.KINDS}
IMITATORS = {kind: [quality.imitator_of_wrong(kind, 40_000, seed) for seed in range(3)]
             for kind in quality.KINDS}
ANSWERS = "replay, base's answers"
FORMATS = curves(contexts, f"mol, {contexts.FORMAT}")


def per_text(text):
    """A row of the table of contexts: path, then replay / mol of three columns."""
    cells = [value(contexts, f"mol, {text}", lambda row: 100 * row["on_path"])]
    for what in (skill("think"), contexts.final, KL):
        cells += [value(contexts, f"{method}, {text}", what) for method in contexts.METHODS]
    return cells


CLAIMS = [
    # README.md
    (FRONT, "`replay` keeps {:.0f}% of the skills with 70% wrong answers, {:.0f}% with 25% and "
     "{:.0f}% with none",
     [value(headline, WRONG_REPLAY), value(quality, quality.run("replay", 0.25, "bias")),
      value(headline, RIGHT_REPLAY)]),
    (FRONT, "`replay` also keeps {:.0f}% on a text whose answers come from the base",
     [value(teacher, ANSWERS)]),
    (FRONT, "(KL {:.2f} against {:.2f} nats)",
     [value(teacher, "mol", KL), value(teacher, ANSWERS, KL)]),
    (FRONT, "the final number is right in {:.0f}% for `mol` and in {:.0f}% for `replay`",
     [value(contexts, f"{method}, {contexts.FORMAT}", contexts.final)
      for method in ("mol", "replay")]),
    (FRONT, "If the text names half of the countries, `mol` keeps {:.0f}% of the others",
     [value(coverage, coverage.some_items("mol", 0.5), skill("not named"))]),
    (FRONT, "`mol` learns {:.0f}% of the domain; without those that surprise the base, {:.0f}%",
     [value(coverage, coverage.overlap("mol", 0.25, **how), learnt)
      for how in ({}, {"limit": coverage.LIMIT})]),
    (FRONT, "MoL drops to {:.0f}% of the skills at step 25",
     [value(headline, WRONG_MOL, step=25)]),
    (FRONT, "{:.2f} nats, for `ce` {:.2f}, for `replay` on right answers {:.2f}",
     [value(headline, run, LOSS) for run in (WRONG_MOL, "ce", RIGHT_REPLAY)]),
    (FRONT, "All three methods learn {:.0f} to {:.0f}%",
     low_high(answers(label, "domain")[0] for label in ("ce", "replay", "mol"))),
    (FRONT, "`replay` is right in {:.0f}%, `mol` in {:.0f}%, `ce` in {:.0f}%, the base in {:.0f}%. "
     "On those that one names: {:.0f}%, {:.0f}%, {:.0f}% and {:.0f}%",
     [answers(label, title)[0] for title in ("never stated", "stated")
      for label in ("replay", "mol", "ce", "base")]),
    # headline
    (RESULTS, "On these texts `mol` keeps {:.0f}% or more",
     [min(value(headline, f"mol, {text}") for text in headline.TEXTS)]),
    (RESULTS, "`replay` keeps {:.0f}% if the answers are right, {:.0f}% or {:.0f}% if 70% are "
     "wrong", [value(headline, f"replay, {text}") for text in headline.TEXTS]),
    (RESULTS, "|base|{:.0f}|{:.0f}|{:.2f}|{:.2f}|",
     [value(headline, BASE, what, step=0) for what in (kept, p_right, KL, LOSS)]),
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.2f}}|{{:.2f}}|",
       [value(headline, label, what) for what in (kept, p_right, KL, LOSS)])
      for label in headline.RUNS),
    (RESULTS, "no difference in skills was found between `mol` and `replay`: {:+.1f} points "
     "({:+.1f} to {:+.1f})", minus(headline, "mol, right answers", RIGHT_REPLAY)),
    (RESULTS, "{:+.3f} nats ({:+.3f} to {:+.3f}) against `ce`",
     minus(headline, WRONG_MOL, "ce", LOSS)),
    (RESULTS, "{:+.3f} ({:+.3f} to {:+.3f}) against `replay` on right answers",
     minus(headline, WRONG_MOL, RIGHT_REPLAY, LOSS)),
    (RESULTS, "At step 25 `mol` on 70% wrong drops to {:.0f}% of the skills (lowest seed {:.0f}%), "
     "`replay` on right answers to {:.0f}%",
     [value(headline, WRONG_MOL, step=25), min(of_seeds(headline, WRONG_MOL, step=25)),
      value(headline, RIGHT_REPLAY, step=25)]),
    (RESULTS, "At step 100 they have learnt {:.0f}% and {:.0f}% of the domain, `ce` {:.0f}%",
     [value(headline, run, learnt, step=100) for run in (WRONG_MOL, RIGHT_REPLAY, "ce")]),
    # budget
    *((RESULTS, f"|replay, {kind}, {documents:,} documents|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|"
       "{:.0f}|", [value(budget, budget.run("replay", kind, documents, steps))
                    for steps in budget.STEPS])
      for kind in ("noise", "bias") for documents in (2_000, 40_000)),
    (RESULTS, "`mol` keeps {:.0f}% or more in every run",
     [min(value(budget, run) for run in budget.RUNS.values() if run.method == "mol")]),
    (RESULTS, "its p(right) is still {:.0f}%, and its KL to the base {:.2f} nats (`mol` {:.2f})",
     [value(budget, LONGEST, p_right), value(budget, LONGEST, KL),
      value(budget, LONGEST._replace(method="mol"), KL)]),
    (RESULTS, "the domain loss rises from {:.2f} to {:.2f} nats for `mol` and from {:.2f} to "
     "{:.2f} for `replay`",
     [value(budget, budget.run(method, "noise", 40_000, steps), LOSS)
      for method in ("mol", "replay") for steps in (300, 2400)]),
    # quality
    (RESULTS, "`mol` keeps {:.0f}% or more however many are wrong",
     [min(value(quality, run) for run in quality.RUNS.values() if run.method == "mol")]),
    *((RESULTS, f"|{method}, {kind}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|"
       "{:.0f}|", [value(quality, quality.run(method, share, kind)) for share in quality.SHARES])
      for method in ("replay", "mol") for kind in quality.KINDS),
    (RESULTS, "it is right in {:.0f}% (bias) and {:.0f}% (noise) of the questions",
     [value(quality, WRONG[kind], quality.MOST_FREQUENT) for kind in ("bias", "noise")]),
    (RESULTS, "with bias it answers {:.0f}% of the text's questions rightly and {:.0f}% of the "
     "test questions, {:.0f}% where the text is right and {:.0f}% where it is wrong",
     [value(quality, WRONG["bias"], what) for what in (
         quality.EXACT, kept, quality.exact_where(1), quality.exact_where(0))]),
    (RESULTS, "at 25% bias ({:.0f}% against {:.0f}%) to below it at 85% ({:.0f}% against {:.0f}%)",
     [value(quality, quality.run("replay", share, "bias"), what)
      for share in (0.25, 0.85) for what in (kept, quality.MOST_FREQUENT)]),
    (RESULTS, "the lowest seed of `mol` keeps {:.0f}%",
     [min(of_seeds(quality, quality.run("mol", 1.0, "bias")))]),
    (RESULTS, "is right in {:.0f}%, {:.0f}% and {:.0f}% of the questions on bias (no-think, think, "
     "facts) and in {:.0f}%, {:.0f}% and {:.0f}% on noise",
     [mean(of_seed[name] for of_seed in IMITATORS[kind])
      for kind in ("bias", "noise") for name in GENERAL]),
    (RESULTS, "On noise `replay` ends at {:.0f}%, {:.0f}% and {:.0f}%",
     [value(budget, LONGEST, skill(name)) for name in GENERAL]),
    # ratio
    *((RESULTS, f"|{method}, {budget_name}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|",
       [value(ratio, ratio.run(method, share, budget_name)) for share in ratio.RATIOS])
      for budget_name in ratio.BUDGETS for method in ratio.METHODS),
    *((RESULTS, f"|{method}: domain loss, same total|{{:.2f}}|{{:.2f}}|{{:.2f}}|{{:.2f}}|{{:.2f}}|"
       "{:.2f}|", [value(ratio, ratio.run(method, share, "same total"), LOSS)
                   for share in ratio.RATIOS]) for method in ratio.METHODS),
    # teacher
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.2f}}|{{:.2f}}|",
       [value(teacher, label, what) for what in (kept, p_right, KL, LOSS)])
      for label in teacher.RUNS),
    (RESULTS, "`mol` no difference in skills was found: {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(teacher, ANSWERS, "mol")),
    (RESULTS, "The KL of this replay is higher, {:+.3f} nats ({:+.3f} to {:+.3f})",
     minus(teacher, ANSWERS, "mol", KL)),
    (RESULTS, "domain loss lower, {:+.3f} ({:+.3f} to {:+.3f})",
     minus(teacher, ANSWERS, "mol", LOSS)),
    (RESULTS, "Adding replay to `mol` changes p(right) by {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(teacher, "replay and mol", "mol", p_right)),
    (RESULTS, "Forward KL changes p(right) by {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(teacher, "mol, forward KL", "mol", p_right)),
    (RESULTS, "and the domain loss by {:+.3f} nats ({:+.3f} to {:+.3f})",
     minus(teacher, "mol, forward KL", "mol", LOSS)),
    (RESULTS, "In the skills no difference was found: {:+.1f} ({:+.1f} to {:+.1f})",
     minus(teacher, "mol, forward KL", "mol")),
    (RESULTS, "It has learnt {:.0f}% of the domain at step 100, reverse KL {:.0f}%",
     [value(teacher, run, learnt, step=100) for run in ("mol, forward KL", "mol")]),
    # contexts
    *((RESULTS, f"|{text}|{{:.0f}}|{{:.0f}} / {{:.0f}}|{{:.0f}} / {{:.0f}}|{{:.2f}} / {{:.2f}}|",
       per_text(text)) for text in contexts.TEXTS),
    (RESULTS, "in the text's format it is at most {:.2f} nats per token",
     [max(mean(rows[-1]["kl_other"][i] for rows in FORMATS) for i in range(len(FORMATS[0][-1][
         "kl_other"])))]),
    (RESULTS, "in the base's format it reaches {:.1f} nats",
     [max(mean(rows[-1]["kl_own"][i] for rows in FORMATS) for i in range(len(FORMATS[0][-1][
         "kl_own"])))]),
    (RESULTS, "with a tenth of the think sums `mol` keeps {:.0f}%",
     [value(contexts, "mol, the same, a tenth in base format", skill("think"))]),
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.2f}}|",
       [value(contexts, label, what) for what in (kept, p_right, learnt, KL)])
      for label in ("mol, 70% wrong", *list(contexts.RUNS)[-4:])),
    # coverage
    *((RESULTS, f"|{method}, capitals not in the text|{{:.0f}}|{{:.0f}}||",
       [value(coverage, coverage.some_items(method, share), skill("not named"))
        for share in coverage.NAMED[:-1]]) for method in coverage.METHODS),
    *((RESULTS, f"|{method}, new sums|{{:.0f}}|{{:.0f}}|{{:.0f}}|",
       [value(coverage, coverage.some_items(method, share), coverage.sums)
        for share in coverage.NAMED]) for method in coverage.METHODS),
    (RESULTS, "Capitals in the text stay at {:.0f}% or more",
     [min(value(coverage, coverage.some_items(method, share), skill("named"))
          for method in coverage.METHODS for share in coverage.NAMED)]),
    (RESULTS, "but never as the test question, `mol` keeps {:.0f}%",
     [value(coverage, "mol, all items, no questions", skill("facts"))]),
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|",
       [value(coverage, coverage.overlap(method, share, **how), learnt)
        for share in (0, *coverage.OVERLAPS)])
      for label, method, how in (("replay, domain learnt", "replay", {}),
                                 ("mol, domain learnt", "mol", {}),
                                 ("mol, filtered", "mol", {"limit": coverage.LIMIT}))),
    # amount
    *((RESULTS, f"|{method}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|",
       [value(amount, amount.run(method, count)) for count in amount.AMOUNTS])
      for method in amount.METHODS),
    (RESULTS, "With 100 documents `mol` keeps {:+.1f} points more ({:+.1f} to {:+.1f})",
     minus(amount, amount.run("mol", 100), amount.run("replay", 100))),
    (RESULTS, "with 3,000 no difference was found, {:+.1f} ({:+.1f} to {:+.1f})",
     minus(amount, amount.run("mol", 3000), amount.run("replay", 3000))),
    (RESULTS, "`replay` has a loss of {:.2f} nats on the documents that it read and {:.2f} on "
     "others; `mol` has a KL of {:.2f} and {:.2f}",
     [value(amount, amount.run(method, 30), f"{text}_{what}") for method, what in (
         ("replay", "loss"), ("mol", "kl")) for text in ("seen", "unseen")]),
    # scale
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|{{:.0f}}|",
       [value(scale, scale.run(name, size), step=step) for size in SIZES])
      for label, name, step in (
          ("base", "ce", 0), (RIGHT_REPLAY, RIGHT_REPLAY, None), (WRONG_MOL, WRONG_MOL, None),
          (WRONG_REPLAY, WRONG_REPLAY, None))),
    (RESULTS, "`mol` keeps {:.0f}% or more of what the base knows, `replay` {:.0f}% to {:.0f}%",
     [min(of_base(WRONG_MOL, size) for size in SIZES),
      *low_high(of_base(WRONG_REPLAY, size) for size in SIZES)]),
    *((RESULTS, sentence, [value(scale, run, step=0), value(scale, run),
                           value(scale, scale.run(RIGHT_REPLAY, 0.5, base_steps=steps))])
      for sentence, run, steps in (
          ("with 200 steps of pretraining answers {:.0f}%; `mol` ends at {:.0f}%, `replay` on "
           "right answers at {:.0f}%", FEW_STEPS[0], 200),
          ("With 550 steps they are {:.0f}%, {:.0f}% and {:.0f}%", FEW_STEPS[-1], 550))),
    # real
    *((RESULTS, f"|{label}|" + "{:.0f}<br>({:.0f}-{:.0f})|" * 5,
       [number for title in real.SCORES for number in answers(label, title)])
      for label in ("base", *real.RUNS)),
    *((RESULTS, "|{:.2f}|{:.2f}|{:.2f}|",
       [value(real, label, key) for key in ("prose_loss", "code_loss", "kl_to_base")])
      for label in real.RUNS),
    *((RESULTS, f"|{value(real, label, 'kl_to_base'):.2f}|{{:.1f}}|",
       [median(of_seeds(real, label, "seconds"))]) for label in real.RUNS),
    *((RESULTS, sentence, change(label, title)) for sentence, label, title in (
        ("On facts never stated `ce` changes by {:+.1f} points ({:+.1f} to {:+.1f})", "ce",
         "never stated"),
        ("against the base; for `mol` no difference was found, {:+.1f} ({:+.1f} to {:+.1f})", "mol",
         "never stated"),
        ("On stated facts `replay` changes by {:+.1f} ({:+.1f} to {:+.1f})", "replay", "stated"),
        ("for `mol` no difference was found, {:+.1f} ({:+.1f} to {:+.1f}). The", "mol", "stated"),
        ("The p(right) of `mol` changes by {:+.1f} ({:+.1f} to {:+.1f})", "mol", "p(right)"))),
    # rivals
    *((RESULTS, f"|{label}|{{:.0f}}|{{:.0f}}|{{:.2f}}|{{:.2f}}|",
       [value(rivals, run, what) for what in (kept, learnt, KL, LOSS)])
      for label, run in rivals.RUNS.items()),
    (RESULTS, "strengths 0.3 to 3 keep {:.0f}% or more; at 10 only {:.0f}% of the domain is learnt",
     [min(value(rivals, rivals.SEARCH[f"search: mol, strength {x}"]) for x in (0.3, 1, 3)),
      value(rivals, rivals.SEARCH["search: mol, strength 10"], learnt)]),
]


@pytest.mark.parametrize("file, sentence, values", CLAIMS)
def test_a_number_in_a_readme_is_that_of_the_runs(file, sentence, values):
    text = " ".join((ROOT / file).read_text().split())
    assert sentence.format(*values) in text


INTERVALS = [(sentence, values) for _, sentence, values in CLAIMS if isinstance(values, Difference)]


@pytest.mark.parametrize("sentence, values", INTERVALS)
def test_a_difference_that_may_be_zero_is_called_not_found(sentence, values):
    _, low, high = values
    assert (low * high <= 0) == (re.search("[Nn]o difference", sentence) is not None)


def test_every_difference_in_the_readmes_is_tested():
    told = {sentence.format(*values) for sentence, values in INTERVALS}
    for file in (FRONT, RESULTS):
        text = " ".join((ROOT / file).read_text().split())
        for found in re.findall(r"[+-][\d.]+ (?:\w+ )*\([+-][\d.]+ to [+-][\d.]+\)", text):
            assert any(found in sentence for sentence in told), found
