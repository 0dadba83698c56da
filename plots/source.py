"""Where may the general text come from? The same methods on six sources of it.

    python plots/source.py        makes the runs that are missing, draws source.png; --help

    open sample      the toy world's own general text, most of its answers wrong
    pretraining      as many tokens of the text that the base was made from
    own samples      as many tokens that the base itself wrote, each row from a new line on: no
                     general corpus at all
    no facts         an open sample of as many documents without facts: is a skill kept that the
                     general text never shows?
    no think sums    an open sample of as many documents without think sums
    random letters   words of them, related to nothing
"""

import math
import random
import string
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that it runs as a script
from plots import style
from plots.runs import Run, ask


def pretraining(s, seed, world, base):
    return world.pretraining[:len(world.general)]


def own_samples(s, seed, world, base, at_once=512):
    """As many tokens as the open sample has, drawn from the base, each row from a new line on."""
    import torch  # drawing does without

    device = world.general.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = math.ceil(len(world.general) / s.block_size)
    lines = torch.full((rows, 1), world.tokenizer.encode_single_token("\n"), device=device)
    written = [base.generate(some, s.block_size - 1, generator=generator)
               for some in lines.split(at_once)]
    return torch.cat(written).flatten()[:len(world.general)]


def without(skill):
    def text(s, seed, world, base):
        import data

        kinds = data.general_kinds(random.Random(f"general {seed}"))
        del kinds[skill]
        rng = random.Random(f"open without {skill} {seed}")
        left = data.write(kinds, s.general_documents, rng, errors=s.general_errors,
                          error_kind=s.error_kind)
        return data.encode(world.tokenizer, left).to(world.general.device)
    return text


def random_letters(s, seed, world, base):
    import data

    rng = random.Random(f"noise {seed}")

    def word():
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))

    lines = [" ".join(word() for _ in range(6)) for _ in range(s.general_documents)]
    return data.encode(world.tokenizer, "\n".join(lines)).to(world.general.device)


SOURCES = {"open sample": None, "pretraining": pretraining, "own samples": own_samples,
           "no facts": without("facts"), "no think sums": without("think"),
           "random letters": random_letters}
METHODS = ("replay", "mol")


def from_source(method, s, seed, world, base, source):
    """A run on other general text -> its rows."""
    from data import BadInput
    from eval import evaluate
    from train import train

    general = SOURCES[source](s, seed, world, base)
    if len(general) <= s.block_size:
        raise BadInput(f"--general-documents {s.general_documents}: too few, {source} makes only "
                       f"{len(general)} tokens of them")
    world = replace(world, general=general)
    return train(method, s, seed, world, base, lambda model: evaluate(model, base, world))[1]


def run(method, source):
    if SOURCES[source] is None:
        return Run(method)
    return Run(method, {}, from_source, {"source": source})


RUNS = {f"{method}, {source}": run(method, source) for source in SOURCES for method in METHODS}


def draw(found, picture):
    figure, (panels,) = style.panels(1, len(style.SKILLS), 11, 4.4, sharey=True)
    for panel, (skill, shown) in zip(panels, style.SKILLS.items()):
        for method, shift in (("replay", 0.15), ("mol", -0.15)):
            points = {}
            for i, source in enumerate(SOURCES):
                ends = style.last(found(run(method, source)))
                points[-i - shift] = [100 * row["accuracy"][skill] for row in ends]
            style.dots(panel, points, style.COLOURS[method], method)
        panel.set(title=shown, xlim=(-5, 105), xlabel="exact answers, %")
        panel.set_yticks([-i for i in range(len(SOURCES))], SOURCES)
        panel.grid(axis="x", alpha=0.25)
    panels[-1].legend(loc="center", frameon=False)
    kept = {method: style.last(found(run(method, "own samples"))) for method in METHODS}
    what = style.title("Without any corpus, on the base's own samples, general skills answered "
                       "exactly", kept)
    style.save(figure, picture, what, f"{len(kept['mol'])} seeds: dots the mean, lines lowest to "
                                      "highest")


if __name__ == "__main__":
    ask("source", RUNS, draw, __doc__)
