import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import train
from plots import (amount, budget, direction, domains, headline, modes, quality, ratio, real,
                   rivals, runs, scale, source, style, sweep)
from plots.runs import Run

ROOT = Path(__file__).parent.parent
QUESTIONS = {"amount": amount, "budget": budget, "direction": direction, "domains": domains,
             "headline": headline, "modes": modes, "quality": quality, "ratio": ratio,
             "rivals": rivals, "scale": scale, "source": source}
REMADE = ["headline", "budget", "quality", "ratio", "direction", "source", "modes",  # committed
          "amount", "domains", "rivals", "scale"]
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3",
        "--base-batch-size", "4", "--steps", "4", "--batch-size", "2", "--device", "cpu"]
RUNS = {"replay, wrong": Run("replay", {"general_errors": 1.0}), "mol": Run("mol")}


@pytest.fixture(autouse=True, scope="module")
def bases(tmp_path_factory):
    """The tiny bases of all these tests lie in one folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "BASES", tmp_path_factory.mktemp("bases"))
        yield sweep.BASES


def ask(out, *more, asked=RUNS, draw=lambda found, picture: None, tell=None):
    arguments = ["--out", str(out), "--seed", "0", *TINY, *map(str, more)]
    return runs.main("asked", asked, draw, "A question.", tell, arguments)


def test_a_sweep_is_made_once_and_goes_on_where_it_stopped(tmp_path, capsys):
    path, seen = tmp_path / "runs.jsonl", []

    def draw(found, picture):
        seen.append({label: found(run) for label, run in RUNS.items()})

    assert ask(tmp_path, "--seed", 1, draw=draw) == 0
    made = runs.read(path)
    assert "4 runs, 0 made before, 4 to make" in capsys.readouterr().out
    assert sorted((line["method"], line["seed"]) for line in made) == [
        ("mol", 0), ("mol", 1), ("replay", 0), ("replay", 1)]
    for line in made:
        assert [row["step"] for row in line["rows"]] == [0, 4] and line["base"]["weights"]
        assert line["settings"]["dtype"] == "float32" and "auto" not in line["key"]
        assert line["base"]["weights"] in line["key"]
    for label, method in (("replay, wrong", "replay"), ("mol", "mol")):
        assert seen[0][label] == [line["rows"] for seed in (0, 1) for line in made
                                  if (line["method"], line["seed"]) == (method, seed)]

    whole = path.read_bytes()
    for damaged, left in [(whole[:-1], 4), (whole[:-20], 3), (b"\0" * 9 + b"\n" + whole, 4),
                          (whole + b'{"key": "half', 4), (whole + b"[1]\n", 4)]:
        path.write_bytes(damaged)
        assert len(runs.read(path)) == left
    path.write_bytes(whole[:-20])  # a power cut in the middle of a line
    assert ask(tmp_path, "--seed", 1) == 0
    assert "1 to make" in capsys.readouterr().out and len(runs.read(path)) == 4
    assert path.read_bytes().startswith(whole[:-20])  # nothing is written again
    assert ask(tmp_path, "--kl", "forward") == 0  # other settings: made, and added
    assert "2 to make" in capsys.readouterr().out and len(runs.read(path)) == 6
    assert ask(tmp_path, "--kl", "forward") == ask(tmp_path) == 0
    assert capsys.readouterr().out.count("0 to make") == 2


def test_a_run_of_a_sweep_is_the_run_of_train(tmp_path):
    """The same function makes both."""
    assert ask(tmp_path / "asked", asked={"mol": Run("mol")}) == 0
    line, = runs.read(tmp_path / "asked" / "runs.jsonl")
    own = ["--out", str(tmp_path / "own"), *TINY, "--methods", "mol", "--eval-every", "50"]
    assert train.main(own) == 0
    rows = style.read(tmp_path / "own" / "metrics.jsonl")
    assert [row for row in rows if row["method"] == "mol"] == line["rows"]


def line_of(run, seed=0, **settings):
    """A line of runs.jsonl as a sweep would add it, with one row."""
    s = replace(train.Settings(dtype="float32", **runs.COMMON), **run.settings, **settings)
    values = sweep.settings_of(s)
    default = sweep.settings_of(train.Settings(dtype="float32"))
    return {"key": "", "method": run.method, "seed": seed, "work": run.work_name, "how": run.how,
            "settings": values, "rows": [{"step": 0}],
            "changed": [name for name in values if values[name] != default[name]],
            "base": {"weights": "w", "precision": "float32", "recipe": "r"}}


def test_a_run_is_found_by_what_it_is():
    lines = [line_of(Run("mol")), line_of(Run("mol", {"ratio": 0.5})), line_of(Run("replay")),
             line_of(Run("mol"), seed=1), line_of(Run("mol", {}, sweep.make_run, {"a": 1}))]

    def found(run, seed=0, common=runs.COMMON):
        line = runs.find(lines, run, seed, common)
        return lines.index(line) if line else None

    assert found(Run("mol")) == found(Run("mol", {"ratio": 1.0})) == 0  # a default may be named
    assert found(Run("mol", {"ratio": 0.5})) == 1 and found(Run("replay")) == 2
    assert found(Run("mol"), seed=1) == 3 and found(Run("mol", {}, sweep.make_run, {"a": 1})) == 4
    assert found(Run("mol", {"ratio": 2.0})) is None and found(Run("ce")) is None
    assert found(Run("mol", {}, sweep.make_run, {"a": 2})) is None
    assert found(Run("mol"), common={}) is None  # eval_every was not asked for


def test_a_setting_added_later_at_its_default_changes_no_run():
    """An old line lacks it and still counts; a default that was changed makes the run anew."""
    line = line_of(Run("mol"))
    s = train.Settings(dtype="float32", **runs.COMMON)
    assert sweep.made_with(line, s)
    del line["settings"]["strength"]
    assert sweep.made_with(line, s) and runs.find([line], Run("mol"), 0, runs.COMMON)
    line["settings"]["lr"] = 1e-3  # the default of another time
    assert not sweep.made_with(line, s)


def test_a_default_that_was_changed_makes_the_run_anew(tmp_path, capsys):
    asked = {"mol": RUNS["mol"]}
    assert ask(tmp_path, asked=asked) == 0
    path = tmp_path / "runs.jsonl"
    line = json.loads(path.read_text())
    line["settings"]["lr"] /= 2  # the default of another time
    path.write_text(json.dumps(line) + "\n")
    seen = []
    assert ask(tmp_path, asked=asked,
               draw=lambda found, picture: seen.extend(found(RUNS["mol"]))) == 0
    assert "1 to make" in capsys.readouterr().out and len(runs.read(path)) == 2
    assert seen == [runs.read(path)[1]["rows"]]  # the newest is drawn


def test_two_programs_may_add_at_once(tmp_path):
    """Each line whole, none lost, also after one that was cut short."""
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "cut sho')
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from plots.runs import add\n"
            "for i in range(100): add(sys.argv[2], {'key': f'{sys.argv[3]} {i}' + 'x' * 20_000,"
            " 'base': {'weights': ''}, 'changed': [], 'rows': [{'step': 0}]})")
    both = [subprocess.Popen([sys.executable, "-c", code, ROOT, path, name]) for name in "ab"]
    assert [program.wait() for program in both] == [0, 0]
    keys = {line["key"].rstrip("x") for line in runs.read(path)}
    assert keys == {f"{name} {i}" for name in "ab" for i in range(100)}


def test_runs_from_another_base_are_not_mixed(tmp_path, capsys):
    assert ask(tmp_path, asked={"mol": RUNS["mol"]}) == 0
    path = tmp_path / "runs.jsonl"
    line = json.loads(path.read_text())
    line["base"]["weights"] = "of another machine"
    path.write_text(json.dumps(line) + "\n")
    assert ask(tmp_path) == 2
    error = capsys.readouterr().err
    assert "started from another base" in error and error.count("\n") == 1
    assert len(runs.read(path)) == 1


def processes():
    """{pid: (parent, state)} of all that run."""
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True)
    lines = map(str.split, told.stdout.splitlines())
    return {int(pid): (int(parent), state) for pid, parent, state in lines}


def test_a_sweep_that_is_killed_goes_on(tmp_path):
    """kill -9 after the first run: it is there, no process stays, asking again ends the sweep."""
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\nfrom plots import modes, runs, sweep\n"
            "if __name__ == '__main__':\n"
            "    sweep.BASES = Path(sys.argv[2])\n"
            "    runs.ask('modes', modes.RUNS, modes.draw, '', None, sys.argv[3:])")
    script = tmp_path / "ask.py"
    script.write_text(code)
    command = [sys.executable, script, ROOT, tmp_path / "bases", "--out", tmp_path, "--seed", "0",
               *TINY]
    path = tmp_path / "runs.jsonl"
    asked = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists():
        assert asked.poll() is None
        time.sleep(0.02)
    workers = [pid for pid, (parent, _) in processes().items() if parent == asked.pid]
    os.kill(asked.pid, signal.SIGKILL)
    asked.wait()
    made = len(runs.read(path))
    assert workers and made < 5 and not (tmp_path / "modes.png").exists()
    for _ in range(200):
        left = processes()
        if not any("Z" not in left[pid][1] for pid in workers if pid in left):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the processes of a killed sweep go on")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"5 runs, {made} made before" in again.stdout
    assert len(runs.read(path)) == 5
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, told", [
    (["--strength", "-1"], "--strength -1"), (["--steps", "0"], "--steps 0"),
    (["--methods", "mol"], "--methods"), (["--general", "README.md"], "--general"),
    (["--fresh"], "--fresh"), (["--base", "nowhere"], "--base"),
    (["--general-errors", "0.3"], "--general-errors"),  # some of the runs set it
])
def test_a_question_refuses_what_would_not_work(arguments, told, tmp_path, capsys):
    try:
        code = ask(tmp_path, *arguments)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--steps", "6"], ["--steps", "6", "--out", "plots"],
                                       ["--seed", "0"]])
def test_the_committed_figures_are_not_drawn_over(arguments, capsys, monkeypatch):
    """Other settings need a folder of their own."""
    monkeypatch.chdir(ROOT)
    before = (ROOT / "plots" / "ratio.png").stat().st_mtime_ns
    assert runs.main("ratio", ratio.RUNS, ratio.draw, "A question.", None, arguments) == 2
    error = capsys.readouterr().err
    assert "--out" in error and error.count("\n") == 1
    assert (ROOT / "plots" / "ratio.png").stat().st_mtime_ns == before


def fails(method, s, seed, world, base):
    raise train.BadInput(f"{method}: the loss is nan at step 1; a lower learning rate may help")


def test_a_run_that_fails_stops_the_sweep(tmp_path, capsys):
    assert ask(tmp_path, asked={"broken": Run("mol", {}, fails)}) == 2
    assert "the loss is nan" in capsys.readouterr().err


def test_a_ruined_model_is_not_kept(tmp_path, capsys):
    assert ask(tmp_path, "--steps", 1, "--lr", 1e30, asked={"mol": Run("mol")}) == 2
    error = capsys.readouterr().err
    assert "at step 1" in error and error.count("\n") == 1
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_base_is_made_once_for_all_questions(tmp_path, bases):
    def files():
        return {path: path.stat().st_mtime_ns for path in bases.rglob("base.pt")}

    assert ask(tmp_path / "one", "--base-steps", 2) == 0
    before = files()
    assert ask(tmp_path / "two", "--base-steps", 2, "--lr", 1e-3) == 0 and files() == before
    assert ask(tmp_path / "two", "--base-steps", 1) == 0 and len(files()) == len(before) + 1


# --- the questions -------------------------------------------------------------------------------

def made_up(question):
    """found(run), as a sweep of this question has it, on two seeds."""
    sentence = {"tokens": ["a", "\n"], "reverse": [0.1, 0.2], "forward": [0.3, 0.1]}
    mode = {"tokens": ["1", "\n"], "right": [0.9, 1.0], "first_wrong": [0.1, 0.0]}
    more = {"seen_loss": 0.9, "seen_kl": 0.1, "unseen_loss": 1.0, "unseen_kl": 0.2,
            "sentences": [sentence] * 3, "modes": {"no_think": mode, "think": mode}}
    all_runs = [repr(run) for run in question.RUNS.values()]
    count = len(all_runs) + 1
    names = ["no_think", "think", "facts"]
    names += domains.DOMAINS if question is domains else ["domain"]

    def found(run):
        i = all_runs.index(repr(run))
        return [[{"method": run.method, "seed": seed, "step": step, "general_loss": 1.0,
                  "domain_loss": 1.0, "kl_to_base": 0.1, **more,
                  **dict.fromkeys(("accuracy", "probability"),
                                  dict.fromkeys(names, (i + seed) / count))}
                 for step in (range(5) if question is domains else (0, 50, 100))]
                for seed in (0, 1)]
    return found


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_draws_and_tells(name, tmp_path):
    question = QUESTIONS[name]
    for run in question.RUNS.values():
        train.check(replace(train.Settings(), **run.settings, methods=(run.method,)))
    found = made_up(question)
    question.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    if hasattr(question, "tell"):
        assert question.tell(found).startswith("|")
    rows = runs.labelled(found, question.RUNS)
    assert {row["method"] for row in rows} == set(question.RUNS)


@pytest.mark.parametrize("name", REMADE)
def test_the_runs_of_a_question_are_committed(name):
    """Every run on every seed, made with today's defaults, from one base per seed and size."""
    lines = runs.read(ROOT / "plots" / "runs.jsonl")
    seeds = getattr(QUESTIONS[name], "SEEDS", runs.SEEDS)
    wanted = [(run, seed) for run in QUESTIONS[name].RUNS.values() for seed in seeds]
    found = [runs.find(lines, run, seed, runs.COMMON) for run, seed in wanted]
    assert all(found) and (ROOT / "plots" / f"{name}.png").exists()
    defaults = replace(train.Settings(dtype="float32"), **runs.COMMON)
    for line, (run, _) in zip(found, wanted):
        assert sweep.made_with(line, replace(defaults, **run.settings))
    bases = {(line["seed"], line["base"]["recipe"]): line["base"]["weights"] for line in found}
    assert all(line["base"]["weights"] == bases[line["seed"], line["base"]["recipe"]]
               for line in found)


@pytest.mark.parametrize("name", [*REMADE, "real"])
def test_drawing_needs_neither_torch_nor_a_base(name, tmp_path):
    """In a copy of plots/ alone, with a torch that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('drawing has asked for torch')")
    subprocess.run(["cp", "-r", ROOT / "plots", tmp_path], check=True)
    (tmp_path / "plots" / f"{name}.png").unlink()
    done = subprocess.run([sys.executable, tmp_path / "plots" / f"{name}.py"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.startswith("| ")


def test_the_readmes_tables_are_those_of_the_committed_runs():
    """The front door's four rows, and the whole tables of plots/README.md."""
    lines = runs.read(ROOT / "plots" / "runs.jsonl")
    answers = (ROOT / "plots" / "README.md").read_text()

    def found(run, seeds=runs.SEEDS):
        return [runs.find(lines, run, seed, runs.COMMON)["rows"] for seed in seeds]

    def of_five(run):
        return found(run, headline.SEEDS)

    def of_the_model(run):
        return [runs.find(lines, run, seed, {})["rows"] for seed in runs.SEEDS]

    assert headline.tell(of_five) in answers and domains.tell(found) in answers
    assert real.tell(of_the_model) in answers
    _, of_the_best, _ = rivals.tell(found).split("\n\n")
    assert of_the_best.partition("\n")[2] in answers
    assert headline.at_the_door(of_five) in (ROOT / "README.md").read_text()


def test_a_budget_of_the_same_text_in_all():
    for share in ratio.RATIOS.values():
        settings = ratio.same_total(share)
        general = round(settings["batch_size"] * settings["ratio"])
        assert settings["batch_size"] + general == ratio.TOTAL
        assert settings["ratio"] == pytest.approx(share, rel=0.25)


@pytest.fixture(scope="module")
def world():
    s = train.on_this_machine(train.parse([*TINY, "--general-documents", "300"]))
    world = train.make_world(s, 0)
    torch.manual_seed(0)
    return s, world, train.GPT(train.config_of(s, world)).requires_grad_(False)


def test_the_sources_of_general_text(world):
    s, world, base = world
    text = {name: world.tokenizer.decode(make(s, 0, world, base).tolist())
            for name, make in source.SOURCES.items() if make}
    assert "capital of" in text["no think sums"] and "think" not in text["no think sums"]
    assert "think" in text["no facts"]
    assert not re.search("capital|ruled|road to \\w+ ends", text["no facts"])
    assert not re.search(r"[^a-z \n]", text["random letters"])
    samples = source.own_samples(s, 0, world, base)
    assert len(source.pretraining(s, 0, world, base)) == len(samples) == len(world.general)
    assert torch.equal(samples, source.own_samples(s, 0, world, base))


def test_where_an_answer_breaks(world):
    """A model that says every token right except the last but one: all answers break there."""
    s, world, _ = world
    end = world.tokenizer.encode_single_token("\n")

    class Oracle(torch.nn.Module):
        def forward(self, tokens):
            V = world.tokenizer.n_vocab
            logits = torch.nn.functional.one_hot(tokens.roll(-1, 1), V).float()  # (B, T, V)
            logits[:, -2] = 0
            logits[:, -1, end] = 2  # the end of every answer, which it cannot see
            return logits

    for mode, found in modes.by_position(Oracle(), world).items():
        n = len(found["tokens"])
        assert "".join(found["tokens"]) == world.probes[mode][0][1]
        assert found["right"] == [1.0] * (n - 2) + [0.0, 1.0]
        assert found["first_wrong"] == [0.0] * (n - 2) + [1.0, 0.0]


def test_forgetting_and_backward_transfer_by_hand():
    """alarms 1 -> 0.4, drugs 0.8 -> 1 -> 0.9 by the end, ships as they were.

    (0.6 + 0.1 + 0) / 3 is forgotten, (-0.6 + 0.1 + 0) / 3 is transferred.
    """
    shares = {"alarms": [0, 1, 1, 0.5, 0.4], "drugs": [0, 0, 0.8, 1, 0.9],
              "ships": [0, 0, 0, 1, 1], "larger": [0, 0, 0, 0, 1]}
    run = [{"step": stage, "accuracy": {name: column[stage] for name, column in shares.items()}}
           for stage in range(5)]
    assert domains.forgetting(run) == pytest.approx(0.7 / 3)
    assert domains.backward_transfer(run) == pytest.approx(-0.5 / 3)


@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_chain_of_domains(world, monkeypatch, latest, earlier):
    """Every stage starts from the one before, and reads and is held to what was asked."""
    s, world, base = world
    stages, drawn, real = [], [], train.train

    def spy(method, s, seed, read, held, mark, start):
        model, rows = real(method, s, seed, read, held, mark, start)
        stages.append((read, start, held, model))
        drawn.append(seed)
        return model, rows

    monkeypatch.setattr(train, "train", spy)
    found = domains.chain("mol", s, 0, world, base, latest, earlier)
    assert domains.DOMAINS == list(data.DOMAINS)
    assert [row["domain"] for row in found] == ["", *domains.DOMAINS]
    assert set(found[0]["accuracy"]) == {"no_think", "think", "facts", *domains.DOMAINS}
    assert found[0]["kl_to_base"] == 0 < found[1]["kl_to_base"] < found[4]["kl_to_base"]
    assert len(set(drawn)) == len(domains.DOMAINS)  # no stage reads the batches of another
    before, own = base, len(world.general)
    for i, (read, start, held, model) in enumerate(stages):
        assert start is before and held is (start if latest else base)
        added = i * (own // i) if earlier and i else 0
        assert len(read.general) == own + added
        shown = world.tokenizer.decode(read.general.tolist())
        assert not i or earlier == ("alarm" in shown)
        before = model


def test_the_best_setting_is_chosen_on_domain_and_general_together():
    """One value is best on general skills, one on the domain, one on their mean: that is taken."""
    shares = [(1.0, 0.2), (0.7, 0.8), (0.1, 1.0), (0.5, 0.5)]  # (general, domain)
    by_run = {repr(rivals.run(name, value)): share for name, (*_, values) in rivals.KNOBS.items()
              if len(values) > 1 for value, share in zip(values, shares)}

    def found(run):
        general, domain = by_run.get(repr(run), shares[0])
        return [[{"seed": 0, "step": 300, "general_loss": 1.0, "domain_loss": 1.0,
                  "kl_to_base": 0.1, "probability": {"facts": general},
                  "accuracy": {"no_think": general, "think": general, "facts": general,
                               "domain": domain}}]]

    second = {name: values[min(1, len(values) - 1)] for name, (*_, values) in rivals.KNOBS.items()}
    assert rivals.best(found) == second
    # of the others the second value is neither the lowest nor the highest
    told = rivals.tell(found).splitlines()[-1]
    assert told.endswith("beyond: replay, lr 0.006; replay, right answers, lr 0.006; "
                         "mol, strength 0.3")


def test_both_divergences_token_by_token(world):
    """Of the base with itself none, and of another model what the loss would be, by token."""
    _, world, base = world
    same = direction.by_token(base, base, world)
    assert len(same) == 3 and "".join(same[0]["tokens"]) == "".join(world.probes["no_think"][0])
    assert all(math.isclose(nats, 0, abs_tol=1e-5) for found in same for nats in found["reverse"])
    torch.manual_seed(1)
    other = direction.by_token(train.GPT(base.config), base, world)
    assert all(nats > 0 for found in other for nats in found["reverse"] + found["forward"])


def test_seen_and_unseen_text(world):
    """A stream is marked by its own loss."""
    s, world, base = world
    found = amount.on_text("seen", base, base, world.general, s.block_size)
    assert found["seen_loss"] == pytest.approx(math.log(512), abs=0.3) and found["seen_kl"] == 0
