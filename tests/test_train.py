import io
import json
import math
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

import eval
import losses
import train
from plots.program import run_program
from model import GPT, GPTConfig
from train import METHODS, Method

SHIPPED = ("ce", "replay", "mol")  # the others are those of plots/methods.py
ROOT = Path(__file__).parent.parent
TINY = {"--n-layer": 1, "--n-head": 2, "--n-embd": 32, "--base-steps": 8, "--base-batch-size": 4,
        "--steps": 4, "--batch-size": 2, "--eval-every": 2, "--device": "cpu"}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the line feed


def program(main):
    """Run a program as in a notebook, whose output has no fileno -> exit code, output, errors."""
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        run_program(main)
    return ended.value.code, output.getvalue(), errors.getvalue()


def tiny(*more):
    """A short command line with more flags, which replace those of the same name."""
    rest = [word for flag, value in TINY.items() if flag not in more for word in (flag, value)]
    return [*map(str, (*rest, *more))]


def finished(out, *more):
    """The rows and the output of a run without errors."""
    code, output, errors = program(lambda: train.main(tiny("--out", out, *more)))
    assert code == 0 and not errors
    rows = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], output


def refused(out, *more, code=2):
    """The one message of a run that cannot be made."""
    found, _, errors = program(lambda: train.main(tiny("--out", out, *more)))
    assert found == code and errors.count("error: ") == (code == 2)
    return errors.splitlines()[-1]  # below the usage


@pytest.fixture
def ask(monkeypatch):
    """(folder of a run, prompts) -> the exit code, output and errors of eval.py."""
    def asked(out, *prompts):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--out", str(out), *prompts])
        return program(eval.main)
    return asked


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untrained(s, seed=0):
    """The world of a seed, and a frozen base that has read nothing."""
    world = train.data.make_world(s, seed)
    torch.manual_seed(seed)
    base = GPT(GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd))
    return world, base.requires_grad_(False)


def record(monkeypatch, name):
    """A list, for each step to come, of the batch that a method reads and of its losses."""
    seen, method = [], METHODS[name]

    def spy(model, base, batch, s):
        seen.append((batch, method.loss(model, base, batch, s)))
        return seen[-1][1]

    monkeypatch.setitem(METHODS, name, method._replace(loss=spy))
    return seen


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder, rows and output of a run that is long enough to see which method forgets."""
    out = tmp_path_factory.mktemp("short")
    return out, *finished(out, "--n-embd", 64, "--base-steps", 100, "--base-batch-size", 16,
                          "--steps", 40, "--batch-size", 8, "--eval-every", 20)


@pytest.fixture
def copied(short, tmp_path):
    return shutil.copytree(short[0], tmp_path / "out")


def test_ce_forgets_more_than_mol(short):
    end = {row["method"]: row for row in short[1]}
    assert end["ce"]["general_loss"] > end["mol"]["general_loss"] + 1.0
    assert end["ce"]["kl_to_base"] > 3 * end["mol"]["kl_to_base"]
    for method in SHIPPED:
        assert end[method]["domain_loss"] < end["base"]["domain_loss"] - 2


def test_what_a_run_leaves(short):
    out, found, _ = short
    assert {str(path.relative_to(out)) for path in contents(out)} == {
        ".lock", "metrics.jsonl", "settings.json", "page.html", "forgetting.png",
        *(f"seed0/{name}.pt" for name in ("base", *SHIPPED))}
    assert [(row["method"], row["step"]) for row in found] == [("base", 0)] + [
        (method, step) for method in SHIPPED for step in (0, 20, 40)]
    for row in found:
        assert set(row) == {"method", "seed", "step", "general_loss", "domain_loss", "kl_to_base",
                            "accuracy", "probability"} | ({"ce", "kl"} if row["step"] else set())
        shares = [*row["accuracy"].values(), *row["probability"].values()]
        assert len(shares) == 8 and all(0 <= share <= 1 for share in shares)


def test_eval_repeats_the_answers_of_a_run_even_if_it_was_stopped(copied, short, ask):
    code, output, errors = ask(copied)
    assert code == 0 and not errors and output.count("\n> ") == 5 and output in short[2]
    (copied / "seed0" / "mol.pt").unlink()
    output = ask(copied, "--", "-5+37=", "x" * 99)[1].splitlines()
    assert output[1] == "> -5+37=" and len(output) == 2 * 5
    assert [line.split()[0] for line in output[2:5]] == ["base", "ce", "replay"]


def test_eval_refuses_a_run_of_another_version(copied, tmp_path, ask):
    saved = (copied / "settings.json").read_text()
    for old, new, message in [("512", "300", "the text or the code has changed"),
                              ("general_files", "files", "no attribute 'general_files'")]:
        (copied / "settings.json").write_text(saved.replace(old, new))
        code, _, errors = ask(copied)
        assert code == 2 and message in errors and errors.count("\n") == 1
    code, _, errors = ask(tmp_path / "nowhere")
    assert code == 2 and "nowhere/settings.json" in errors and errors.count("\n") == 1


def test_lora_changes_weights_by_its_rank_and_the_same_seed_gives_the_same_numbers(
        tmp_path, monkeypatch):
    """The first two runs pretrain a base, the third has it. A checkpoint is a plain GPT."""
    out, found = tmp_path / "out", []
    for bases in "abb":
        monkeypatch.setattr(train, "BASES", tmp_path / bases)
        found += finished(out, "--lora-rank", 2, "--lr", 1e-2, "--methods", "mol")[:1]
    assert found[0] == found[1] == found[2]
    assert found[0][0]["domain_loss"] > found[0][-1]["domain_loss"] + 0.01
    base, mol = (eval.load_model(out / f"seed0/{name}.pt").state_dict()
                 for name in ("base", "mol"))
    changed = mol["token_embedding.weight"] - base["token_embedding.weight"]
    assert torch.linalg.matrix_rank(changed, rtol=1e-3) == 2


def test_the_readmes_method_of_your_own(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example, = (block for block in blocks if "def halfway" in block)
    monkeypatch.setitem(METHODS, "halfway", None)  # removed after the test
    exec(example, dict(vars(train)))
    found, _ = finished(tmp_path, "--methods", "halfway")
    assert {row["method"] for row in found} == {"base", "halfway"}
    assert METHODS["halfway"].reads_general


def test_own_text(tmp_path, monkeypatch, ask):
    """Folders of text with signs that control a terminal."""
    flags = ["--methods", "ce", "--base-steps", 30]
    for name, text in [("general", "the cat sat on\x1b[31m the mat\x07 at noon. " * 100),
                       ("domain", "def f(x):\x1b return x + 1\n" * 200)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "\x1btext").write_text(text)
        (tmp_path / name / "\x1bpicture").write_bytes(b"\xff")
        flags += [f"--{name}", tmp_path / name]
    found, output = finished(tmp_path / "out", *flags)
    assert all(row["accuracy"] == {} for row in found)
    assert "no-think" not in output and not CONTROL.search(output)
    assert "\n  ce    " in output and "\\n" in output  # line breaks of code are seen
    monkeypatch.chdir(tmp_path)
    assert ask("out")[1].partition("\n\n")[2] in output  # the same answers, elsewhere


BAD = [  # arguments, what the message says; by default it names the flag
    ("--methods magic",), ("--methods ce ce",), ("--methods", "expected"), ("--stepz 3",),
    ("--lr 1 --lr=2",), ("--seed 1 --seed 2",), ("--lr nan",), ("--lr inf",), ("--strength -1",),
    ("--ratio 0.05 --batch-size 50",), ("--ratio 0.02",), ("--ratio nan",), ("--ratio 1e308",),
    ("--kl sideways",), ("--device abacus",), ("--dtype float8",), ("--general-errors 1.5",),
    ("--lora-rank 33",), ("--steps many",), ("--n-layer 0",), ("--steps 0",), ("--seed -1",),
    (f"--seed {2**64}",), ("--seed 1 1",), ("--vocab-size 100",), ("--block-size 8",),
    ("--block-size 100000",), ("--n-embd 30 --n-head 4",), ("--general-documents 1", "too short"),
    ("--error-kind noise --general README.md --domain LICENSE",),
    ("--general README.md", "--domain"), ("--domain README.md", "--general"),
    ("--general no\x1bwhere --domain LICENSE", "no?where: No such file"),
    ("--general .gitignore --domain LICENSE", "--general: too short"),
    ("--domain .gitignore --general LICENSE", "--domain: too short"), ("--out <empty>",),
    ("--domain <empty> --general LICENSE",), ("--questions README.md",)]
if not torch.cuda.is_available():
    BAD.append(("--device cuda",))


@pytest.mark.parametrize("bad", BAD, ids=" ".join)
def test_bad_settings_are_refused_and_change_nothing(bad, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("earlier\n")
    flag, *_ = arguments = [x.replace("<empty>", "") for x in bad[0].split()]
    out = () if "--out" in arguments else ("--out", tmp_path)
    code, _, errors = program(lambda: train.main(tiny(*out, *arguments)))
    assert code == 2 and (bad[1:] or [flag])[0] in errors.splitlines()[-1]
    assert contents(tmp_path) == {tmp_path / "metrics.jsonl": b"earlier\n"}


def test_help_names_every_flag_and_may_show_a_percent_sign(capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse(["--help"], defaults=replace(train.Settings(), out="100%/x"))
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "100%/x" in shown and "{reverse,forward,mean}" in shown
    names = {"seeds": "seed", "general_files": "general", "domain_files": "domain"}
    for f in fields(train.Settings):
        assert "--" + names.get(f.name, f.name).replace("_", "-") in shown
    assert "share of wrong answers in the toy general text (default: 0.0)" in shown


def test_a_run_removes_earlier_results_and_nothing_else_but_only_if_it_can_start(copied):
    """Else its base cannot be made, its folder not be written, or another run is writing there."""
    fcntl = pytest.importorskip("fcntl")
    for name in ("holiday.png", "seed1"):
        (copied / name).write_text("not of a run")
    before = contents(copied)
    for told, out, *flags in [("--base-lr", copied, "--base-lr", 1e9),
                              ("seed1", copied, "--seed", 0, 1), ("", copied / "seed1" / "out")]:
        assert told in refused(out, *flags) and contents(copied) == before
    with open(copied / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run" in refused(copied) and contents(copied) == before
    eval.start_run(train.parse(tiny("--out", copied)), ("base", *METHODS))
    left = {path.name for path in contents(copied)}
    assert left == {"settings.json", "holiday.png", "seed1", ".lock"}


@pytest.mark.parametrize("failure, code, told", [
    (math.nan, 2, "broken: the loss is nan at step 1"),
    (math.inf, 2, "broken: the loss is inf at step 1"),
    (KeyboardInterrupt, 130, "stopped; the methods that finished are kept")])
def test_a_method_that_fails_loses_nothing(tmp_path, monkeypatch, failure, code, told):
    def broken(model, base, batch, s):
        if not isinstance(failure, float):
            raise failure
        loss = model(batch.tokens).sum() * 0 + failure
        return loss, loss, loss

    monkeypatch.setitem(METHODS, "broken", Method(broken))
    assert told in refused(tmp_path, "--methods", "ce", "broken", code=code)
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert '"step": 4' in rows and "broken" not in rows and (tmp_path / "seed0/ce.pt").exists()


def test_a_model_that_the_last_step_ruins_stops_the_run(tmp_path):
    assert "--lr" in refused(tmp_path, "--lr", 1e9, "--steps", 1)


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)


def test_a_base_is_used_again_but_not_after_another_pretraining(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "BASES", tmp_path)
    s, output = train.parse(tiny()), ""
    later = train.parse(tiny("--general-errors", 0.1, "--steps", 9, "--kl", "forward"))
    world, of_later = (train.data.make_world(x, 0) for x in (s, later))
    rolled = replace(world, pretraining=world.pretraining.roll(1))
    for count, change, *given in [
            (1, "none", s, 0, world), (1, "none", s, 0, world), (1, "later", later, 0, of_later),
            (2, "a setting", train.parse(tiny("--base-lr", 1e-3)), 0, world),
            (3, "the dtype", train.parse(tiny("--dtype", "bfloat16")), 0, world),
            (4, "the seed", s, 1, world), (5, "the pretraining text", s, 0, rolled),
            (6, "the threads", s, 0, world), (7, "the code", s, 0, world)]:
        if change == "the threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        elif change == "the code":
            assert {(ROOT / x).read_text() for x in ("model.py", "data.py")} < {*train.BASE_CODE}
            monkeypatch.setattr(train, "BASE_CODE", [*train.BASE_CODE, "another line"])
        base = train.get_base(*given)
        output += capsys.readouterr().out
        assert output.count("kept step") == len(list(train.BASES.iterdir())) == count, change
        assert not any(weight.requires_grad for weight in base.parameters())


def test_an_untrained_base_is_not_stored_and_a_damaged_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BASES", tmp_path / "bases")
    out = tmp_path / "out"
    assert "--base-lr" in refused(out, "--base-lr", 30, "--base-steps", 40)
    assert not list(train.BASES.glob("*"))
    finished(out, "--methods", "ce")
    path, = train.BASES.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert path.name in refused(out, "--methods", "ce")


def test_the_base_reads_pretraining_text_and_is_the_best_on_heldout_text(monkeypatch, capsys):
    """Ten steps down the gradient and ten steps up: the base is the model in between."""
    s, read = train.parse(tiny("--base-steps", 20, "--base-lr", 1e-2)), []
    world = train.data.make_world(s, 0)
    world = replace(world, pretraining=world.pretraining[:10_000])

    def turning(model, base, batch, s):
        read.append(batch.tokens)
        loss, *parts = METHODS["ce"].loss(model, base, batch, s)
        return loss if len(read) <= 10 else -loss, *parts

    monkeypatch.setattr(train, "next_token_loss", turning)
    base = train.pretrain(s, 0, world)
    loss, _ = eval.heldout_losses(base, world.heldout_general)
    kept, told = re.search(r"kept step (\d+) of 20, held-out loss (.*)",
                           capsys.readouterr().out).groups()
    assert 9 <= int(kept) <= 13 and float(told) == pytest.approx(loss, abs=0.01)
    windows = world.pretraining.unfold(0, s.block_size, 1)  # (N, T)
    assert len(read) == 20 and all(tokens.shape == (4, s.block_size) for tokens in read)
    assert all((windows == row).all(dim=1).any() for tokens in read[:5] for row in tokens)


def test_what_each_method_reads(monkeypatch):
    """The same domain rows in the same order for all. The base reads general rows alone."""
    s = train.parse(tiny("--steps", 3))
    world, base = untrained(s)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    by_base, read = {name: [] for name in SHIPPED}, {}
    base.register_forward_hook(lambda module, inputs, _: by_base[method].append(inputs[0])
                               if module is base else None)
    for method in SHIPPED:
        read[method] = record(monkeypatch, method)
        train.continue_pretraining(method, s, 0, world, base, lambda model: {})
    for (ce, _), (replay, _), (mol, _) in zip(*read.values(), strict=True):
        assert torch.equal(replay.tokens, mol.tokens)
        assert torch.equal(ce.tokens, mol.tokens[:2]) and len(mol.tokens) == 4
        assert ce.is_domain.all() and mol.is_domain.tolist() == [True, True, False, False]
    assert not by_base["ce"] and not by_base["replay"]
    for tokens, (batch, _) in zip(by_base["mol"], read["mol"], strict=True):
        assert torch.equal(tokens, batch.tokens[2:])
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


@pytest.mark.parametrize("name", SHIPPED)
def test_rows_have_the_mean_of_the_loss_parts_since_the_last_row(monkeypatch, name):
    s = train.parse(tiny("--steps", 5, "--eval-every", 2, "--strength", 3))
    world, base = untrained(s)
    seen = record(monkeypatch, name)
    _, curve = train.continue_pretraining(name, s, 0, world, base, lambda model: {})
    for _, (loss, ce, kl) in seen:
        torch.testing.assert_close(loss, ce + 3 * kl)
    assert [row["step"] for row in curve] == [0, 2, 4, 5] and "ce" not in curve[0]
    for row, (start, end) in zip(curve[1:], [(0, 2), (2, 4), (4, 5)]):
        ces, kls = zip(*((ce.item(), kl.item()) for _, (_, ce, kl) in seen[start:end]))
        assert (row["ce"], row["kl"]) == pytest.approx((mean(ces), mean(kls)))
    assert (curve[-1]["kl"] > 0) == (name == "mol")


@pytest.mark.parametrize("direction", ["reverse", "forward", "mean"])
def test_mol_is_the_mixture_with_the_settings_of_the_run(direction):
    s = train.parse(tiny("--kl", direction, "--strength", 3))
    (world, base), (_, model) = untrained(s), untrained(s, seed=1)
    batch = next(train.data.batches(world.domain, world.general, 2, 2, s.block_size, 0))
    assert train.mol_loss(model, base, batch, s) == losses.mixture_of_losses(
        model(batch.tokens), batch.targets, batch.is_domain, base(batch.tokens[2:]), direction, 3.0)


def test_a_method_of_your_own_gets_a_frozen_plain_base_and_what_it_prepared(monkeypatch):
    """Its weight decay shrinks the matrices, not the gains, and no frozen matrix of LoRA."""
    def own(model, base, batch, s, prepared):
        assert prepared == "for seed 0" and not is_parametrized(base.head)
        assert not any(weight.requires_grad for weight in base.parameters())
        loss = 0 * model(batch.tokens).sum()
        return loss, loss, loss

    for rank, weight_decay, shrunk in [(0, 0.1, 0.1), (0, 0.0, 0.0), (2, 0.1, 0.0)]:
        monkeypatch.setitem(METHODS, "own", Method(
            own, False, weight_decay, lambda base, world, s, seed: f"for seed {seed}"))
        s = train.parse(tiny("--steps", 1, "--lora-rank", rank))
        world, base = untrained(s)
        model, _ = train.continue_pretraining("own", s, 0, world, base, lambda model: {})
        expected = (1 - shrunk * s.lr) * base.head.weight
        assert torch.allclose(model.head.weight, expected, rtol=1e-6, atol=0)
        assert torch.equal(model.ln_f.weight, base.ln_f.weight)


def test_bfloat16_trains_and_metrics_are_float32():
    s, found = train.parse(tiny("--dtype", "bfloat16", "--steps", 2)), set()
    world, base = untrained(s)
    base.register_forward_hook(lambda model, tokens, logits: found.add(
        ("trained" if torch.is_grad_enabled() else "tested", logits.dtype)))  # copies have it, too
    train.continue_pretraining("ce", s, 0, world, base,
                               lambda model: eval.evaluate(model, model, world))
    assert found == {("trained", torch.bfloat16), ("tested", torch.float32)}


@pytest.mark.parametrize("device, native, dtype", [
    ("cuda", True, "bfloat16"), ("cuda", False, "float32"), ("mps", True, "float32"),
    (None, False, "float32")])
def test_auto_is_the_accelerator_and_its_dtype(monkeypatch, device, native, dtype):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: device and torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    s = train.parse([])
    assert (s.device, s.dtype) == (device or "cpu", dtype)
    s = train.parse(["--device", "cpu", "--dtype", "bfloat16"])
    assert (s.device, s.dtype) == ("cpu", "bfloat16")
