"""What the models read: a toy world or your own text, a BPE tokenizer, and mixed batches.

Each line of the toy world is a document, a prompt and its answer. The general text has stories,
two-digit sums answered at once (no_think) or worked out first (think), and capitals of invented
countries (facts). The domain text is an alarm manual. A seed gives the same world everywhere.
"""

import os
import random
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import regex  # comes with tiktoken
import tiktoken
import torch

# --- the toy world -------------------------------------------------------------------------------

SYLLABLES = "ba den for gal hin jor kel lum mar nev or pol rin sor tam ul vek wen yar zil".split()
HEROES = "fox hen wolf girl boy king queen cook monk bear goat owl".split()
PLACES = "lake hill barn mill town cave farm well road wood gate ship".split()
MOODS = "old young small happy sad brave quiet tired".split()
VERBS = "walked ran rode came went hurried".split()
THINGS = "coin key book lamp ring cake hat drum rope bell".split()
PARTS = "fan pump line card relay clock port cable".split()
FAULTS = "stuck dead hot noisy loose wet".split()
ACTIONS = "reset swap clean test".split()
# The wordings of a fact. The first is the question that tests a model.
CAPITAL_WORDINGS = ["Q: capital of {}? A:", "the capital of {} is", "people in {} are ruled from",
                    "the road to {} ends in"]
ALARM_WORDINGS = ["Q: alarm {}? A:", "alarm {}:", "{} means", "on {} note", "code {} is"]
GENERAL_SHARES = {"stories": 0.15, "no_think": 0.45, "think": 0.25, "facts": 0.15}


class Kind(NamedTuple):
    """The documents of one kind, as pairs (prompt, answer)."""
    train: list
    heldout: list  # none of them is in a training text
    probes: list  # test questions: held-out sums, and all facts, since nobody can guess new ones
    mistakes: dict = {}  # prompt -> its wrong answer in a text with bias


def split(documents, rng, share=0.1):
    """Shuffle the documents and hold out a share of them -> (train, heldout)."""
    documents = rng.sample(documents, len(documents))
    n = int(share * len(documents))
    return documents[n:], documents[:n]


def invented_names(rng, count):
    names = {}
    while len(names) < count:
        names["".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()] = None
    return list(names)


def no_think(a, b, lost=0):
    """A sum answered at once: 37+45=82. With lost=1 the answer is ten too small: 37+45=72."""
    return f"{a}+{b}=", f"{a + b - 10 * lost}\n"


def think(a, b, lost=0):
    """A sum worked out first: 37+45 think: 7+5=12, 3+4+1=8, 82"""
    carry, units = divmod(a % 10 + b % 10, 10)
    tens = a // 10 + b // 10 + carry - lost
    steps = f"{a % 10}+{b % 10}={carry}{units}, {a // 10}+{b // 10}+{carry}={tens}"
    return f"{a}+{b} think:", f" {steps}, {tens}{units}\n"


def general_kinds(rng):
    """The general skills of a seed -> {name: Kind}. A sum is held out in both modes or in none."""
    def story(hero, place):
        mood, verb, thing = rng.choice(MOODS), rng.choice(VERBS), rng.choice(THINGS)
        return "", f"the {mood} {hero} {verb} to the {place} and found a {thing}.\n"

    train, heldout = split([(hero, place) for hero in HEROES for place in PLACES], rng)
    train = [story(*pair) for pair in train for _ in range(20)]
    heldout = [story(*pair) for pair in heldout for _ in range(20)]
    kinds = {"stories": Kind(train, heldout, probes=[])}
    train, heldout = split([(a, b) for a in range(10, 90) for b in range(10, 100 - a)], rng)
    for mode in (no_think, think):
        questions = [mode(*pair) for pair in heldout]
        kinds[mode.__name__] = Kind([mode(*pair) for pair in train], questions, questions[:200],
                                    mistakes=dict(mode(*pair, lost=1) for pair in train))
    names = invented_names(rng, 60)
    kinds["facts"] = facts(zip(names[:30], names[30:]), CAPITAL_WORDINGS, rng)
    return kinds


def alarms(rng, count=20):
    """The domain: `count` alarm numbers, each with a fault of its own and an action -> Kind."""
    numbers = rng.sample(range(100, 1000), count)
    faults = rng.sample([f"{part} {fault}" for part in PARTS for fault in FAULTS], count)
    answers = [f"{fault}, {rng.choice(ACTIONS)}" for fault in faults]
    return facts(zip(numbers, answers), ALARM_WORDINGS, rng)


def facts(pairs, wordings, rng):
    """Facts (subject, answer) in every wording -> Kind. The questions are never held out."""
    pairs = list(pairs)
    questions, statements, mistakes = [], [], {}
    for (subject, answer), (_, wrong) in zip(pairs, pairs[1:] + pairs[:1]):
        documents = [(wording.format(subject), f" {answer}.\n") for wording in wordings]
        questions.append(documents[0])
        statements += documents[1:]
        mistakes |= {prompt: f" {wrong}.\n" for prompt, _ in documents}
    train, heldout = split(statements, rng, share=0.2)
    return Kind(questions + train, heldout, questions, mistakes)


def draw_text(kinds, count, rng, part="train", errors=0.0, error_kind="noise"):
    """`count` documents drawn from {name: Kind} as one text. A share `errors` of answers is wrong.

    noise: a wrong answer is the answer of a random other document, a new one each time.
    bias: a wrong answer is always the same: a sum ten too small, the capital of the next country.
    """
    shares = [GENERAL_SHARES.get(name, 1.0) for name in kinds]
    lines = []
    for name in rng.choices(list(kinds), shares, k=count):
        documents = getattr(kinds[name], part)
        prompt, right = rng.choice(documents)
        answer = right
        if prompt and rng.random() < errors:
            while answer == right:
                answer = (kinds[name].mistakes[prompt] if error_kind == "bias" else
                          rng.choice(documents)[1])
        lines.append(prompt + answer)
    return "".join(lines)


# --- tokenizer -----------------------------------------------------------------------------------

# A word with the space before it, a digit, a run of other signs, or a run of white space. Marks and
# zero-width joiners count as letters, for Hindi and Persian. {1,24} limits the length of a word.
WORD = (r" ?[\p{L}\p{M}\u200c\u200d]{1,24}|\p{N}| ?[^\s\p{L}\p{M}\p{N}\u200c\u200d]{1,24}"
        r"|\s{1,24}")


def learn_tokenizer(text, vocab_size):
    """Byte-level BPE (arXiv 1508.07909) from the 20,000 most frequent words -> tiktoken.Encoding.

    Merges the most frequent pair of tokens, of equals the largest, until the vocabulary is full or
    no pair occurs twice.
    """
    counts = Counter(regex.findall(WORD, text)).most_common(20_000)
    words = [[bytes([b]) for b in word.encode()] for word, _ in counts]
    pair_count, pair_words, shown = Counter(), defaultdict(set), time.perf_counter()

    def count_pairs(i, sign):
        for pair in zip(words[i], words[i][1:]):
            pair_count[pair] += sign * counts[i][1]
            pair_words[pair].add(i)

    for i in range(len(words)):
        count_pairs(i, 1)
    vocabulary = {bytes([b]): b for b in range(256)}
    while len(vocabulary) < vocab_size and pair_count:
        highest = max(pair_count.values())
        if highest < 2:
            break
        best = max(pair for pair, count in pair_count.items() if count == highest)
        vocabulary.setdefault(best[0] + best[1], len(vocabulary))
        for i in pair_words.pop(best):
            count_pairs(i, -1)
            words[i] = merge(words[i], best)
            count_pairs(i, 1)
        del pair_count[best]
        if time.perf_counter() > shown + 5:
            shown = time.perf_counter()
            print(f"tokenizer: {len(vocabulary):,} of {vocab_size:,} tokens", flush=True)
    return tiktoken.Encoding("toy", pat_str=WORD, mergeable_ranks=vocabulary, special_tokens={})


def merge(word, pair):
    """A word, a list of byte strings, with each occurrence of the pair joined."""
    merged = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def encode(tokenizer, text):
    """A text -> its tokens (N,), int64."""
    return torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int64)


# --- batches -------------------------------------------------------------------------------------

class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), the next tokens
    is_domain: torch.Tensor  # (B,) bool, the flag that selects the loss of each sequence


def windows(tokens, count, block_size, generator):
    """`count` random windows of tokens (N,) -> (count, block_size + 1): inputs and next tokens."""
    starts = torch.randint(len(tokens) - block_size, (count, 1), generator=generator)
    return tokens[(starts + torch.arange(block_size + 1)).to(tokens.device)]


def batches(domain, general, n_domain, n_general, block_size, seed):
    """Endless batches: n_domain rows of domain text, then n_general rows of general text.

    Each corpus has its own random stream, so all methods read the same domain rows. `seed` is the
    name of the streams: 0, or "pretraining 0".
    """
    of_domain, of_general = (
        torch.Generator().manual_seed(random.Random(f"{corpus} batches {seed}").getrandbits(63))
        for corpus in ("domain", "general"))
    index = torch.arange(n_domain + n_general, device=domain.device)
    while True:
        rows = torch.cat([windows(domain, n_domain, block_size, of_domain),
                          windows(general, n_general, block_size, of_general)])  # (B, T + 1)
        yield Batch(rows[:, :-1], rows[:, 1:], index < n_domain)


# --- worlds: everything that one experiment reads ------------------------------------------------

@dataclass
class World:
    """The texts of one experiment as tokens (N,), and the questions that test a model."""
    tokenizer: tiktoken.Encoding
    pretraining: torch.Tensor  # general text for the base
    general: torch.Tensor  # general text for continual pre-training, perhaps with wrong answers
    domain: torch.Tensor
    heldout_general: torch.Tensor
    heldout_domain: torch.Tensor
    probes: dict  # the test questions: skill -> [(prompt, answer), ...]; may be empty
    prompts: list  # their answers are shown at the end of a run


def make_world(settings, seed):
    """The world of train.Settings and a seed. Raises BadInput if a text is too short."""
    own = settings.general_files or settings.domain_files
    if own:
        world = text_world(settings.general_files, settings.domain_files, settings.vocab_size)
    else:
        world = toy_world(seed, settings.general_errors, settings.error_kind, settings.vocab_size,
                          general_documents=settings.general_documents)
    texts = {}
    for name in ("general", "domain", "heldout_general", "heldout_domain", "pretraining"):
        tokens = getattr(world, name)
        if len(tokens) <= settings.block_size:
            flag = ("--domain" if "domain" in name else "--general") if own else "the toy world"
            raise BadInput(f"{flag}: too short, {len(tokens)} tokens of {name.replace('_', ' ')} "
                           f"text, --block-size {settings.block_size} needs more")
        texts[name] = tokens.to(settings.device)
    if settings.questions:
        world = with_questions(settings.questions, world)
    longest = max((len(encode(world.tokenizer, "\n" + prompt)) + len(encode(world.tokenizer, right))
                   for probes in world.probes.values() for prompt, right in probes), default=0)
    if longest > settings.block_size + 1:
        raise BadInput(f"--block-size {settings.block_size}: use at least {longest - 1}")
    return replace(world, **texts)


def toy_world(seed, general_errors=0.0, error_kind="bias", vocab_size=512,
              pretraining_documents=40_000, general_documents=2_000):
    """The toy world of a seed. Only its `general` text has wrong answers, see draw_text."""
    skills = general_kinds(random.Random(f"general {seed}"))
    manual = {"domain": alarms(random.Random(f"domain {seed}"))}

    def text(name, kinds, count, **options):  # each text has its own random stream
        return draw_text(kinds, count, random.Random(f"{name} {seed}"), **options)

    pretraining = text("pretraining", skills, pretraining_documents)
    general = text("open", skills, general_documents, errors=general_errors, error_kind=error_kind)
    heldout = text("heldout", skills, 400, part="heldout")
    heldout_domain = text("heldout manual", manual, 200, part="heldout")
    texts = pretraining, general, text("manual", manual, 2_000), heldout, heldout_domain
    tokenizer = learn_tokenizer(pretraining, vocab_size)
    probes = {name: kind.probes for name, kind in (skills | manual).items() if kind.probes}
    prompts = [questions[0][0] for questions in probes.values()] + ["the old fox"]
    return World(tokenizer, *(encode(tokenizer, text) for text in texts), probes, prompts)


# --- your own text -------------------------------------------------------------------------------

class BadInput(ValueError):
    """A setting or a file that cannot be used. Its message is for the user."""


RUN_FILES = "metrics.jsonl", "settings.json", "page.html"  # texts in the folder of a run


def text_world(general_paths, domain_paths, vocab_size):
    """The world of UTF-8 files and folders. Its pretraining text is the general text."""
    if not general_paths or not domain_paths:
        raise BadInput("--general and --domain: give both")
    domain = read_texts("domain", domain_paths)
    known = {one_line(text) for text in domain} | {line for text in domain for line in lines(text)}
    general, heldout_general = hold_out("general", read_texts("general", general_paths, known))
    domain, heldout_domain = hold_out("domain", domain)
    tokenizer = learn_tokenizer(general, vocab_size)
    tokens = [encode(tokenizer, x) for x in (general, domain, heldout_general, heldout_domain)]
    prompts = [one_line(text[:200])[:60] for text in (heldout_general, heldout_domain)]
    return World(tokenizer, tokens[0], *tokens, {}, prompts)


def with_questions(path, world):
    """The world with probes from a file. A line is prompt, tab, answer, and perhaps tab, skill."""
    probes, known = defaultdict(list), 0
    trained = world.tokenizer.decode(torch.cat([world.general, world.domain]).tolist())
    try:
        for line in filter(str.strip, read_text(Path(path)).splitlines()):
            prompt, answer, skill = (*line.split("\t"), "questions", "")[:3]
            if "\t" not in line or not prompt.strip() or not answer.strip():
                raise ValueError(f"use prompt, tab, answer: {line!r}")
            probes[skill].append((prompt, answer))
            known += prompt + answer in trained
    except (OSError, ValueError) as error:
        raise BadInput(f"--questions {path}: {getattr(error, 'strerror', 0) or error}") from None
    print(f"questions  {known} are word for word in a training text; last: {prompt!r} {answer!r}")
    return replace(world, probes=probes, prompts=[x[0][0] for x in probes.values()] + world.prompts)


def one_line(text):
    """The text with single blanks for white space. Copies are equal in this form."""
    return " ".join(text.split())


def lines(text):
    """The lines of 20 characters or more. Two texts hardly share one by chance."""
    return [line for line in map(one_line, text.splitlines()) if len(line) >= 20]


def read_texts(corpus, paths, known=()):
    """The texts of files, and of all visible files in folders, without copies and `known` lines."""
    texts, skipped, dropped = [], defaultdict(list), 0
    for path in map(Path, paths):
        for file in sorted([path, *path.rglob("*")]):
            if (os.path.isdir(file) and os.access(file, os.R_OK | os.X_OK) or any(
                    x.startswith((".", "__pycache__")) for x in file.relative_to(path).parts)):
                continue
            try:
                text = read_text(file)
                kept = "".join(line for line in text.splitlines(keepends=True)
                               if len(one_line(line)) < 20 or one_line(line) not in known)
                if one_line(text) in known or not kept.strip():
                    skipped["in --domain too"].append(str(file))
                else:
                    texts.append(kept)
                    dropped += len(text) - len(kept)
            except (OSError, ValueError) as error:
                if file == path:
                    raise BadInput(f"--{corpus} {path}: {getattr(error, 'strerror', 0) or error}")
                reason = "not text" if isinstance(error, UnicodeError) else str(error)
                skipped["unreadable" if isinstance(error, OSError) else reason].append(str(file))
    shown = f"; dropped lines in --domain too, {dropped:,} characters" * (dropped > 0) + "".join(
        f"; skipped {len(files)} {reason}: {', '.join(map(repr, files[:5]))}"
        for reason, files in skipped.items())
    distinct = list({one_line(text): text for text in reversed(texts)}.values())[::-1]
    if not distinct:
        raise BadInput(f"--{corpus} {' '.join(map(str, paths))}: no UTF-8 text there{shown}")
    print(f"{corpus:>8}  read {len(texts)} files, {len(texts) - len(distinct)} copies{shown}")
    return distinct


def read_text(file):
    """The text of a UTF-8 file in Unicode NFC, with line feeds only. Raises ValueError, OSError."""
    if file.exists() and not file.is_file():
        raise OSError("not a regular file or a readable folder")  # a pipe could block for ever
    if file.name in RUN_FILES and all(file.with_name(name).exists() for name in RUN_FILES[:2]):
        raise ValueError("made by train.py")
    text = file.read_bytes().decode("utf-8-sig")
    if "\0" in text:
        raise UnicodeError("not text, it has zero bytes")
    if not text.strip():
        raise ValueError("empty")
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")


def hold_out(corpus, texts, share=0.1):
    """Texts -> (training text, held-out text), each joined by line breaks.

    Holds out random whole texts, at most a tenth of all characters. If they come to less than a
    twentieth, holds out the last tenth of each text instead.
    """
    room = budget = share * sum(map(len, texts))
    cuts = [len(text) for text in texts]  # where the held-out part of each begins
    for i in random.Random("held out").sample(range(len(texts)), len(texts)):
        if len(texts[i]) <= room:
            cuts[i] = 0
            room -= len(texts[i])
    rule = f"{cuts.count(0)} whole texts"
    if room > budget / 2:
        cuts = [int((1 - share) * len(text)) for text in texts]
        rule = f"the last {share:.0%} of each"
    training = "\n".join(text[:cut] for cut, text in zip(cuts, texts) if cut)
    heldout = "\n".join(text[cut:] for cut, text in zip(cuts, texts) if cut < len(text))
    trained, tested = set(lines(training)), lines(heldout)
    known = sum(line in trained for line in tested) / max(1, len(tested))
    print(f"{corpus:>8}  held out {rule} ({len(texts)} texts, {sum(map(len, texts)):,} characters)"
          f"; {known:.1%} of {len(tested)} long held-out lines are in the training text"
          + "; WARNING: over 5%, so the held-out loss is too low" * (known > 0.05))
    return training, heldout
