import hashlib
import itertools
import random
import re
from collections import Counter

import pytest
import regex
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
    manual = {"domain": data.alarms(random.Random(f"domain {seed}"))}
    return {**data.general_kinds(random.Random(f"general {seed}")), **manual}


def test_the_same_seed_is_the_same_world_on_every_machine(world):
    """Pinned: any machine, Python or package that draws, merges or encodes otherwise fails here."""
    digest = hashlib.sha256()
    for name in STREAMS:
        digest.update(getattr(world, name).numpy().tobytes())
    digest.update(repr(world.probes).encode())
    assert digest.hexdigest()[:16] == "70288e66b474a519"


def test_seeds_differ_and_repeat(world):
    again, other = (data.toy_world(seed) for seed in (0, 1))
    for name in STREAMS:
        assert torch.equal(getattr(world, name), getattr(again, name))
    assert world.probes == again.probes and world.probes["facts"] != other.probes["facts"]


def test_splits_never_overlap(world):
    for kind in all_kinds().values():
        assert kind.train and kind.heldout and not set(kind.train) & set(kind.heldout)
    def lines(*names):
        return {line for name in names for line in text_of(world, name).splitlines()}

    heldout = lines("heldout_general", "heldout_domain")
    assert heldout and not lines("pretraining", "general", "domain") & heldout


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


def test_the_mistakes_of_bias():
    """One wrong answer to each prompt: a sum ten too small in both modes, another's capital."""
    kinds = all_kinds()
    for prompt, answer in kinds["no_think"].mistakes.items():
        a, b = map(int, re.findall(r"\d+", prompt))
        assert int(answer) == a + b - 10
    assert data.think(37, 45, lost=1) == ("37+45 think:", " 7+5=12, 3+4+1=7, 72\n")
    assert kinds["think"].mistakes["37+45 think:"] == " 7+5=12, 3+4+1=7, 72\n"
    right = dict(kinds["facts"].train)
    wrong = {prompt: kinds["facts"].mistakes[prompt] for prompt in right}
    assert all(wrong[prompt] != right[prompt] for prompt in right)
    assert set(wrong.values()) <= set(right.values())
    countries = [prompt.removeprefix("the road to ").split()[0] for prompt in right
                 if prompt.startswith("the road to ")]
    for country in countries:  # every wording makes the same mistake
        assert len({wrong[prompt] for prompt in right if f" {country}" in prompt}) == 1


@pytest.mark.parametrize("kind, share_right", [("noise", 1.0), ("bias", 0.0)])
def test_what_a_perfect_imitator_would_answer(kind, share_right):
    """The likeliest answer to each prompt of a text 70% wrong; and 30% for the right one."""
    facts = {"facts": all_kinds()["facts"]}
    text = data.write(facts, 20_000, random.Random(0), errors=0.7, error_kind=kind)
    right = {prompt: answer.strip() for prompt, answer in facts["facts"].train}
    answers = {prompt: Counter() for prompt in right}
    for line in text.splitlines():
        prompt = next(prompt for prompt in right if line.startswith(prompt + " "))
        answers[prompt][line.removeprefix(prompt).strip()] += 1
    likeliest = [found.most_common(1)[0][0] == right[prompt] for prompt, found in answers.items()]
    assert sum(likeliest) / len(likeliest) == share_right
    given = sum(found[right[prompt]] for prompt, found in answers.items())
    assert given / 20_000 == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", ["noise", "bias"])
@pytest.mark.parametrize("errors", [0.0, 0.5, 1.0])
def test_share_of_wrong_answers(errors, kind):
    kinds = {"no_think": all_kinds()["no_think"]}
    text = data.write(kinds, 2000, random.Random(0), errors=errors, error_kind=kind)
    lines = text.splitlines()
    numbers = [tuple(map(int, re.split(r"[+=]", line))) for line in lines]
    wrong = sum(a + b != c for a, b, c in numbers)
    assert wrong / 2000 == pytest.approx(errors, abs=0.05 if 0 < errors < 1 else 0)


def test_errors_touch_the_open_general_text_alone(world):
    right = data.toy_world(seed=0, general_errors=0.0)
    changed = [name for name in STREAMS
               if not torch.equal(getattr(world, name), getattr(right, name))]
    assert changed == ["general"]
    assert world.probes == right.probes


@pytest.mark.parametrize("text", [
    "", "grüße, 你好 🦊👩‍👩‍👧", "\x00\x01\x1b[0m\x7f\u200b\ufeff", "a  b\r\n\t c", "x_1 ²³ ½ ٣",
    "<|endoftext|>"])
def test_every_string_survives_encoding(world, text):
    assert world.tokenizer.decode(data.encode(world.tokenizer, text).tolist()) == text


def test_every_corpus_survives_encoding(world, monkeypatch):
    """What each stream decodes to is the very text that was written."""
    written = []
    encode = data.encode

    def spy(tokenizer, text):
        written.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(data, "encode", spy)
    again = data.toy_world(seed=0)
    assert [text_of(again, name) for name in STREAMS] == written


def test_digits_are_one_token_each(world):
    assert len(data.encode(world.tokenizer, "1234567890")) == 10


def test_merges_by_hand():
    tokenizer = data.learn_tokenizer("ab ab ab abc", vocab_size=258)
    assert tokenizer.decode_single_token_bytes(256) == b"ab"  # four times; " a" three times
    assert tokenizer.decode_single_token_bytes(257) == b" ab"
    assert data.learn_tokenizer("ab ab", vocab_size=500).n_vocab == 257  # "ab" is all there is


def test_a_pair_seen_once_is_never_merged():
    assert data.learn_tokenizer("abcdefg hijklmn", vocab_size=300).n_vocab == 256


@pytest.mark.parametrize("text", [
    "हिन्दी में लिखा हुआ पाठ", "বাংলা ভাষায় লেখা", "தமிழில் எழுதியது", "ภาษาไทยมีสระ",
    "עִבְרִית עם ניקוד",
    "العربيّة بالتشكيل", "Ελληνικά", "русский язык",
    "中文文本没有空格", "日本語のテキスト", "한국어",
    "e\u0301a\u0308", "x_1 ²³ ½ ٣", "a1b2--c  \n\t d", "🦊👩‍👩‍👧", "aaa" * 30, "=" * 60, " " * 60,
])
def test_words_are_cut_alike_for_learning_and_for_encoding(text):
    """The pattern means the same to regex, which learns, and to tiktoken, which encodes."""
    words = regex.findall(data.WORD, text)
    assert "".join(words) == text and max(map(len, words)) <= 25
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:  # every word whole a token: an encoder that cuts alike uses just those
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    tokenizer = data.tokenizer_from(list(ranks))
    found = [tokenizer.decode_single_token_bytes(t) for t in tokenizer.encode_ordinary(text)]
    assert found == [word.encode() for word in words]


def test_letters_keep_their_marks():
    assert regex.findall(data.WORD, "हिन्दी ภาษาที่") == ["हिन्दी", " ภาษาที่"]


def test_a_word_without_end_is_learnt_in_pieces():
    """One long word would be merged again and again in all its length: quadratic."""
    assert max(map(len, regex.findall(data.WORD, "ab" * 1000 + "?!" * 100 + " " * 99))) <= 25


def test_mixing():
    domain, general = torch.arange(100), torch.arange(1000, 1100)

    def first(n_general, seed=0):
        return list(itertools.islice(data.batches(domain, general, 2, n_general, 5, seed), 3))

    for batch in first(3):
        assert batch.general.tolist() == [2, 3, 4]
        assert batch.tokens.shape == batch.targets.shape == (5, 5)
        assert batch.is_domain.tolist() == [True, True, False, False, False]
        assert torch.equal(batch.targets, batch.tokens + 1)  # the next token of each
        assert torch.equal(batch.tokens[:, 0] < 1000, batch.is_domain)
    for alone, mixed in zip(first(0), first(3)):
        assert torch.equal(alone.tokens, mixed.tokens[:2])  # the same domain rows in any mixture
    assert not torch.equal(first(3)[0].tokens, first(3, seed=1)[0].tokens)


def test_windows_reach_both_ends():
    seen = data.windows(torch.arange(8), 500, 5, torch.Generator().manual_seed(0))
    assert seen.shape == (500, 6) and seen.min() == 0 and seen.max() == 7


# --- your own text -------------------------------------------------------------------------------

def test_own_text(tmp_path, capsys):
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
    told = capsys.readouterr().out
    assert "general  read 1 file (850 characters), held out the last 10% of each\n" in told
    assert "skipped 1: picture.png (not UTF-8 text: byte 0 is 0x89)" in told
    assert "tokens  learning 300 from 765 characters" in told


def test_whole_files_are_held_out_where_there_are_many(tmp_path, capsys):
    """Nothing is cut, nothing is glued: each line of each part is a file, as it was written."""
    sentences = [f"sentence number {i} tells of {i * i}." for i in range(600)]
    for i, sentence in enumerate(sentences):
        (tmp_path / f"{i}.txt").write_text(sentence)
    training, heldout = (part.splitlines() for part in data.read_texts("general", [tmp_path]))
    assert sorted(training + heldout) == sorted(sentences)
    assert 0.08 * 600 < len(heldout) < 0.12 * 600
    assert f"held out {len(heldout)} of them whole" in capsys.readouterr().out


@pytest.mark.parametrize("sizes, whole", [
    ([100] * 10, True), ([100] * 9, False), ([100], False),
    ([10_000] + [10] * 20, False),  # the small ones together are too little to mark on
    ([2000] + [10] * 30, True),
])
def test_a_tenth_is_held_out_whatever_the_sizes(sizes, whole):
    texts = [chr(97 + i % 26) * size for i, size in enumerate(sizes)]
    training, heldout, what = data.hold_out(texts)
    assert 0.05 <= len(heldout.replace("\n", "")) / sum(sizes) <= 0.101
    assert len(training.replace("\n", "")) + len(heldout.replace("\n", "")) == sum(sizes)
    assert ("whole" in what) == whole


def test_a_folder_tells_what_it_skips_and_never_reads_hidden_names_or_out(tmp_path, capsys):
    files = {"good.txt": b"good text", "sub/more.txt": b"more text", ".hidden": b"hidden text",
             ".git/config": b"git text", "out/metrics.jsonl": b"out text", "empty.txt": b" \n",
             "utf16.txt": "wide".encode("utf-16"), "latin.txt": b"caf\xe9", "nul.txt": b"a\0b",
             "cut.txt": "caf\u00e9".encode()[:-1]}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    text = "".join(data.read_texts("domain", [tmp_path], out=tmp_path / "out"))
    assert "good" in text and "more" in text
    assert not any(word in text for word in ("hidden", "git", "out", "caf"))
    told = capsys.readouterr().out
    assert "read 2 files (18 characters)" in told and "skipped 6: " in told and "and 1 more" in told
    for name in ("cut.txt (not UTF-8 text: byte 3 is 0xc3)", "empty.txt (empty)",
                 "gone.txt (No such file or directory)",
                 "latin.txt (not UTF-8 text: byte 3 is 0xe9)",
                 "nul.txt (not UTF-8 text: byte 1 is 0x00)"):
        assert name in told
    assert not re.search(r"\.hidden|\.git|metrics", told)


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("text")

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "locked")))
        yield str(folder), [], ["a.txt"]

    monkeypatch.setattr(data.os, "walk", walk)
    data.read_texts("general", [tmp_path])
    assert "skipped 1: locked (Permission denied)" in capsys.readouterr().out


def test_lines_end_alike_and_a_mark_at_the_start_is_dropped(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert data.read_text(tmp_path / "dos.txt") == "one\ntwo\n"


@pytest.mark.parametrize("content, told", [
    (None, "No such file"), (b"", "empty"), (b" \n", "empty"), (b"a\0b", "byte 1 is 0x00"),
    (b"\xff\xfe", "not UTF-8 text: byte 0 is 0xff"), (b"\xef\xbb\xbfab\xff", "byte 5 is 0xff"),
])
def test_bad_text(tmp_path, content, told):
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=f"--general.*{told}"):
        data.read_texts("general", [file])


def test_a_folder_without_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    with pytest.raises(BadInput, match="--domain.*no UTF-8 text.*picture.png"):
        data.read_texts("domain", [tmp_path])


def test_what_a_terminal_might_obey_is_not_printed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "\x1b]0;title\x07.png").write_bytes(b"\xff")
    data.read_texts("general", [tmp_path])
    assert "\x1b" not in capsys.readouterr().out
    assert data.printable("a\x1b[31mb\x9b\u202e\u00e9 \U0001f98a") == "a?[31mb??\u00e9 \U0001f98a"


def test_prompts_of_own_text_are_short_in_any_script():
    assert data.openings("abc " * 1000, 2) == [("abc " * 15)[:60]] * 2
    assert [len(opening) for opening in data.openings("你好" * 1000, 3)] == [60] * 3


@pytest.mark.parametrize("errors, wrong", [(0.0, False), (0.7, True)])
def test_the_samples_show_what_is_wrong_in_the_general_text(errors, wrong):
    samples = data.toy_world(0, errors, pretraining_documents=200).samples
    sums = [re.match(r"(\d\d)\+(\d\d)=(\d\d)", line).groups() for line in samples["no_think"]]
    assert [int(a) + int(b) - int(told) for a, b, told in sums] == [0, 10 * wrong]
    told = [kind for kind in samples if samples[kind][1].endswith("(a wrong one)")]
    assert told == ["no_think", "think", "facts"] * wrong
