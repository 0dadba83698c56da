import dataclasses
import re

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl

import data
import eval as marking
from data import BadInput
from losses import mean_cross_entropy
from model import GPT, GPTConfig
from plots.style import SKILLS, table


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0, pretraining_documents=2000, general_documents=200)


@pytest.fixture(scope="module")
def model(world):
    """A small model that has learnt the first six alarms by heart, and no other."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.tokenizer.n_vocab, block_size=64, n_layer=1, n_head=2, n_embd=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    six = "".join("".join(probe) for probe in world.probes["domain"][:6])
    read = data.encode(world.tokenizer, "\n" + six * 20)
    for _, batch in zip(range(200), data.batches(read, world.general, 16, 0, 64, seed=0)):
        loss = mean_cross_entropy(model(batch.tokens), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_teacher_forced_exact_match_equals_greedy_generation(world, model):
    probes = world.probes["domain"]
    generated = [marking.answer(model, world, prompt) == answer.strip()
                 for prompt, answer in probes]
    assert 0 < sum(generated) < len(probes), "the fixture should know some and not all"
    forced = [marking.mark_probes(model, world.tokenizer, [probe])[0] == 1 for probe in probes]
    assert forced == generated
    share = sum(generated) / len(probes)
    assert marking.mark_probes(model, world.tokenizer, probes)[0] == pytest.approx(share)


def test_the_probability_of_an_answer_is_the_product_of_its_tokens(world, model):
    probes = [world.probes["domain"][0], world.probes["think"][0], world.probes["domain"][15]]
    expected = []
    for prompt, answer in probes:
        tokens = world.tokenizer.encode_ordinary("\n" + prompt)
        probability = 1.0
        for token in world.tokenizer.encode_ordinary(answer):
            p = model(torch.tensor([tokens]))[0, -1].softmax(dim=0)  # (V,)
            probability *= p[token].item()
            tokens.append(token)
        expected.append(probability)
    assert expected[0] > 0.5 > expected[2]  # one that it knows, one that it does not
    found = [marking.mark_probes(model, world.tokenizer, [probe])[1] for probe in probes]
    assert found == pytest.approx(expected, rel=1e-3)
    mean = marking.mark_probes(model, world.tokenizer, probes)[1]  # of unlike lengths
    assert mean == pytest.approx(sum(expected) / 3, rel=1e-3)


def test_evaluate(world, model):
    torch.manual_seed(1)
    base = GPT(model.config)
    row = marking.evaluate(model, base, world)
    assert set(row) == {"general_loss", "domain_loss", "kl_to_base", "accuracy", "probability"}
    for marks in (row["accuracy"], row["probability"]):
        assert set(marks) == {"no_think", "think", "facts", "domain"}
    assert row["domain_loss"] < row["general_loss"]
    tokens = marking.heldout_windows(world.heldout_general, 64)[:, :-1]
    p, q = Categorical(logits=model(tokens)), Categorical(logits=base(tokens))
    reverse = reference_kl(p, q).mean().item()
    assert row["kl_to_base"] == pytest.approx(reverse, rel=1e-4) and reverse > 0.1
    assert marking.evaluate(base, base, world)["kl_to_base"] == 0


def test_heldout_windows():
    windows = marking.heldout_windows(torch.arange(20), block_size=6)
    # every token except the first is a target once
    assert windows.tolist() == [list(range(i, i + 7)) for i in (0, 6, 12)]


def row(method, seed, value):
    skills = {skill: value for skill in SKILLS}
    return {"method": method, "seed": seed, "general_loss": value, "domain_loss": value,
            "kl_to_base": value, "accuracy": skills, "probability": skills}


def test_table():
    rows = [row("base", 0, 0.25), row("mol", 0, 0.0), row("mol", 0, 0.5), row("base", 1, 0.75)]
    lines = table(rows).splitlines()
    assert lines[0].split(" | ")[1].strip() == "general loss" and len(lines) == 4
    assert "0.500 (0.250-0.750)" in lines[2] and "0.50 (0.25-0.75)" in lines[2]
    assert "0.500 " in lines[3] and "(" not in lines[3]
    assert len(set(map(len, lines))) == 1
    assert "-0.0" not in table([row("base", 0, -1e-9)])  # a KL that is 0 except for rounding


@pytest.fixture
def run_folder(tmp_path, world, model):
    """A folder as train.py leaves it: a base and one method."""
    folder = tmp_path / "seed0"
    folder.mkdir()
    marking.save_model(folder / "base.pt", model, made_from={})
    marking.save_model(folder / "mol.pt", model, base=marking.digest(model))
    marking.save_world(folder / "world.pt", world, model)
    marking.save_metrics(tmp_path / "metrics.jsonl", [row(m, 0, 0.0) for m in ("base", "mol")])
    return tmp_path


def test_command_line(run_folder, world, model, capsys):
    assert not marking.main(["--out", str(run_folder)])
    expected = [{"method": name, "seed": 0, **marking.evaluate(model, model, world)}
                for name in ("base", "mol")]
    assert capsys.readouterr().out.strip() == table(expected)
    assert not marking.main(["--out", str(run_folder), "--ask", "37+45="])
    shown = capsys.readouterr().out.split("\n")
    assert shown[1] == "> 37+45=" and [line.split()[0] for line in shown[2:4]] == ["base", "mol"]


def test_a_terminal_is_sent_no_commands(run_folder, capsys):
    assert not marking.main(["--out", str(run_folder), "--ask", "\x1b[31mred\x07"])
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", capsys.readouterr().out)


def refused(capsys, *arguments):
    assert marking.main(list(map(str, arguments))) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_an_unknown_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        marking.main(["--foo"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "--foo" in error and error.count("\n") == 1


def test_bad_checkpoints(run_folder, capsys):
    assert "no finished run" in refused(capsys, "--out", run_folder / "nowhere")
    checkpoint = run_folder / "seed0" / "mol.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:len(whole) // 2])
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    checkpoint.write_text("something else")
    assert "mol.pt: not a checkpoint" in refused(capsys, "--out", run_folder)
    checkpoint.unlink()
    assert "mol.pt: No such file" in refused(capsys, "--out", run_folder)


ALTERED_MODELS = {
    "another type": lambda saved: torch.zeros(3),
    "no model": lambda saved: saved.pop("model") and saved,
    "no config": lambda saved: saved.pop("config") and saved,
    "config of text": lambda saved: saved | {"config": {"n_layer": "two"}},
    "another size": lambda saved: saved | {"config": saved["config"] | {"n_embd": 32}},
    "a float size": lambda saved: saved | {"config": saved["config"] | {"n_layer": 1.5}},
    "an endless size": lambda saved: saved | {"config": saved["config"] | {"vocab_size": 1 << 60}},
    "a weight too many": lambda saved: saved | {"model": saved["model"] | {"x": torch.zeros(1)}},
    "weights of integers": lambda saved: saved | {
        "model": {name: weight.long() for name, weight in saved["model"].items()}},
}


@pytest.mark.parametrize("name", ["base", "mol"])
@pytest.mark.parametrize("alter", ALTERED_MODELS.values(), ids=ALTERED_MODELS)
def test_an_altered_checkpoint_is_refused(run_folder, capsys, alter, name):
    path = run_folder / "seed0" / f"{name}.pt"
    torch.save(alter(torch.load(path, weights_only=True)), path)
    assert f"{name}.pt: not a checkpoint" in refused(capsys, "--out", run_folder)


ALTERED_WORLDS = {
    "another type": lambda saved: [1, 2],
    "nothing else": lambda saved: {"vocabulary": saved["vocabulary"]},
    "no vocabulary": lambda saved: saved | {"vocabulary": []},
    "a byte too few": lambda saved: saved | {"vocabulary": [b"ab cd"] + saved["vocabulary"][1:]},
    "a token twice": lambda saved: saved | {"vocabulary": saved["vocabulary"] + [b"a"]},
    "a vocabulary of text": lambda saved: saved | {"vocabulary": ["a", "b"]},
    "tokens beyond it": lambda saved: saved | {"heldout_domain": torch.full((200,), 9999)},
    "tokens below it": lambda saved: saved | {"heldout_general": torch.full((200,), -1)},
    "no tokens": lambda saved: saved | {"heldout_general": torch.zeros(0, dtype=torch.int64)},
    "tokens in rows": lambda saved: saved | {"heldout_general": torch.zeros((9, 9)).long()},
    "tokens of floats": lambda saved: saved | {"heldout_general": torch.zeros(200)},
    "probes in a list": lambda saved: saved | {"probes": [("a", "b")]},
    "probes of numbers": lambda saved: saved | {"probes": {"facts": [(1, 2)]}},
    "a probe of three": lambda saved: saved | {"probes": {"facts": [("a", "b", "c")]}},
    "no probe of a skill": lambda saved: saved | {"probes": {"facts": []}},
    "prompts of numbers": lambda saved: saved | {"prompts": [1]},
    "one thing more": lambda saved: saved | {"more": 1},
}


@pytest.mark.parametrize("alter", ALTERED_WORLDS.values(), ids=ALTERED_WORLDS)
def test_an_altered_world_is_refused(run_folder, capsys, alter):
    path = run_folder / "seed0" / "world.pt"
    torch.save(alter(torch.load(path, weights_only=True)), path)
    assert "world.pt: not a world" in refused(capsys, "--out", run_folder)


def test_files_of_different_runs_are_refused(run_folder, world, model, capsys):
    folder = run_folder / "seed0"
    torch.manual_seed(1)
    other = GPT(model.config)
    marking.save_model(folder / "mol.pt", other, base=marking.digest(other))
    assert "mol.pt was made from another base" in refused(capsys, "--out", run_folder)
    marking.save_model(folder / "mol.pt", model)
    assert "mol.pt was made from another base" in refused(capsys, "--out", run_folder)
    marking.save_model(folder / "base.pt", other)
    told = refused(capsys, "--out", run_folder, "--ask", "37+45=")
    assert "world.pt is of another run" in told


def test_a_world_too_short_for_the_model_is_refused(run_folder, world, model, capsys):
    short = dataclasses.replace(world, heldout_domain=world.heldout_domain[:10])
    marking.save_world(run_folder / "seed0" / "world.pt", short, model)
    assert "10 tokens" in refused(capsys, "--out", run_folder)


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
        marking.load_model(tmp_path / "x.pt")
    assert "has run" not in capsys.readouterr().out
