"""The numbers in the READMEs, computed again from the committed runs.

Each row of a table in plots/README.md is one that the command of its section prints. A claim is a
file, a piece of a sentence with gaps, and the values of the gaps.
"""

import functools
import io
import math
import re
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev

import pytest

from plots import amount, contexts, details, domains, headline, quality, rivals, runs, wordings
from plots.huggingface import real
from plots.tables import T_QUANTILES, difference, domain_loss, kept, learnt, p_right, skill

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "plots" / "runs.jsonl"
LINES = runs.read_runs(RUNS) | runs.read_runs(RUNS, real.Settings())
FRONT, RESULTS = "README.md", "plots/README.md"
EXPERIMENTS = ("headline", "quality", "rivals", "contexts", "wordings", "amount", "scale",
               "domains", "details", "huggingface.real")
COSTS = {"step", "memory", "preparation"}  # of tests/benchmark.py
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """name -> what this experiment prints. It may make no runs."""
    @functools.cache
    def run(name):
        out, text = tmp_path_factory.mktemp(name), io.StringIO()
        shutil.copy(RUNS, out)
        with (pytest.MonkeyPatch.context() as patch, redirect_stdout(text),
              pytest.raises(SystemExit) as ended):
            patch.setattr(runs, "make_in_processes", lambda *_: pytest.fail("no such runs"))
            patch.setattr(sys, "argv", [name, "--out", str(out)])
            if name == "huggingface.real":  # its settings are read from its source
                real.main()
            runpy.run_module(f"plots.{name}", run_name="__main__")
        assert ended.value.code == 0 and ", 0 to make" in text.getvalue()
        for picture in out.glob("*.png"):
            assert (ROOT / "plots" / picture.name).exists()
        return text.getvalue()
    return run


def rows_of_tables(text):
    """The rows of all Markdown tables -> [{column: cell}, ...]"""
    rows = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        columns, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")]
                              for line in table.splitlines()]
        rows += [dict(zip(columns, line, strict=True)) for line in lines]
    return rows


def without_ranges(row):
    return {column: re.sub(r" \(.*\)$", "", cell) for column, cell in row.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tables_of_a_section_are_those_that_its_command_prints(name, printed):
    section = re.search(rf"^### [^\n]*`python -m plots.{name}`\n(.*?)(?=^##)",
                        (ROOT / RESULTS).read_text(), re.MULTILINE | re.DOTALL)[1]
    rows, found = rows_of_tables(section), rows_of_tables(printed(name))
    assert rows
    for row in rows:
        row = {column: cell for column, cell in row.items() if column not in COSTS}
        assert any(row.items() <= some.items() for other in found
                   for some in (other, without_ranges(other))), row


def test_the_tables_of_the_first_page_are_those_of_the_commands(printed):
    """Those with the columns of an experiment. A block of code shows what one run prints."""
    found = [without_ranges(row) for name in EXPERIMENTS for row in rows_of_tables(printed(name))]
    text = re.sub("```.*?```", "", (ROOT / FRONT).read_text(), flags=re.DOTALL)
    for row in map(without_ranges, rows_of_tables(text)):
        alike = [other for other in found if row.keys() <= other.keys()]
        assert not alike or any(row.items() <= other.items() for other in alike), row


def of_seeds(run, what=kept, step=None):
    """A value per seed, in the last row or at a step."""
    curves = [LINES[runs.identity_of(run, runs.DEFAULTS, seed)]["rows"]
              for seed in range(run.seeds or 5)]
    return [what(next(row for row in reversed(rows) if step in (None, row["step"])))
            for rows in curves]


def on_smollm2(label, what="capitals"):
    """The change of right answers, in points."""
    seeds = [LINES[runs.identity_of(real.RUNS[label], real.Settings(), seed)]["rows"]
             for seed in real.Settings.seeds]
    return real.interval(seeds, *real.SCORES[what], base=seeds[0][:1])[0]


def value(*where, **more):
    return mean(of_seeds(*where, **more))


def minus(run, other, what=kept):
    return difference(of_seeds(run, what), of_seeds(other, what))


CE, RIGHT_REPLAY, RIGHT_MOL = (headline.ENDS[label] for label in (
    "ce", "replay, right answers", "mol, right answers"))
MOL, FORWARD, ANSWERS = (rivals.RUNS[label] for label in (
    "mol, strength 1", "mol, forward KL", "replay, base's answers, lr 0.003"))
OTHER, ENDINGS = ({way: wordings.run(way, text) for way in wordings.WAYS}
                  for text in ("other beginnings", "other endings"))
TENTH = {method: f"{method}, a tenth in the base's words" for method in ("replay", "mol")}
EIGHT, earlier = domains.EIGHT, domains.earlier_domains
EVERY = {method: [run for run in quality.RUNS.values() if run.method == method]
         for method in quality.METHODS}

CLAIMS = [
    # headline, quality
    (RESULTS, "On right answers no difference in skills was found between `mol` and `replay`: "
     "{:+.1f} points ({:+.1f} to {:+.1f})", minus(RIGHT_MOL, RIGHT_REPLAY)),
    (RESULTS, "held-out wordings (right answers) `mol` {:.0f}%, `replay` {:.0f}%, `ce` {:.0f}%; "
     "domain loss `mol` {:.2f}, `ce` {:.2f}",
     [value(run, skill("held-out wordings")) for run in (RIGHT_MOL, RIGHT_REPLAY, CE)]
     + [value(run, domain_loss) for run in (RIGHT_MOL, CE)]),
    (RESULTS, "`mol` keeps {:.0f}% or more, however many are wrong",
     [min(map(value, EVERY["mol"]))]),
    (RESULTS, "Its p(right) does not: {:.0f}% after 2,400 steps on 40,000 documents",
     [value(quality.longer("replay", "noise", 40_000, 2400), p_right)]),
    # rivals
    (RESULTS, "no difference in skills to `mol` was found, {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(ANSWERS, MOL)),
    (RESULTS, "Forward KL changes p(right) by {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(FORWARD, MOL, p_right)),
    (RESULTS, "in skills no difference was found, {:+.1f} ({:+.1f} to {:+.1f})",
     minus(FORWARD, MOL)),
    (RESULTS, "At step 100 it has learnt {:.0f}% of the domain, reverse KL {:.0f}%",
     [value(run, learnt, step=100) for run in (FORWARD, MOL)]),
    (RESULTS, "0.3 to 3 keep {:.0f}% or more; at 10 only {:.0f}% of the domain is learnt",
     [min(value(rivals.SEARCH[f"search: mol, strength {x}"]) for x in (0.3, 1, 3)),
      value(rivals.SEARCH["search: mol, strength 10"], learnt)]),
    # contexts, amount
    (RESULTS, "with a tenth `mol` keeps {:.0f}% of the think sums, `replay` none",
     [value(contexts.run("mol", "other format, a tenth in base format"), skill("think"))]),
    (RESULTS, "Named capitals stay at {:.0f}% or more, but at {:.0f}% without the question",
     [min(value(contexts.named(method, share), skill("named"))
          for method in contexts.METHODS for share in contexts.NAMED),
      value(contexts.NO_QUESTIONS, skill("named"))]),
    (RESULTS, "Sums stay at {:.0f}% or more",
     [min(value(contexts.named(method, share), skill(name)) for method in contexts.METHODS
          for share in contexts.NAMED for name in ("no_think", "think"))]),
    (RESULTS, "With 100 documents `mol` keeps more, {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(*(amount.of_documents(method, 100) for method in ("mol", "replay")))),
    (RESULTS, "with 3,000 no difference was found, {:+.1f} ({:+.1f} to {:+.1f})",
     minus(*(amount.of_documents(method, 3000) for method in ("mol", "replay")))),
    # wordings
    (RESULTS, "in other endings `mol` keeps less, {:+.1f} points ({:+.1f} to {:+.1f})",
     minus(ENDINGS["mol"], ENDINGS["replay"])),
    (RESULTS, "in other endings no difference was found, {:+.1f} ({:+.1f} to {:+.1f})",
     minus(ENDINGS[TENTH["mol"]], ENDINGS[TENTH["replay"]])),
    (RESULTS, "In other beginnings no difference in skills was found between `mol` and `replay`, "
     "{:+.1f} ({:+.1f} to {:+.1f})", minus(OTHER["mol"], OTHER["replay"])),
    (RESULTS, "With a tenth in the base's words `mol` keeps more in other beginnings, {:+.1f} "
     "points ({:+.1f} to {:+.1f})", minus(OTHER[TENTH["mol"]], OTHER[TENTH["replay"]])),
    # details
    (RESULTS, "moves domain losses by up to {:.3f} nats and held-out wordings by up to {:.1f} "
     "points",
     [max(stdev(of_seeds(details.run(*case, noise), what)[0] for noise in range(details.NOISES))
          for case in details.NOISY) for what in (domain_loss, skill("held-out wordings"))]),
    (RESULTS, "The lowest points of the first 60 steps are {:.0f}% and {:.0f}% with a warmup of 10 "
     "steps, {:.0f}% and {:.0f}% with 100",
     [min(value(details.DIP[f"{method}, warmup of {steps} steps"], step=step)
          for step in range(0, 61, 4)) for steps in (10, 100) for method in ("replay", "mol")]),
    (RESULTS, "the rank correlation is {:.2f} over all", details.rank_correlation()),
    # domains
    (RESULTS, "`replay` keeps more of them than `mol` to the latest model, {:+.1f} points "
     "({:+.1f} to {:+.1f})", minus(EIGHT["replay"], EIGHT["mol to the latest model"], earlier)),
    (RESULTS, "`mol` keeps more, {:+.1f} points ({:+.1f} to {:+.1f}), which Holm's",
     minus(EIGHT["mol to one base per domain"], EIGHT["mol to the latest model"], earlier)),
    # README.md
    (FRONT, "10%: `replay` keeps {:.0f}%, `mol` {:.0f}%; 70%: {:.0f}% and {:.0f}%",
     [value(headline.ENDS[f"{method}, {text}"]) for text in ("10% wrong", "70% wrong")
      for method in ("replay", "mol")]),
    (FRONT, "`replay` keeps {:.0f}%, `mol` {:.0f}%; with a tenth in the base's words {:.0f}% and "
     "{:.0f}%", [value(OTHER[way]) for way in ("replay", "mol", TENTH["replay"], TENTH["mol"])]),
    (FRONT, "other endings|`replay` {:.0f}%, `mol` {:.0f}%; with a tenth {:.0f}%, {:.0f}%",
     [value(ENDINGS[way]) for way in ("replay", "mol", TENTH["replay"], TENTH["mol"])]),
    (FRONT, "at 25% `mol` learns {:.0f}% of the domain, with strength 0.3 {:.0f}%",
     [value(contexts.DOMAIN[label][0.25], learnt) for label in ("mol", "mol, strength 0.3")]),
    (FRONT, "its 64 likeliest tokens, stored before: `mol` keeps {:.0f}%",
     [value(rivals.RUNS["mol, 64 stored tokens"])]),
    (FRONT, "`replay` {:+.0f} points, `mol` {:+.0f}; not in the text {:+.0f}, {:+.0f}",
     [on_smollm2(label, what) for what in ("capitals", "unnamed capitals")
      for label in ("replay", "mol")]),
    (FRONT, "`replay` {:+.0f} points, `mol` {:+.0f}|",
     [on_smollm2(f"{method}, wrong statements") for method in ("replay", "mol")]),
    (RESULTS, "`replay` loses {:.0f} points of the capitals, `mol` {:.0f}. On right ones `mol` "
     "loses {:.0f}; `replay` gains {:.0f}", [abs(on_smollm2(label)) for label in (
         "replay, wrong statements", "mol, wrong statements", "mol", "replay")]),
    ("plots/huggingface/README.md", "With 64 tokens SmolLM2 lost {:.0f} points of the capitals, "
     "with the whole base {:.0f}", [-on_smollm2(label) for label in (
         "mol, 64 stored tokens", "mol")]),
    (FRONT, "`mol` keeps {:.0f}% of the others",
     [value(contexts.named("mol", 0.5), skill("not named"))]),
]


@pytest.mark.parametrize("file, sentence, values", CLAIMS)
def test_a_number_in_a_readme_is_that_of_the_runs(file, sentence, values):
    """A difference whose interval contains 0 is called not found."""
    text = " ".join((ROOT / file).read_text().split())
    assert sentence.format(*values) in text
    if "{:+.1f} to {:+.1f}" in sentence:
        _, low, high = values
        assert (low * high <= 0) == (re.search("[Nn]o difference", sentence) is not None)


def p_value(mean, low, high, seeds):
    """Of the paired t-test with three or five seeds that gave this 95% interval."""
    t = abs(mean) / ((high - low) / 2) * T_QUANTILES[seeds - 2]
    x = t / math.sqrt(seeds - 1 + t * t)
    return 1 - x if seeds == 3 else 1 - 1.5 * x + 0.5 * x ** 3


def test_how_many_differences_survive_holms_correction():
    found = sorted(p_value(*values, seeds=3 if re.search("latest|Holm", sentence) else 5)
                   for _, sentence, values in CLAIMS if "{:+.1f} to" in sentence)
    survive = 0
    while found[survive] <= 0.05 / (len(found) - survive):
        survive += 1
    text = (f"Of the {len(found)} differences in this file {sum(p < 0.05 for p in found)} were "
            f"found; {survive} survive Holm's correction")
    assert text in " ".join((ROOT / RESULTS).read_text().split())


def test_every_difference_in_the_results_is_tested():
    told = {sentence.format(*values) for _, sentence, values in CLAIMS}
    text = " ".join((ROOT / RESULTS).read_text().partition("### A real")[0].split())
    found = re.findall(r"[+-][\d.]+ (?:\w+ )*\([+-][\d.]+ to [+-][\d.]+\)", text)
    assert len(found) > 5
    for each in found:
        assert any(each in sentence for sentence in told), each


def test_the_first_page_shows_the_lines_of_losses_py():
    code = "".join((ROOT / "losses.py").read_text().split())
    block = re.search(r"```python\n(.*?)```", (ROOT / FRONT).read_text(), re.DOTALL)[1]
    assert len(block.splitlines()) == 4
    for line in block.splitlines():
        assert "".join(line.split()) in code


def test_the_class_names_tests_that_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text()):
        assert f"def {name}(" in tests, name
