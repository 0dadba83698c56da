import hashlib
import itertools
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
import regex
import tiktoken
import torch

import data

STREAMS = ("pretraining", "general", "domain", "heldout_general", "heldout_domain")
KINDS = data.general_kinds(random.Random("general 0"))
KINDS["domain"] = data.alarms(random.Random("domain 0"))


@pytest.fixture(scope="module")
def world():
    return data.toy_world(seed=0, general_errors=0.7)


def text_of(world, *names):
    return "".join(world.tokenizer.decode(getattr(world, name).tolist()) for name in names)


def test_a_seed_gives_the_same_world_on_every_machine(world):
    """Another seed gives another one. Wrong answers change the general text alone."""
    right = data.toy_world(seed=0)
    for made, expected in [(world, "70288e66b474a519"), (right, "7bd8502989a48695"),
                           (data.toy_world(1, pretraining_documents=200), "d784ddd5866fdb0c")]:
        digest = hashlib.sha256()
        for name in STREAMS:
            digest.update(getattr(made, name).numpy().tobytes())
        digest.update(repr(made.probes).encode())
        assert digest.hexdigest()[:16] == expected
    assert world.probes == right.probes and ["general"] == [
        name for name in STREAMS if not torch.equal(getattr(world, name), getattr(right, name))]


def test_nothing_that_is_held_out_is_trained(world):
    """No document, and no sum of a test question, in either mode."""
    heldout = set(text_of(world, "heldout_general", "heldout_domain").splitlines())
    trained = set(text_of(world, "pretraining", "general", "domain").splitlines())
    assert heldout and not trained & heldout
    summed = set(re.findall(r"\d+\+\d+(?==| think)", "\n".join(trained)))
    probed = {re.match(r"\d+\+\d+", prompt)[0] for skill in ("no_think", "think")
              for prompt, _ in world.probes[skill]}
    assert len(summed) > 2000 and len(probed) == 200 and not summed & probed


def test_documents_and_their_mistakes():
    """A sum is ten too small in both modes. All wordings of a fact name the same other capital."""
    for prompt, answer in itertools.chain(*(kind.train for kind in KINDS.values())):
        assert answer.endswith("\n") and "\n" not in prompt + answer[:-1]
    assert data.no_think(37, 45) == ("37+45=", "82\n")
    assert data.think(37, 45) == ("37+45 think:", " 7+5=12, 3+4+1=8, 82\n")
    assert data.think(32, 45) == ("32+45 think:", " 2+5=07, 3+4+0=7, 77\n")
    assert KINDS["think"].mistakes["37+45 think:"] == " 7+5=12, 3+4+1=7, 72\n"
    for prompt, answer in KINDS["no_think"].mistakes.items():
        a, b = map(int, re.findall(r"\d+", prompt))
        assert int(answer) == a + b - 10
    right, wrong = dict(KINDS["facts"].train), KINDS["facts"].mistakes
    for question, capital in KINDS["facts"].probes:
        country = re.search("of (.*)[?]", question)[1]
        other, = {wrong[prompt] for prompt in right if country in prompt}
        assert other != capital and other in right.values()


@pytest.mark.parametrize("error_kind, share_right", [("noise", 1.0), ("bias", 0.0)])
def test_wrong_answers(error_kind, share_right):
    """At 70%, a question's most frequent answer is right under noise and wrong under bias."""
    kinds, right = {"facts": KINDS["facts"]}, dict(KINDS["facts"].train)
    for errors in (0.0, 0.7, 1.0):
        answers = {prompt: Counter() for prompt in right}
        text = data.draw_text(kinds, 10_000, random.Random(0), errors=errors, error_kind=error_kind)
        for line in text.splitlines(keepends=True):
            prompt, _, answer = line.rpartition(" ")
            answers[prompt][f" {answer}"] += 1
        wrong = 1 - sum(found[right[prompt]] for prompt, found in answers.items()) / 10_000
        assert wrong == pytest.approx(errors, abs=0.02 if errors == 0.7 else 0)
        most = [found.most_common(1)[0][0] == right[prompt] for prompt, found in answers.items()]
        assert errors != 0.7 or sum(most) / len(most) == share_right


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
    "", "x_1 ²³ ½ ٣", "a1b2--c  \r\n\t d", "🦊👩‍👩‍👧", "ab" * 1000 + "?!" * 100 + " " * 99,
    "\x00\x01\x1b[0m\x7f\u200b\ufeff", "<|endoftext|>"])
def test_every_text_survives_and_its_words_are_cut_alike_for_learning_and_for_encoding(text):
    """The pattern means the same to regex, which learns, and to tiktoken, which encodes."""
    words = regex.findall(data.WORD, text)
    assert "".join(words) == text and all(len(word) <= 25 for word in words)
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:  # each word is a token, so that the encoder shows where it cuts
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    tokenizer = tiktoken.Encoding("words", pat_str=data.WORD, mergeable_ranks=ranks,
                                  special_tokens={})
    found = [tokenizer.decode_single_token_bytes(t) for t in tokenizer.encode_ordinary(text)]
    assert found == [word.encode() for word in words]
    learnt = data.learn_tokenizer(text, 300)
    assert learnt._pat_str == data.WORD
    assert learnt.decode(data.encode(learnt, text).tolist()) == text


def test_letters_keep_their_marks_and_joiners_and_digits_stand_alone():
    text = "हिन्दी ภาษาที่ می\u200cخواهم क्\u200dष"
    assert "|".join(regex.findall(data.WORD, text + "12")) == text.replace(" ", "| ") + "|1|2"


def test_batches_mix_the_corpora_flag_the_rows_and_reach_both_ends():
    domain, general = torch.arange(100), torch.arange(1000, 1100)

    def first(n_general, seed=0):
        return list(itertools.islice(data.batches(domain, general, 2, n_general, 5, seed), 3))

    for batch in first(3):
        assert batch.tokens.shape == batch.targets.shape == (5, 5)
        assert batch.is_domain.tolist() == [True, True, False, False, False]
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.tokens[:, 0] < 1000, batch.is_domain)
    for alone, mixed in zip(first(0), first(3)):
        assert torch.equal(alone.tokens, mixed.tokens[:2])  # the same domain rows in any mixture
    assert not torch.equal(first(3)[0].tokens, first(3, seed=1)[0].tokens)
    many = next(data.batches(torch.arange(8), general, 500, 0, 5, seed=0))
    assert many.tokens.min() == 0 and many.targets.max() == 7  # both ends of the text


def write(folder, texts):
    """Write files from {name: text or bytes}, and make their folders."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def test_own_text(tmp_path, capsys):
    write(tmp_path, {"a.txt": "alpha beta gamma " * 50, "folder/b.txt": "delta " * 100})
    world = data.text_world([tmp_path / "a.txt"], [tmp_path / "folder"], vocab_size=300)
    assert text_of(world, "general", "heldout_general") == "alpha beta gamma " * 50
    assert text_of(world, "domain", "heldout_domain") == "delta " * 100
    assert torch.equal(world.pretraining, world.general)
    assert text_of(world, "heldout_domain") == "delta " * 10
    assert not world.probes and [len(prompt) for prompt in world.prompts] == [60, 59]
    assert re.search("general +held out the last 10% of each .*850 char", capsys.readouterr().out)


def test_copies_count_once_and_short_files_are_held_out_whole(tmp_path, capsys):
    """Copies, copies with other white space, symlinks, files named twice. Nothing is cut or joined:
    each line of each part is a whole file."""
    sentences = [f"sentence number {i} tells of {i * i}." for i in range(60)]
    for i, sentence in enumerate(sentences):
        copy = sentence.replace(" ", " \t") + "\n"
        write(tmp_path, {f"{i}.txt": sentence, f"{i} copy.txt": copy})
        os.symlink(tmp_path / f"{i}.txt", tmp_path / f"{i} link.txt")
    texts = data.read_texts("general", [tmp_path, tmp_path / "0.txt", tmp_path / "0.txt", tmp_path])
    files = 2 * 3 * 60 + 2
    assert re.search(rf"read {files} files, {files - 60} copies", capsys.readouterr().out)
    parts = [data.one_line(line) for part in data.hold_out("general", texts)
             for line in part.splitlines() if line]
    assert sorted(parts) == sorted(sentences)
    assert re.search("held out [4-7] whole texts", capsys.readouterr().out)


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


def test_a_text_of_both_corpora_is_domain_text_alone(tmp_path, capsys):
    """Else its held-out part would be in the general training text. File 8 quotes two others."""
    texts = ["".join(f"{chr(97 + i)} text of file {i} has line {line}.\n" for line in range(20))
             for i in range(21)]
    texts[8] = f"alone\n{texts[8]}{texts[9]}between 9\n{texts[10]}end\n"
    write(tmp_path, {f"{i}.txt": text for i, text in enumerate(texts)} | {
        "domain/7": texts[7].replace(" ", "  \n") + "\n\n", "domain/9": texts[9]})
    world = data.text_world(sorted(tmp_path.glob("*.txt")), [tmp_path / "domain"], vocab_size=300)
    general = text_of(world, "general", "heldout_general")
    assert "file 7 " not in general and "file 9 " not in general
    assert general.count("of file 8 ") == general.count("of file 10 ") / 2 == 20
    assert "alone" in general and "between 9\n" in general
    assert "file 7 " in data.one_line(text_of(world, "domain", "heldout_domain"))
    assert re.search("general .*; dropped lines in --domain too, 590 characters; skipped 2 in "
                     "--domain too: .*/7.txt', .*/9.txt'", capsys.readouterr().out)


def test_a_folder_names_what_it_skips(tmp_path, capsys, monkeypatch):
    """It reads no hidden files, no results of train.py, and never waits for a pipe."""
    write(tmp_path, {
        "good.txt": "good text", "sub/more.txt": "more text", ".hidden": "hidden text",
        ".git/config": "git text", "out/metrics.jsonl": "rows", "out/settings.json": "{}",
        "out/page.html": "<p>page</p>", "out/seed0/base.pt": b"\xff", "empty.txt": " \n",
        "utf16": "wide".encode("utf-16"), "latin.txt": b"caf\xe9", "nul": "a\0b",
        "\x1b]0;title\x07.png": b"\xff"})
    (tmp_path / "zzz.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed")  # root can read all
    assert sorted(data.read_texts("domain", [tmp_path])) == ["good text", "more text"]
    printed = capsys.readouterr().out
    for expected in ("read 2 files, 0 copies", "skipped 1 empty: [^;]*empty.txt",
                     "skipped 3 unreadable: [^;]*closed'[^;]*pipe'[^;]*zzz.txt",
                     "skipped 5 not text: .*title.*png'.*latin.*nul",
                     "skipped 3 made by train.py: [^;]*out/"):
        assert re.search(expected, printed)
    assert not re.search(r"\x1b|\.hidden|\.git", printed)
    for name, told in [("pipe", "not a reg"), ("closed", "not a reg"), ("empty.txt", "empty"),
                       ("out", "no UTF-8"), ("nowhere", "No such file"), ("nul", "zero bytes"),
                       ("latin.txt", "0xe9 in position 3")]:
        with pytest.raises(data.BadInput, match=f"--general .*{name}: .*{told}"):
            data.read_texts("general", [tmp_path / name])


def test_held_out_lines_that_are_trained_are_counted(capsys):
    lines = [f"line {i} is one of a hundred lines." for i in range(100)]
    for texts, share in [(lines, 0), (["\n".join(lines + lines[:5])], 45.5), (lines[:9] * 3, 100)]:
        data.hold_out("general", texts)
        shown = capsys.readouterr().out
        assert f" {share:.1f}% of" in shown and ("WARNING" in shown) == (share > 5)


def test_texts_have_line_feeds_composed_letters_and_no_byte_order_mark(tmp_path):
    for content, text in [("\ufeffone\r\ntwo\r\n", "one\ntwo\n"), ("1\r2\r\r\n3", "1\n2\n\n3"),
                          (unicodedata.normalize("NFD", "Café, 한국어"), "Café, 한국어")]:
        write(tmp_path, {"text": content})
        assert data.read_text(tmp_path / "text") == text


def test_questions_on_your_own_text(world, tmp_path, capsys):
    file, known = tmp_path / "questions", data.encode(world.tokenizer, "37+45=82\n")
    file.write_text("the fox ran\t to the\n37+45=\t8\tsums\n37+45=\t28\tsums\n")
    assert data.with_questions(file, replace(world, general=known)).probes == {
        "questions": [("the fox ran", " to the")], "sums": [("37+45=", "8"), ("37+45=", "28")]}
    shown = capsys.readouterr().out
    assert " 1 are word for word in a training text; last: '37+45=' '28'\n" in shown
    with pytest.raises(data.BadInput, match="--questions .*nowhere: No such file"):
        data.with_questions(tmp_path / "nowhere", world)
    for line in ("no tab", "no answer\t ", "\tno prompt"):
        file.write_text(f"prompt\tanswer\n{line}\n")
        with pytest.raises(data.BadInput, match=re.escape(f"use prompt, tab, answer: {line!r}")):
            data.with_questions(file, world)
