import json
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl

import data
import eval as marking
from data import BadInput
from losses import mean_cross_entropy
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0, pretraining_documents=2000, general_documents=200)


@pytest.fixture(scope="module")
def model(world):
    """A small model that has learnt the first six alarms by heart, and no other."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.tokenizer.n_vocab, block_size=64, n_layer=1, n_head=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    read = data.encode(world.tokenizer, "\n" + "".join("".join(probe) for probe in world.probes["domain"][:6]) * 20)
    for _, batch in zip(range(200), data.batches(read, world.general, 16, 0, 64, seed=0)):
        loss = mean_cross_entropy(model(batch.tokens), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_teacher_forced_exact_match_equals_greedy_generation(world, model):
    probes = world.probes["domain"]
    generated = [marking.answer(model, world, prompt) == answer.strip() for prompt, answer in probes]
    assert 0 < sum(generated) < len(probes), "the fixture should know some and not all"
    forced = [marking.exact_match(model, world.tokenizer, [probe]) == 1 for probe in probes]
    assert forced == generated
    assert marking.exact_match(model, world.tokenizer, probes) == pytest.approx(sum(generated) / len(probes))


def test_evaluate(world, model):
    torch.manual_seed(1)
    base = GPT(model.config)
    row = marking.evaluate(model, base, world, 64)
    assert set(row) == {"general_loss", "domain_loss", "kl_to_base", "accuracy"}
    assert set(row["accuracy"]) == {"no_think", "think", "facts", "domain"}
    assert row["domain_loss"] < row["general_loss"]
    tokens = marking.heldout_windows(world.heldout_general, 64)[:, :-1]
    reverse = reference_kl(Categorical(logits=model(tokens)), Categorical(logits=base(tokens))).mean().item()
    assert row["kl_to_base"] == pytest.approx(reverse, rel=1e-4) and reverse > 0.1
    assert marking.evaluate(base, base, world, 64)["kl_to_base"] == 0


def test_heldout_windows():
    windows = marking.heldout_windows(torch.arange(20), block_size=6)
    assert windows.tolist() == [list(range(i, i + 7)) for i in (0, 6, 12)]  # every token but the first is a target once


def row(method, seed, value):
    skills = {skill: value for skill in marking.SKILLS}
    return {"method": method, "seed": seed, "general_loss": value, "domain_loss": value, "kl_to_base": value, "accuracy": skills}


def test_table():
    lines = marking.table([row("base", 0, 0.25), row("mol", 0, 0.0), row("mol", 0, 0.5), row("base", 1, 0.75)]).splitlines()
    assert lines[0].split(" | ")[1].strip() == "general loss" and len(lines) == 4
    assert "0.500 (0.250-0.750)" in lines[2] and "0.50 (0.25-0.75)" in lines[2]
    assert "0.500 " in lines[3] and "(" not in lines[3]
    assert len(set(map(len, lines))) == 1


@pytest.fixture
def run_folder(tmp_path, world, model):
    """A folder as train.py leaves it: a base and one method."""
    folder = tmp_path / "seed0"
    folder.mkdir()
    for name in ("base", "mol"):
        torch.save({"config": vars(model.config), "model": model.state_dict()}, folder / f"{name}.pt")
    vocabulary = [world.tokenizer.decode_single_token_bytes(t) for t in range(world.tokenizer.n_vocab)]
    torch.save({"vocabulary": vocabulary, "heldout_general": world.heldout_general, "heldout_domain": world.heldout_domain,
                "probes": world.probes, "prompts": world.prompts}, folder / "world.pt")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(m, 0, 0.0)) + "\n" for m in ("base", "mol")))
    return tmp_path


def test_command_line(run_folder, world, model, capsys):
    assert not marking.main(["--out", str(run_folder)])
    expected = [{"method": name, "seed": 0, **marking.evaluate(model, model, world, 64)} for name in ("base", "mol")]
    assert capsys.readouterr().out.strip() == marking.table(expected)
    assert not marking.main(["--out", str(run_folder), "--ask", "37+45="])
    shown = capsys.readouterr().out.split("\n")
    assert shown[1] == "> 37+45=" and [line.split()[0] for line in shown[2:4]] == ["base", "mol"]


def refused(capsys, *arguments):
    assert marking.main(list(map(str, arguments))) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_bad_checkpoints(run_folder, capsys):
    assert "no finished run" in refused(capsys, "--out", run_folder / "nowhere")
    checkpoint = run_folder / "seed0" / "mol.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:len(whole) // 2])
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    checkpoint.write_text("something else")
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    torch.save({"weights": torch.zeros(3)}, checkpoint)
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    other = GPT(GPTConfig(300, 64, 1, 2, 64))
    torch.save({"config": vars(other.config), "model": other.state_dict()}, checkpoint)
    assert "another size" in refused(capsys, "--out", run_folder)
    torch.save(torch.zeros(3), checkpoint)
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    checkpoint.unlink()
    assert "mol.pt: No such file" in refused(capsys, "--out", run_folder)


def test_a_base_of_another_vocabulary(run_folder, capsys):
    other = GPT(GPTConfig(300, 64, 1, 2, 64))
    torch.save({"config": vars(other.config), "model": other.state_dict()}, run_folder / "seed0" / "base.pt")
    assert "different runs" in refused(capsys, "--out", run_folder, "--ask", "37+45=")


@pytest.mark.parametrize("damage", [lambda saved: [1, 2], lambda saved: {"vocabulary": saved["vocabulary"]}])
def test_bad_world(run_folder, capsys, damage):
    path = run_folder / "seed0" / "world.pt"
    torch.save(damage(torch.load(path, weights_only=True)), path)
    assert "world.pt: not a" in refused(capsys, "--out", run_folder)


@pytest.mark.parametrize("content", ["", '{"method": "base", "se', '{"method": "base"}', "[1]"])
def test_bad_metrics(run_folder, capsys, content):
    (run_folder / "metrics.jsonl").write_text(content)
    assert "metrics.jsonl" in refused(capsys, "--out", run_folder)


class Evil:
    def __reduce__(self):
        return print, ("code from a checkpoint has run",)


def test_a_foreign_file_runs_no_code(tmp_path, capsys):
    torch.save(Evil(), tmp_path / "x.pt")
    with pytest.raises(BadInput):
        marking.load(tmp_path / "x.pt")
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics", "control"])
def test_the_tables_of_the_readme_are_those_of_the_committed_metrics(name):
    root = Path(__file__).parent.parent
    rows = [json.loads(line) for line in (root / "plots" / f"{name}.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert marking.table(rows) in (root / "README.md").read_text()
