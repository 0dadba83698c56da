"""Where can the general text come from? Six sources, each with as many tokens or documents.

    open sample      the toy world's general text, most of its answers wrong
    pretraining      text that the base was pretrained on
    own samples      text that the base itself generated, each row from the start of a line
    no facts, no think sums      an open sample without them
    random letters   words of random letters
"""

import math
import random
import string
from dataclasses import replace

import torch

import data
from data import BadInput
from eval import evaluate
from plots import runs, style
from plots.runs import Run
from plots.tables import SKILLS, ends
from train import train


def own_samples(settings, seed, world, base, at_once=512):
    device = world.general.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = math.ceil(len(world.general) / settings.block_size)
    lines = torch.full((rows, 1), world.tokenizer.encode_single_token("\n"), device=device)
    samples = [base.generate(some, settings.block_size - 1, generator=generator)
               for some in lines.split(at_once)]
    return torch.cat(samples).flatten()[:len(world.general)]


def without(skill):
    def text(settings, seed, world, base):
        kinds = data.general_kinds(random.Random(f"general {seed}"))
        del kinds[skill]
        documents = data.draw_text(kinds, settings.general_documents,
                                   random.Random(f"open without {skill} {seed}"),
                                   errors=settings.general_errors, error_kind=settings.error_kind)
        return data.encode(world.tokenizer, documents).to(world.general.device)
    return text


def random_letters(settings, seed, world, base):
    rng = random.Random(f"noise {seed}")

    def word():
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))

    lines = [" ".join(word() for _ in range(6)) for _ in range(settings.general_documents)]
    return data.encode(world.tokenizer, "\n".join(lines)).to(world.general.device)


SOURCES = {"open sample": None,
           "pretraining": lambda _, seed, world, base: world.pretraining[:len(world.general)],
           "own samples": own_samples, "no facts": without("facts"),
           "no think sums": without("think"), "random letters": random_letters}
METHODS = ("replay", "mol")


def from_source(method, settings, seed, world, base, source):
    """A run on other general text."""
    general = SOURCES[source](settings, seed, world, base)
    if len(general) <= settings.block_size:
        raise BadInput(f"--general-documents {settings.general_documents}: too few for {source}")
    world = replace(world, general=general)
    return train(method, settings, seed, world, base,
                 lambda model: evaluate(model, base, world))[1]


def run(method, source):
    if SOURCES[source] is None:
        return Run(method)
    return Run(method, {}, from_source, {"source": source})


RUNS = {f"{method}, {source}": run(method, source) for source in SOURCES for method in METHODS}


def draw(results, picture):
    figure, (axes,) = style.panels(1, len(SKILLS), 10, 4.2, sharey=True)
    for panel, skill in zip(axes, SKILLS):
        for method, shift in zip(METHODS, (0.15, -0.15)):
            points = {shift - i: ends(results(run(method, source)),
                                      lambda row: 100 * row["accuracy"][skill])
                      for i, source in enumerate(SOURCES)}
            style.dots(panel, points, style.COLOURS[method])
        panel.set(title=SKILLS[skill], xlim=(-5, 105), xlabel="exact answers, %")
        panel.set_yticks([-i for i in range(len(SOURCES))], SOURCES)
    for method, height in zip(METHODS, (0.6, 0.5)):
        axes[-1].text(0.3, height, method, color=style.COLOURS[method], fontweight="bold",
                      transform=axes[-1].transAxes)
    style.save(figure, picture, "A skill that the general text does not show is lost, also by mol",
               style.seeds_note(len(results(run("mol", "open sample")))))


if __name__ == "__main__":
    runs.main("source", RUNS, draw, __doc__)
