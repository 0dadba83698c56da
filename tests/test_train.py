import dataclasses
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losses
import train
from eval import load_model
from plots.style import table

ROOT = Path(__file__).parent.parent
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3",
        "--base-batch-size", "4", "--steps", "4", "--batch-size", "2", "--eval-every", "2",
        "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def quick_worlds():
    """A world takes a second to make, and is only read: make each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "toy_world", functools.cache(train.data.toy_world))
        yield


def run(out, *more):
    """train.py's exit code; its command line may also end the program itself."""
    try:
        return train.main(["--out", str(out), *TINY, *map(str, more)])
    except SystemExit as ended:
        return ended.code


def settings(*more):
    """Settings of a tiny run, on this machine."""
    return train.on_this_machine(train.check(train.parse([*TINY, *map(str, more)])))


def untrained(s, seed=0):
    """The world of a seed, and a frozen base that has read nothing."""
    world = train.make_world(s, seed)
    return world, train.GPT(train.config_of(s, world)).requires_grad_(False)


def go_on(name, s, world, base, **more):
    """The model that a method makes of a base, unmarked."""
    return train.train(name, s, 0, world, base, lambda model: {}, **more)[0]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A base that has read a little and is then continued: enough to see who forgets."""
    out = tmp_path_factory.mktemp("short")
    assert run(out, "--n-embd", 64, "--base-steps", 150, "--base-batch-size", 16, "--steps", 40,
               "--batch-size", 8, "--eval-every", 20) == 0
    return out


def test_ce_forgets_more_than_mol(short):
    base, *_ = rows(short)
    end = {row["method"]: row for row in rows(short)}
    assert list(end) == ["base", "ce", "replay", "mol"]
    lost = {method: row["general_loss"] - base["general_loss"] for method, row in end.items()}
    assert lost["ce"] > lost["mol"] + 1.0
    assert end["ce"]["kl_to_base"] > 3 * end["mol"]["kl_to_base"]
    for method in ("ce", "replay", "mol"):
        assert end[method]["domain_loss"] < base["domain_loss"] - 2


def test_what_a_run_leaves(short):
    def names(folder):
        return {path.name for path in folder.iterdir()}

    assert names(short) == {"metrics.jsonl", "settings.json", "seed0", "forgetting.png",
                            "tradeoff.png"}
    assert names(short / "seed0") == {"world.pt", "base.pt", "ce.pt", "replay.pt", "mol.pt"}
    found = rows(short)
    assert [(row["method"], row["step"]) for row in found] == [("base", 0)] + [
        (method, step) for method in ("ce", "replay", "mol") for step in (0, 20, 40)]
    for row in found:
        assert set(row) == {"method", "seed", "step", "general_loss", "domain_loss", "kl_to_base",
                            "accuracy", "probability"}
        shares = [*row["accuracy"].values(), *row["probability"].values()]
        assert len(shares) == 8 and all(0 <= share <= 1 for share in shares)


def test_the_table_from_checkpoints_is_the_table_of_the_run(short, capsys):
    import eval as marking
    assert not marking.main(["--out", str(short)])
    again = capsys.readouterr().out.strip()
    assert again == table(rows(short))


@pytest.mark.parametrize("kind, how", [("bias", "always in the same way"), ("noise", "at random")])
def test_the_run_says_how_wrong_its_general_text_is(kind, how, tmp_path, capsys, monkeypatch):
    """The screen and both figures, in words."""
    titles = []
    save = train.forgetting.style.save
    monkeypatch.setattr(train.forgetting.style, "save",
                        lambda figure, picture, what, remark: titles.append(what) or save(
                            figure, picture, what, remark))
    assert run(tmp_path, "--general-errors", 0.3, "--error-kind", kind) == 0
    remark = f"(30% of the general text's answers wrong, {how})"
    assert f"after 4 steps {remark}" in capsys.readouterr().out
    assert len(titles) == 2 and all(remark in title for title in titles)


def test_the_same_seed_is_bit_identical(tmp_path):
    assert run(tmp_path / "a", "--seed", 3) == run(tmp_path / "b", "--seed", 3) == 0
    one, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert one == other
    assert run(tmp_path / "c", "--seed", 4) == 0
    assert rows(tmp_path / "a")[0]["general_loss"] != rows(tmp_path / "c")[0]["general_loss"]


def test_several_seeds(tmp_path, capsys):
    assert run(tmp_path, "--seed", 0, 1, "--methods", "mol") == 0
    starts = [(row["method"], row["seed"]) for row in rows(tmp_path) if row["step"] == 0]
    assert starts == [("base", 0), ("mol", 0), ("base", 1), ("mol", 1)]
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| mol"))
    assert line.count("(") == 8  # every metric with its spread over seeds


def test_the_base_is_reused(tmp_path, capsys):
    def said(*more):
        assert run(*more) == 0
        return capsys.readouterr().out

    def changed():
        return {now["method"] for now, before in zip(rows(one), first, strict=True)
                if now != before}

    one, two = tmp_path / "one", tmp_path / "two"
    assert "reused from" not in said(one)
    first = rows(one)
    assert "reused from" in said(one, "--kl", "forward")
    assert changed() == {"mol"}
    assert "reused from" in said(one, "--general-errors", 0.1)
    assert changed() == {"replay", "mol"}
    assert "reused from" not in said(one, "--fresh")
    assert rows(one) == first  # the same base again, and nothing else of the earlier runs
    assert "reused from" in said(two, "--base", one)
    assert rows(two) == first
    told = said(one, "--base-steps", 2)  # the folder's base makes way for one that fits
    assert "made with another base_steps: a new one will take its place" in told
    assert run(two, "--base", one) == 2
    assert "another base_steps" in capsys.readouterr().err and rows(two) == first
    assert run(two, "--base", one, "--base-steps", 2, "--seed", 1) == 2
    assert "no base of seed 1" in capsys.readouterr().err and rows(two) == first


def test_ratio_zero_is_ce(tmp_path):
    assert run(tmp_path, "--ratio", 0) == 0
    end = {row.pop("method"): row for row in rows(tmp_path)}
    assert end["ce"] == end["replay"] == end["mol"]


BAD = [
    (["--methods", "magic"], "--methods magic"),
    (["--methods", "ce", "ce"], "--methods ce"),
    (["--ratio", "0.1"], "--ratio 0.1"),
    (["--ratio", "1e308"], "--ratio 1e+308"),
    (["--device", "abacus"], "--device abacus"),
    (["--dtype", "float8"], "--dtype float8"),
    (["--ratio", "-1"], "--ratio -1"),
    (["--ratio", "nan"], "--ratio nan"),
    (["--general-errors", "1.5"], "--general-errors 1.5"),
    (["--general-errors", "-0.1"], "--general-errors -0.1"),
    (["--kl", "sideways"], "--kl sideways"),
    (["--strength", "-1"], "--strength -1"),
    (["--lora-rank", "-1"], "--lora-rank -1"),
    (["--lora-rank", "2", "--methods", "ewc"], "--lora-rank 2"),
    (["--general-documents", "0"], "--general-documents 0"),
    (["--general-documents", "1"], "too short"),
    (["--n-embd", "30", "--n-head", "4"], "divisible"),
    (["--n-layer", "0"], "n-layer is 0"),
    (["--steps", "0"], "--steps 0"),
    (["--base-steps", "0"], "--base-steps 0"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--eval-every", "0"], "--eval-every 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--steps", "many"], "--steps"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**64)], "--seed"),
    (["--seed", "1", "1"], "--seed 1 1"),
    (["--vocab-size", "100"], "--vocab-size 100"),
    (["--block-size", "8"], "--block-size 8"),
    (["--block-size", "100000"], "--block-size 100000"),
    (["--base", "nowhere", "--fresh"], "--fresh"),
    (["--stepz", "3"], "--stepz"),
    (["--methods", "ce", "--methods", "ce"], "--methods ce"),
    (["--general", "README.md"], "--domain"),
    (["--general", "nowhere.txt", "--domain", "README.md"], "--general nowhere.txt"),
    (["--base", "nowhere"], "nowhere"),
]
if not torch.cuda.is_available():
    BAD.append((["--device", "cuda"], "--device cuda"))


@pytest.mark.parametrize("arguments, told", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_settings(arguments, told, tmp_path, capsys):
    """One line that names the setting, code 2, and an earlier run's results as they were."""
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    assert run(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "earlier\n"


def test_a_flag_given_twice_holds_both(tmp_path):
    s = train.parse(["--methods", "ce", "--methods", "mol", "ewc", "--seed", "1", "--seed", "2",
                     "--general", "a", "--general", "b", "--lr", "1", "--lr", "2"])
    assert s.methods == ("ce", "mol", "ewc") and s.seed == (1, 2) and s.general == ("a", "b")
    assert s.lr == 2 and train.parse([]).methods == ("ce", "replay", "mol")


def test_bad_text(tmp_path, capsys):
    good, short, empty, binary = (tmp_path / name for name in ("good", "short", "empty", "binary"))
    good.write_text("some words to learn from, " * 300)
    short.write_text("some words")
    empty.write_text("")
    binary.write_bytes(b"\0\1\2\xff")
    for bad, told in [(short, "too short"), (empty, "empty"), (binary, "not UTF-8 text: byte 3")]:
        for general, domain, flag in [(bad, good, "--general"), (good, bad, "--domain")]:
            assert run(tmp_path / "out", "--general", general, "--domain", domain) == 2
            error = capsys.readouterr().err
            assert told in error and flag in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def blocked_by_a_file(out):
    out.write_text("not a folder")
    return out / "out"


def blocked_seed(out):
    out.mkdir()
    (out / "seed0").write_text("not a folder")
    (out / "metrics.jsonl").write_text("earlier\n")
    return out


@pytest.mark.parametrize("make", [blocked_by_a_file, blocked_seed, lambda out: out / ("x" * 300),
                                  lambda out: ""])
def test_bad_out(tmp_path, capsys, make):
    out = make(tmp_path / "made")
    assert run(out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("--out" in error or "too long" in error)
    assert make is not blocked_seed or (out / "metrics.jsonl").read_text() == "earlier\n"


def test_only_its_own_files_are_cleared(tmp_path):
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "other.pt").write_text("mine")
    (tmp_path / "holiday.png").write_text("mine")
    for left in ("metrics.jsonl.123.tmp", "seed0/mol.pt.99.tmp"):  # of runs that were killed
        (tmp_path / left).write_text("half")
    assert run(tmp_path, "--methods", "ce") == 0 and run(tmp_path, "--methods", "mol") == 0
    assert not (tmp_path / "seed0" / "ce.pt").exists() and not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "holiday.png").read_text() == "mine"
    assert (tmp_path / "seed0" / "other.pt").read_text() == "mine"


def test_two_runs_into_one_folder(tmp_path, capsys):
    """The second is refused before it touches anything; when the first has ended it may."""
    assert run(tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with train.locked(tmp_path):
        assert run(tmp_path, "--seed", 0) == 2
    error = capsys.readouterr().err
    assert "another run is writing there" in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path) == 0


def test_a_lock_ends_with_its_program(tmp_path):
    """Also where the program is killed."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from plots.style import locked\n"
            "with locked(sys.argv[2]): print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(OSError, match="another run"):
        with train.locked(tmp_path):
            pass
    other.kill()
    other.wait()
    with train.locked(tmp_path):
        pass


@pytest.mark.parametrize("limit", [1, 40, 100])
def test_a_file_that_cannot_be_written_is_one_line_and_no_litter(tmp_path, limit):
    """A limit on the size of files, in KiB: metrics fit and checkpoints do not, or nothing does."""
    command = f"ulimit -f {limit}; exec {sys.executable} {ROOT / 'train.py'} {' '.join(TINY)}"
    done = subprocess.run(["bash", "-c", f"{command} --out {tmp_path / 'out'}"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("problem", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")])
def test_out_of_memory(tmp_path, capsys, monkeypatch, problem):
    def hungry(model, base, batch, s):
        raise problem

    monkeypatch.setitem(train.METHODS, "hungry", train.Method(hungry))
    assert run(tmp_path, "--methods", "hungry") == 2
    error = capsys.readouterr().err
    assert "out of memory" in error and error.count("\n") == 1


def test_a_fault_of_the_programs_own_is_not_hidden(tmp_path, monkeypatch):
    def wrong(model, base, batch, s):
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(train.METHODS, "wrong", train.Method(wrong))
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, "--methods", "wrong")


def test_a_damaged_base_is_not_used(tmp_path, capsys):
    assert run(tmp_path) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    base = tmp_path / "seed0" / "base.pt"
    whole, saved = base.read_bytes(), torch.load(base, weights_only=True)
    del saved["made_from"]
    foreign = tmp_path / "foreign.pt"
    torch.save(saved, foreign)
    for damaged in (whole[:1000], b"something else", foreign.read_bytes()):
        base.write_bytes(damaged)
        capsys.readouterr()
        assert run(tmp_path) == 2
        error = capsys.readouterr().err
        assert "base.pt" in error and "--fresh" in error and error.count("\n") == 1
        assert (tmp_path / "metrics.jsonl").read_bytes() == before and base.read_bytes() == damaged


def test_a_base_of_another_size_is_not_used(tmp_path, capsys):
    assert run(tmp_path / "one") == 0
    assert run(tmp_path / "two", "--base", tmp_path / "one", "--n-layer", 2) == 2
    assert "--base" in capsys.readouterr().err and not (tmp_path / "two").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, value):
    def broken(model, base, batch, s):
        return model(batch.tokens).sum() * 0 + value

    monkeypatch.setitem(train.METHODS, "broken", train.Method(broken))
    assert run(tmp_path, "--methods", "mol", "broken") == 2
    error = capsys.readouterr().err
    assert "broken" in error and "step 1" in error and str(value) in error
    assert {row["method"] for row in rows(tmp_path)} == {"base", "mol"}  # what was finished stays


@pytest.mark.parametrize("flags", [("--lr", 1e30, "--steps", 1),
                                   ("--base-lr", 1e30, "--base-steps", 1)])
def test_a_model_ruined_by_its_last_step(tmp_path, capsys, flags):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert "at step 1" in error and error.count("\n") == 1


def test_interrupt(tmp_path, capsys, monkeypatch):
    def interrupted(model, base, batch, s):
        raise KeyboardInterrupt

    monkeypatch.setitem(train.METHODS, "interrupted", train.Method(interrupted))
    assert run(tmp_path, "--methods", "mol", "interrupted") == 130
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert {row["method"] for row in rows(tmp_path)} == {"base", "mol"}
    assert (tmp_path / "seed0" / "mol.pt").exists()


def test_the_readmes_method_of_your_own(tmp_path, monkeypatch):
    """The worked example, as it stands there: a function and a row."""
    readme = (ROOT / "README.md").read_text()
    example, = re.findall(r"```python\n(def halfway.*?\n)\n+METHODS", readme, re.DOTALL)
    scope = {"torch": torch, "losses": train.losses}
    exec(example, scope)
    method = train.Method(scope["halfway"], reads_general=True)
    monkeypatch.setitem(train.METHODS, "halfway", method)
    assert run(tmp_path, "--methods", "replay", "halfway") == 0
    assert {row["method"] for row in rows(tmp_path)} == {"base", "replay", "halfway"}


def test_own_text(tmp_path, capsys):
    (tmp_path / "general.txt").write_text("the cat sat on the mat and looked at the moon. " * 200)
    (tmp_path / "domain.txt").write_text("def f(x): return x + 1\n" * 300)
    out = tmp_path / "out"
    assert run(out, "--general", tmp_path / "general.txt", "--domain", tmp_path / "domain.txt") == 0
    assert all(row["accuracy"] == {} for row in rows(out))
    assert (out / "forgetting.png").exists() and "no-think" not in capsys.readouterr().out


def test_an_own_text_that_is_not_like_its_held_out_part_gets_a_warning(tmp_path, capsys):
    """The first nine tenths say nothing of the last: the held-out loss is best at the start."""
    general, domain = tmp_path / "general", tmp_path / "domain"
    rng = random.Random(0)
    dice = "".join(rng.choice("0123456789") for _ in range(1000))
    general.write_text("aaaa bbbb " * 900 + dice)
    domain.write_text("def f(x): return x + 1\n" * 300)
    assert run(tmp_path / "out", "--general", general, "--domain", domain, "--base-steps", 60,
               "--base-batch-size", 8, "--base-lr", 3e-2, "--methods", "ce") == 0
    assert "was best so early that it has learnt little" in capsys.readouterr().out


def test_the_output_folder_is_not_read(tmp_path, capsys):
    """A second run over a folder that holds the output of the first reads what the first read."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat and looked at the moon. " * 200)
    for _ in range(2):
        assert run(tmp_path / "out", "--general", tmp_path, "--domain", tmp_path) == 0
        assert "read 1 file (9,400 characters)" in capsys.readouterr().out


# --- what a method sees --------------------------------------------------------------------------

def test_what_each_method_reads(monkeypatch):
    """The same domain rows in the same order for all; the base reads general rows alone."""
    s = settings("--steps", 3)
    world, base = untrained(s)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    read_by_base, read = {}, {}
    base.register_forward_hook(lambda module, inputs, _: read_by_base[method].append(inputs[0])
                               if module is base else None)
    for method, row in train.METHODS.items():
        read[method], read_by_base[method] = [], []

        def spy(model, frozen, batch, s, *once):
            read[method].append(batch)
            return row.loss(model, frozen, batch, s, *once)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train.METHODS, method, row._replace(loss=spy))
            go_on(method, s, world, base)
    for ce, replay, mol in zip(read["ce"], read["replay"], read["mol"], strict=True):
        assert torch.equal(replay.tokens, mol.tokens)
        assert torch.equal(ce.tokens, mol.tokens[:2]) and len(mol.tokens) == 4
        assert ce.is_domain.all() and mol.is_domain.tolist() == [True, True, False, False]
    for method in ("domain_kl", "l2sp", "ewc"):
        for mine, ce in zip(read[method], read["ce"], strict=True):
            assert torch.equal(mine.tokens, ce.tokens)
    assert [method for method, tokens in read_by_base.items() if tokens] == ["mol", "domain_kl"]
    for tokens, batch in zip(read_by_base["mol"], read["mol"], strict=True):
        assert torch.equal(tokens, batch.tokens[2:])
    for tokens, batch in zip(read_by_base["domain_kl"], read["domain_kl"], strict=True):
        assert torch.equal(tokens, batch.tokens)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, before[name])


def test_the_base_reads_pretraining_text_alone(monkeypatch):
    s = settings("--base-steps", 5)
    world = train.make_world(s, 0)
    read, ce = [], train.METHODS["ce"]

    def spy(model, frozen, batch, s):
        read.append(batch)
        return ce.loss(model, frozen, batch, s)

    monkeypatch.setitem(train.METHODS, "ce", ce._replace(loss=spy))
    train.pretrain(s, 0, world)
    stream = world.pretraining.unfold(0, s.block_size, 1)
    assert len(read) == 5
    for batch in read:
        assert batch.tokens.shape == (4, s.block_size)
        for row in batch.tokens:
            assert (stream == row).all(dim=1).any()


def test_strength_weighs_what_protects_the_base():
    """At strength 0 only cross-entropy is left; what comes on top grows with it."""
    s = settings("--steps", 1)
    world, base = untrained(s)
    model = train.GPT(train.config_of(s, world))
    mixed, domain = (next(train.data.batches(world.domain, world.general, 2, n, s.block_size, 0))
                     for n in (2, 0))
    fisher = train.fisher(base, world, s, 0)
    for method, batch, once in [("mol", mixed, []), ("domain_kl", domain, []), ("l2sp", domain, []),
                                ("ewc", domain, [fisher])]:
        def loss(model, strength):
            weighed = dataclasses.replace(s, strength=strength)
            return train.METHODS[method].loss(model, base, batch, weighed, *once).item()

        rows = 2 if method == "mol" else 1  # mol's mean is over all four rows
        left = train.ce(model, base, domain, s).item() / rows
        on_top = loss(model, 1.0) - left
        assert loss(model, 0.0) == pytest.approx(left, rel=1e-5)
        assert on_top > 1e-4 and loss(model, 30.0) - left == pytest.approx(30 * on_top, rel=1e-2)
        # and it is nothing for the base itself
        assert loss(base, 30.0) == pytest.approx(loss(base, 0.0), abs=1e-5)


def test_weight_distance_by_hand():
    """Half of 2 * 1^2 + 1 * 3^2 is 5.5; its gradient is the importance times how far w has gone."""
    w, w0 = (torch.tensor(values, requires_grad=True) for values in ([1.0, 5.0], [0.0, 2.0]))
    f = torch.tensor([2.0, 1.0])
    assert train.weight_distance([w], [w0]).item() == 5.0
    distance = train.weight_distance([w], [w0], [f])
    distance.backward()
    assert distance.item() == 5.5 and w.grad.tolist() == [2.0, 3.0] and w0.grad is None
    with pytest.raises(ValueError):
        train.weight_distance([w], [])


class Bias(torch.nn.Module):
    """The simplest language model: the same logits after every token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)  # (B, T, V)


def test_the_fisher_by_hand():
    """The gradient of log p(y) by the logits is onehot(y) - p.

    At p = (1/2, 1/2) its square is 1/4, whatever is drawn.
    """
    model = Bias([0.0, 0.0]).requires_grad_(False)
    fisher, = train.diagonal_fisher(model, torch.zeros(10, 1, dtype=torch.int64))
    assert fisher.tolist() == pytest.approx([0.25, 0.25], rel=1e-6)
    assert not model.logits.requires_grad and model.logits.grad is None


def test_the_fisher_is_the_curvature_of_the_kl():
    """p (1 - p) on the diagonal, per token however long the sequences are.

    Half of it times the square of a small step is the KL of that step.
    """
    model = Bias([1.0, 0.0, -1.0])
    p = model.logits.softmax(dim=0)
    for T in (1, 4):
        tokens = torch.zeros(4000, T, dtype=torch.int64)
        fisher, = train.diagonal_fisher(model, tokens, torch.Generator().manual_seed(0))
        assert torch.allclose(fisher, p * (1 - p), atol=0.01)
    step = torch.tensor([1e-2, 0.0, 0.0])
    with torch.no_grad():
        stepped = model.logits + step
        kl = losses.kl_divergence(stepped[None, None], model.logits[None, None], "forward").item()
    distance = train.weight_distance([stepped], [model.logits], [p * (1 - p)])
    assert distance.item() == pytest.approx(kl, rel=0.02)


def test_domain_kl_distils_by_forward_kl():
    """One token, p = (1/2, 1/2), the base's q = (1/4, 3/4): log 2 + KL[q || p], whatever --kl."""
    def says(*p):
        return lambda tokens: torch.tensor([[p]]).log()  # (1, 1, 2)

    token, rows = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    batch = train.data.Batch(token, token, torch.tensor([True]), rows)
    s = train.Settings(strength=2.0)
    loss = train.domain_kl(says(0.5, 0.5), says(0.25, 0.75), batch, s)
    forward = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert loss.item() == pytest.approx(math.log(2) + 2 * forward)


def test_only_what_has_no_anchor_decays_to_zero(monkeypatch):
    """A loss that is flat leaves l2sp and ewc at the base; the matrices of the others shrink."""
    s = settings("--steps", 1)
    world, base = untrained(s)
    for method, row in list(train.METHODS.items()):
        flat = row._replace(loss=lambda model, base, batch, *rest: 0 * model(batch.tokens).sum())
        monkeypatch.setitem(train.METHODS, method, flat)
        model = go_on(method, s, world, base)
        left = 1.0 if method in ("l2sp", "ewc") else 1 - 0.1 * s.lr
        expected = left * base.head.weight
        assert torch.allclose(model.head.weight, expected, rtol=1e-6, atol=0), method


def test_the_base_is_one_type_of_thing_under_every_method(monkeypatch):
    """A method of one's own may ask it for its weights, with adapters and without."""
    seen = []

    def own(model, base, batch, s):
        seen.append(sum(weight.numel() for weight in base.parameters()))
        assert isinstance(base, train.GPT) and not any(w.requires_grad for w in base.parameters())
        return train.ce(model, base, batch, s)

    monkeypatch.setitem(train.METHODS, "own", train.Method(own))
    for rank in (0, 2):
        s = settings("--lora-rank", rank)
        go_on("own", s, *untrained(s))
    assert len(set(seen)) == 1


def test_lora(tmp_path, monkeypatch):
    """Adapters learn the domain by a change of their rank; a checkpoint is a plain GPT again."""
    assert run(tmp_path, "--lora-rank", 2, "--lr", 1e-2, "--methods", "ce", "mol") == 0
    base, *_, ce, mol = (rows(tmp_path)[i] for i in (0, 3, 6))
    assert base["domain_loss"] > ce["domain_loss"] + 0.01
    assert base["domain_loss"] > mol["domain_loss"] + 0.01
    saved = {name: load_model(tmp_path / "seed0" / f"{name}.pt")[0].state_dict()
             for name in ("base", "ce")}
    assert torch.equal(saved["base"]["ln_f.weight"], saved["ce"]["ln_f.weight"])
    for name in ("blocks.0.attn.qkv.weight", "token_embedding.weight"):
        change = saved["ce"][name] - saved["base"][name]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2


def test_a_model_continued_from_another_than_the_base():
    """`start` is what is trained, the base what it is held to."""
    s = settings("--steps", 1, "--lr", 1e-9)
    world, base = untrained(s)
    start = train.GPT(train.config_of(s, world))
    model = go_on("mol", s, world, base, start=start)
    assert torch.allclose(model.head.weight, start.head.weight, atol=1e-6)
    assert not torch.allclose(model.head.weight, base.head.weight, atol=1e-6)


def test_the_base_that_is_kept_is_the_best_on_held_out_text(tmp_path, capsys):
    """Digits thrown by a die are learnt by heart, and the held-out loss turns."""
    die = random.Random(0)
    for name in ("general", "domain"):
        (tmp_path / name).write_text("".join(die.choice("0123456789") for _ in range(2000)))
    assert run(tmp_path / "out", "--general", tmp_path / "general", "--domain", tmp_path / "domain",
               "--n-embd", 64, "--base-steps", 200, "--base-lr", 1e-2, "--base-batch-size", 16,
               "--methods", "ce") == 0
    told = capsys.readouterr().out
    step, loss = re.search(r"kept from step (\d+), .*: ([\d.]+) nats", told).groups()
    assert int(step) < 200
    assert rows(tmp_path / "out")[0]["general_loss"] == pytest.approx(float(loss), abs=1e-3)


def test_dtype(monkeypatch):
    """float32 on every CPU; bfloat16 on the CUDA cards that compute in it."""
    assert train.choose_dtype("bfloat16", "cpu") == "bfloat16"
    for native, expected in [(True, "bfloat16"), (False, "float32")]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert train.choose_dtype("auto", "cuda") == expected
        assert train.choose_dtype("auto", "cpu") == train.choose_dtype("auto", "mps") == "float32"


def test_a_device_that_does_not_work_is_passed_over(monkeypatch, capsys):
    """A card without kernels in this torch: auto says so and takes the next, --device refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    ones = torch.ones

    def no_kernels(*size, device=None):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nmore of it")
        return ones(*size, device=device)

    monkeypatch.setattr(torch, "ones", no_kernels)
    assert train.choose_device("auto") == train.choose_device("cpu") == "cpu"
    told = capsys.readouterr().out
    assert "cuda" in told and "no kernel image" in told and told.count("\n") == 1
    with pytest.raises(train.BadInput, match="--device cuda"):
        train.choose_device("cuda")


def test_compile_without_a_compiler_is_refused_before_anything_is_cleared(tmp_path, capsys,
                                                                          monkeypatch):
    def no_compiler(model):
        def call(x):
            raise RuntimeError("Failed to find C compiler\nand forty more lines")
        return call

    assert run(tmp_path) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run(tmp_path, "--compile") == 2
    error = capsys.readouterr().err
    assert "--compile" in error and "C compiler" in error and error.count("\n") == 1
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_bfloat16_runs(tmp_path):
    assert run(tmp_path / "half", "--dtype", "bfloat16") == 0
    assert run(tmp_path / "full", "--dtype", "float32") == 0
    half, full = rows(tmp_path / "half")[-1], rows(tmp_path / "full")[-1]
    assert half["general_loss"] != full["general_loss"]
    assert half["general_loss"] == pytest.approx(full["general_loss"], abs=0.1)


def program(*arguments, cwd, **environment):
    return subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=cwd, text=True,
                          capture_output=True,
                          env={**os.environ, "COLUMNS": "100", **environment})


def test_as_a_program(tmp_path):
    """From another folder, as a user types it: help is a page, bad input a line and code 2."""
    shown = program("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for f in train.fields(train.Settings):
        assert "--" + f.name.replace("_", "-") in shown.stdout
    for arguments in (["--ratio", "-1"], ["--foo"]):
        refused = program(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_notebooks_backend_for_figures_is_not_needed(tmp_path):
    shown = program("--help", cwd=tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert shown.returncode == 0 and not shown.stderr


def test_a_notebooks_screen_will_do(monkeypatch):
    """It has no `reconfigure`, which only a real console needs."""
    import io
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    train.tolerant_console()
