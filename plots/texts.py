"""General texts of the experiments, in place of the toy world's own one.

A text of SOURCES is a function (settings, seed, world, base, **how) -> tokens (N,). A run with
`from_source` reads it as its general text.
"""

import math
import random
from dataclasses import replace
from statistics import mean

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import losses
from data import BadInput, encode
from eval import evaluate, heldout_losses
from train import continue_pretraining


def from_source(method, settings, seed, world, base, source, **how):
    """A run on other general text. Its last row has on_path and final, see there."""
    probes = dict(world.probes)
    if source == "other format":
        probes["other format"] = [(prompt, by_tens(prompt)) for prompt, _ in probes["think"]]
    if source == "some items":
        probes |= countries(seed, how["share"])
    general = SOURCES[source](settings, seed, world, base, **how)
    if len(general) <= settings.block_size:
        raise BadInput(f"--general-documents {settings.general_documents}: too few for {source}")
    world = replace(world, general=general, probes=probes)
    model, rows = continue_pretraining(method, settings, seed, world, base,
                                       lambda model: evaluate(model, base, world))
    rows[-1] |= {"on_path": on_path(base, world), "final": final(model, world)}
    return rows


def final(model, world):
    """The share of think sums whose last number is right, after any working."""
    given = answers_of(model, world, [prompt for prompt, _ in world.probes["think"]])
    return mean(given[prompt].split()[-1:] == right.split()[-1:]
                for prompt, right in world.probes["think"])


def test_on_text(name, model, base, tokens):
    """Loss and KL on tokens (N,), in nats per token -> {"seen_loss", "seen_kl"} if name is seen."""
    return dict(zip((f"{name}_loss", f"{name}_kl"), heldout_losses(model, tokens, base)))


# --- documents -----------------------------------------------------------------------------------

def kinds_of(seed):
    """The general documents of a seed, the same as in its toy world -> {name: Kind}."""
    return data.general_kinds(random.Random(f"general {seed}"))


def documents_of(text, kinds):
    """A text of data.draw_text -> its documents (prompt, answer). A story has no prompt."""
    prompts = {"", *(prompt for kind in kinds.values() for prompt, _ in kind.train)}
    for line in text.splitlines(keepends=True):
        cut = max(i for i in range(len(line)) if line[:i] in prompts)
        yield line[:cut], line[cut:]


def drawn(name, kinds, settings, seed, world):
    """A text of the usual size from these kinds, all answers right -> tokens (N,)."""
    text = data.draw_text(kinds, settings.general_documents, random.Random(f"{name} {seed}"))
    return to_tokens(text, world)


def to_tokens(text, world):
    return encode(world.tokenizer, text).to(world.general.device)


@torch.no_grad()
def surprise(base, world, lines, at_once=256):
    """Lines of text -> for each its tokens' -log p under the base, in nats, as a list."""
    rows = [to_tokens("\n" + line, world) for line in lines]
    found = []
    for i in range(0, len(rows), at_once):
        tokens = pad_sequence(rows[i:i + at_once], batch_first=True)  # (D, L)
        nats = losses.cross_entropy(base(tokens[:, :-1]), tokens[:, 1:])  # (D, L - 1)
        found += [loss[:len(row) - 1].tolist() for loss, row in zip(nats, rows[i:])]
    return found


def on_path(base, world, limit=5.0):
    """The share of general tokens before which the base expects every token of the document.

    A token is not expected if its -log p is over the limit, in nats.
    """
    lines = world.tokenizer.decode(world.general.tolist()).splitlines(keepends=True)
    found = total = 0
    for nats in surprise(base, world, [line for line in lines if line.strip()]):
        found += next((i + 1 for i, loss in enumerate(nats) if loss > limit), len(nats))
        total += len(nats)
    return found / total


# --- texts made by the base, or chosen by it -----------------------------------------------------

def own_samples(settings, seed, world, base, at_once=512):
    """Text that the base generates, each row from the start of a line."""
    device = world.general.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = math.ceil(len(world.general) / settings.block_size)
    lines = torch.full((rows, 1), world.tokenizer.encode_single_token("\n"), device=device)
    samples = [base.generate(some, settings.block_size - 1, generator=generator)
               for some in lines.split(at_once)]
    return torch.cat(samples).flatten()[:len(world.general)]


def answered(settings, seed, world, base):
    """The general text with the base's own answers to its prompts, greedy. Stories stay."""
    documents = list(documents_of(world.tokenizer.decode(world.general.tolist()), kinds_of(seed)))
    answers = answers_of(base, world, {prompt for prompt, _ in documents if prompt})
    return to_tokens("".join(prompt + answers.get(prompt, story) for prompt, story in documents),
                     world)


def answers_of(base, world, prompts, most=32):
    """Greedy answers, to the end of the line -> {prompt: answer}. Equal lengths go together."""
    end, rows, answers = world.tokenizer.encode_single_token("\n"), {}, {}
    for prompt in sorted(prompts):
        rows.setdefault(len(encode(world.tokenizer, "\n" + prompt)), []).append(prompt)
    for length, group in rows.items():
        tokens = torch.stack([to_tokens("\n" + prompt, world) for prompt in group])  # (P, T)
        new = base.generate(tokens, most, temperature=0, stop=end)[:, length:].tolist()
        for prompt, answer in zip(group, new):
            answer = answer[:answer.index(end)] if end in answer else answer
            answers[prompt] = world.tokenizer.decode(answer) + "\n"
    return answers


def likely_documents(settings, seed, world, base, limit):
    """The general text without documents in which a token's -log p under the base is over limit."""
    lines = world.tokenizer.decode(world.general.tolist()).splitlines(keepends=True)
    return to_tokens("".join(line for line, nats in zip(lines, surprise(base, world, lines))
                             if max(nats) <= limit), world)


# --- right answers, but in another format, about few things, or mixed with the domain ------------

def by_tens(prompt):
    """The right answer to a think sum in another format: 37+45 think: 30+40=70, 7+5=12, 82"""
    a, b = map(int, prompt.removesuffix(" think:").split("+"))
    tens, units = a // 10 + b // 10, a % 10 + b % 10
    return f" {a // 10}0+{b // 10}0={tens}0, {a % 10}+{b % 10}={units:02}, {a + b}\n"


def other_format(settings, seed, world, base, own=0.0):
    """Right answers, but think sums are worked out in another format, except a share `own`."""
    kinds, rng = kinds_of(seed), random.Random(f"own format {seed}")
    documents = [(prompt, answer if rng.random() < own else by_tens(prompt))
                 for prompt, answer in kinds["think"].train]
    kinds["think"] = kinds["think"]._replace(train=documents)
    return drawn("other format", kinds, settings, seed, world)


def other_format_answered(settings, seed, world, base):
    world = replace(world, general=other_format(settings, seed, world, base))
    return answered(settings, seed, world, base)


def countries(seed, share):
    """The questions about countries that a text with this share of them names, and the others."""
    questions = random.Random(f"named {seed}").sample(kinds_of(seed)["facts"].probes, 30)
    count = round(share * 30)
    return {"named": questions[:count], **({"not named": questions[count:]} if share < 1 else {})}


def some_items(settings, seed, world, base, share, question=True):
    """Right answers, but only a share of the countries and of the sums.

    Without `question` the facts lack the wording that tests a model.
    """
    kinds = kinds_of(seed)
    named = [prompt.split()[3].rstrip("?") for prompt, _ in countries(seed, share)["named"]]
    for name in ("no_think", "think"):
        documents = kinds[name].train  # already shuffled, both in the same order
        kinds[name] = kinds[name]._replace(train=documents[:round(share * len(documents))])
    kinds["facts"] = kinds["facts"]._replace(train=[
        (prompt, answer) for prompt, answer in kinds["facts"].train
        if any(country in prompt for country in named)
        and (question or not prompt.startswith("Q:"))])
    return drawn(f"some items {share}", kinds, settings, seed, world)


def overlap(settings, seed, world, base, share, limit=None):
    """Right answers, but a share of the documents is from the domain. With a limit: filtered."""
    kinds, rng = kinds_of(seed), random.Random(f"overlap {seed}")
    manual = {"domain": data.alarms(random.Random(f"domain {seed}"))}
    count = round(share * settings.general_documents)
    lines = (data.draw_text(kinds, settings.general_documents - count, rng)
             + data.draw_text(manual, count, rng)).splitlines(keepends=True)
    rng.shuffle(lines)
    world = replace(world, general=to_tokens("".join(lines), world))
    return likely_documents(settings, seed, world, base, limit) if limit else world.general


SOURCES = {"open": lambda settings, seed, world, base: world.general, "answered": answered,
           "own samples": own_samples, "likely documents": likely_documents,
           "other format": other_format, "other format, answered": other_format_answered,
           "some items": some_items, "overlap": overlap}
