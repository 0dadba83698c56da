import json
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

import train
from plots import amount, direction, domains, modes, quality, ratio, rivals, source, sweep

ROOT = Path(__file__).parent.parent
QUESTIONS = {"amount": amount, "direction": direction, "domains": domains, "modes": modes, "quality": quality, "ratio": ratio,
             "rivals": rivals, "source": source}
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3", "--base-batch-size", "4", "--steps", "4",
        "--batch-size", "2", "--eval-every", "2", "--device", "cpu", "--dtype", "float32"]
RUNS = [sweep.Run("replay, wrong", "replay", {"general_errors": 1.0}), sweep.Run("mol", "mol")]


def ask(out, *more, runs=RUNS, drawn=lambda rows, picture: None):
    arguments = ["--out", str(out), "--base", str(out / "bases"), "--seed", "0", *TINY, *map(str, more)]
    return sweep.main("asked", runs, drawn, "A question.", arguments=arguments)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A run's folder with the tiny bases of seeds 0 and 1."""
    out = tmp_path_factory.mktemp("bases")
    assert train.main(["--out", str(out), "--seed", "0", "1", "--methods", "mol", *TINY]) == 0
    return out


def test_a_sweep_is_made_once_and_goes_on_where_it_stopped(tmp_path, bases, capsys):
    (tmp_path / "bases").symlink_to(bases)
    path, seen = tmp_path / "asked.jsonl", []
    assert ask(tmp_path, "--seed", 0, 1, drawn=lambda rows, picture: seen.append(rows)) == 0
    whole = path.read_text()
    assert [(row["method"], row["seed"], row["step"]) for row in rows(path)] == [
        (label, seed, step) for label in ("replay, wrong", "mol") for seed in (0, 1) for step in (0, 2, 4)]
    assert seen == [rows(path)] and "4 to make" in capsys.readouterr().out
    # the same run as train.py's, but for the threads that computed it
    mine, = (row for row in rows(path) if (row["method"], row["seed"], row["step"]) == ("mol", 1, 4))
    theirs, = (row for row in rows(bases / "metrics.jsonl") if (row["method"], row["seed"], row["step"]) == ("mol", 1, 4))
    assert mine["general_loss"] == pytest.approx(theirs["general_loss"], rel=1e-3)

    lines = whole.splitlines()
    for damaged, left in [("\n".join(lines[:-1]), 3), (whole.replace(lines[-3], "{}"), 3), (whole + '{"run": "half', 4),
                          ("\0" * 9, 0), (whole + '{"run": "of another program"}\n[1]\n', 4), (whole[:-20], 3)]:
        path.write_text(damaged)
        assert len(sweep.kept(path)) == left
    capsys.readouterr()
    assert ask(tmp_path, "--seed", 0, 1) == 0
    assert path.read_text() == whole and "1 to make" in capsys.readouterr().out
    assert ask(tmp_path, "--kl", "forward") == 0  # other settings: made, and what was there is kept behind
    assert set(lines) < set(path.read_text().splitlines())
    assert "2 to make" in capsys.readouterr().out


def test_questions_share_the_runs_they_have_in_common(tmp_path, bases, capsys):
    """Those from the same base, and no others."""
    (tmp_path / "bases").symlink_to(bases)

    def write(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def asked(**options):
        seen = []
        code = ask(tmp_path, drawn=lambda rows, picture: seen.extend(rows), **options)
        return code, seen, capsys.readouterr()

    assert ask(tmp_path) == 0
    made = {label: [row for row in rows(tmp_path / "asked.jsonl") if row["method"] == label] for label in ("replay, wrong", "mol")}
    elsewhere = {label: [{**row, "general_loss": row["general_loss"] + 0.1} for row in runs] for label, runs in made.items()}
    both = [RUNS[1]._replace(label=label) for label in ("one name", "another")]

    (tmp_path / "asked.jsonl").rename(tmp_path / "earlier.jsonl")
    code, seen, told = asked(runs=both)  # two labels of one run, which another question made
    assert code == 0 and "1 runs, 1 made before" in told.out
    assert rows(tmp_path / "asked.jsonl") == [{**row, "method": "one name"} for row in made["mol"]]
    assert seen == [{**row, "method": label} for label in ("one name", "another") for row in made["mol"]]

    write("asked", made["mol"])
    write("earlier", elsewhere["mol"] + elsewhere["replay, wrong"])
    code, seen, told = asked()  # its own run counts, and another's from another base is made anew
    assert code == 0 and "2 runs, 1 made before, 1 to make" in told.out and seen == made["replay, wrong"] + made["mol"]

    write("earlier", made["replay, wrong"])
    for own, drawn in [(elsewhere["mol"], False), (elsewhere["mol"] + made["replay, wrong"], False), (elsewhere["mol"] + elsewhere["replay, wrong"], True)]:
        write("asked", own)
        before = (tmp_path / "asked.jsonl").read_text()
        code, seen, told = asked()
        assert code == (0 if drawn else 2) and bool(seen) == drawn and ("another base" in told.err) != drawn
        assert drawn or (tmp_path / "asked.jsonl").read_text() == before


def test_a_sweep_that_is_killed_goes_on(tmp_path, bases):
    """kill -9 after the first run: whole runs are there and nothing else, no process stays, and asking again ends it."""
    command = [sys.executable, ROOT / "plots" / "quality.py", "--out", tmp_path, "--base", bases, "--seed", "0", *TINY]
    path = tmp_path / "quality.jsonl"
    asked = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists():
        assert asked.poll() is None
        time.sleep(0.02)
    workers = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    workers = [int(pid) for pid, parent in map(str.split, workers.splitlines()) if int(parent) == asked.pid]
    os.kill(asked.pid, signal.SIGKILL)
    asked.wait()
    found = rows(path)
    assert found and all(sum(row["run"] == other["run"] for other in found) == row["rows"] == 3 for row in found)
    made = len({row["run"] for row in found})
    assert made < 12 and not (tmp_path / "quality.png").exists() and workers
    for _ in range(200):
        states = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout
        if not any(int(pid) in workers and "Z" not in state for pid, state in map(str.split, states.splitlines())):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the processes of a killed sweep go on")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and f"12 runs, {made} made before" in again.stdout
    assert len({row["run"] for row in rows(path)}) == 12 and rows(path)[0]["rows"] == 3
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, told", [
    (["--general-errors", "2"], "--general-errors 2"), (["--steps", "0"], "--steps 0"), (["--methods", "mol"], "--methods"),
    (["--general", "README.md"], "--general"), (["--fresh"], "--fresh"), (["--base", "nowhere"], "nowhere"),
    (["--base-steps", "4"], "--base"),
])
def test_a_question_refuses_what_train_refuses(arguments, told, tmp_path, bases, capsys):
    (tmp_path / "bases").symlink_to(bases)
    assert ask(tmp_path, *arguments, runs=RUNS[1:]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "asked.jsonl").exists()


@pytest.mark.parametrize("arguments, told", [(["--steps", "6"], "--out"), (["--steps", "6", "--out", "plots"], "--out"), (["--seed", "0"], "--out"), (["--general-errors", "0.3"], "--general-errors")])
def test_the_committed_figures_are_not_drawn_over(arguments, told, capsys, monkeypatch):
    """Other settings need a folder of their own, and a flag for what the question varies is none."""
    monkeypatch.chdir(ROOT)
    before = (ROOT / "plots" / "quality.png").stat().st_mtime_ns
    assert sweep.main("quality", quality.RUNS, quality.draw, "A question.", arguments=arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and (ROOT / "plots" / "quality.png").stat().st_mtime_ns == before


def test_a_flag_that_some_runs_set_is_refused(tmp_path, capsys):
    """It would change the others under the same labels."""
    assert sweep.main("rivals", rivals.RUNS, rivals.draw, "A question.", arguments=["--out", str(tmp_path), "--lr", "1e-3"]) == 2
    assert "--lr" in capsys.readouterr().err and not list(tmp_path.iterdir())


def fails(s, seed, method, world, base, dtype):
    raise train.BadInput(f"{method}: the loss is nan at step 1; a lower learning rate may help")


def test_a_run_that_fails_stops_the_sweep(tmp_path, bases, capsys):
    (tmp_path / "bases").symlink_to(bases)
    assert ask(tmp_path, runs=[sweep.Run("broken", "mol", {}, fails)]) == 2
    assert "the loss is nan" in capsys.readouterr().err


def test_a_ruined_model_is_not_kept(tmp_path, bases, capsys):
    (tmp_path / "bases").symlink_to(bases)
    assert ask(tmp_path, "--steps", 1, "--lr", 1e30, runs=RUNS[1:]) == 2
    error = capsys.readouterr().err
    assert "at step 1" in error and error.count("\n") == 1 and not (tmp_path / "asked.jsonl").exists()


def test_without_a_base_one_is_made_and_found_again(tmp_path, monkeypatch):
    """In out/bases, for all questions."""
    monkeypatch.setattr(sweep, "HERE", tmp_path / "plots")

    def asked(out):
        return sweep.main("asked", RUNS[1:], lambda rows, picture: None, "A question.",
                          arguments=["--out", str(tmp_path / out), "--seed", "0", *TINY])

    base = tmp_path / "out" / "bases" / "seed0" / "base.pt"
    assert asked("one") == 0
    made = base.stat().st_mtime_ns
    assert asked("two") == 0 and base.stat().st_mtime_ns == made
    assert rows(tmp_path / "one" / "asked.jsonl") == rows(tmp_path / "two" / "asked.jsonl")


def made_up(question):
    """Rows as a sweep of this question has them, on two seeds."""
    sentence = {"tokens": ["a", "\n"], "reverse": [0.1, 0.2], "forward": [0.3, 0.1]}
    mode = {"tokens": ["1", "\n"], "right": [0.9, 1.0], "first_wrong": [0.1, 0.0]}
    found = []
    for i, run in enumerate(question.RUNS):
        for seed in (0, 1):
            for step in range(5) if question is domains else (0, 50, 100):
                names = ["no_think", "think", "facts", *(domains.DOMAINS if question is domains else ["domain"])]
                found.append({"method": run.label, "seed": seed, "step": step, "general_loss": 1.0, "domain_loss": 1.0, "kl_to_base": 0.1,
                              "seen_loss": 0.9, "seen_kl": 0.1, "unseen_loss": 1.0, "unseen_kl": 0.2, "sentences": [sentence] * 3, "modes": {"no_think": mode, "think": mode},
                              "accuracy": {name: (i + seed) / (len(question.RUNS) + 1) for name in names}})
    return found


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_draws_and_names_its_runs(name, tmp_path):
    question = QUESTIONS[name]
    labels = [run.label for run in question.RUNS]
    assert len(set(labels)) == len(labels)
    s = train.Settings()
    for run in question.RUNS:
        train.check(replace(s, **run.settings, methods=(run.method,)))
    question.draw(made_up(question), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    if hasattr(question, "tell"):
        assert question.tell(made_up(question)).startswith("|")


@pytest.mark.parametrize("name", [name for name in QUESTIONS if f"plots/{name}.png" in (ROOT / "README.md").read_text()])
def test_what_the_readme_shows_of_a_question_is_committed(name):
    """Its picture, and beside it the metrics of every run on three seeds, whole."""
    path = ROOT / "plots" / f"{name}.jsonl"
    s = train.Settings(eval_every=50)
    assert set(sweep.kept(path)) == {sweep.name_of(replace(s, **run.settings), seed, run) for run in QUESTIONS[name].RUNS for seed in (0, 1, 2)}
    assert path.with_suffix(".png").exists()


def test_a_budget_of_the_same_text_in_all():
    for name, share in ratio.RATIOS.items():
        settings = ratio.same_total(share)
        assert settings["batch_size"] + round(settings["batch_size"] * settings["ratio"]) == ratio.TOTAL
        assert settings["ratio"] == pytest.approx(share, rel=0.25)


@pytest.fixture(scope="module")
def world():
    s = train.parse([*TINY, "--general-documents", "300"])
    world = train.make_world(s, 0, "cpu")
    torch.manual_seed(0)
    return s, world, train.GPT(train.config_of(s, world))


def test_the_sources_of_general_text(world):
    s, world, base = world
    text = {name: world.tokenizer.decode(make(s, 0, world, base).tolist()) for name, make in source.SOURCES.items() if make}
    assert re.search(r"capital of", text["no think sums"]) and not re.search("think", text["no think sums"])
    assert re.search("think", text["no facts"]) and not re.search("capital|ruled|road to \\w+ ends", text["no facts"])
    assert not re.search(r"[^a-z \n]", text["noise"])
    assert len(source.pretraining(s, 0, world, base)) == len(source.own_samples(s, 0, world, base)) == len(world.general)
    assert torch.equal(source.own_samples(s, 0, world, base), source.own_samples(s, 0, world, base))


def test_where_an_answer_breaks(world):
    """A model that says every token right but the last but one: all answers break there, though they end right."""
    s, world, _ = world

    class Oracle(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.nn.functional.one_hot(tokens.roll(-1, 1), world.tokenizer.n_vocab).float()  # (B, T, V)
            logits[:, -2] = 0
            logits[:, -1, world.tokenizer.encode_single_token("\n")] = 2  # the end of every answer, which it cannot see
            return logits

    for mode, found in modes.by_position(Oracle(), world).items():
        n = len(found["tokens"])
        assert "".join(found["tokens"]) == world.probes[mode][0][1]
        assert found["right"] == [1.0] * (n - 2) + [0.0, 1.0] and found["first_wrong"] == [0.0] * (n - 2) + [1.0, 0.0]


def test_forgetting_and_backward_transfer_by_hand():
    """alarms 1 -> 0.4 and drugs 0.8 -> 1 -> 0.9 by the end, ships as they were: (0.6 + 0.1 + 0) / 3, (-0.6 + 0.1 + 0) / 3."""
    shares = {"alarms": [0, 1, 1, 0.5, 0.4], "drugs": [0, 0, 0.8, 1, 0.9], "ships": [0, 0, 0, 1, 1], "larger": [0, 0, 0, 0, 1]}
    run = [{"step": stage, "accuracy": {name: column[stage] for name, column in shares.items()}} for stage in range(5)]
    assert domains.forgetting(run) == pytest.approx(0.7 / 3)
    assert domains.backward_transfer(run) == pytest.approx(-0.5 / 3)


@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_chain_of_domains(world, monkeypatch, latest, earlier):
    """Every stage starts from the one before, reads and is held to what was asked, and is marked on all domains."""
    s, world, base = world
    stages, real = [], train.continue_training

    def spy(method, s, seed, read, start, dtype, mark, held):
        model = real(method, s, seed, read, start, dtype, mark, held)
        stages.append((read, start, held, model))
        return model

    monkeypatch.setattr(train, "continue_training", spy)
    found = domains.chain(s, 0, "mol", world, base, torch.float32, latest, earlier)
    assert [row["domain"] for row in found] == ["", *domains.DOMAINS]
    assert set(found[0]["accuracy"]) == {"no_think", "think", "facts", *domains.DOMAINS}
    assert found[0]["kl_to_base"] == 0 < found[1]["kl_to_base"] < found[4]["kl_to_base"]
    before = base
    for i, (read, start, held, model) in enumerate(stages):
        assert start is before and held is (start if latest else base)
        assert len(read.general) == len(world.general) * (2 if earlier and i else 1) - (len(world.general) % i if earlier and i else 0)
        assert not i or earlier == ("alarm" in world.tokenizer.decode(read.general.tolist()))
        before = model


def test_the_best_setting_is_chosen_on_domain_and_general_together():
    """One value is best on general skills, one on the domain, and one on their mean: that one is taken."""
    shares = [(1.0, 0.2), (0.7, 0.8), (0.1, 1.0), (0.5, 0.5)]  # (general, domain)
    found = [{"method": rivals.label(name, value), "seed": 0, "step": 400, "general_loss": 1.0, "domain_loss": 1.0, "kl_to_base": 0.1,
              "accuracy": {"no_think": general, "think": general, "facts": general, "domain": domain}}
             for name, (*_, values) in rivals.KNOBS.items() for value, (general, domain) in zip(values, shares)]
    assert rivals.best(found) == {name: rivals.label(name, values[min(1, len(values) - 1)]) for name, (*_, values) in rivals.KNOBS.items()}
    told = rivals.tell(found).splitlines()
    assert told[-1].endswith("beyond: replay, lr 0.004; mol, strength 0.3")  # the others' second value is neither lowest nor highest
