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

import train

ROOT = Path(__file__).parent.parent
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--base-steps", "3", "--base-batch-size", "4",
        "--steps", "4", "--batch-size", "2", "--eval-every", "2", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def quick_worlds():
    """A world takes a second to make, and is only read: make each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "toy_world", functools.cache(train.data.toy_world))
        yield


def run(out, *more):
    return train.main(["--out", str(out), *TINY, *map(str, more)])


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A base that has read a little and is then continued: enough to see who forgets."""
    out = tmp_path_factory.mktemp("short")
    assert run(out, "--n-embd", 64, "--base-steps", 150, "--base-batch-size", 16, "--steps", 40, "--batch-size", 8,
               "--eval-every", 20) == 0
    return out


def test_ce_forgets_more_than_mol(short):
    base, *_ = rows(short)
    end = {row["method"]: row for row in rows(short)}
    assert list(end) == ["base", "ce", "replay", "mol"]
    lost = {method: row["general_loss"] - base["general_loss"] for method, row in end.items()}
    assert lost["ce"] > lost["mol"] + 1.0 and end["ce"]["kl_to_base"] > 3 * end["mol"]["kl_to_base"]
    assert all(end[method]["domain_loss"] < base["domain_loss"] - 2 for method in ("ce", "replay", "mol"))


def test_what_a_run_leaves(short):
    assert {path.name for path in short.iterdir()} == {"metrics.jsonl", "settings.json", "seed0", "forgetting.png", "tradeoff.png"}
    assert {path.name for path in (short / "seed0").iterdir()} == {"world.pt", "base.pt", "ce.pt", "replay.pt", "mol.pt"}
    found = rows(short)
    assert [(row["method"], row["step"]) for row in found] == [("base", 0)] + [
        (method, step) for method in ("ce", "replay", "mol") for step in (0, 20, 40)]
    for row in found:
        assert set(row) == {"method", "seed", "step", "general_loss", "domain_loss", "kl_to_base", "accuracy"}
        assert all(0 <= share <= 1 for share in row["accuracy"].values())


def test_the_table_from_checkpoints_is_the_table_of_the_run(short, capsys):
    import eval as marking
    assert not marking.main(["--out", str(short)])
    again = capsys.readouterr().out.strip()
    assert again == marking.table(rows(short))


def test_the_same_seed_is_bit_identical(tmp_path):
    assert run(tmp_path / "a", "--seed", 3) == run(tmp_path / "b", "--seed", 3) == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert run(tmp_path / "c", "--seed", 4) == 0
    assert rows(tmp_path / "a")[0]["general_loss"] != rows(tmp_path / "c")[0]["general_loss"]


def test_several_seeds(tmp_path, capsys):
    assert run(tmp_path, "--seed", 0, 1, "--methods", "mol") == 0
    assert [(row["method"], row["seed"]) for row in rows(tmp_path) if row["step"] == 0] == [
        ("base", 0), ("mol", 0), ("base", 1), ("mol", 1)]
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| mol"))
    assert line.count("(") == 7  # every metric with its spread over seeds


def test_the_base_is_reused(tmp_path, capsys):
    def said(*more):
        assert run(*more) == 0
        return capsys.readouterr().out

    one, two = tmp_path / "one", tmp_path / "two"
    assert "reused from" not in said(one)
    first = rows(one)
    assert "reused from" in said(one, "--kl", "forward")
    assert {now["method"] for now, before in zip(rows(one), first, strict=True) if now != before} == {"mol"}
    assert "reused from" in said(one, "--general-errors", 0.1)
    assert {now["method"] for now, before in zip(rows(one), first, strict=True) if now != before} == {"replay", "mol"}
    assert "reused from" not in said(one, "--fresh")
    assert rows(one) == first  # the same base again, and nothing else of the earlier runs
    assert "reused from" in said(two, "--base", one)
    assert rows(two) == first
    assert "reused from" not in said(one, "--base-steps", 2)
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


def test_bad_text(tmp_path, capsys):
    good, short, empty, binary = (tmp_path / name for name in ("good", "short", "empty", "binary"))
    good.write_text("some words to learn from, " * 300)
    short.write_text("some words")
    empty.write_text("")
    binary.write_bytes(b"\0\1\2\xff")
    for bad, told in [(short, "too short"), (empty, "empty"), (binary, "not UTF-8")]:
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


@pytest.mark.parametrize("make", [blocked_by_a_file, blocked_seed, lambda out: out / ("x" * 300), lambda out: ""])
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
    assert run(tmp_path, "--methods", "ce") == 0 and run(tmp_path, "--methods", "mol") == 0
    assert not (tmp_path / "seed0" / "ce.pt").exists()
    assert (tmp_path / "holiday.png").read_text() == (tmp_path / "seed0" / "other.pt").read_text() == "mine"


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


@pytest.mark.parametrize("flags", [("--lr", 1e30, "--steps", 1), ("--base-lr", 1e30, "--base-steps", 1)])
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
    example, = re.findall(r"```python\n(def halfway.*?\n)\nMETHODS", (ROOT / "README.md").read_text(), re.DOTALL)
    scope = {"torch": torch, "losses": train.losses}
    exec(example, scope)
    monkeypatch.setitem(train.METHODS, "halfway", train.Method(scope["halfway"], reads_general=True))
    assert run(tmp_path, "--methods", "replay", "halfway") == 0
    assert {row["method"] for row in rows(tmp_path)} == {"base", "replay", "halfway"}


def test_own_text(tmp_path, capsys):
    (tmp_path / "general.txt").write_text("the cat sat on the mat and looked at the moon. " * 200)
    (tmp_path / "domain.txt").write_text("def f(x): return x + 1\n" * 300)
    out = tmp_path / "out"
    assert run(out, "--general", tmp_path / "general.txt", "--domain", tmp_path / "domain.txt") == 0
    assert all(row["accuracy"] == {} for row in rows(out))
    assert (out / "forgetting.png").exists() and "no-think" not in capsys.readouterr().out


def test_what_each_method_reads(tmp_path):
    """The same domain rows in the same order for all; the base reads general rows alone, and stays as it is."""
    s = train.parse(["--steps", "3", "--batch-size", "2", "--n-layer", "1", "--n-embd", "32"])
    world = train.make_world(s, 0, "cpu")
    base = train.GPT(train.config_of(s, world)).requires_grad_(False)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    read_by_base, read = {}, {}
    base.register_forward_hook(lambda module, inputs, _: read_by_base[method].append(inputs[0]) if module is base else None)
    for method, row in train.METHODS.items():
        read[method], read_by_base[method] = [], []

        def spy(model, frozen, batch, s, *prepared):
            read[method].append(batch)
            return row.loss(model, frozen, batch, s, *prepared)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train.METHODS, method, row._replace(loss=spy))
            train.continue_training(method, s, 0, world, base, torch.float32, lambda model, step: None)
    for ce, replay, mol in zip(read["ce"], read["replay"], read["mol"], strict=True):
        assert torch.equal(replay.tokens, mol.tokens) and torch.equal(ce.tokens, mol.tokens[:2]) and len(mol.tokens) == 4
        assert ce.is_domain.all() and mol.is_domain.tolist() == [True, True, False, False]
    for method in ("lwf", "l2sp", "ewc"):
        assert all(torch.equal(mine.tokens, ce.tokens) for mine, ce in zip(read[method], read["ce"], strict=True))
    assert [method for method, tokens in read_by_base.items() if tokens] == ["mol", "lwf"]
    assert all(torch.equal(tokens, batch.tokens[2:]) for tokens, batch in zip(read_by_base["mol"], read["mol"], strict=True))
    assert all(torch.equal(tokens, batch.tokens) for tokens, batch in zip(read_by_base["lwf"], read["lwf"], strict=True))
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


def test_strength_weighs_what_protects_the_base():
    """At strength 0 only the cross-entropy is left; what comes on top grows with it, and is nothing for the base itself."""
    s = train.parse(["--steps", "1", "--batch-size", "2", "--n-layer", "1", "--n-embd", "32"])
    world = train.make_world(s, 0, "cpu")
    base = train.GPT(train.config_of(s, world)).requires_grad_(False)
    model = train.GPT(train.config_of(s, world))
    mixed, domain = (next(train.data.batches(world.domain, world.general, 2, n, s.block_size, 0)) for n in (2, 0))
    fisher = train.fisher(base, world, s, 0)
    for method, batch, more in [("mol", mixed, []), ("lwf", domain, []), ("l2sp", domain, []), ("ewc", domain, [fisher])]:
        def loss(model, strength):
            return train.METHODS[method].loss(model, base, batch, dataclasses.replace(s, strength=strength), *more).item()

        left = train.ce(model, base, domain, s).item() / (2 if method == "mol" else 1)  # mol's mean is over all four rows
        assert loss(model, 0.0) == pytest.approx(left, rel=1e-5)
        assert loss(model, 1.0) > left + 1e-4
        assert loss(model, 30.0) - left == pytest.approx(30 * (loss(model, 1.0) - left), rel=1e-2)
        assert loss(base, 30.0) == pytest.approx(loss(base, 0.0), abs=1e-5)


def test_lwf_distils_by_forward_kl():
    """One token, p = (1/2, 1/2) and the base's q = (1/4, 3/4): log 2 + KL[q || p], whatever --kl says."""
    def says(*p):
        return lambda tokens: torch.tensor([[p]]).log()  # (1, 1, 2)

    batch = train.data.Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([True]))
    loss = train.lwf(says(0.5, 0.5), says(0.25, 0.75), batch, train.Settings(strength=2.0))
    assert loss.item() == pytest.approx(math.log(2) + 2 * (0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)))


def test_only_what_has_no_anchor_decays_to_zero():
    """A loss that is flat leaves l2sp and ewc at the base; the matrices of the others shrink a little."""
    s = train.parse([*TINY, "--steps", "1"])
    world = train.make_world(s, 0, "cpu")
    base = train.GPT(train.config_of(s, world))
    for method, row in train.METHODS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(train.METHODS, method, row._replace(loss=lambda model, *rest: 0 * model(rest[1].tokens).sum()))
            model = train.continue_training(method, s, 0, world, base, torch.float32, lambda model, step: None)
        left = 1.0 if method in ("l2sp", "ewc") else 1 - 0.1 * s.lr
        assert torch.allclose(model.head.weight, left * base.head.weight, rtol=1e-6, atol=0), method


def test_lora(tmp_path):
    """Adapters learn the domain, a checkpoint is a plain GPT again, and mol holds to the frozen weights inside the model."""
    assert run(tmp_path, "--lora-rank", 2, "--lr", 1e-2, "--methods", "ce", "mol") == 0
    base, *_, ce, mol = (rows(tmp_path)[i] for i in (0, 3, 6))
    assert base["domain_loss"] > ce["domain_loss"] + 0.01 and base["domain_loss"] > mol["domain_loss"] + 0.01
    from eval import load_model
    saved = {name: load_model(tmp_path / "seed0" / f"{name}.pt").state_dict() for name in ("base", "ce")}
    assert torch.equal(saved["base"]["position_embedding.weight"], saved["ce"]["position_embedding.weight"])
    s = train.parse([*TINY, "--lora-rank", "2", "--lr", "1e-2"])
    world = train.make_world(s, 0, "cpu")
    first = load_model(tmp_path / "seed0" / "base.pt")
    tokens = world.general[:64][None]
    held = []

    def spy(model, frozen, batch, s):
        held.append((frozen(tokens), model(tokens)))
        return train.mol(model, frozen, batch, s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.METHODS, "mol", train.Method(spy, reads_general=True))
        train.continue_training("mol", s, 0, world, first, torch.float32, lambda model, step: None)
    assert all(torch.equal(frozen, first(tokens)) for frozen, _ in held) and not torch.equal(held[-1][1], first(tokens))
    for name in ("blocks.0.attn.qkv.weight", "token_embedding.weight"):
        assert torch.linalg.matrix_rank(saved["ce"][name] - saved["base"][name], rtol=1e-3) == 2


def test_the_base_that_is_kept_is_the_best_on_held_out_text(tmp_path, capsys):
    """Digits thrown by a die are learnt by heart, and the held-out loss turns."""
    die = random.Random(0)
    for name in ("general", "domain"):
        (tmp_path / name).write_text("".join(die.choice("0123456789") for _ in range(2000)))
    assert run(tmp_path / "out", "--general", tmp_path / "general", "--domain", tmp_path / "domain", "--n-embd", 64,
               "--base-steps", 200, "--base-lr", 1e-2, "--base-batch-size", 16, "--methods", "ce") == 0
    step, loss = re.search(r"kept from step (\d+), .*: ([\d.]+) nats", capsys.readouterr().out).groups()
    assert int(step) < 200
    assert rows(tmp_path / "out")[0]["general_loss"] == pytest.approx(float(loss), abs=1e-3)


def test_dtype_and_device(monkeypatch):
    assert train.choose_dtype("bfloat16", "cpu") == torch.bfloat16
    assert train.choose_dtype("auto", "mps") == torch.float32
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
        assert train.choose_dtype("auto", "cuda") == train.choose_dtype("auto", "cpu") == expected
    assert train.choose_device("cpu") == "cpu" and train.choose_device("auto") in ("cuda", "mps", "cpu")


def test_bfloat16_runs(tmp_path):
    assert run(tmp_path / "half", "--dtype", "bfloat16") == run(tmp_path / "full", "--dtype", "float32") == 0
    half, full = rows(tmp_path / "half")[-1], rows(tmp_path / "full")[-1]
    assert half["general_loss"] != full["general_loss"] == pytest.approx(half["general_loss"], abs=0.1)


def test_as_a_program(tmp_path):
    """From another folder, as a user types it: help is a page, bad input a line and code 2."""
    def program(*arguments):
        return subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": "100"})

    shown = program("--help")
    assert shown.returncode == 0 and all("--" + f.name.replace("_", "-") in shown.stdout for f in train.fields(train.Settings))
    refused = program("--ratio", "-1")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
    assert list(tmp_path.iterdir()) == []
