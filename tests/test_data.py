import hashlib
import itertools
import random
import re

import pytest
import torch

import data
from data import BadInput

STREAMS = ("pretraining", "general", "domain", "heldout_general", "heldout_domain")


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0)


def text_of(world, name):
    return world.tokenizer.decode(getattr(world, name).tolist())


def all_kinds(seed=0):
    return {**data.general_kinds(random.Random(f"general {seed}")), "domain": data.alarms(random.Random(f"domain {seed}"))}


def test_the_same_seed_is_the_same_world_on_every_machine(world):
    """Pinned: any machine, Python or package that draws, merges or encodes otherwise fails here."""
    digest = hashlib.sha256()
    for name in STREAMS:
        digest.update(getattr(world, name).numpy().tobytes())
    digest.update(repr(world.probes).encode())
    assert digest.hexdigest()[:16] == "6305f1f76e258bc4"


def test_seeds_differ_and_repeat(world):
    again, other = (data.toy_world(seed) for seed in (0, 1))
    assert all(torch.equal(getattr(world, name), getattr(again, name)) for name in STREAMS)
    assert world.probes == again.probes and world.probes["facts"] != other.probes["facts"]


def test_splits_never_overlap(world):
    for kind in all_kinds().values():
        assert kind.train and kind.heldout and not set(kind.train) & set(kind.heldout)
    training = set("".join(text_of(world, name) for name in ("pretraining", "general", "domain")).splitlines())
    assert not training & set(text_of(world, "heldout_general").splitlines() + text_of(world, "heldout_domain").splitlines())


def test_no_probed_sum_is_trained_in_either_mode(world):
    def sums(lines):
        return {found[0] for found in (re.match(r"\d+\+\d+", line) for line in lines) if found}

    trained = sums((text_of(world, "pretraining") + text_of(world, "general")).splitlines())
    probed = sums(prompt for skill in ("no_think", "think") for prompt, _ in world.probes[skill])
    assert len(trained) > 2000 and len(probed) == 200 and not trained & probed


def test_documents_are_right():
    for kind, documents in all_kinds().items():
        for prompt, answer in documents.train[:50]:
            assert answer.endswith("\n") and "\n" not in prompt + answer[:-1]
    assert data.no_think(37, 45) == ("37+45=", "82\n")
    assert data.think(37, 45) == ("37+45 think:", " 7+5=12, 3+4+1=8, 82\n")
    assert data.think(32, 45) == ("32+45 think:", " 2+5=07, 3+4+0=7, 77\n")


@pytest.mark.parametrize("errors", [0.0, 0.5, 1.0])
def test_share_of_wrong_answers(errors):
    kinds = {"no_think": all_kinds()["no_think"]}
    lines = data.write(kinds, 2000, random.Random(0), errors=errors).splitlines()
    wrong = sum(int(a) + int(b) != int(c) for a, b, c in (line.replace("=", "+").split("+") for line in lines))
    assert wrong / 2000 == pytest.approx(errors, abs=0.05 if 0 < errors < 1 else 0)


def test_errors_touch_the_open_general_text_alone(world):
    right = data.toy_world(seed=0, general_errors=0.0)
    assert [name for name in STREAMS if not torch.equal(getattr(world, name), getattr(right, name))] == ["general"]
    assert world.probes == right.probes


@pytest.mark.parametrize("text", ["", "grüße, 你好 🦊👩‍👩‍👧", "\x00\x01\x1b[0m\x7f\u200b\ufeff", "a  b\r\n\t c", "x_1 ²³ ½ ٣", "<|endoftext|>"])
def test_every_string_survives_encoding(world, text):
    assert world.tokenizer.decode(data.encode(world.tokenizer, text).tolist()) == text


def test_every_corpus_survives_encoding(world, monkeypatch):
    """What each stream decodes to is the very text that was written."""
    written = []
    encode = data.encode
    monkeypatch.setattr(data, "encode", lambda tokenizer, text: written.append(text) or encode(tokenizer, text))
    again = data.toy_world(seed=0)
    assert [text_of(again, name) for name in STREAMS] == written


def test_digits_are_one_token_each(world):
    assert len(data.encode(world.tokenizer, "1234567890")) == 10


def test_merges_by_hand():
    tokenizer = data.learn_tokenizer("ab ab ab abc", vocab_size=258)
    assert tokenizer.decode_single_token_bytes(256) == b"ab"  # four times; " a" three times
    assert tokenizer.decode_single_token_bytes(257) == b" ab"
    assert data.learn_tokenizer("ab", vocab_size=500).n_vocab == 257  # one pair is all there is


def test_mixing():
    domain, general = torch.arange(100), torch.arange(1000, 1100)

    def first(n_general, seed=0):
        return list(itertools.islice(data.batches(domain, general, 2, n_general, 5, seed), 3))

    for batch in first(3):
        assert batch.tokens.shape == batch.targets.shape == (5, 5)
        assert batch.is_domain.tolist() == [True, True, False, False, False]
        assert torch.equal(batch.targets, batch.tokens + 1)  # the next token of each
        assert torch.equal(batch.tokens[:, 0] < 1000, batch.is_domain)
    for alone, mixed in zip(first(0), first(3)):
        assert torch.equal(alone.tokens, mixed.tokens[:2])  # the domain sequences do not depend on the mixture
    assert not torch.equal(first(3)[0].tokens, first(3, seed=1)[0].tokens)


def test_windows_reach_both_ends():
    seen = data.windows(torch.arange(8), 500, 5, torch.Generator().manual_seed(0))
    assert seen.shape == (500, 6) and seen.min() == 0 and seen.max() == 7


def test_own_text(tmp_path):
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 50, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("delta " * 100)
    (folder / "picture.png").write_bytes(b"\x89PNG\0\xff")
    world = data.text_world([tmp_path / "a.txt"], [folder], vocab_size=300)
    assert text_of(world, "general") + text_of(world, "heldout_general") == "alpha beta gamma " * 50
    assert text_of(world, "domain") + text_of(world, "heldout_domain") == "delta " * 100
    assert len(text_of(world, "heldout_domain")) == 60
    assert not world.probes and len(world.prompts) == 5


@pytest.mark.parametrize("content, told", [(None, "No such file"), (b"", "empty"), (b" \n", "empty"), (b"a\0b", "not UTF-8"), (b"\xff\xfe", "not UTF-8")])
def test_bad_text(tmp_path, content, told):
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=f"--general.*{told}"):
        data.read_texts("general", [file])


def test_a_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    with pytest.raises(BadInput, match="--domain.*no UTF-8 text"):
        data.read_texts("domain", [tmp_path])


def test_prompts_of_own_text_are_short_in_any_script():
    assert data.openings("abc " * 1000, 2) == [("abc " * 15)[:60]] * 2
    assert [len(opening) for opening in data.openings("你好" * 1000, 3)] == [60] * 3
