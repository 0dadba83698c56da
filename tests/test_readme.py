"""The figures that the prose quotes, recomputed from the committed runs.

Each claim is a piece of a sentence with gaps, and what stands in them. A run made anew, or a
sentence changed by hand, fails here until both agree again.
"""

from operator import sub
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from plots import (amount, budget, direction, domains, headline, modes, quality, ratio, real,
                   rivals, runs, scale, source, style)

ROOT = Path(__file__).parent.parent
LINES = runs.read(ROOT / "plots" / "runs.jsonl")


def curves(question, run):
    """All rows of each seed."""
    run = question.RUNS[run] if isinstance(run, str) else run
    seeds = getattr(question, "SEEDS", runs.SEEDS)
    common = {} if question is real else runs.COMMON
    return [runs.find(LINES, run, seed, common)["rows"] for seed in seeds]


def rows(question, run, step=None):
    """A row per seed: the last, or that of a step."""
    return [next(row for row in reversed(of_seed) if step in (None, row["step"]))
            for of_seed in curves(question, run)]


def kept(question, run, step=None):
    """The general skills answered exactly, mean over seeds."""
    return mean(map(style.general, rows(question, run, step)))


def p_right(question, run, step=None):
    return mean(map(style.probability, rows(question, run, step)))


def skill(question, run, name, step=None):
    return mean(row["accuracy"][name] for row in rows(question, run, step))


def value(question, run, name):
    return mean(row[name] for row in rows(question, run))


def first_wrong(mode):
    """How many of replay's answers on wrong text first go wrong at each token, of all seeds."""
    ends = rows(modes, "replay, 70% wrong")
    return sum(np.array(row["modes"][mode]["first_wrong"]) * 200 for row in ends)


FRONT, ANSWERS = "README.md", "plots/README.md"
BASE = [skill(headline, "ce", name, step=0) for name in style.SKILLS]
GENERAL = list(style.SKILLS)[:3]
AT_TENS = 15  # the token of a think answer with the tens of the sum
REPLAY, MOL = ratio.METHODS
SAME_DOMAIN, SAME_TOTAL = ratio.BUDGETS
ALL_FOUR = "mol to the latest model, earlier domains too"
LONGEST = budget.run("replay", "noise", 40_000, 2400)

SIZES = list(scale.SIZES)
LEARNT_AT = {(name, size): list(map(scale.step_learnt, curves(scale, scale.run(name, size))))
             for name in scale.LINES for size in SIZES}


def of_base(name, size):
    """The share of the base's right answers that a method keeps."""
    run = scale.run(name, size)
    return kept(scale, run) / kept(scale, run, step=0)


def of_seeds(name, step, places, mark="accuracy"):
    """No-think sums at a step, at each of some places (size, position of the seed)."""
    return [rows(scale, scale.run(name, size), step)[i][mark]["no_think"] for size, i in places]


PLACES = [(size, i) for size in SIZES for i in range(len(runs.SEEDS))]
PARTLY = [at for at in PLACES if of_seeds("ce", 0, [at], "probability")[0] < 0.8]  # known in part
WHOLLY = [at for at in PLACES if at not in PARTLY]
LEAD = [of_base("mol, 70% wrong", size) - of_base("replay, 70% wrong", size) for size in SIZES]
COST = {(name, factor): [
    round(100 * (kept(scale, scale.run(name, size)) - kept(scale, scale.run(name, size, factor))))
    for size in SIZES] for name, factors in scale.FACTORS.items() for factor in factors}


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
    (ANSWERS, "`mol` keeps {:.0%} of them or more",
     [min(kept(headline, f"mol, {text}") for text in headline.TEXTS)]),
    (ANSWERS, "`replay` keeps {:.0%} on right answers, {:.0%} where seven in ten are wrong in the "
     "same way, and {:.0%} where they are wrong at random",
     [kept(headline, f"replay, {text}") for text in headline.TEXTS]),
    (ANSWERS, "(KL {:.3f} nats against {:.3f})",
     [value(headline, f"{method}, right answers", "kl_to_base") for method in ("replay", "mol")]),
    (ANSWERS, "to {:.2f} of the general skills at step 25 ({:.2f} on one seed), `replay` on right "
     "ones to {:.2f}",
     [kept(headline, "mol, 70% wrong", 25),
      min(map(style.general, rows(headline, "mol, 70% wrong", 25))),
      kept(headline, "replay, right answers", 25)]),
    (ANSWERS, "({:.2f} of it at step 100, `replay` on right answers {:.2f}, `ce` {:.2f})",
     [skill(headline, run, "domain", 100)
      for run in ("mol, 70% wrong", "replay, right answers", "ce")]),
    (ANSWERS, "ends at {:.3f}, where `ce` has {:.3f}",
     [value(headline, run, "domain_loss") for run in ("mol, 70% wrong", "ce")]),
    (ANSWERS, "it has {:.0%} of the general skills after 150 steps, {:.0%} after 1,200 and {:.0%} "
     "after 2,400",
     [kept(budget, budget.run("replay", "noise", 40_000, steps)) for steps in (150, 1200, 2400)]),
    (ANSWERS, "from {:.0%} after 150 steps to {:.0%} after 2,400. `mol`",
     [kept(budget, budget.run("replay", "bias", 40_000, steps)) for steps in (150, 2400)]),
    (ANSWERS, "`mol` has {:.0%} or more on average at every budget",
     [min(kept(budget, run) for run in budget.RUNS.values() if run.method == "mol")]),
    (ANSWERS, "at every budget: p(right) is {:.2f} to {:.2f}",
     [end(p_right(budget, budget.run("replay", "bias", documents, steps))
          for documents in budget.DOCUMENTS for steps in budget.STEPS) for end in (min, max)]),
    (ANSWERS, "p(right) is {:.2f} with {:.0%} of the answers right, and the model is {:.2f} nats "
     "away from the base, `mol` {:.2f}",
     [p_right(budget, LONGEST), kept(budget, LONGEST), value(budget, LONGEST, "kl_to_base"),
      value(budget, LONGEST._replace(method="mol"), "kl_to_base")]),
    (ANSWERS, "With 2,000 documents p(right) ends at {:.2f} too, but {:.0%} are right",
     [of(budget, budget.run("replay", "noise", 2_000, 2400)) for of in (p_right, kept)]),
    (ANSWERS, "its loss on held-out text rises from {:.3f} at 300 steps to {:.3f}, where with "
     "40,000 it falls from {:.3f} to {:.3f}.",
     [value(budget, budget.run("replay", "noise", documents, steps), "general_loss")
      for documents in budget.DOCUMENTS for steps in (300, 2400)]),
    (ANSWERS, "the answers stay at {:.0%} to {:.0%}, more than the imitator's",
     [end(kept(budget, budget.run("replay", "bias", 2_000, steps)) for steps in budget.STEPS)
      for end in (min, max)]),
    (ANSWERS, "`replay` is ahead on one seed of three, {:.0%} against {:.0%}",
     [style.general(rows(budget, LONGEST._replace(method=method))[-1])
      for method in budget.METHODS]),
    (ANSWERS, "`mol` has more after 300 steps ({:.0%})",
     [kept(budget, budget.run("mol", "noise", 40_000, 300))]),
    (ANSWERS, "`mol`'s held-out loss rises from {:.3f} after 300 steps to {:.3f}.",
     [value(budget, budget.run("mol", "noise", 40_000, steps), "domain_loss")
      for steps in (300, 2400)]),
    (ANSWERS, "(held-out loss {:.3f}, then {:.3f}), and so does `replay` ({:.3f}, then {:.3f})",
     [value(budget, budget.run(method, "noise", 40_000, steps), "domain_loss")
      for method in ("mol", "replay") for steps in (300, 2400)]),
    (ANSWERS, "its p(right) stays at {:.2f} or less on either text",
     [max(p_right(budget, budget.run("replay", "noise", documents, steps))
          for documents in budget.DOCUMENTS for steps in budget.STEPS)]),
    (ANSWERS, "`mol` keeps {:.0%} or more of what the base knows at every size from 0.2 to 10 "
     "million parameters, `replay` {:.0%} to {:.0%}",
     [min(of_base("mol, 70% wrong", size) for size in SIZES),
      *(end(of_base("replay, 70% wrong", size) for size in SIZES) for end in (min, max))]),
    (ANSWERS, "The bases answer {:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%} of the general questions",
     [kept(scale, scale.run("ce", size), step=0) for size in SIZES]),
    *((ANSWERS, f"{name} {{:.0%}}, {{:.0%}}, {{:.0%}}, {{:.0%}} and {{:.0%}}",
       [kept(scale, scale.run(run, size)) for size in SIZES])
      for name, run in (("`replay` on right answers", "replay, right answers"),
                        ("`mol` on wrong ones", "mol, 70% wrong"))),
    *((file, sentence, [100 * min(LEAD), 100 * max(LEAD)]) for file, sentence in (
        (ANSWERS, "a lead of {:.0f} to {:.0f} points over `replay`"),
        (FRONT, "leads replay by {:.0f} to {:.0f} points of what the base knows"))),
    (ANSWERS, "a probability of {:.2f}, {:.2f} and {:.2f}, and answer {:.2f}, {:.2f} and {:.2f} of "
     "them; there `mol` ends at {:.2f}, {:.2f} and {:.2f}, `replay` on right answers at {:.2f}, "
     "{:.2f} and {:.2f}.",
     of_seeds("ce", 0, PARTLY, "probability") + of_seeds("ce", 0, PARTLY)
     + of_seeds("mol, 70% wrong", None, PARTLY) + of_seeds("replay, right answers", None, PARTLY)),
    (ANSWERS, "give it {:.2f} or more, and `mol` loses at most {:.2f} of the sums",
     [min(of_seeds("ce", 0, WHOLLY, "probability")),
      max(map(sub, of_seeds("ce", 0, WHOLLY), of_seeds("mol, 70% wrong", None, WHOLLY)))]),
    (ANSWERS, "have a p(right) of {:.2f}, {:.2f}, {:.2f} and {:.2f}, and",
     [p_right(scale, scale.run("mol, 70% wrong", 0.5, base_steps=steps), 0)
      for steps in scale.BASE_STEPS]),
    *((ANSWERS, f"{text} {{:.0%}}, {{:.0%}}, {{:.0%}} and {{:.0%}}{after}",
       [kept(scale, scale.run(name, 0.5, base_steps=steps), step) for steps in scale.BASE_STEPS])
      for text, name, step, after in (
          ("and answer", "mol, 70% wrong", 0, " of the general questions. From"),
          ("`mol` on wrong answers ends at", "mol, 70% wrong", None, ", and"),
          ("`replay` on right answers at", "replay, right answers", None, ", where"))),
    (ANSWERS, "learnt at step {} to {},",
     [end(at for found in LEARNT_AT.values() for at in found) for end in (min, max)]),
    (ANSWERS, "by `mol` {:.0f} to {:.0f} steps later than by `replay` on right answers",
     [end(mean(LEARNT_AT["mol, 70% wrong", size]) - mean(LEARNT_AT["replay, right answers", size])
          for size in SIZES) for end in (min, max)]),
    (ANSWERS, "({:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%} of the answers)",
     [kept(scale, scale.run("mol, 70% wrong", size, 2)) for size in SIZES]),
    (ANSWERS, "`mol` keeps {:.0%} or more of the general skills however wrong the text is",
     [min(kept(quality, run) for run in quality.RUNS.values() if run.method == "mol")]),
    (ANSWERS, "{:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%} under noise, and {:.0%}, {:.0%}, {:.0%}, "
     "{:.0%} and {:.0%} under bias",
     [kept(quality, quality.run("replay", share, kind))
      for kind in quality.KINDS for share in quality.SHARES[1:]]),
    (ANSWERS, "level on right answers ({:.0%} and {:.0%})",
     [kept(quality, quality.run(method, 0.0, "bias")) for method in quality.METHODS]),
    (ANSWERS, "its p(right) is {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}",
     [p_right(quality, quality.run("replay", share, "bias")) for share in quality.SHARES[1:]]),
    (ANSWERS, "where every answer is biased it ends at {:.0%}, on one seed at {:.0%}",
     [kept(quality, quality.run("mol", 1.0, "bias")),
      min(map(style.general, rows(quality, quality.run("mol", 1.0, "bias"))))]),
    (ANSWERS, "`mol` keeps {:.0%}, {:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%} of the general skills "
     "from 1:8", [kept(ratio, ratio.run(MOL, share, SAME_DOMAIN)) for share in ratio.RATIOS]),
    (ANSWERS, "right answers here and keeps {:.0%}, {:.0%}, {:.0%}, {:.0%}, {:.0%} and {:.0%}:",
     [kept(ratio, ratio.run(REPLAY, share, SAME_DOMAIN)) for share in ratio.RATIOS]),
    (ANSWERS, "There `mol` keeps {:.0%} at 1:8 and {:.0%} at 1:4",
     [kept(ratio, ratio.run(MOL, share, SAME_TOTAL)) for share in ("1:8", "1:4")]),
    (ANSWERS, "`mol` learns {:.2f} of it and `replay` {:.2f}, late ({:.2f} and {:.2f} at step 150, "
     "where both have {:.2f} or more at 1:1)",
     [skill(ratio, ratio.run(name, "4:1", SAME_TOTAL), "domain", step)
      for step in (None, 150) for name in (MOL, REPLAY)]
     + [min(skill(ratio, ratio.run(name, "1:1", SAME_TOTAL), "domain", 150)
            for name in (MOL, REPLAY))]),
    *((ANSWERS, "Reverse, forward and their mean all keep {:.0%} of the general skills",
       [kept(direction, run)]) for run in direction.RUNS),
    (ANSWERS, "forward KL has {:.2f} of it and reverse {:.2f}, less on every seed (the mean of "
     "both {:.2f})", [skill(direction, f"mol, {way}", "domain", 100)
                 for way in ("forward", "reverse", "mean")]),
    (ANSWERS, "further from the base, {:.3f} nats against {:.3f},",
     [value(direction, f"mol, {way}", "kl_to_base") for way in ("forward", "reverse")]),
    (ANSWERS, "as near as reverse ({:.3f})", [value(direction, "mol, mean", "kl_to_base")]),
    (ANSWERS, "`mol` keeps {:.2f}, {:.2f} and {:.2f} of the three skills, and `replay` {:.2f}, "
     "{:.2f} and {:.2f};", [skill(source, f"{method}, own samples", name)
                            for method in ("mol", "replay") for name in GENERAL]),
    (ANSWERS, "from the base there (KL {:.3f} against {:.3f})",
     [value(source, f"{method}, own samples", "kl_to_base") for method in ("replay", "mol")]),
    (ANSWERS, "a probability of {:.2f}, where `mol` has {:.2f}",
     [p_right(source, f"{method}, own samples") for method in ("replay", "mol")]),
    (ANSWERS, "(no-think {:.2f} and {:.2f}, think {:.2f} and {:.2f})",
     [skill(source, f"{method}, pretraining", name)
      for name in ("no_think", "think") for method in ("replay", "mol")]),
    *((ANSWERS, "the facts end at {:.2f} under both",
       [skill(source, f"{method}, no facts", "facts")]) for method in ("replay", "mol")),
    (ANSWERS, "the no-think sums beside them keep {:.2f}.",
     [skill(source, "mol, no think sums", "no_think")]),
    (ANSWERS, "(no-think {:.0%}, think {:.0%}); under replay on wrong answers both fall alike "
     "({:.0%} and {:.0%})", [skill(modes, f"{method}, 70% wrong", mode)
                             for method in ("mol", "replay") for mode in modes.MODES]),
    (ANSWERS, "on wrong text {:.0f} are wrong at the end, and {:.0f} of them first go wrong at the "
     "tens", [first_wrong("think").sum(), first_wrong("think")[AT_TENS]]),
    (ANSWERS, "All {:.0f} wrong no-think answers break there",
     [first_wrong("no_think")[0]]),
    (ANSWERS, "({:.2f} at step 25, no-think {:.2f}), and as fragile as no-think under `mol` "
     "({:.2f} and {:.2f})", [skill(modes, f"{method}, 0% wrong", mode, 25)
                     for method in ("replay", "mol") for mode in ("think", "no_think")]),
    (ANSWERS, "for `mol` ({:.0%}) and for `replay` on right answers ({:.0%});",
     [kept(amount, amount.run(method, 1000)) for method in ("mol", "replay")]),
    (ANSWERS, "300 documents keep {:.0%} under `mol` and {:.0%} under `replay`, 100 keep {:.0%} "
     "and {:.0%}, 30 only {:.0%} and {:.0%}.",
     [kept(amount, amount.run(method, count))
      for count in (300, 100, 30) for method in ("mol", "replay")]),
    (ANSWERS, "it ends at {:.2f} nats per token on the ones that it saw and {:.2f} on others",
     [value(amount, amount.run("replay", 30), f"{text}_loss") for text in ("seen", "unseen")]),
    (ANSWERS, "agrees with the base to {:.2f} nats where it was asked and is {:.2f} away",
     [value(amount, amount.run("mol", 30), f"{text}_kl") for text in ("seen", "unseen")]),
    (ANSWERS, "`replay` is above it ({:.1%} and {:.1%}).",
     [kept(amount, amount.run(method, 10_000)) for method in ("replay", "mol")]),
    (ANSWERS, "(KL {:.3f} on seen text, {:.3f} on unseen); on 30 the KL is {:.2f} on seen text and "
     "{:.2f} on unseen", [value(amount, amount.run("mol", count), f"{text}_kl")
                          for count in (1000, 30) for text in ("seen", "unseen")]),
    (ANSWERS, "`mol` keeps {:.2f} of the earlier domains",
     [mean(skill(domains, ALL_FOUR, name) for name in domains.DOMAINS[:-1])]),
    (ANSWERS, "drifts a little: {:.2f} of the general skills, `replay` {:.2f}.",
     [kept(domains, ALL_FOUR), kept(domains, "replay, earlier domains too")]),
    (ANSWERS, "`ce` learns it only to {:.2f} as the last", [skill(domains, "ce", "larger")]),
    *((file, "`mol` keeps {:.0%} of what the base knew of the kinds stated there and {:.0%} of "
       "kinds that the text never mentions, `replay` {:.0%} and {:.0%}, `ce` {:.0%} and {:.0%}",
       [skill(real, run, kinds) for run in ("mol, wrong", "replay, wrong", "ce")
        for kinds in ("shown", "never shown")]) for file in (FRONT, ANSWERS)),
    (ANSWERS, "LoRA with `ce` {:.0%} and {:.0%}, with `replay` on wrong statements {:.0%} and "
     "{:.0%}; LoRA with `mol` keeps {:.0%} and {:.0%}.",
     [skill(real, run, kinds) for run in ("LoRA ce", "LoRA replay, wrong", "LoRA mol, wrong")
      for kinds in ("shown", "never shown")]),
    (ANSWERS, "never shows 0.00, on the real model {:.2f}",
     [skill(real, "mol, wrong", "never shown")]),
    (FRONT, "Where the statements are right, `replay` keeps {:.0%} and {:.0%}, `mol` {:.0%} and "
     "{:.0%}", [skill(real, f"{method}, right", kinds) for method in ("replay", "mol")
                for kinds in ("shown", "never shown")]),
    (ANSWERS, "`replay` keeps all of the kinds stated and `mol` {:.0%}",
     [skill(real, "mol, right", "shown")]),
    (ANSWERS, "In a new wording `ce` answers {:.0%} of the alarms, LoRA with it {:.0%}, `replay` "
     "on right statements {:.0%}, `mol` {:.0%} and {:.0%}, and LoRA with `mol` {:.0%}.",
     [skill(real, run, "new wording") for run in (
         "ce", "LoRA ce", "replay, right", "mol, right", "mol, wrong", "LoRA mol, wrong")]),
    (ANSWERS, "({:.2f}; base {:.2f}, `mol` {:.2f})",
     [value(real, "replay, right", "prose_loss"), rows(real, "ce", 0)[0]["prose_loss"],
      value(real, "mol, right", "prose_loss")]),
    (ANSWERS, "`mol` keep {:.0%} and {:.0%} of the general skills and learn the domain, the next "
     "is `ewc` with {:.0%}; on right answers `replay` keeps {:.0%}.",
     [kept(rivals, rivals.run(*best)) for best in (
         ("mol", 1.0), ("LoRA mol", 0.04), ("ewc", 1000.0), ("replay, right answers", 0.0015))]),
    (ANSWERS, "it does not keep `replay` from imitating, which ends at {:.0%}.",
     [kept(rivals, rivals.run("LoRA replay", 0.02))]),
    (ANSWERS, "on its rate: {:.0%}, {:.0%} and {:.0%} at 0.003, 0.006 and 0.0015",
     [kept(rivals, rivals.run("replay", rate)) for rate in (3e-3, 6e-3, 1.5e-3)]),
    (ANSWERS, "at 0.0007 {:.0%}, with {:.2f} of the domain",
     [kept(rivals, rivals.run("replay", 7e-4)),
      skill(rivals, rivals.run("replay", 7e-4), "domain")]),
    (ANSWERS, "with LoRA, which learns {:.2f} of the domain at the lowest",
     [skill(rivals, rivals.run("LoRA mol", 5e-3), "domain")]),
    (ANSWERS, "and {:.2f} of the domain is learnt with nothing kept",
     [skill(rivals, rivals.run("domain_kl", 1.0), "domain")]),
    (ANSWERS, "at strength 3000 it keeps {:.0%}, but learns only {:.2f} of the domain",
     [kept(rivals, rivals.run("ewc", 3000.0)),
      skill(rivals, rivals.run("ewc", 3000.0), "domain")]),
    (ANSWERS, "strengths 0.3 to 3 keep {:.0%} of the general skills and learn {:.2f} of the domain "
     "or more; at 10 it comes too late ({:.2f})",
     [min(kept(rivals, rivals.run("mol", strength)) for strength in (0.3, 1.0, 3.0)),
      min(skill(rivals, rivals.run("mol", strength), "domain") for strength in (0.3, 1.0, 3.0)),
      skill(rivals, rivals.run("mol", 10.0), "domain")]),
    (ANSWERS, "{:.0%} at 1:1, {:.0%} at 1:4, {:.0%} at 1:8, {:.0%} at 4:1",
     [kept(ratio, ratio.run(MOL, share, SAME_DOMAIN)) for share in ("1:1", "1:4", "1:8", "4:1")]),
]


@pytest.mark.parametrize("file, sentence, values", CLAIMS)
def test_a_figure_in_the_prose_is_that_of_the_runs(file, sentence, values):
    text = " ".join((ROOT / file).read_text().split())
    assert sentence.format(*values) in text


def test_what_the_section_on_size_says_in_words():
    assert [size for size, _ in PARTLY] == [0.2, 10, 10]
    assert all(kept(scale, scale.run("ce", size)) == 0 for size in SIZES)
    assert set(COST["mol, 70% wrong", 2]) == {2, 3}
    few = [scale.run("mol, 70% wrong", 0.5, base_steps=steps) for steps in scale.BASE_STEPS]
    assert max(round(100 * (kept(scale, run, 0) - kept(scale, run))) for run in few) == 6
    *smaller, largest = COST["replay, right answers", 2]
    assert max(smaller) == 1 and largest == 3
    assert all(abs(cost) <= 1 for name in scale.FACTORS for cost in COST[name, 0.5])
    slowly = [skill(scale, scale.run("mol, 70% wrong", size, 0.5), "domain") for size in SIZES]
    assert sorted(round(share, 2) for share in slowly) == [0.98, 0.98, 1, 1, 1]
    for name in scale.LINES:
        assert mean(LEARNT_AT[name, 10]) == min(mean(LEARNT_AT[name, size]) for size in SIZES)


def test_the_real_model_was_asked_27_and_40_questions():
    """So many of them every share of right answers is a whole number."""
    for run in real.RUNS:
        for row in rows(real, run):
            asked = 27 * row["accuracy"]["shown"], 40 * row["accuracy"]["never shown"]
            assert asked == pytest.approx([round(right) for right in asked])
