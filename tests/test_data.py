import hashlib
import itertools
import os
import random
import re
import shutil
import unicodedata
from collections import Counter

import pytest
import regex
import tiktoken
import torch

import data

STREAMS = ("pretraining", "general", "domain", "heldout_general", "heldout_domain")


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0)


def text_of(world, *names):
    return "".join(world.tokenizer.decode(getattr(world, name).tolist()) for name in names)


def all_kinds(seed=0):
    manual = {"domain": data.alarms(random.Random(f"domain {seed}"))}
    return data.general_kinds(random.Random(f"general {seed}")) | manual


# --- the toy world -------------------------------------------------------------------------------

def test_a_seed_gives_the_same_world_on_every_machine(world):
    digest = hashlib.sha256()
    for name in STREAMS:
        digest.update(getattr(world, name).numpy().tobytes())
    digest.update(repr(world.probes).encode())
    assert digest.hexdigest()[:16] == "70288e66b474a519"


def test_another_seed_gives_another_world(world):
    other = data.toy_world(seed=1, pretraining_documents=200)
    assert all(world.probes[skill] != other.probes[skill] for skill in world.probes)


def test_splits_never_overlap(world):
    for kind in all_kinds().values():
        assert kind.train and kind.heldout and not set(kind.train) & set(kind.heldout)
    heldout = set(text_of(world, "heldout_general", "heldout_domain").splitlines())
    trained = set(text_of(world, "pretraining", "general", "domain").splitlines())
    assert heldout and not trained & heldout


def test_no_probed_sum_is_trained_in_either_mode(world):
    def sums(lines):
        return {found[0] for found in (re.match(r"\d+\+\d+", line) for line in lines) if found}

    trained = sums(text_of(world, "pretraining", "general").splitlines())
    probed = sums(prompt for skill in ("no_think", "think") for prompt, _ in world.probes[skill])
    assert len(trained) > 2000 and len(probed) == 200 and not trained & probed


def test_documents_are_single_lines_and_right():
    for kind in all_kinds().values():
        for prompt, answer in kind.train:
            assert answer.endswith("\n") and "\n" not in prompt + answer[:-1]
    assert data.no_think(37, 45) == ("37+45=", "82\n")
    assert data.think(37, 45) == ("37+45 think:", " 7+5=12, 3+4+1=8, 82\n")
    assert data.think(32, 45) == ("32+45 think:", " 2+5=07, 3+4+0=7, 77\n")


def test_the_mistakes_of_bias():
    """A sum is ten too small in both modes. All wordings of a fact name the same other capital."""
    kinds = all_kinds()
    for prompt, answer in kinds["no_think"].mistakes.items():
        a, b = map(int, re.findall(r"\d+", prompt))
        assert int(answer) == a + b - 10
    assert kinds["think"].mistakes["37+45 think:"] == " 7+5=12, 3+4+1=7, 72\n"
    right, wrong = dict(kinds["facts"].train), kinds["facts"].mistakes
    assert set(wrong.values()) <= set(right.values())
    countries = [re.search("of (.*)[?]", prompt)[1] for prompt, _ in kinds["facts"].probes]
    assert len(countries) == 30
    for country in countries:
        prompts = [prompt for prompt in right if country in prompt]
        assert len({wrong[prompt] for prompt in prompts}) == 1
        assert wrong[prompts[0]] != right[prompts[0]]


@pytest.mark.parametrize("error_kind, share_right", [("noise", 1.0), ("bias", 0.0)])
def test_the_most_frequent_answer_is_right_under_noise_and_wrong_under_bias(error_kind,
                                                                            share_right):
    """Of a text that is 70% wrong; in both, 30% of the answers are right."""
    kinds = {"facts": all_kinds()["facts"]}
    right = {prompt: answer.strip() for prompt, answer in kinds["facts"].train}
    answers = {prompt: Counter() for prompt in right}
    text = data.draw_text(kinds, 20_000, random.Random(0), errors=0.7, error_kind=error_kind)
    for line in text.splitlines():
        prompt = next(prompt for prompt in right if line.startswith(prompt + " "))
        answers[prompt][line.removeprefix(prompt).strip()] += 1
    most = [found.most_common(1)[0][0] == right[prompt] for prompt, found in answers.items()]
    assert sum(most) / len(most) == share_right
    given = sum(found[right[prompt]] for prompt, found in answers.items())
    assert given / 20_000 == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("error_kind", ["noise", "bias"])
@pytest.mark.parametrize("errors", [0.0, 0.5, 1.0])
def test_the_share_of_wrong_answers(errors, error_kind):
    text = data.draw_text({"no_think": all_kinds()["no_think"]}, 2000, random.Random(0),
                          errors=errors, error_kind=error_kind)
    numbers = [tuple(map(int, re.split(r"[+=]", line))) for line in text.splitlines()]
    wrong = sum(a + b != c for a, b, c in numbers)
    assert wrong / 2000 == pytest.approx(errors, abs=0.05 if errors == 0.5 else 0)


def test_errors_change_only_the_general_text(world):
    right = data.toy_world(seed=0, general_errors=0.0)
    assert ["general"] == [name for name in STREAMS
                           if not torch.equal(getattr(world, name), getattr(right, name))]
    assert world.probes == right.probes


# --- tokenizer -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "", "grüße, 你好 🦊👩‍👩‍👧", "\x00\x01\x1b[0m\x7f\u200b\ufeff", "a  b\r\n\t c", "x_1 ²³ ½ ٣",
    "<|endoftext|>"])
def test_every_string_survives_encoding(world, text):
    assert world.tokenizer.decode(data.encode(world.tokenizer, text).tolist()) == text


def test_digits_are_one_token_each(world):
    assert len(data.encode(world.tokenizer, "1234567890")) == 10


def test_merges_by_hand():
    tokenizer = data.learn_tokenizer("ab ab ab abc", vocab_size=258)
    assert tokenizer.decode_single_token_bytes(256) == b"ab"  # four times; " a" three times
    assert tokenizer.decode_single_token_bytes(257) == b" ab"
    assert data.learn_tokenizer("ab ab", vocab_size=500).n_vocab == 257  # "ab" is all there is
    assert data.learn_tokenizer("abcdefg hijklmn", vocab_size=300).n_vocab == 256  # nothing twice


@pytest.mark.parametrize("text", [
    "हिन्दी में लिखा हुआ पाठ", "বাংলা ভাষায় লেখা", "தமிழில் எழுதியது", "ภาษาไทยมีสระ",
    "עִבְרִית עם ניקוד", "العربيّة بالتشكيل", "می\u200cخواهم کتاب\u200cها", "क्\u200dष",
    "Ελληνικά", "русский язык", "中文文本没有空格", "日本語のテキスト", "한국어", "e\u0301a\u0308",
    "x_1 ²³ ½ ٣", "a1b2--c  \n\t d", "🦊👩‍👩‍👧", "ab" * 1000 + "?!" * 100 + " " * 99])
def test_words_are_cut_alike_for_learning_and_for_encoding(text):
    """The pattern means the same to regex, which learns, and to tiktoken, which encodes."""
    words = regex.findall(data.WORD, text)
    assert "".join(words) == text and max(map(len, words)) <= 25
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:  # each word is a token, so that the encoder shows where it cuts
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    tokenizer = tiktoken.Encoding("words", pat_str=data.WORD, mergeable_ranks=ranks,
                                  special_tokens={})
    found = [tokenizer.decode_single_token_bytes(t) for t in tokenizer.encode_ordinary(text)]
    assert found == [word.encode() for word in words]
    assert data.learn_tokenizer(text, 300)._pat_str == data.WORD


def test_letters_keep_their_marks_and_joiners():
    text = "हिन्दी ภาษาที่ می\u200cخواهم क्\u200dष"
    assert "|".join(regex.findall(data.WORD, text)) == text.replace(" ", "| ")


# --- batches -------------------------------------------------------------------------------------

def test_batches_mix_the_corpora_and_flag_the_rows():
    domain, general = torch.arange(100), torch.arange(1000, 1100)

    def first(n_general, seed=0):
        return list(itertools.islice(data.batches(domain, general, 2, n_general, 5, seed), 3))

    for batch in first(3):
        assert batch.general.tolist() == [2, 3, 4]
        assert batch.tokens.shape == batch.targets.shape == (5, 5)
        assert batch.is_domain.tolist() == [True, True, False, False, False]
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.tokens[:, 0] < 1000, batch.is_domain)
    for alone, mixed in zip(first(0), first(3)):
        assert torch.equal(alone.tokens, mixed.tokens[:2])  # the same domain rows in any mixture
    assert not torch.equal(first(3)[0].tokens, first(3, seed=1)[0].tokens)


def test_windows_reach_both_ends():
    seen = data.windows(torch.arange(8), 500, 5, torch.Generator().manual_seed(0))
    assert seen.shape == (500, 6) and seen.min() == 0 and seen.max() == 7


# --- your own text -------------------------------------------------------------------------------

def test_own_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 50)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("delta " * 100)
    world = data.text_world([tmp_path / "a.txt"], [folder], vocab_size=300, out=tmp_path / "out")
    assert text_of(world, "general", "heldout_general") == "alpha beta gamma " * 50
    assert text_of(world, "domain", "heldout_domain") == "delta " * 100
    assert torch.equal(world.pretraining, world.general) and len(world.heldout_domain) >= 10
    assert text_of(world, "heldout_domain") == "delta " * 10
    assert not world.probes and [len(prompt) for prompt in world.prompts] == [60, 59]
    assert re.search("general +held out the last 10% of each .*850 char", capsys.readouterr().out)


def test_a_folder_of_short_files_holds_out_whole_files(tmp_path, capsys):
    """Nothing is cut, nothing is joined: each line of each part is a whole file."""
    sentences = [f"sentence number {i} tells of {i * i}." for i in range(600)]
    for i, sentence in enumerate(sentences):
        (tmp_path / f"{i}.txt").write_text(sentence)
    texts = data.read_texts("general", [tmp_path], "")
    training, heldout = (part.splitlines() for part in data.hold_out("general", texts))
    assert sorted(training + heldout) == sorted(sentences)
    assert 0.08 * 600 < len(heldout) < 0.12 * 600
    assert f"held out {len(heldout)} whole texts" in capsys.readouterr().out


def test_out_hides_nothing_but_itself(tmp_path):
    """Texts below the output folder are read if they were named."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text")
    for path in (tmp_path / "texts", tmp_path / "texts" / "a.txt"):
        assert data.read_texts("general", [path], out=tmp_path) == ["some text"]


def test_copies_count_once(tmp_path, capsys):
    """Copies, symlinks and files named twice."""
    sentences = [f"sentence number {i} tells of {i * i}." for i in range(60)]
    for i, sentence in enumerate(sentences):
        (tmp_path / f"{i}.txt").write_text(sentence)
        shutil.copy(tmp_path / f"{i}.txt", tmp_path / f"{i} copy.txt")
        os.symlink(tmp_path / f"{i}.txt", tmp_path / f"{i} link.txt")
    paths = [tmp_path, tmp_path / "0.txt", tmp_path / "0.txt", tmp_path]
    assert sorted(data.read_texts("general", paths, "")) == sorted(sentences)
    copies = 2 * 3 * 60 + 2 - 60
    assert re.search(rf"read {copies + 60} files, {copies} copies", capsys.readouterr().out)


@pytest.mark.parametrize("sizes, whole", [
    ([100] * 10, True), ([100] * 9, False), ([100], False), ([2000] + [10] * 30, True),
    ([10_000] + [10] * 20, False),  # the small ones together are less than half of a tenth
])
def test_a_tenth_is_held_out_whatever_the_sizes(sizes, whole, capsys):
    texts = [chr(97 + i % 26) * size for i, size in enumerate(sizes)]
    training, heldout = data.hold_out("general", texts)
    assert 0.05 <= len(heldout.replace("\n", "")) / sum(sizes) <= 0.101
    assert len((training + heldout).replace("\n", "")) == sum(sizes)
    assert ("whole" in capsys.readouterr().out) == whole


def test_a_text_of_both_corpora_is_domain_text_alone(tmp_path):
    """Else a held-out end of it would be in the general training text."""
    for i in range(21):
        (tmp_path / f"{i}.txt").write_text(f"{chr(97 + i)} text of file {i}. " * 20)
    world = data.text_world([tmp_path], [tmp_path / "7.txt"], vocab_size=300, out="")
    assert "file 7." not in text_of(world, "general", "heldout_general")
    assert "file 8." in text_of(world, "general", "heldout_general")
    assert "file 7." in text_of(world, "domain")


def test_a_folder_names_what_it_skips_and_reads_neither_hidden_files_nor_out(tmp_path, capsys):
    files = {"good.txt": b"good text", "sub/more.txt": b"more text", ".hidden": b"hidden text",
             ".git/config": b"git text", "out/metrics.jsonl": b"out text", "empty.txt": b" \n",
             "utf16.txt": "wide".encode("utf-16"), "latin.txt": b"caf\xe9", "nul.txt": b"a\0b",
             "\x1b]0;title\x07.png": b"\xff"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "zzz.txt").symlink_to(tmp_path / "nowhere")
    text = "".join(data.read_texts("domain", [tmp_path], out=tmp_path / "out"))
    assert sorted(text.replace("\n", "")) == sorted("good text" "more text")
    printed = capsys.readouterr().out
    assert re.search(r"read 2 .*skipped 6, not text: ", printed)
    assert "\x1b" not in printed and "title" in printed
    for name in ("empty.txt", "latin.txt", "nul.txt", "utf16.txt"):
        assert name in printed
    assert not re.search(r"\.hidden|\.git|metrics", printed)


@pytest.mark.parametrize("content, text", [
    (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"), (b"one\rtwo\r\r\nthree", "one\ntwo\n\nthree")])
def test_lines_end_in_line_feeds_and_a_byte_order_mark_is_dropped(tmp_path, content, text):
    (tmp_path / "dos.txt").write_bytes(content)
    assert data.read_text(tmp_path / "dos.txt") == text


def test_composed_and_decomposed_letters_are_the_same_tokens(world, tmp_path):
    texts = [unicodedata.normalize(form, "Café, Ärger, 한국어") for form in ("NFC", "NFD")]
    for name, text in zip("ab", texts):
        (tmp_path / name).write_text(text, encoding="utf-8")
    one, other = (data.encode(world.tokenizer, data.read_text(tmp_path / name)) for name in "ab")
    assert texts[0] != texts[1] and torch.equal(one, other)
