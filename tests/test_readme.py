"""The numbers in the READMEs, computed again from the committed runs.

A claim is a file, a piece of a sentence or a row of a table with gaps, and the values of the gaps.
"""

from pathlib import Path
from statistics import mean

import pytest

from plots import (amount, budget, direction, domains, headline, modes, quality, ratio, real,
                   rivals, runs, scale, source)
from plots.tables import SKILLS, kept, learnt, p_right

ROOT = Path(__file__).parent.parent
LINES = {experiment: runs.read_runs(ROOT / "plots" / "runs.jsonl", defaults)
         for experiment, defaults in (("toy", runs.DEFAULTS), ("real", real.Settings()))}
FRONT, RESULTS = "README.md", "plots/README.md"
LOSS, KL = "domain_loss", "kl_to_base"


def curves(experiment, run):
    """All rows of each seed."""
    run = experiment.RUNS[run] if isinstance(run, str) else run
    defaults = experiment.Settings() if experiment is real else runs.DEFAULTS
    seeds = getattr(experiment, "SEEDS", defaults.seeds)
    lines = LINES["real" if experiment is real else "toy"]
    return [lines[runs.identity_of(run, defaults, seed)]["rows"] for seed in seeds]


def of_seeds(experiment, run, what=kept, step=None):
    """A value per seed, in the last row or at a step. what: a function or a key of the row."""
    get = what if callable(what) else lambda row: row[what]
    return [get(next(row for row in reversed(rows) if step in (None, row["step"])))
            for rows in curves(experiment, run)]


def value(*where, **more):
    return mean(of_seeds(*where, **more))


def skill(name):
    return lambda row: 100 * row["accuracy"][name]


def low_high(values):
    values = list(values)
    return [min(values), max(values)]


GENERAL = list(SKILLS)[:3]
BASE = headline.RUNS["ce"]
REPLAY, MOL = ratio.METHODS
LONGEST = budget.run("replay", "noise", 40_000, 2400)
ALL_FOUR = "mol to the latest model, earlier domains too"
SIZES = list(scale.SIZES)
WRONG_MOL, RIGHT_REPLAY, WRONG_REPLAY = ("mol, 70% wrong", "replay, right answers",
                                         "replay, 70% wrong")


def of_base(name, size):
    """The share of the base's right answers that a method keeps, %."""
    run = scale.run(name, size)
    return 100 * value(scale, run) / value(scale, run, step=0)


LEAD = [of_base(WRONG_MOL, size) - of_base(WRONG_REPLAY, size) for size in SIZES]
FEW_STEPS = [scale.run(WRONG_MOL, 0.5, base_steps=steps) for steps in scale.BASE_STEPS]
FIRST_WRONG = [sum(200 * row["modes"]["think"]["first_wrong"][i] for row in
                   (rows[-1] for rows in curves(modes, "replay, 70% wrong"))) for i in range(21)]

CLAIMS = [
    # README.md
    *((FRONT, "Both keep {:.0f}% of the general skills", [value(headline, run)])
      for run in ("mol, right answers", RIGHT_REPLAY)),
    (FRONT, "the default has 70% wrong answers, and replay keeps {:.0f}%; with 25% it keeps "
     "{:.0f}%", [value(headline, WRONG_REPLAY),
                 value(quality, quality.run("replay", 0.25, "bias"))]),
    (FRONT, "drops to {:.0f}% of the general skills at step 25",
     [value(headline, WRONG_MOL, step=25)]),
    (FRONT, "{:.2f} nats, `ce` {:.2f}, `replay` on right answers {:.2f}",
     [value(headline, run, LOSS) for run in (WRONG_MOL, "ce", RIGHT_REPLAY)]),
    (FRONT, "`mol` keeps {:.0f} to {:.0f} points more", low_high(LEAD)),
    (FRONT, "`mol` keeps {:.0f}% of the facts of the stated kinds, `replay` {:.0f}% and `ce` "
     "{:.0f}%", [value(real, run, skill("shown"))
                          for run in ("mol, wrong", "replay, wrong", "ce")]),
    # headline
    (RESULTS, "`mol` keeps {:.0f}% or more of them on every text",
     [min(value(headline, f"mol, {text}") for text in headline.TEXTS)]),
    (RESULTS, "`replay` keeps {:.0f}% if the answers are right, {:.0f}% or {:.0f}% if 70% are "
     "wrong", [value(headline, f"replay, {text}") for text in headline.TEXTS]),
    (RESULTS, "| base | {:.0f} | {:.0f} | {:.2f} | {:.2f} |",
     [value(headline, BASE, what, step=0) for what in (kept, p_right, KL, LOSS)]),
    *((RESULTS, f"| {label} | {{:.0f}} | {{:.0f}} | {{:.2f}} | {{:.2f}} |",
       [value(headline, label, what) for what in (kept, p_right, KL, LOSS)])
      for label in headline.RUNS),
    (RESULTS, "`mol` on 70% wrong drops to {:.0f}% at step 25 ({:.0f}% on one seed), `replay` on "
     "right answers to {:.0f}%",
     [value(headline, WRONG_MOL, step=25), min(of_seeds(headline, WRONG_MOL, step=25)),
      value(headline, RIGHT_REPLAY, step=25)]),
    (RESULTS, "`mol` has learnt {:.0f}% of the domain, `replay` on right answers {:.0f}%, `ce` "
     "{:.0f}%", [value(headline, run, learnt, step=100)
                 for run in (WRONG_MOL, RIGHT_REPLAY, "ce")]),
    # budget
    *((RESULTS, f"| replay, {kind}, {documents:,} documents | {{:.0f}} | {{:.0f}} | {{:.0f}} | "
       "{:.0f} | {:.0f} |", [value(budget, budget.run("replay", kind, documents, steps))
                    for steps in budget.STEPS])
      for kind in ("noise", "bias") for documents in (2_000, 40_000)),
    (RESULTS, "`mol` keeps {:.0f}% or more in every run",
     [min(value(budget, run) for run in budget.RUNS.values() if run.method == "mol")]),
    (RESULTS, "p(right) of `replay` on bias is {:.0f}% to {:.0f}%",
     low_high(value(budget, budget.run("replay", "bias", documents, steps), p_right)
              for documents in budget.DOCUMENTS for steps in budget.STEPS)),
    (RESULTS, "its p(right) is still {:.0f}%, and its KL to the base {:.2f} nats (`mol` {:.2f})",
     [value(budget, LONGEST, p_right), value(budget, LONGEST, KL),
      value(budget, LONGEST._replace(method="mol"), KL)]),
    (RESULTS, "the domain loss rises from {:.2f} to {:.2f} nats for `mol` and from {:.2f} to "
     "{:.2f} for `replay`",
     [value(budget, budget.run(method, "noise", 40_000, steps), LOSS)
      for method in ("mol", "replay") for steps in (300, 2400)]),
    # quality
    (RESULTS, "`mol` keeps {:.0f}% or more however many answers are wrong",
     [min(value(quality, run) for run in quality.RUNS.values() if run.method == "mol")]),
    *((RESULTS, f"| {method}, {kind} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | "
       "{:.0f} |", [value(quality, quality.run(method, share, kind)) for share in quality.SHARES])
      for method in quality.METHODS for kind in quality.KINDS),
    (RESULTS, "p(right) of `replay` is {:.0f}%, {:.0f}%, {:.0f}%, {:.0f}% and {:.0f}%",
     [value(quality, quality.run("replay", share, "bias"), p_right)
      for share in quality.SHARES[1:]]),
    (RESULTS, "one seed of `mol` falls to {:.0f}%",
     [min(of_seeds(quality, quality.run("mol", 1.0, "bias")))]),
    # ratio
    *((RESULTS, f"| {name}, {budget_name} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | "
       "{:.0f} |", [value(ratio, ratio.run(name, share, budget_name)) for share in ratio.RATIOS])
      for budget_name in ratio.BUDGETS for name in ratio.METHODS),
    (RESULTS, "`mol` learns {:.0f}% of the domain and `replay` {:.0f}%",
     [value(ratio, ratio.run(name, "4:1", "same total"), learnt) for name in (MOL, REPLAY)]),
    # direction
    *((RESULTS, "all three keep {:.0f}% of the general skills", [value(direction, run)])
      for run in direction.RUNS),
    (RESULTS, "forward KL has learnt {:.0f}% of the domain, reverse {:.0f}% and the mean {:.0f}%",
     [value(direction, f"mol, {way}", learnt, step=100) for way in ("forward", "reverse", "mean")]),
    (RESULTS, "{:.3f} nats (forward), {:.3f} (reverse) and {:.3f} (mean)",
     [value(direction, f"mol, {way}", KL) for way in ("forward", "reverse", "mean")]),
    # source
    (RESULTS, "`mol` keeps {:.0f}% and `replay` {:.0f}%, but the KL of `replay` is {:.2f} nats "
     "(`mol` {:.2f}) and its p(right) {:.0f}% (`mol` {:.0f}%)",
     [value(source, f"{method}, own samples", what) for what, methods in (
         (kept, ("mol", "replay")), (KL, ("replay", "mol")), (p_right, ("replay", "mol")))
      for method in methods]),
    *((RESULTS, "facts end at {:.0f}%", [value(source, f"{method}, no facts", skill("facts"))])
      for method in source.METHODS),
    *((RESULTS, "think sums end at {:.0f}%",
       [value(source, f"{method}, no think sums", skill("think"))]) for method in source.METHODS),
    # modes
    (RESULTS, "`mol` keeps {:.0f}% of the no-think and {:.0f}% of the think sums, `replay` {:.0f}% "
     "and {:.0f}%", [value(modes, f"{method}, 70% wrong", skill(mode))
                     for method in ("mol", "replay") for mode in modes.MODES]),
    (RESULTS, "Of 600 think answers of `replay` {:.0f} are wrong. In {:.0f} of them",
     [sum(FIRST_WRONG), FIRST_WRONG[15]]),
    # amount
    *((RESULTS, f"| {method} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} |",
       [value(amount, amount.run(method, count)) for count in amount.AMOUNTS])
      for method in amount.METHODS),
    (RESULTS, "`replay` has a loss of {:.2f} nats on the documents that it read and {:.2f} on "
     "others; `mol` has a KL of {:.2f} and {:.2f}",
     [value(amount, amount.run(method, 30), f"{text}_{what}") for method, what in (
         ("replay", "loss"), ("mol", "kl")) for text in ("seen", "unseen")]),
    (RESULTS, "with 1,000 documents the KL is {:.3f} and {:.3f}",
     [value(amount, amount.run("mol", 1000), f"{text}_kl") for text in ("seen", "unseen")]),
    # domains
    *((RESULTS, f"| {label} | {{:.0f}} | {{:.0f}} | {{:.0f}} |", [
        value(domains, label, lambda row: 100 * domains.general(row)),
        mean(value(domains, label, skill(name)) for name in ("alarms", "drugs", "ships")),
        value(domains, label, skill("larger"))]) for label in domains.RUNS),
    # scale
    *((RESULTS, f"| {label} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} |",
       [value(scale, scale.run(name, size), step=step) for size in SIZES])
      for label, name, step in (
          ("base", "ce", 0), (RIGHT_REPLAY, RIGHT_REPLAY, None), (WRONG_MOL, WRONG_MOL, None),
          (WRONG_REPLAY, WRONG_REPLAY, None))),
    (RESULTS, "`mol` keeps {:.0f}% or more of what the base knows, `replay` {:.0f}% to {:.0f}%",
     [min(of_base(WRONG_MOL, size) for size in SIZES),
      *low_high(of_base(WRONG_REPLAY, size) for size in SIZES)]),
    (RESULTS, "Bases of 0.5 million with 200, 300, 400 and 550 steps of pretraining answer "
     "{:.0f}%, {:.0f}%, {:.0f}% and {:.0f}%; from them `mol` ends at {:.0f}%, {:.0f}%, {:.0f}% and "
     "{:.0f}%, `replay` on right answers at {:.0f}%, {:.0f}%, {:.0f}% and {:.0f}%",
     [value(scale, run, step=0) for run in FEW_STEPS] + [value(scale, run) for run in FEW_STEPS]
     + [value(scale, scale.run(RIGHT_REPLAY, 0.5, base_steps=steps))
        for steps in scale.BASE_STEPS]),
    (RESULTS, "costs `mol` {:.0f} to {:.0f} points",
     low_high(value(scale, scale.run(WRONG_MOL, size)) - value(scale, scale.run(WRONG_MOL, size, 2))
              for size in SIZES)),
    # real
    (RESULTS, "`mol` keeps {:.0f}% of the stated and {:.0f}% of the other kinds",
     [value(real, "mol, wrong", skill(kinds)) for kinds in ("shown", "never shown")]),
    *((RESULTS, f"| {label} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.0f}} | {{:.2f}} |",
       [value(real, label, skill(name)) for name in real.SHARES] + [value(real, label, KL)])
      for label in real.RUNS),
    # rivals
    *((RESULTS, f"| {rivals.label(name, setting)} | {{:.0f}} | {{:.0f}} | {{:.2f}} |",
       [value(rivals, rivals.run(name, setting), what) for what in (kept, learnt, KL)])
      for name, setting in (
          ("ce", 3e-3), ("ce, low rate", 1e-3), ("domain_kl", 0.1), ("l2sp", 0.03),
          ("replay", 6e-3), ("LoRA replay", 0.02), ("ewc", 1000.0), ("mol", 1.0),
          ("LoRA mol", 0.04), ("replay, right answers", 1.5e-3))),
    (RESULTS, "The next method here is `ewc` with {:.0f}%",
     [value(rivals, rivals.run("ewc", 1000.0))]),
    (RESULTS, "own samples is not in this table and keeps {:.0f}%",
     [value(source, "replay, own samples")]),
    (RESULTS, "strengths 0.3 to 3 keep {:.0f}% or more; at 10 only {:.0f}% of the domain is learnt",
     [min(value(rivals, rivals.run("mol", strength)) for strength in (0.3, 1.0, 3.0)),
      value(rivals, rivals.run("mol", 10.0), learnt)]),
]


@pytest.mark.parametrize("file, sentence, values", CLAIMS)
def test_a_number_in_a_readme_is_that_of_the_runs(file, sentence, values):
    text = " ".join((ROOT / file).read_text().split())
    assert sentence.format(*values) in text


def test_the_rows_of_rivals_are_the_best_values():
    best = rivals.best_values(lambda run: curves(rivals, run))
    text = (ROOT / RESULTS).read_text()
    for name, setting in best.items():
        assert name == "LoRA ce" or f"| {rivals.label(name, setting)} |" in text


def test_the_real_model_was_asked_27_and_40_questions():
    for run in real.RUNS:
        for rows in curves(real, run):
            asked = [27 * rows[-1]["accuracy"]["shown"], 40 * rows[-1]["accuracy"]["never shown"]]
            assert asked == pytest.approx([round(right) for right in asked])
