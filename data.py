"""What the models read: a toy world or your own text, a byte-level BPE tokenizer, mixed batches.

The toy world is one short document a line. The *general* text has four kinds: stories (fluency),
two-digit sums answered at once (no-think), the same sums worked out first (think), and capitals of
invented countries (facts). The *domain* text is the alarm manual of an invented telephone exchange.
A document is a pair (prompt, answer), so what trains a model can also mark it. Everything is drawn
from `random.Random`, whose stream is the same on every machine: one seed, one world, bit for bit.
"""

import heapq
import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import regex  # comes with tiktoken
import tiktoken
import torch


class BadInput(ValueError):
    """A setting or a file that cannot be used. Its text is the one line that the user is shown."""


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

# A fact in several wordings. The first one asks, and is the one that probes use.
FACT_WORDINGS = [
    "Q: capital of {}? A:",
    "the capital of {} is",
    "people in {} are ruled from",
    "the road to {} ends in",
]
ILLNESSES = "fever cough rash cramp burn chill sore gout".split()
CARGOES = "grain salt wool iron tea oil fish rum".split()
PORTS = "north south east west upper lower inner outer".split()
ALARM_WORDINGS = [
    "Q: alarm {}? A:",
    "alarm {}:",
    "{} means",
    "on {} note",
    "code {} is",
]
DRUG_WORDINGS = [
    "Q: dose of {}? A:",
    "take {} for",
    "{} treats",
    "the label of {} says",
    "a doctor gives {} for",
]
SHIP_WORDINGS = [
    "Q: cargo of {}? A:",
    "ship {}:",
    "{} carries",
    "aboard {} lies",
    "call sign {} has",
]
# The share of the documents that each kind of general text has.
GENERAL_KINDS = {"stories": 0.15, "no_think": 0.45, "think": 0.25, "facts": 0.15}


class Kind(NamedTuple):
    """The documents of one kind as (prompt, answer) pairs; no held-out one is ever trained on."""

    train: list
    heldout: list
    probes: list  # what is asked: held-out questions where the skill allows it, else trained ones
    mistakes: dict = {}  # prompt -> the wrong answer of a writer who errs the same way every time


def split(documents, rng, share=0.1):
    """Shuffle the documents and hold out a share of them -> (train, heldout)."""
    documents = rng.sample(documents, len(documents))
    n = max(1, int(share * len(documents)))
    return documents[n:], documents[:n]


def names(rng, count):
    """`count` different invented names."""
    found = {}
    while len(found) < count:
        found["".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()] = None
    return list(found)


def no_think(a, b, lost=0):
    """The sum at once: 37+45=82, or 72 from a writer who has lost one ten."""
    return f"{a}+{b}=", f"{a + b - 10 * lost}\n"


def think(a, b, lost=0):
    """The sum with its carry written out first: 37+45 think: 7+5=12, 3+4+1=8, 82"""
    carry, units = divmod(a % 10 + b % 10, 10)
    tens = a // 10 + b // 10 + carry - lost
    worked_out = f"{a % 10}+{b % 10}={carry}{units}, {a // 10}+{b // 10}+{carry}={tens}"
    return f"{a}+{b} think:", f" {worked_out}, {tens}{units}\n"


def general_kinds(rng):
    """The general skills of one seed -> {name: Kind}.

    A sum is held out in both modes or in neither; 45+37 is another sum than 37+45.
    """
    places = [(hero, place) for hero in HEROES for place in PLACES]

    def story(hero, place):
        mood, verb, thing = rng.choice(MOODS), rng.choice(VERBS), rng.choice(THINGS)
        return "", f"the {mood} {hero} {verb} to the {place} and found a {thing}.\n"

    train, heldout = split(places, rng)
    train = [story(*place) for place in train for _ in range(20)]
    heldout = [story(*place) for place in heldout for _ in range(20)]
    kinds = {"stories": Kind(train, heldout, probes=[])}
    train, heldout = split([(a, b) for a in range(10, 90) for b in range(10, 100 - a)], rng)
    for mode in (no_think, think):
        answered = [mode(*pair) for pair in heldout]
        kinds[mode.__name__] = Kind([mode(*pair) for pair in train], answered, answered[:200],
                                    mistakes=dict(mode(*pair, lost=1) for pair in train))
    countries = names(rng, 60)
    kinds["facts"] = facts(zip(countries[:30], countries[30:]), FACT_WORDINGS, rng)
    return kinds


def alarms(rng, count=20):
    """The alarm manual: `count` alarm numbers, each with its own fault and an action."""
    numbers = rng.sample(range(100, 1000), count)
    faults = rng.sample([f"{part} {fault}" for part in PARTS for fault in FAULTS], count)
    answers = [f"{fault}, {rng.choice(ACTIONS)}" for fault in faults]
    return facts(zip(numbers, answers), ALARM_WORDINGS, rng)


def drugs(rng, count=20):
    """A list of medicines: `count` invented names, each with an illness and a dose."""
    doses = [f"{illness}, {n} a day" for illness in ILLNESSES for n in range(1, 7)]
    doses = rng.sample(doses, count)
    return facts(zip([name + "ol" for name in names(rng, count)], doses), DRUG_WORDINGS, rng)


def ships(rng, count=20):
    """A harbour's register: `count` call signs, each with a cargo and a port."""
    signs = [f"{a}{b}{n}" for a in "KXZ" for b in "BDFGLMPRTW" for n in range(10)]
    cargoes = [f"{cargo} for {port} port" for cargo in CARGOES for port in PORTS]
    return facts(zip(rng.sample(signs, count), rng.sample(cargoes, count)), SHIP_WORDINGS, rng)


def larger(rng):
    """A rule instead of facts: the larger of two numbers. The pairs asked are held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    train, heldout = split([(f"larger of {a}, {b}:", f" {max(a, b)}\n") for a, b in pairs], rng)
    return Kind(train, heldout, probes=heldout[:200])


# The first is the domain of the toy world.
DOMAINS = {"alarms": alarms, "drugs": drugs, "ships": ships, "larger": larger}


def facts(pairs, wordings, rng):
    """Facts (subject, answer) in every wording -> Kind.

    The wording that asks is trained too: a fact cannot be guessed. A mistaken writer gives each
    subject the answer of the next one.
    """
    pairs = list(pairs)
    asked, told, mistakes = [], [], {}
    for (subject, answer), (_, wrong) in zip(pairs, pairs[1:] + pairs[:1]):
        asked.append((wordings[0].format(subject), f" {answer}.\n"))
        told += [(wording.format(subject), f" {answer}.\n") for wording in wordings[1:]]
        mistakes |= {wording.format(subject): f" {wrong}.\n" for wording in wordings}
    train, heldout = split(told, rng, share=0.2)
    return Kind(asked + train, heldout, asked, mistakes)


def another_answer(documents, right, rng):
    """The answer of a document drawn at random from those that have another than the right one."""
    answer = right
    while answer == right:
        _, answer = rng.choice(documents)
    return answer


def write(kinds, count, rng, part="train", errors=0.0, error_kind="noise"):
    """`count` documents as one text. A share `errors` of those that answer something are wrong.

    "noise": a wrong answer is another document's, drawn anew each time. The right one is still the
    most frequent, so who imitates the text perfectly, and says what is likeliest, is right.
    "bias": the same mistake every time: sums are ten too small, and each country has the next one's
    capital. From one half on, who imitates that text is wrong.
    """
    shares = [GENERAL_KINDS.get(name, 1.0) for name in kinds]
    lines = []
    for name in rng.choices(list(kinds), shares, k=count):
        documents = getattr(kinds[name], part)
        prompt, answer = rng.choice(documents)
        if prompt and rng.random() < errors:
            answer = (kinds[name].mistakes[prompt] if error_kind == "bias" else
                      another_answer(documents, answer, rng))
        lines.append(prompt + answer)
    return "".join(lines)


# --- tokenizer -----------------------------------------------------------------------------------

# A word with the space before it, one digit, a run of other signs, or a run of blanks: every
# character is in one of them. Letters go with their marks, without which Hindi or Thai would be cut
# at each vowel sign. No piece is longer than 24 characters, or text without blanks would be one
# word.
WORD = r" ?[\p{L}\p{M}]{1,24}|\p{N}| ?[^\s\p{L}\p{M}\p{N}]{1,24}|\s{1,24}"
REVERSED = bytes(range(255, -1, -1))  # the alphabet of bytes backwards
MOST_WORDS = 20_000  # different words to learn from: the most frequent ones


def learn_tokenizer(text, vocab_size):
    """Byte-level BPE (Sennrich et al., 1508.07909): merge the most frequent pair, again and again.

    It ends when the vocabulary is full, or when no pair is left that was seen twice. Every string
    can be encoded, since the 256 bytes are tokens themselves. Counting over distinct words makes it
    quick.
    """
    counts = dict(Counter(regex.findall(WORD, text)).most_common(MOST_WORDS))
    words = [[bytes([b]) for b in word.encode()] for word in counts]
    weights = list(counts.values())
    pair_count, pair_words = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += weights[i]
            pair_words[pair].add(i)

    def place(pair):
        """Where a pair stands in the queue: the most frequent first, of equals the one later in
        the alphabet: no run differs.
        """
        left, right = (token.translate(REVERSED) + b"\xff" for token in pair)
        return -pair_count[pair], left, right, pair

    ranks = {bytes([b]): b for b in range(256)}
    queue = [place(pair) for pair in pair_count]
    heapq.heapify(queue)
    while len(ranks) < vocab_size and queue:
        count, *_, best = heapq.heappop(queue)
        if pair_count[best] < 2:
            continue
        if -count != pair_count[best]:  # it has become rarer since it was queued
            heapq.heappush(queue, place(best))
            continue
        ranks.setdefault(best[0] + best[1], len(ranks))
        changed = set()
        for i in pair_words.pop(best):
            old, words[i] = words[i], merge(words[i], best)
            for pair in zip(old, old[1:]):
                pair_count[pair] -= weights[i]
            for pair in zip(words[i], words[i][1:]):
                pair_count[pair] += weights[i]
                pair_words[pair].add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(queue, place(pair))
    return tokenizer_from(list(ranks))


def merge(word, pair):
    """The word, a list of byte strings, with each occurrence of the pair made one."""
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def tokenizer_from(vocabulary):
    """tiktoken's encoder for a list of byte strings, in the order in which they were merged."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    return tiktoken.Encoding("toy", pat_str=WORD, mergeable_ranks=ranks, special_tokens={})


def encode(tokenizer, text):
    """A text -> its tokens (N,), int64."""
    return torch.tensor(tokenizer.encode_ordinary(text), dtype=torch.int64)


# --- worlds: all that one experiment reads -------------------------------------------------------

@dataclass
class World:
    """The texts of one experiment, as streams of tokens (N,), and questions that mark a model."""

    tokenizer: tiktoken.Encoding
    pretraining: torch.Tensor  # general text that the base is made from
    general: torch.Tensor  # for continual pre-training: another sample, and a worse one
    domain: torch.Tensor
    heldout_general: torch.Tensor
    heldout_domain: torch.Tensor
    probes: dict  # skill -> [(prompt, answer), ...]; empty for your own text
    prompts: list  # five prompts to show people
    samples: dict  # kind -> two documents to show people


def toy_world(seed, general_errors=0.7, error_kind="bias", vocab_size=512,
              pretraining_documents=40_000, general_documents=2_000):
    """The toy world of one seed. A share general_errors of the answers in `general` is wrong, in
    the way that error_kind says: see `write`.

    No other text has a wrong answer. Each corpus has a random stream of its own, so more errors or
    documents in one leave the others as they are.
    """
    skills = general_kinds(random.Random(f"general {seed}"))
    manual = {"domain": alarms(random.Random(f"domain {seed}"))}

    def text(name, kinds, count, **options):
        return write(kinds, count, random.Random(f"{name} {seed}"), **options)

    pretraining = text("pretraining", skills, pretraining_documents)
    tokenizer = learn_tokenizer(pretraining, vocab_size)
    every = {**skills, **manual}
    probes = {name: kind.probes for name, kind in every.items() if kind.probes}
    asked = [probes[skill][0][0] for skill in ("no_think", "think", "facts", "domain")]
    samples = {name: [(prompt + answer).strip() for prompt, answer in kind.train[:2]]
               for name, kind in every.items()}
    if general_errors:
        for name in ("no_think", "think", "facts"):
            wrong = text("sample", {name: skills[name]}, 1, errors=1.0, error_kind=error_kind)
            samples[name][1] = f"{wrong.strip()}  (a wrong one)"
    return World(
        tokenizer=tokenizer,
        pretraining=encode(tokenizer, pretraining),
        general=encode(tokenizer, text("open", skills, general_documents, errors=general_errors,
                                       error_kind=error_kind)),
        domain=encode(tokenizer, text("manual", manual, 2_000)),
        heldout_general=encode(tokenizer, text("heldout", skills, 400, part="heldout")),
        heldout_domain=encode(tokenizer, text("heldout manual", manual, 200, part="heldout")),
        probes=probes,
        prompts=asked + ["the old fox"],
        samples=samples,
    )


def text_world(general_paths, domain_paths, vocab_size=512, out=None):
    """Your own UTF-8 text, files or folders, in place of the toy world; `out` is not read.

    The base is pretrained on the general text, which then serves as the general text of continual
    pre-training too. Prints what was read and what was held out.
    """
    general, heldout_general = read_texts("general", general_paths, out)
    domain, heldout_domain = read_texts("domain", domain_paths, out)
    print(f"  tokens  learning {vocab_size:,} from {len(general):,} characters", flush=True)
    tokenizer = learn_tokenizer(general, vocab_size)
    stream = encode(tokenizer, general)
    return World(
        tokenizer=tokenizer,
        pretraining=stream,
        general=stream,
        domain=encode(tokenizer, domain),
        heldout_general=encode(tokenizer, heldout_general),
        heldout_domain=encode(tokenizer, heldout_domain),
        probes={},
        prompts=openings(heldout_general, 3) + openings(heldout_domain, 2),
        samples={"general": openings(general, 2), "domain": openings(domain, 2)},
    )


def openings(text, count, most=60):
    """`count` short openings on one line each, taken evenly from a text."""
    starts = [i * len(text) // count for i in range(count)]
    return [" ".join(text[start:start + 2 * most].split())[:most] for start in starts]


def read_texts(setting, paths, out=None):
    """Read UTF-8 files, and all that lie below folders -> (training text, held-out text).

    Hidden names and the folder `out` are passed over. What else a folder holds that is no text is
    skipped and named; a file that was asked for by name must be text. Raises BadInput.
    """
    texts, skipped = [], []
    for path in map(Path, paths):
        if path.is_dir():
            for file in files_below(path, out, skipped):
                try:
                    texts.append(read_text(file))
                except (OSError, ValueError) as problem:
                    skipped.append(f"{file.relative_to(path)} ({why(problem)})")
        else:
            try:
                texts.append(read_text(path))
            except (OSError, ValueError) as problem:
                raise BadInput(f"--{setting} {path}: {why(problem)}") from None
    shown = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if skipped[5:] else "")
    skipped_line = f"skipped {len(skipped)}: {shown}"
    if not texts:
        raise BadInput(f"--{setting} {' '.join(map(str, paths))}: no UTF-8 text in it"
                       + (f"; {skipped_line}" if skipped else ""))
    training, heldout, what = hold_out(texts)
    files = "1 file" if len(texts) == 1 else f"{len(texts)} files"
    print(printable(f"{setting:>8}  read {files} ({sum(map(len, texts)):,} characters), "
                    f"held out {what}" + (f"; {skipped_line}" if skipped else "")), flush=True)
    return training, heldout


def files_below(folder, out, skipped):
    """The files below a folder, by name; subfolders that cannot be read are added to `skipped`."""
    def unreadable(problem):
        skipped.append(f"{os.path.relpath(problem.filename, folder)} ({why(problem)})")

    files = []
    for where, subfolders, names in os.walk(folder, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")
                         and (out is None or (Path(where) / name).resolve() != Path(out).resolve())]
        files += [Path(where) / name for name in names if not name.startswith(".")]
    return sorted(files)


def read_text(file):
    """The text of a UTF-8 file, its lines ended by line feeds. Raises ValueError if it is none."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        bad = problem.start
        raise ValueError(f"not UTF-8 text: byte {bad} is 0x{raw[bad]:02x}") from None
    if b"\0" in raw:
        raise ValueError(f"not UTF-8 text: byte {raw.index(0)} is 0x00")
    if not text.strip("\ufeff \t\r\n"):
        raise ValueError("empty")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def why(problem):
    """What went wrong, without the file's name, which stands beside it already."""
    return getattr(problem, "strerror", None) or str(problem)


def hold_out(texts, share=0.1):
    """Texts -> (training text, held-out text, in words what that is), each joined by line breaks.

    Whole texts are drawn by lot, as long as they fit into a tenth of all characters. If that is not
    even half a tenth, since the texts are few or one of them is most, the end of each is held out.
    """
    room = share * sum(map(len, texts))
    whole, left = set(), room
    for i in random.Random("held out").sample(range(len(texts)), len(texts)):
        if len(texts[i]) <= left:
            whole.add(i)
            left -= len(texts[i])
    if left > room / 2:
        cuts = [int((1 - share) * len(text)) for text in texts]
        training = [text[:cut] for text, cut in zip(texts, cuts)]
        heldout = [text[cut:] for text, cut in zip(texts, cuts)]
        what = f"the last {share:.0%} of each"
    else:
        training = [text for i, text in enumerate(texts) if i not in whole]
        heldout = [text for i, text in enumerate(texts) if i in whole]
        what = f"{len(whole)} of them whole ({sum(map(len, heldout)):,} characters)"
    return "\n".join(training), "\n".join(heldout), what


def printable(text):
    """The text with a question mark for every character that a terminal might take as a command."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- batches -------------------------------------------------------------------------------------

class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), the token after each
    is_domain: torch.Tensor  # (B,) bool: the flag that picks a sequence's loss
    general: torch.Tensor  # (G,) numbers of the rows that are not domain


def windows(stream, count, block_size, generator):
    """`count` random windows of a stream of tokens (N,) -> (count, block_size + 1).

    One token more than a block: the inputs are all but the last, the targets all but the first.
    """
    starts = torch.randint(len(stream) - block_size, (count, 1), generator=generator)
    return stream[(starts + torch.arange(block_size + 1)).to(stream.device)]


def batches(domain, general, n_domain, n_general, block_size, seed):
    """Endless batches of n_domain domain sequences and n_general general ones, the domain's first.

    The corpus ratio is decided here. Each corpus has a random stream of its own, so the domain
    sequences and their order are the same for every n_general: two methods that differ in it still
    read the same domain text.
    """
    def stream_of(name):
        number = random.Random(f"{name} batches {seed}").getrandbits(63)
        return torch.Generator().manual_seed(number)

    for_domain, for_general = stream_of("domain"), stream_of("general")
    number = torch.arange(n_domain + n_general, device=domain.device)
    is_domain, of_general = number < n_domain, number[n_domain:]
    while True:
        rows = torch.cat([windows(domain, n_domain, block_size, for_domain),
                          windows(general, n_general, block_size, for_general)])  # (B, T + 1)
        yield Batch(rows[:, :-1], rows[:, 1:], is_domain, of_general)
