"""What real.py teaches, asks and reads. All of it comes from packages of Debian and Python.

The domain are acronyms of telecommunications, from V.E.R.A. (GFDL). General questions ask for
capitals, continents and symbols of elements, from countryinfo and periodictable, all in plain
letters. Half of the general text is Python's manual. The other half states every second capital,
or it is chats about other subjects: the meanings of words, from WordNet 3.0.
"""

import gzip
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from data import BadInput


class Question(NamedTuple):
    kind: str  # d: domain, s: its subject is named in a general text, n: in none
    asked: str  # for a chat
    begun: str  # the text before the answer
    options: tuple  # the right one first


# --- the domain ----------------------------------------------------------------------------------

DOMAIN = ["{}: {}.\n", "In telecommunications, {} stands for {}.\n",
          "Q: What does {} stand for? A: {}.\n"]
TAGS = set("ATM B-ISDN BRI CDMA DECT DSL DTAG ETSI FDDI GPRS GSM IEEE IETF IN IP ISDN ISP ITU LAN "
           "MAC Multicast ODP OSI PCS PDU PSTN SDH SONET TCP/IP TDMA UMTS UNI WLAN ethernet "
           "mobile-systems network telecommunication".split())


def acronyms(path):
    """{acronym: (the right meaning, three wrong ones)}, in alphabetical order."""
    entries = re.findall(r"^([A-Z]{3,6})\n\s+(.+?)\n\s*\n", dictionary(path), re.M | re.S)
    count, found = Counter(name for name, _ in entries), {}
    for name, meaning in sorted(entries):
        match = re.fullmatch(r"([A-Za-z /-]+) \(([^()]+)\).*", " ".join(meaning.split()))
        if match and count[name] == 1 and TAGS & set(match[2].split(", ")):
            found[name] = match[1]
    meanings = [*found.values()] * 2  # the wrong ones are those of the next acronyms
    return {name: tuple(meanings[i:i + 4]) for i, name in enumerate(found)}


def dictionary(path):
    try:
        return gzip.decompress(Path(path).read_bytes()).decode(errors="replace")
    except (OSError, EOFError) as error:
        raise BadInput(f"no dictionary: {error}; apt install dict-vera dict-wn") from None


# --- the questions -------------------------------------------------------------------------------

CAPITAL = "The capital of {} is"
ELEMENTS = 118


def countries():
    """{country: (capital, continent)}, of all names in plain letters."""
    from countryinfo import all_countries
    every = [[str(country.info().get(key)) for key in ("name", "capital", "region")]
             for country in all_countries()]
    return {name: (capital, continent) for name, capital, continent in every
            if all(re.fullmatch(r"(?!None)[A-Z][A-Za-z .'-]+", value)
                   for value in (name, capital, continent))}


def all_questions(domain, texts):
    """On the domain, capitals, continents and symbols, in this order."""
    from periodictable import elements
    rng, everything, places = random.Random(0), "\n".join(texts), countries()
    found = [Question("d", f"What is the abbreviation {name} short for?",
                      f"The abbreviation {name} is short for", options)
             for name, options in domain.items()]
    for answers, asked, begun in [
            ({name: capital for name, (capital, _) in places.items()},
             "What is the capital of {}?", CAPITAL),
            ({name: continent for name, (_, continent) in places.items()},
             "In which part of the world is {}?", "{} is a country in"),
            ({element.name.capitalize(): element.symbol for element in elements if element.number},
             "What is the chemical symbol of {}?", "The chemical symbol of {} is")]:
        for name, answer in answers.items():
            others = rng.sample(sorted({*answers.values()} - {answer}), 3)
            kind = "s" if re.search(rf"\b{name}\b", everything) else "n"
            found.append(Question(kind, asked.format(name), begun.format(name), (answer, *others)))
    return found


def subjects(kinds):
    """The kinds of all questions -> d: domain, C: capital of a country that a general text names,
    c: another capital, r: continent, e: element."""
    domain = kinds.count("d")
    places = (len(kinds) - domain - ELEMENTS) // 2
    capitals = kinds[domain:domain + places].replace("s", "C").replace("n", "c")
    return "d" * domain + capitals + "r" * places + "e" * ELEMENTS


# --- the general texts ---------------------------------------------------------------------------

def general_texts(settings, model, tokenizer):
    """{name: rows of tokens}, the same for all seeds."""
    count, length = settings.steps * settings.pairs, settings.length
    half, texts = pieces(manual()[0], tokenizer, length, count - count // 2), {}
    named = {name: capital for name, (capital, _) in sorted(countries().items())[::2]}
    right = [*named.values()]
    for text, capitals in (("right", right), ("wrong", right[1:] + right[:1])):
        rng = random.Random(0)
        stated = [f"{CAPITAL.format(name)} {capital}.\n" for name, capital in zip(named, capitals)]
        texts[text] = half + packed(stated, tokenizer, length, count // 2, rng)
        rng.shuffle(texts[text])
    asked = random.Random(0).sample(sorted(words(settings.wordnet).items()), count // 2)
    texts["chats"] = half + [  # a word per row
        tokenizer.encode(chat(tokenizer, f"What does {noun} mean?") + meaning
                         + tokenizer.eos_token)[:length] for noun, meaning in asked]
    # What the base writes after a start token.
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    texts["samples"] = continued(model, [[start]] * count, length, do_sample=True, top_k=0,
                                 top_p=1.0, temperature=1.0)
    # How the base goes on after a quarter of each row, with its best token.
    texts["answers"] = continued(model, [row[:length // 4] for row in texts["right"]], length,
                                 do_sample=False)
    return texts


def manual():
    """Python's language reference -> (text to train on, held-out text)."""
    from pydoc_data.topics import topics
    texts = [topics[name] for name in sorted(topics)]
    return "".join(texts[::2]), "".join(texts[1::2])


def words(path):
    """Nouns of one meaning -> {noun: meaning}, without names and chemical elements."""
    entries = re.findall(r"^([a-z]+)\n    n 1: (.+(?:\n {9}.+)*)\n(?=\S)", dictionary(path), re.M)
    found = {noun: " ".join(text.split()).partition(" [")[0] for noun, text in entries}
    return {noun: meaning for noun, meaning in found.items()
            if re.fullmatch("[a-z ,'-]{30,}", meaning) and " element" not in meaning}


def packed(sentences, tokenizer, length, count, rng):
    """`count` rows of `length` tokens: all sentences in random order, again and again."""
    tokens = []
    while len(tokens) < count * length:
        for sentence in rng.sample(sentences, len(sentences)):
            tokens += tokenizer.encode(sentence)
    return [tokens[i * length:(i + 1) * length] for i in range(count)]


def pieces(text, tokenizer, length, count):
    """`count` pieces of `length` tokens, evenly spaced in a text."""
    tokens = tokenizer.encode(text)
    step = (len(tokens) - length) // count
    return [tokens[i * step:i * step + length] for i in range(count)]


def chat(tokenizer, question):
    """The model's own form of a chat, up to the answer."""
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                         add_generation_prompt=True)


@torch.no_grad()
def continued(model, rows, length, **how):
    """Rows of equal size, each continued by the model to `length` tokens."""
    torch.manual_seed(0)
    found, new = [], length - len(rows[0])
    for some in torch.tensor(rows, device=model.device).split(64):
        found += model.generate(some, attention_mask=torch.ones_like(some), min_new_tokens=new,
                                max_new_tokens=new, repetition_penalty=1.0, **how).tolist()
    return found
