import re

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl

import data
import eval
import train
from data import BadInput, encode
from eval import (evaluate, heldout_losses, heldout_windows, load_model, save_model, score_probes,
                  show_answers, show_tokens, write_file)
from model import GPT, GPTConfig
from plots.program import printable


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0, pretraining_documents=2000, general_documents=200)


@pytest.fixture(scope="module")
def model(world):
    """A small model that has learnt the first six alarms by heart, and no other."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(world.tokenizer.n_vocab, block_size=64, n_layer=1, n_head=2, n_embd=32))
    settings = train.Settings(device="cpu", dtype="float32")
    six = "".join("".join(probe) for probe in world.probes["domain"][:6])
    text = data.encode(world.tokenizer, "\n" + six * 20)
    list(train.optimise(
        model, lambda batch: train.next_token_loss(model, None, batch, settings),
        data.batches(text, world.general, 8, 0, 64, seed=0), 200, 1e-2, settings, "six alarms"))
    return model


def test_exact_answers_are_those_of_greedy_generation_and_p_right_is_a_product(world, model):
    """The probability of an answer is the product over its tokens."""
    probes = world.probes["domain"]
    generated = [eval.answer(model, world, prompt) == right.strip() for prompt, right in probes]
    assert 0 < sum(generated) < len(probes)
    assert [score_probes(model, world.tokenizer, [probe])[0] for probe in probes] == generated
    share, _ = score_probes(model, world.tokenizer, probes)
    assert share == pytest.approx(sum(generated) / len(probes))

    probes, expected = [probes[0], world.probes["think"][0], probes[15]], []
    for prompt, answer in probes:
        tokens = world.tokenizer.encode_ordinary("\n" + prompt)
        probability = 1.0
        for token in world.tokenizer.encode_ordinary(answer):
            probability *= model(torch.tensor([tokens]))[0, -1].softmax(dim=0)[token].item()
            tokens.append(token)
        expected.append(probability)
    assert expected[0] > 0.5 > expected[2]  # one that the model knows, one that it does not
    found = [score_probes(model, world.tokenizer, [probe])[1] for probe in probes]
    assert found == pytest.approx(expected, rel=1e-3)
    mean = score_probes(model, world.tokenizer, probes)[1]  # of different lengths
    assert mean == pytest.approx(sum(expected) / 3, rel=1e-3)


def test_evaluate(world, model):
    torch.manual_seed(1)
    base = GPT(model.config)
    row = evaluate(model, base, world)
    assert set(row) == {"general_loss", "domain_loss", "kl_to_base", "accuracy", "probability"}
    skills = {"no_think", "think", "facts", "domain"}
    assert row["accuracy"].keys() == row["probability"].keys() == skills
    windows = heldout_windows(world.heldout_general, 64)
    p, q = (Categorical(logits=m(windows[:, :-1])) for m in (model, base))
    reverse = reference_kl(p, q).mean().item()
    assert row["kl_to_base"] == pytest.approx(reverse, rel=1e-4) and reverse > 0.1
    assert row["general_loss"] == pytest.approx(-p.log_prob(windows[:, 1:]).mean().item(), rel=1e-4)
    assert row["domain_loss"] < row["general_loss"]
    assert evaluate(base, base, world)["kl_to_base"] == 0

    sizes = []  # at most a window of logits at a time gives the same numbers as all at once
    base.register_forward_hook(lambda module, given, logits: sizes.append(len(logits)))
    losses = heldout_losses(model, world.heldout_general, base, at_once=1)
    assert losses == pytest.approx((row["general_loss"], row["kl_to_base"]), rel=1e-5)
    assert sizes == [1] * len(windows)


def test_heldout_windows_use_every_token_once_as_a_target():
    windows = heldout_windows(torch.arange(20), block_size=6)
    assert windows.tolist() == [list(range(i, i + 7)) for i in (0, 6, 12)]
    assert heldout_windows(torch.arange(21), 2, most=4)[:, 0].tolist() == [0, 6, 12, 18]


def test_answers_and_tokens_of_each_model_send_the_terminal_no_commands(world, model, capsys):
    (prompt, answer), models = world.probes["domain"][0], {"base": model, "mol": model}
    show_answers(models, world, [prompt, "\x1b[31mred\x07"])
    lines, right = capsys.readouterr().out.split("\n"), answer.strip()
    assert lines[:4] == ["", f"> {prompt}", f"  base  {right}", f"  mol   {right}"]
    assert lines[5] == "> ?[31mred?" and all(map(str.isprintable, lines))
    assert printable("a\nb\x9b\u202e é \U0001f98a") == "a\\nb?? é \U0001f98a"

    show_tokens(models, world, [prompt + answer, "\x1b" * 999])
    lines = capsys.readouterr().out.split("\n")
    assert lines[1].split() == ["token", "base", "mol"] and all(map(str.isprintable, lines))
    start, count = (len(encode(world.tokenizer, text)) for text in (prompt, answer))
    for line in lines[2 + start:2 + start + count]:  # the model knows the answer
        assert re.fullmatch(r"(\S.*?) +\1 (1\.00|0\.[5-9]\d) +\1 \2", line), line


class Foreign:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


def test_a_wrong_checkpoint_is_refused_and_runs_no_code(tmp_path, capsys, model):
    """It is missing or damaged, or has foreign code, no weights, or weights of another size."""
    path = tmp_path / "x.pt"
    save_model(path, model)
    saved, half = torch.load(path, weights_only=True), path.read_bytes()[:1000]
    other = {"config": saved["config"] | {"n_embd": 64}}
    for wrong in (None, half, Foreign(), {"config": saved["config"]}, saved | other):
        path.unlink(missing_ok=True)
        if wrong is half:
            path.write_bytes(half)
        elif wrong:
            torch.save(wrong, path)
        with pytest.raises(BadInput, match="x.pt: .*not a checkpoint"):
            load_model(path)
    assert not capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, write = tmp_path / "x", type(tmp_path).write_bytes

    def half(self, content):
        write(self, content[:1])
        raise OSError(28, "No space left on device")

    write_file(path, b"older")
    write_file(path, b"old")
    monkeypatch.setattr(type(path), "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
