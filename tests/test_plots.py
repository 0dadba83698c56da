"""The experiments of plots/: their runs, figures and tables, other methods and other texts."""

import copy
import functools
import importlib
import io
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import data
import losses
import train
from model import GPT, GPTConfig
from plots import amount, forgetting, quality, ratio, rivals, runs, style, teacher, texts
from plots.runs import Run
from plots.tables import difference, differences_table, metrics_table

ROOT = Path(__file__).parent.parent
EXPERIMENTS = {name: importlib.import_module(f"plots.{name}") for name in
               "amount budget contexts coverage headline quality ratio real rivals scale "
               "teacher".split()}
LINES = runs.read_runs(ROOT / "plots" / "runs.jsonl")
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3",
        "--base-batch-size", "4", "--steps", "4", "--batch-size", "2", "--device", "cpu"]
RUNS = {"replay, wrong": Run("replay", {"general_errors": 1.0}), "mol": Run("mol")}


@pytest.fixture(scope="module", autouse=True)
def quick_worlds():
    """A world takes a second to make, and is only read: make each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy_world", functools.cache(data.toy_world))
        yield


def program(main, *arguments, **options):
    """Run a program -> exit code, output, errors."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        main(*arguments, **options)
    return ended.value.code, output.getvalue(), errors.getvalue()


def record_figures(patch):
    """A list to which every figure is added when it is saved."""
    figures, savefig = [], Figure.savefig
    patch.setattr(Figure, "savefig", lambda figure, *arguments, **options: (
        figures.append(figure), savefig(figure, *arguments, **options)))
    return figures


# --- the committed runs --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """name -> the finished program of this experiment, which may make no runs; figures, folder."""
    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp(name)
        shutil.copy(ROOT / "plots" / "runs.jsonl", out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "make_in_processes", lambda jobs, path: pytest.fail("no such runs"))
            patch.setattr(sys, "argv", [name, "--out", str(out)])
            figures = record_figures(patch)
            return *program(runpy.run_module, f"plots.{name}", run_name="__main__"), figures, out
    return run


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_draws_its_figure_from_the_committed_runs(name, committed):
    code, output, errors, (figure,), out = committed(name)
    assert code == 0 and not errors and ", 0 to make" in output and "\n| " in output
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "plots" / f"{name}.png").exists()
    assert figure.get_size_inches()[0] <= 10
    assert figure.get_suptitle() and figure._suptitle.get_ha() == "left"
    assert not any(axes.get_title(loc) for axes in figure.axes for loc in ("center", "right"))


def rows_of_tables(text):
    """The rows of all Markdown tables -> [{column: cell}, ...]"""
    rows = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        columns, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")]
                              for line in table.splitlines()]
        rows += [dict(zip(columns, line, strict=True)) for line in lines]
    return rows


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_tables_of_the_readmes_are_those_of_the_committed_runs(committed):
    """Of each table whose columns an experiment prints. The short one of headline is there.

    A block of code shows what one run prints, so it does not count.
    """
    front, answers = (rows_of_tables(re.sub("```.*?```", "", (ROOT / file).read_text(), flags=re.S))
                      for file in ("README.md", "plots/README.md"))
    printed = {name: rows_of_tables(committed(name)[1]) for name in EXPERIMENTS}
    for row in front + answers:
        alike = [other for rows in printed.values() for other in rows if row.keys() <= other.keys()]
        assert not alike or any(row.items() <= other.items() for other in alike), row
    short = printed["headline"][-4:]
    assert [row["method"] for row in short] == EXPERIMENTS["headline"].SHOWN
    assert all(row in front for row in short)


def test_committed_runs_of_one_seed_and_size_have_the_same_base():
    bases = {}
    for line in LINES.values():
        key = line["seed"], runs.base_settings(line["settings"])
        assert bases.setdefault(key, line["base"]) == line["base"]


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {"real"}))
def test_a_run_that_is_made_again_has_the_metrics_of_the_committed_one(name):
    run = next(iter(EXPERIMENTS[name].RUNS.values()))
    committed = LINES[runs.identity_of(run, runs.DEFAULTS, 0)]
    tiny = train.parse(TINY, runs.DEFAULTS)
    made = runs.make_run(run, replace(tiny, general_errors=run.settings.get("general_errors", 0.7)),
                         0)
    assert made["settings"].keys() == committed["settings"].keys()
    for row in (0, -1):
        assert made["rows"][row].keys() >= committed["rows"][row].keys()
        assert made["rows"][row]["accuracy"].keys() == committed["rows"][row]["accuracy"].keys()


# --- runs.jsonl ----------------------------------------------------------------------------------

def line(run=Run("mol"), seed=0, rows=()):
    """A line of runs.jsonl."""
    return {"method": run.method, "seed": seed, "work": run.work_name, "how": run.how,
            "settings": runs.of_run(replace(runs.DEFAULTS, **run.settings)), "rows": rows}


def test_a_line_that_was_cut_short_is_ignored_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "runs.jsonl"
    for seed in range(3):
        runs.append_run(path, line(seed=seed))
    whole = path.read_bytes()
    for damaged, seeds in [(b"", []), (whole[:-1], [0, 1, 2]), (whole[:-20], [0, 1]),
                           (whole[:9], []), (b"[1]\n{}\n\0\xff\n" + whole, [0, 1, 2])]:
        path.write_bytes(damaged)
        assert [found["seed"] for found in runs.read_runs(path).values()] == seeds
        runs.append_run(path, line(seed=7))
        assert [found["seed"] for found in runs.read_runs(path).values()] == [*seeds, 7]


def test_two_programs_may_append_at_once(tmp_path):
    path = tmp_path / "runs.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: runs.append_run(path, line(seed=seed, rows=["x" * 100_000])),
                      range(100)))
    assert [found["rows"] for found in runs.read_runs(path).values()] == [["x" * 100_000]] * 100


def test_a_run_is_found_by_what_it_depends_on():
    different = [Run("mol"), Run("replay"), Run("mol", {"ratio": 0.5}),
                 Run("mol", {}, texts.from_source, {"source": "open"}),
                 Run("mol", {}, texts.from_source, {"source": "answered"})]
    here = [runs.identity_of(run, runs.DEFAULTS, seed) for run in different for seed in (0, 1)]
    assert len(set(here)) == 10
    there = replace(runs.DEFAULTS, out="x", seeds=(5,), methods=("ce",), device="cuda")
    assert here == [runs.identity_of(run, there, seed) for run in different for seed in (0, 1)]
    assert here[0] == runs.identity_of(Run("mol", {"ratio": 1.0}), runs.DEFAULTS, 0)  # the default
    assert runs.identity_of(Run("mol"), replace(runs.DEFAULTS, lr=1.0), 0) not in here


# --- making what is missing ----------------------------------------------------------------------

@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """(settings) -> the finished program of an experiment of two tiny runs in tmp_path."""
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))

    def run(*more, made=RUNS, draw=lambda results, picture, note: None):
        arguments = ["--out", str(tmp_path), "--seed", "0", *TINY, *map(str, more)]
        return program(runs.main, "tiny", made, draw, "A test.", arguments=arguments)
    return run


def refused(ended):
    """The one message of a program that has ended with code 2."""
    code, _, errors = ended
    *usage, message = errors.splitlines()
    assert code == 2 and "error: " in message and (not usage or usage[0].startswith("usage: "))
    return message


def test_only_missing_runs_are_made(experiment, tmp_path):
    path, drawn = tmp_path / "runs.jsonl", []
    code, output, _ = experiment("--seed", 0, 1, draw=lambda results, picture, note: drawn.extend(
        results(run) for run in RUNS.values()))
    assert code == 0 and "4 runs, 4 to make" in output and "| replay, wrong |" in output
    made = {(line["method"], line["seed"]): line["rows"] for line in runs.read_runs(path).values()}
    assert drawn == [[made[run.method, seed] for seed in (0, 1)] for run in RUNS.values()]
    assert [row["step"] for row in made["mol", 1]] == [0, 4] and made["mol", 0] != made["mol", 1]

    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # the last run was cut short
    for more, missing in [(["--seed", 0, 1], "4 runs, 1"), (["--kl", "forward"], "2 runs, 2"),
                          (["--kl", "forward"], "2 runs, 0"), ([], "2 runs, 0")]:
        assert f"{missing} to make" in experiment(*more)[1]
    assert path.read_bytes().startswith(whole[:-20])  # nothing is written again


def test_runs_from_another_base_are_refused(experiment, tmp_path):
    experiment(made={"mol": Run("mol")})
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace('"base": "', '"base": "of another machine '))
    before = path.read_bytes()
    assert "another base" in refused(experiment()) and path.read_bytes() == before
    assert experiment("--seed", 1)[0] == 0  # another seed has a base of its own


@pytest.mark.parametrize("arguments", [["--steps", "6"], ["--steps", "6", "--out", "plots"],
                                       ["--seed", "0"]])
def test_other_settings_need_a_folder_of_your_own(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "--out" in refused(program(runs.main, "ratio", RUNS, lambda *_: pytest.fail("it draws"),
                                      "A test.", make=pytest.fail, arguments=arguments))


@pytest.mark.parametrize("arguments, told", [
    (["--methods", "mol"], "--methods"), (["--general", "README.md"], "--general"),
    (["--general-errors", "0.3"], "--general-errors"),  # the experiment varies it
    (["--steps", "1", "--lr", "1e30"], "at step 1")])  # its loss is NaN
def test_an_experiment_that_fails_keeps_nothing(arguments, told, experiment, tmp_path):
    assert told in refused(experiment(*arguments)) and not list(tmp_path.rglob("*.*"))


def test_the_help_of_an_experiment_may_have_percent_signs():
    code, output, _ = program(runs.main, "tiny", RUNS, None, "A test of 100%.",
                              defaults=replace(runs.DEFAULTS, out="100%/x"), arguments=["--help"])
    assert code == 0 and "100%/x" in output and "of 100%." in output
    assert "--steps" in output and "--general-errors" not in output  # RUNS vary it


# The bases lie in a folder of the test. The processes run this script too.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import train
train.BASES = train.Path(sys.argv[2])
from plots import headline, runs
if __name__ == "__main__":
    runs.main("headline", headline.RUNS, headline.draw, "", arguments=sys.argv[3:])
"""


def is_running(pid):
    state = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def test_kill_loses_no_finished_run_and_leaves_no_process(tmp_path):
    script, path = tmp_path / "experiment.py", tmp_path / "runs.jsonl"
    script.write_text(SCRIPT)
    command = [sys.executable, script, ROOT, tmp_path / "bases", "--out", tmp_path, "--seed", "0",
               *TINY]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists() or not path.read_bytes():
        assert killed.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["ps", "--ppid", str(killed.pid), "-o", "pid="], text=True,
                              capture_output=True).stdout.split()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = runs.read_runs(path)
    assert children and 0 < len(finished) < 7 and not (tmp_path / "headline.png").exists()
    deadline = time.monotonic() + 10
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "the processes of a killed experiment go on"
        time.sleep(0.05)

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"7 runs, {7 - len(finished)} to make" in again.stdout
    lines = runs.read_runs(path)
    assert len(lines) == 7 and all(lines[key] == line for key, line in finished.items())
    assert (tmp_path / "headline.png").exists()


# --- figures and tables --------------------------------------------------------------------------

def metrics(toy=True):
    """Rows of metrics: ce forgets all, mol a tenth. The bases of the seeds differ in their loss."""
    rows = []
    for seed in (0, 1):
        for method, share, loss in [("base", 1.0, 0), ("ce", 0.0, 2.01), ("mol", 0.9, 0.11)]:
            for t in (0,) if method == "base" else (0, 0.5, 1):
                kept = dict.fromkeys(("no_think", "think", "facts"), 1 + t * (share - 1))
                skills = {**kept, "domain": t} if toy else {}
                rows.append({"method": method, "seed": seed, "step": 20 * t, "kl_to_base": t,
                             "general_loss": 1 + seed + t * loss, "domain_loss": 5 - 4 * t,
                             **({"ce": 5 - t, "kl": 0.1 * (method == "mol")} if t else {}),
                             "accuracy": skills, "probability": skills})
    return rows


@pytest.mark.parametrize("toy, kind, start, title", [
    (True, "pdf", b"%PDF", "General skills (base 100%): ce 0%, mol 90%"),
    (True, "svg", b"<?xml", "General skills (base 100%): ce 0%, mol 90%"),
    (False, "png", b"\x89PNG", "General loss, compared with the base: ce +2.01, mol +0.11")],
    ids=["pdf", "svg", "own text"])
def test_the_figure_of_a_run(toy, kind, start, title, tmp_path, monkeypatch):
    """Its title, and its format, which the name decides."""
    figures = record_figures(monkeypatch)
    picture = tmp_path / f"new.{kind}"
    forgetting.draw(metrics(toy), picture)
    assert picture.read_bytes().startswith(start) and picture.stat().st_size > 10_000
    assert figures[0].get_suptitle() == title and figures[0].get_size_inches()[0] <= 10


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            forgetting.draw(metrics(), tmp_path / "new.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not os.listdir(tmp_path)


def test_a_curve_shows_the_mean_and_the_range_over_seeds():
    _, ((axes,),) = style.panels(1, 1, 3, 3)
    assert style.curve(axes, {0: [1, 1, 1], 10: [2, 3, 7]}, "black") == 4
    assert axes.lines[0].get_xydata().tolist() == [[0, 1], [10, 4]]
    band = axes.collections[0].get_paths()[0].vertices
    assert sorted({tuple(corner) for corner in band.tolist()}) == [(0, 1), (10, 2), (10, 7)]


@pytest.mark.parametrize("scale, low, high, ends, highest_first", [
    ("linear", 0, 1, {"a": 0.5, "b": 0.51, "c": 0.1}, "bac"),
    ("linear", 1, 0, {"a": 0.5, "b": 0.51, "c": 0.9}, "abc"),  # upside down
    ("log", 1e-4, 1, {"a": 0.01, "b": 0.011, "c": 10 ** -3.6}, "bac"),
    ("linear", 0, 1, {"a": 1.0, "b": 1.0, "c": 0.1}, "abc")])
def test_labels_are_beside_their_curves_and_do_not_touch(scale, low, high, ends, highest_first):
    _, ((axes,),) = style.panels(1, 1, 3, 3)
    axes.set(yscale=scale, ylim=(low, high))
    style.label_ends(axes, {name: ("black", y) for name, y in ends.items()}, apart=0.15)
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert "".join(sorted(height, key=height.get, reverse=True)) == highest_first
    first, second, third = (height[name] for name in highest_first)
    assert third == pytest.approx(0.1) and first - second == pytest.approx(0.15)
    assert first == pytest.approx(1.0 if ends["a"] == 1.0 else 0.5, abs=0.02)


def test_a_table_has_the_mean_and_the_range_of_the_last_rows():
    rows = metrics()
    rows[-1]["kl_to_base"] = -1e-9  # a KL that is 0 except for rounding
    row, = rows_of_tables(metrics_table(rows[-3:]))
    assert list(row.items()) == [
        ("method", "mol"), ("general loss", "2.110"), ("domain loss", "1.000"),
        ("KL to base", "0.000"), ("no-think sums", "0.90"), ("think sums", "0.90"),
        ("facts", "0.90"), ("domain", "1.00"), ("p(right)", "0.90")]
    assert rows_of_tables(metrics_table(rows))[2]["general loss"] == "1.610 (1.110-2.110)"
    assert "p(right)" not in metrics_table(metrics(toy=False))


def test_what_the_modules_import():
    """data, model and losses none of the others, so each can be copied. eval draws nothing."""
    code = ("import sys\n"
            "for name in ('data', 'model', 'losses'):\n"
            "    __import__(name)\n"
            "    ours = {'data', 'model', 'losses', 'eval', 'train', 'plots'} & set(sys.modules)\n"
            "    assert ours == {name}, ours\n"
            "    del sys.modules[name]\n"
            "import eval\n"
            "assert 'matplotlib' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what single experiments measure -------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    """Tiny settings, their world, and a frozen model that has read nothing."""
    settings = train.parse([*TINY, "--general-documents", "300"])
    world = data.make_world(settings, 0)
    return settings, world, untrained(settings, world).requires_grad_(False)


def untrained(s, world, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd))


def test_a_budget_of_the_same_text_in_all():
    for share in ratio.RATIOS.values():
        settings = ratio.same_total(share)
        assert settings["batch_size"] * (1 + settings["ratio"]) == ratio.TOTAL
        assert settings["ratio"] == pytest.approx(share, rel=0.25)


class Expects(torch.nn.Module):
    """A base that expects each next token, but nothing where it is one of a list: 6 nats."""

    def __init__(self, world, *surprises):
        super().__init__()
        self.V = world.tokenizer.n_vocab
        self.surprises = [world.tokenizer.encode_single_token(token) for token in surprises]

    def forward(self, tokens):
        following = tokens.roll(-1, 1)  # (B, T), the last is the first, a line break as well
        logits = torch.zeros(*tokens.shape, self.V).scatter(2, following[..., None], 30.0)
        return logits.index_fill(2, torch.tensor(self.surprises, dtype=torch.int64), 0.0)


def text_of(source, world, seed=0, base=None, **how):
    settings, toy, blank = world
    tokens = texts.SOURCES[source](settings, seed, toy, base or blank, **how)
    return toy.tokenizer.decode(tokens.tolist())


def test_documents_are_found_again_in_their_text(world):
    kinds = texts.kinds_of(0)
    found = list(texts.documents_of(text_of("open", world), kinds))
    assert len(found) == 300 and any(not prompt for prompt, _ in found)
    assert all(prompt + answer in {a + b for kind in kinds.values() for a, b in kind.train}
               or answer in (kind.mistakes.get(prompt) for kind in kinds.values())
               for prompt, answer in found)


def test_own_samples_are_rows_of_the_base_that_start_on_a_new_line(world):
    settings, world, base = world
    samples, again, other = (texts.own_samples(settings, seed, world, base) for seed in (0, 0, 1))
    assert len(samples) == len(world.general)
    line_break = world.tokenizer.encode_single_token("\n")
    assert (samples[::settings.block_size] == line_break).all()
    assert torch.equal(samples, again) and not torch.equal(samples, other)


def test_answers_of_a_batch_are_those_of_single_prompts(world):
    _, world, base = world
    prompts = [prompt for probes in world.probes.values() for prompt, _ in probes[:3]]
    end = world.tokenizer.encode_single_token("\n")
    for prompt, given in texts.answers_of(base, world, prompts).items():
        tokens = data.encode(world.tokenizer, "\n" + prompt)[None]
        single = base.generate(tokens, 32, temperature=0, stop=end)[0, tokens.shape[1]:].tolist()
        assert given == world.tokenizer.decode(single).partition("\n")[0] + "\n"


def test_the_base_answers_the_prompts_and_stories_stay(world, monkeypatch):
    monkeypatch.setattr(texts, "answers_of", lambda base, world, prompts: {
        prompt: f" answer {len(prompt)}\n" for prompt in prompts})
    kinds = texts.kinds_of(0)
    before, after = (list(texts.documents_of(text_of(name, world), kinds))
                     for name in ("open", "answered"))
    assert [prompt for prompt, _ in before] == [prompt for prompt, _ in after]
    for (prompt, old), (_, new) in zip(before, after):
        assert new == (f" answer {len(prompt)}\n" if prompt else old)


def test_the_other_format_is_right_and_only_for_think_sums(world):
    assert texts.by_tens("37+45 think:") == " 30+40=70, 7+5=12, 82\n"
    assert texts.by_tens("10+12 think:") == " 10+10=20, 0+2=02, 22\n"
    kinds = texts.kinds_of(0)
    right = {a + b for kind in kinds.values() for a, b in kind.train}
    for own in (0.0, 0.5, 1.0):
        found = list(texts.documents_of(text_of("other format", world, own=own), kinds))
        think = [document for document in found if "think" in document[0]]
        assert all(a + b in right for a, b in found if "think" not in a)
        assert all(answer == texts.by_tens(prompt) or prompt + answer in right
                   for prompt, answer in think)
        share = sum(prompt + answer in right for prompt, answer in think) / len(think)
        assert share == pytest.approx(own, abs=0.15) and len(think) > 40


def test_a_text_with_some_of_the_items(world):
    kinds = texts.kinds_of(0)
    named, others = texts.countries(0, 0.5).values()
    assert texts.countries(0, 1.0).keys() == {"named"}
    assert len(named) == len(others) == 15 and {*named, *others} == {*kinds["facts"].probes}
    text = text_of("some items", world, share=0.5)
    assert all(prompt.split()[3].rstrip("?") not in text for prompt, _ in others)
    assert any(prompt in text for prompt, _ in named)
    assert "Q:" not in text_of("some items", world, share=0.5, question=False)
    few = [prompt for prompt, _ in texts.documents_of(text_of("some items", world, share=0.02),
                                                      kinds)]
    pairs = [{prompt.removesuffix(end) for prompt in few if prompt.endswith(end)}
             for end in ("=", " think:")]
    assert all(pairs) and len(pairs[0] | pairs[1]) <= 0.02 * len(kinds["no_think"].train) + 1


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_overlap_with_the_domain(share, world):
    manual = data.alarms(random.Random("domain 0"))
    domain = {a + b for a, b in manual.train}
    lines = text_of("overlap", world, share=share).splitlines(keepends=True)
    assert len(lines) == 300 and sum(line in domain for line in lines) == 300 * share
    base = Expects(world[1], "4")
    filtered = text_of("overlap", world, share=share, base=base, limit=5.0)
    assert filtered == "".join(line for line in lines if "4" not in line) != ""


def test_how_much_of_a_text_is_on_the_path_of_the_base(world):
    """After the token that surprises the base nothing of the document counts."""
    _, world, _ = world
    lines = "12+13=25\n21+43=64\n"
    world = replace(world, general=data.encode(world.tokenizer, lines))
    nats = texts.surprise(Expects(world, "4"), world, lines.splitlines(keepends=True))
    assert [[i for i, loss in enumerate(line) if loss > 5] for line in nats] == [[], [3, 7]]
    length = [len(data.encode(world.tokenizer, line)) for line in lines.splitlines(keepends=True)]
    assert [len(line) for line in nats] == length
    assert texts.on_path(Expects(world), world) == 1
    assert texts.on_path(Expects(world, "4"), world) == (length[0] + 4) / sum(length)


def test_think_sums_by_format(world, monkeypatch):
    settings, world, base = world
    found = texts.think_sums(base, base, world)
    assert set(found["kl_own"] + found["kl_other"]) == {0.0} and found["final"] < 0.1
    assert len(found["kl_own"]) == len(data.encode(world.tokenizer, world.probes["think"][0][1]))
    other = texts.think_sums(untrained(settings, world, seed=1), base, world)
    assert min(other["kl_own"]) > 0
    monkeypatch.setattr(texts, "answers_of", lambda model, world, prompts: {
        prompt: texts.by_tens(prompt) for prompt in prompts})
    assert texts.think_sums(base, base, world)["final"] == 1


def test_a_run_on_another_text_reads_it_and_is_tested_on_it(world, monkeypatch):
    settings, world, base = world
    read = []
    monkeypatch.setattr(texts, "train", lambda method, settings, seed, world, base, test: (
        read.append(world.general), (base, [{}, test(base)]))[1])
    *_, row = texts.from_source("mol", settings, 0, world, base, "some items", share=0.5)
    assert {"named", "not named", "facts"} <= row["accuracy"].keys() and row["on_path"] < 1
    assert torch.equal(read[0], texts.some_items(settings, 0, world, base, 0.5))
    *_, row = texts.from_source("mol", settings, 0, world, base, "other format")
    assert "other format" in row["accuracy"] and row["kl_to_base"] == 0
    with pytest.raises(data.BadInput, match="too few"):
        texts.from_source("mol", replace(settings, general_documents=1), 0, world, base,
                          "other format")


def test_the_imitator_by_hand():
    kinds = {skill: data.Kind([], [], []) for skill in ("no_think", "think")}
    kinds["facts"] = data.Kind([("a:", "1\n"), ("b:", "2\n"), ("c:", "3\n"), ("d:", "4\n")], [],
                               [])
    text = "a:1\na:1\na:9\nb:9\nc:3\nc:8\na story\n"
    assert quality.imitator(text, kinds)["facts"] == {
        "a:": (pytest.approx(2 / 3), 1.0), "b:": (0.0, 0.0), "c:": (0.5, 0.5)}


def test_seen_and_unseen_text(world):
    settings, world, base = world
    found = amount.test_on_text("seen", base, base, world.general, settings.block_size)
    assert found == {"seen_loss": pytest.approx(math.log(512), abs=0.3), "seen_kl": 0}
    other = untrained(settings, world, seed=1)
    assert amount.test_on_text("a", other, base, world.general, settings.block_size)["a_kl"] > 1e-3


def test_the_questions_of_a_text_by_hand():
    """[share right in the text, most frequent right, exact, p(right)] of two questions."""
    row = {"questions": {"no_think": [[0.5, 1, 1, 0.8], [0.1, 0, 0, 0.4]],
                         "think": [[0.3, 0, 1, 0.2], [0.3, 0.5, 1, 0.2]],
                         "facts": [[0.0, 0, 0, 0.3], [0.6, 1, 0, 0.9]]}}
    assert [quality.IN_TEXT(row), quality.MOST_FREQUENT(row), quality.EXACT(row),
            quality.P_RIGHT(row)] == pytest.approx([30, 125 / 3, 50, 140 / 3])
    assert quality.exact_where(1)(row) == 50
    assert quality.exact_where(0)(row) == pytest.approx(100 / 3)


def test_a_paired_difference_by_hand():
    """1, 2 and 3: mean 2, deviation 1, t 4.30, so 2 -+ 4.30 / sqrt(3)."""
    assert difference([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2 - 2.4826, 2 + 2.4826), abs=1e-3)
    assert difference([1], [0]) == (1, -math.inf, math.inf)
    assert difference([1, 1], [1, 1]) == (0, 0, 0)


def test_differences_that_may_be_zero_are_in_brackets():
    def row(share, kl):
        return [{"accuracy": dict.fromkeys(("no_think", "think", "facts", "domain"), share),
                 "probability": dict.fromkeys(("no_think", "think", "facts"), share),
                 "domain_loss": 1.0, "kl_to_base": kl}]

    found = {"a": [row(0.1, 1.0), row(0.2, 3.0)], "b": [row(0.5, 2.0), row(0.6, 2.0)]}
    line, = rows_of_tables(differences_table(lambda run: found[run], {"a": "a", "b": "b"}, "a"))
    assert line["minus a"] == "b" and line["kept, %"] == "+40.0 (+40.0 to +40.0)"
    assert line["KL to base"] == "[+0.000 (-12.710 to +12.710)]"


# --- the other methods ---------------------------------------------------------------------------

def test_weight_distance_by_hand():
    """Half of 2 * 1^2 + 1 * 3^2 is 5.5. Its gradient is the importance times the change of w."""
    w, w0 = (torch.tensor(values, requires_grad=True) for values in ([1.0, 5.0], [0.0, 2.0]))
    assert rivals.weight_distance([w], [w0]).item() == 5.0
    distance = rivals.weight_distance([w], [w0], [torch.tensor([2.0, 1.0])])
    distance.backward()
    assert distance.item() == 5.5 and w.grad.tolist() == [2.0, 3.0] and w0.grad is None
    with pytest.raises(ValueError):
        rivals.weight_distance([w], [])


class Bias(torch.nn.Module):
    """The simplest language model: the same logits after every token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)  # (B, T, V)


def test_the_fisher_by_hand():
    """The gradient of log p(y) by the logits is onehot(y) - p: 1/4 squared at p = (1/2, 1/2)."""
    model = Bias([0.0, 0.0]).requires_grad_(False)
    fisher, = rivals.diagonal_fisher(model, torch.zeros(10, 1, dtype=torch.int64))
    assert fisher.tolist() == pytest.approx([0.25, 0.25], rel=1e-6)
    assert not model.logits.requires_grad and model.logits.grad is None


def test_the_fisher_is_the_curvature_of_the_kl():
    """It is p (1 - p) per token for any length. Half of it times a small step squared is the KL."""
    model = Bias([1.0, 0.0, -1.0])
    p = model.logits.softmax(dim=0)
    for T in (1, 4):
        tokens = torch.zeros(4000, T, dtype=torch.int64)
        fisher, = rivals.diagonal_fisher(model, tokens, torch.Generator().manual_seed(0))
        assert torch.allclose(fisher, p * (1 - p), atol=0.01)
    stepped = model.logits.detach() + torch.tensor([1e-2, 0.0, 0.0])
    kl = losses.kl_divergence(stepped[None, None], model.logits[None, None], "forward").item()
    distance = rivals.weight_distance([stepped], [model.logits], [p * (1 - p)])
    assert distance.item() == pytest.approx(kl, rel=0.02)


def test_domain_kl_distils_by_forward_kl():
    """One token, p = (1/2, 1/2), the base has q = (1/4, 3/4): log 2 + KL[q || p], for any --kl."""
    def says(*p):
        return lambda tokens: torch.tensor([[p]]).log()  # (1, 1, 2)

    token = torch.zeros(1, 1, dtype=torch.int64)
    batch = data.Batch(token, token, torch.tensor([True]), torch.zeros(0, dtype=torch.int64))
    loss, ce, kl = teacher.domain_kl(says(0.5, 0.5), says(0.25, 0.75), batch,
                                    train.Settings(strength=2.0))
    assert ce.item() == pytest.approx(math.log(2))
    assert kl.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert loss.item() == pytest.approx((ce + 2 * kl).item())


def rows_of(model, base, world, settings, name, targets):
    """The loss of a method on one domain row and one general row, by hand from these targets."""
    batch = next(data.batches(world.domain, world.general, 1, 1, settings.block_size, 0))
    method = train.METHODS[name]
    prepared = [method.prepare(base, world, settings, 0)] if method.prepare else []
    loss, ce, kl = method.loss(model, base, batch, settings, *prepared)
    expected = losses.mean_cross_entropy(model(batch.tokens), torch.stack(
        [batch.targets[0], targets(base(batch.tokens[1:])[0], batch.targets[1])]))
    assert kl.item() == 0 and loss.item() == ce.item()
    return loss.item(), expected.item()


def test_replay_with_targets_from_the_base(world):
    settings, world, base = world
    model, settings = untrained(settings, world, seed=1), replace(settings, strength=6.0)
    loss, expected = rows_of(model, base, world, settings, "argmax",
                             lambda logits, targets: logits.argmax(dim=-1))
    assert loss == pytest.approx(expected)
    generator = torch.Generator().manual_seed(0)
    loss, expected = rows_of(model, base, world, settings, "sampled", lambda logits, targets:
                             torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
    assert loss == pytest.approx(expected)
    dropped = []

    def likely(logits, targets):
        nats = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        dropped.append((nats > 6.0).sum().item())
        return targets.where(nats <= 6.0, losses.PADDING)

    loss, expected = rows_of(model, base, world, settings, "likely_tokens", likely)
    assert loss == pytest.approx(expected) and 0 < dropped[0] < settings.block_size


def test_sampled_targets_follow_the_base():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(10, 1000, 3)
    targets = torch.zeros(10, 1000, dtype=torch.int64)
    drawn = teacher.sampled(logits, targets, None, torch.Generator().manual_seed(0))
    assert drawn.shape == targets.shape
    assert drawn.flatten().bincount() / 10_000 == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


def test_replay_and_mol_is_the_mean_of_both(world):
    settings, world, base = world
    model = untrained(settings, world, seed=1)
    batch = next(data.batches(world.domain, world.general, 2, 2, settings.block_size, 0))
    both, mol, replay = (train.METHODS[name].loss(model, base, batch, settings)
                         for name in ("ce_and_kl", "mol", "replay"))
    for value, a, b in zip(both, mol, replay):
        assert value.item() == pytest.approx((a + b).item() / 2)


def test_the_masked_kl_by_hand():
    """The target is word 1. Of words 0 and 2 the model has (1/2, 1/2), the base (1/4, 3/4)."""
    def says(*p):
        return lambda tokens: torch.tensor([[p]]).log()  # (1, 1, 3)

    token = torch.ones(1, 1, dtype=torch.int64)
    batch = data.Batch(token, token, torch.tensor([True]), torch.zeros(0, dtype=torch.int64))
    loss, ce, kl = teacher.domain_kl(says(0.2, 0.6, 0.2), says(0.2, 0.2, 0.6), batch,
                                     train.Settings(strength=2.0), masked=True)
    assert ce.item() == pytest.approx(-math.log(0.6))
    assert kl.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert loss.item() == pytest.approx((ce + 2 * kl).item())


def test_only_a_part_of_the_model_is_trained(world):
    settings, world, _ = world
    base = untrained(replace(settings, n_layer=2), world).requires_grad_(False)
    for part, name in rivals.PARTS.items():
        model, _ = train.train(f"ce, {part}", settings, 0, world, base, lambda model: {})
        for (weight_name, new), old in zip(model.named_parameters(), base.parameters()):
            assert torch.equal(new, old) != (name in weight_name), (part, weight_name)


def test_interpolation_between_the_base_and_the_trained_model(world):
    settings, world, base = world
    model, _ = train.train("ce", settings, 0, world, base, lambda model: {})
    trained = copy.deepcopy(model.state_dict())
    for a in (0.0, 0.25, 1.0):
        model.load_state_dict({name: weight + a * (trained[name] - weight)
                               for name, weight in base.state_dict().items()})
        found = rivals.interpolated("ce", settings, 0, world, base, a)[-1]
        for loss in ("domain_loss", "kl_to_base"):
            assert found[loss] == pytest.approx(train.evaluate(model, base, world)[loss], abs=1e-6)


@pytest.mark.parametrize("name", ["mol", "domain_kl", "masked_kl", "l2sp", "ewc"])
def test_strength_weighs_what_protects_the_base(name, world):
    """The rest is cross-entropy. Nothing is added for the base itself."""
    settings, world, base = world
    model, method = untrained(settings, world, seed=1), train.METHODS[name]
    batch = next(data.batches(world.domain, world.general, 2, 2 * method.reads_general,
                              settings.block_size, 0))
    prepared = [method.prepare(base, world, settings, 0)] if method.prepare else []

    def loss(model, strength):
        of_strength = replace(settings, strength=strength)
        return [x.item() for x in method.loss(model, base, batch, of_strength, *prepared)]

    without, ce, kl = loss(model, 0.0)
    domain = losses.per_sequence(losses.cross_entropy(model(batch.tokens), batch.targets),
                                 batch.targets)[:2].sum().item()
    assert without == ce == pytest.approx(domain / len(batch.tokens), rel=1e-5)
    added = loss(model, 1.0)[0] - ce
    assert added > 1e-4 and loss(model, 30.0)[0] - ce == pytest.approx(30 * added, rel=1e-2)
    assert kl == (pytest.approx(added, rel=1e-2) if name.endswith(("mol", "kl")) else 0)
    assert loss(base, 30.0)[0] == pytest.approx(loss(base, 0.0)[0], abs=1e-5)


@pytest.mark.parametrize("name", ["domain_kl", "masked_kl", "l2sp", "ewc"])
def test_the_other_methods_read_domain_text_and_decay_only_without_an_anchor(name, world,
                                                                           monkeypatch):
    settings, world, base = world

    def flat(model, base, batch, settings, *prepared):
        assert batch.is_domain.all() and len(batch.tokens) == 2
        loss = 0 * model(batch.tokens).sum()
        return loss, loss, loss

    monkeypatch.setitem(train.METHODS, name, train.METHODS[name]._replace(loss=flat))
    settings = replace(settings, steps=1)
    model, _ = train.train(name, settings, 0, world, base, lambda model: {})
    left = 1 - 0.1 * settings.lr if name.endswith("kl") else 1.0
    assert torch.allclose(model.head.weight, left * base.head.weight, rtol=1e-6, atol=0)


def test_the_best_value_has_the_highest_mean_of_domain_and_general_skills():
    """One value is best in general skills, one in the domain, one in their mean: that one."""
    shares = [(1.0, 0.2), (0.7, 0.8), (0.1, 1.0), (0.5, 0.5)]  # (general, domain)
    of_run = {repr(run._replace(seeds=3)): share for values in rivals.SEARCHES.values()
              if len(values) > 1 for run, share in zip(values.values(), shares)}

    def results(run):
        general, domain = of_run.get(repr(run), shares[0])
        return [[{"accuracy": {"no_think": general, "think": general, "facts": general,
                               "domain": domain}}]]

    assert rivals.best_values(results) == {
        name: list(values)[min(1, len(values) - 1)] for name, values in rivals.SEARCHES.items()}


def test_the_settings_of_rivals_are_the_best_of_the_search():
    assert rivals.BEST == rivals.best_values(lambda run: [
        LINES[runs.identity_of(run, runs.DEFAULTS, seed)]["rows"] for seed in range(3)])
