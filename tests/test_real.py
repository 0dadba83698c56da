"""real.py and questions.py with a tiny random model. Skipped without transformers."""

import gzip
import math
import sys

import pytest
import torch

pytest.importorskip("transformers")
from plots import runs  # noqa: E402
from plots.huggingface import questions, real  # noqa: E402
from test_recipe import save_bytes_model  # noqa: E402

WORDS = "active basic common direct early fast given hybrid inner joint known local".split()
VERA = "ZZZ\n  A Game (slang)\n \n" + "".join(
    f"{word[0].upper()}XY\n  {word} eXchange (ATM, UNI)\n \n" for word in WORDS)
WORDNET = "".join(f"{word}\n    n 1: a word that is read\n         in this test [syn: {{other}}]\n"
                  for word in WORDS) + """two\n    n 1: a word that has two meanings
    2: another one\niron\n    n 1: a heavy metallic element that is not asked\nlast\n"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model in bfloat16, its tokenizer, and small dictionaries."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vera").write_bytes(gzip.compress(VERA.encode()))
    (folder / "wordnet").write_bytes(gzip.compress(WORDNET.encode()))
    save_bytes_model(folder, torch.bfloat16,
                     chat_template="user {{ messages[0].content }} assistant ")
    return folder


@pytest.fixture
def program(folder, tmp_path, monkeypatch, capsys):
    """(flags) -> exit code, output and errors of real.py, on ten countries and short texts."""
    ten = dict([*questions.countries().items()][:10])
    monkeypatch.setattr(questions, "countries", lambda: ten)
    monkeypatch.setattr("pydoc_data.topics.topics", {x: f"the topic {x} " * 99 for x in WORDS})

    def run(**changed):
        flags = {"model": folder, "vera": folder / "vera", "wordnet": folder / "wordnet",
                 "steps": 2, "seed": 3, "out": tmp_path, **changed}
        with pytest.raises(SystemExit) as ended:
            real.main([str(x) for name, value in flags.items() for x in (f"--{name}", value)])
        return ended.value.code, *capsys.readouterr()
    return run


def test_each_run_differs_from_the_others_and_is_made_once(program, tmp_path):
    (code, output, errors), count = program(), len(real.SEARCH)
    assert code == 0 and f"{count} runs, {count} to make" in output, errors
    assert all(f"| {label} " in output for label in real.RUNS) and (tmp_path / "real.png").exists()
    lines = runs.read_runs(tmp_path / "runs.jsonl", real.Settings()).values()
    kl = [line["rows"][1]["kl_to_base"] for line in lines]
    assert 0 not in kl and len(lines) == count
    assert len({*kl}) >= count - 1  # so little training may give two runs the same rounded KL
    near = {line["settings"]["share"]: x for line, x in zip(lines, kl) if line["method"] == "ce"}
    assert near[0.25] < near[0.5] < near[0.75]  # interpolated: the more, the further
    assert f"{count} runs, 0 to make" in program()[1]


def test_the_options_have_the_probabilities_that_whole_rows_give(folder):
    model, tokenizer = real.load(folder)
    assert model.dtype == torch.float32  # though it is saved in bfloat16
    options, asked = ("b", "cd", "efg", "h i"), ["a text", "other", "a", "and a last"]
    found = real.probabilities(model, tokenizer, [real.Question("", "", x, options) for x in asked])
    for text, probabilities in zip(asked, found):
        nats, start = torch.zeros(4), len(tokenizer.encode(text))
        for i, row in enumerate(tokenizer.encode(f"{text} {option}") for option in options):
            log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)  # (T, V)
            nats[i] = log_p[range(start - 1, len(row) - 1), row[start:]].sum()
        assert (torch.tensor(probabilities).log() - nats.log_softmax(0)).abs().max() < 0.3


def test_the_general_texts(folder):
    settings = real.Settings(steps=6, length=96, wordnet=folder / "wordnet")
    model, tokenizer = real.load(folder)
    texts = questions.general_texts(settings, model, tokenizer)
    assert {len(rows) for rows in texts.values()} == {24}
    right, wrong = ("".join(map(tokenizer.decode, texts[text])) for text in ("right", "wrong"))
    assert "Gabon is Libreville" in right and "Gabon is Lib" not in wrong and "Gabon is" in wrong
    for before, after in zip(texts["right"], texts["answers"]):
        logits = model(torch.tensor([after])).logits[0, 23:-1, 1:]  # without <end>
        assert after[:24] == before[:24] and (logits.argmax(-1) + 1).tolist() == after[24:]
    assert {row[0] for row in texts["samples"]} == {tokenizer.eos_token_id}
    assert {tokenizer.decode(row) for row in texts["chats"][12:]} == {
        f"user What does {word} mean? assistant a word that is read in this test<end>"
        for word in WORDS}


def test_the_subjects_of_the_questions_are_those_of_the_committed_runs():
    asked = questions.all_questions({"ABR": ("a", "b", "c", "d")}, ["In Fiji"])
    found = dict(zip([q.begun for q in asked], questions.subjects("".join(q.kind for q in asked))))
    assert "dCcre" == "".join(found[begun] for begun in (
        "The abbreviation ABR is short for", "The capital of Fiji is", "The capital of Mali is",
        "Fiji is a country in", "The chemical symbol of Iron is"))
    lines = runs.read_runs(runs.HERE / "runs.jsonl", real.Settings()).values()
    kinds, = {line["rows"][0]["kinds"] for line in lines if line["work"] == "on_a_real_model"}
    assert len(kinds) - real.FACTS == len(asked) - 1 and kinds.count("d") == real.FACTS


def test_the_interval_holds_questions_and_seeds():
    def seed(right, elements="n" * questions.ELEMENTS):
        return [{"kinds": "d" * len(right) + elements}, {"plain": {"right": right + elements}}]
    half = seed("10" * 100)
    middle, low, high = real.interval([half], "plain", "d", "right")
    assert middle == 50 and 40 < low < 45 and 55 < high < 60
    assert real.interval([seed("1" * 50), seed("0" * 50)], "plain", "d", "right") == (50, 0, 100)
    assert real.interval([half], "plain", "d", "right", base=half) == (0, 0, 0)
    assert real.scores(seed("0111101111"), "plain", "d", "right", choice=True) == [0, 0]


@pytest.mark.parametrize("flags, told", [
    ({"model": "/no/folder"}, "--model /no/folder: "), ({"vera": "/no/file"}, "'/no/file'; apt"),
    ({}, "the loss is no longer a number"), ({}, "peft")])
def test_bad_input_is_one_message(flags, told, tmp_path, program, monkeypatch):
    monkeypatch.setattr(real, "test", lambda *given: {"prose_loss": math.nan})
    if told == "peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    code, _, errors = program(**flags)
    assert code == 2 and told in errors.splitlines()[-1] and errors.count("error: ") == 1
    assert not (tmp_path / "runs.jsonl").exists()
