"""Where may the general text come from? The same methods on six sources of it.

    python plots/source.py        the runs that are missing, source.jsonl, source.png; --help lists the settings

    open sample      the toy world's own general text, most of its answers wrong
    pretraining      as many tokens of the text that the base was made from
    own samples      as many tokens that the base itself wrote, each row from a new line on: no general corpus at all
    no facts         an open sample of as many documents without facts: is a skill kept that the general text never shows?
    no think sums    an open sample of as many documents without think sums
    noise            words of random letters, related to nothing
"""

import math
import random
import string
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
import data
from eval import SKILLS
from plots import style
from plots.style import plt
from plots.sweep import Run, main, train_and_mark


def pretraining(s, seed, world, base):
    return world.pretraining[:len(world.general)]


def own_samples(s, seed, world, base, at_once=512):
    """As many tokens as the open sample has, drawn from the base: every row starts on a new line."""
    generator = torch.Generator(world.general.device).manual_seed(seed)
    rows = math.ceil(len(world.general) / s.block_size)
    lines = torch.full((rows, 1), world.tokenizer.encode_single_token("\n"), device=world.general.device)
    written = torch.cat([base.generate(some, s.block_size - 1, generator=generator) for some in lines.split(at_once)])
    return written.flatten()[:len(world.general)]


def without(skill):
    def text(s, seed, world, base):
        kinds = data.general_kinds(random.Random(f"general {seed}"))
        del kinds[skill]
        left = data.write(kinds, s.general_documents, random.Random(f"open without {skill} {seed}"), errors=s.general_errors)
        return data.encode(world.tokenizer, left).to(world.general.device)
    return text


def noise(s, seed, world, base):
    rng = random.Random(f"noise {seed}")
    lines = (" ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(6)) for _ in range(s.general_documents))
    return data.encode(world.tokenizer, "\n".join(lines)).to(world.general.device)


SOURCES = {"open sample": None, "pretraining": pretraining, "own samples": own_samples,
           "no facts": without("facts"), "no think sums": without("think"), "noise": noise}


def from_source(s, seed, method, world, base, dtype, source):
    """train_and_mark, with other general text."""
    general = SOURCES[source](s, seed, world, base)
    if len(general) <= s.block_size:
        raise data.BadInput(f"--general-documents {s.general_documents}: too few, {source} makes only {len(general)} tokens of them")
    return train_and_mark(s, seed, method, replace(world, general=general), base, dtype)


RUNS = [Run(f"{method}, {source}", method, {}, from_source, {"source": source}) if SOURCES[source] else
        Run(f"{method}, {source}", method) for source in SOURCES for method in ("replay", "mol")]


def draw(rows, picture):
    last = style.last(rows)
    figure, panels = plt.subplots(1, len(SKILLS), figsize=(11, 4.4), sharey=True)
    for panel, (skill, shown) in zip(panels, SKILLS.items()):
        for method, shift in (("replay", 0.15), ("mol", -0.15)):
            style.dots(panel, {-i - shift: [100 * row["accuracy"][skill] for row in last[f"{method}, {source}"]]
                               for i, source in enumerate(SOURCES)}, style.COLOURS[method], method)
        panel.set(title=shown, xlim=(-5, 105), xlabel="exact answers, %")
        panel.set_yticks([-i for i in range(len(SOURCES))], SOURCES)
        panel.grid(axis="x", alpha=0.25)
    panels[-1].legend(loc="center", frameon=False)
    figure.suptitle(style.title("Without any corpus, on the base's own samples, general skills answered exactly", {
        method: last[f"{method}, own samples"] for method in ("replay", "mol")}), x=0.01, ha="left")
    style.save(figure, picture, rows, "lines: lowest to highest")


if __name__ == "__main__":
    sys.exit(main("source", RUNS, draw, __doc__))
