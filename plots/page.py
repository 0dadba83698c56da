"""The page of a run, out/page.html: its answers and, token by token, what each loss pushes.

train.py records every model at a few steps. The page is plots/page_template.html with these numbers
inside. plots/page.html is the page of `python train.py`.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
import losses
from eval import answer, write_file
from plots.tables import SKILLS

EARLY = 2, 5, 10, 15  # steps that only the page has, since most happens before step 25
TOP = 5  # likeliest tokens of the base and of the model at each position,
LEAST = math.log(0.01)  # but none that is less likely than this for both


@dataclass
class Recording:
    """What the page shows of one seed: R rows of up to L + 1 tokens."""
    world: data.World
    settings: dict  # some of train.Settings
    steps: list
    questions: list  # [skill, prompt, right answer]; without questions only the prompt
    rows: list  # [is it domain text?, note, tokens]: six of general, six of domain text
    tokens: torch.Tensor  # (R, L + 1), those of all rows, filled up with zeros
    base_log_p: torch.Tensor  # (R, L, V)
    base: list  # for each token of each row {token: -log p of the base}, see `position`
    models: dict = field(default_factory=dict)  # {method: [[answers, positions of rows], ...]}


def start(settings, world, base):
    """Choose steps, questions and rows -> Recording."""
    every = settings.eval_every * math.ceil(settings.steps / settings.eval_every / 15)
    steps = {0, *EARLY, *range(every, settings.steps, every), settings.steps}
    questions = [[skill, *probes[0]] for skill, probes in world.probes.items()]
    rows = toy_rows(world) if not settings.general_files else [
        (is_domain, "", text[i * len(text) // 6:][:32])  # twelve pieces of your own text
        for is_domain, text in enumerate((world.general, world.domain)) for i in range(6)]
    rows = [[*row, tokens[:settings.block_size + 1].tolist()] for *row, tokens in rows]
    tokens = pad_sequence([torch.tensor(row[-1]) for row in rows], True).to(settings.device)
    with torch.no_grad():
        base_log_p = losses.log_probs(base(tokens[:, :-1]))
    return Recording(
        world, {name: getattr(settings, name) for name in ("general_errors", "kl", "strength")},
        sorted(step for step in steps if step <= settings.steps),
        questions or [["", prompt, ""] for prompt in world.prompts], rows, tokens, base_log_p,
        [[{} for _ in row[-1][1:]] for row in rows])


def toy_rows(world):
    """One sum, right, wrong and in another format; a fact, a story; six lines of the manual.
    -> [(is it domain text?, note, tokens), ...]"""
    general, domain = (world.tokenizer.decode(text.tolist())
                       for text in (world.general, world.domain))
    lines = {"36+21=47": "wrong answer", "36+21=57": "right answer",
             "36+21 think: 6+1=07, 3+2+0=4, 47": "wrong answer, worked out",
             "36+21 think: 30+20=50, 6+1=07, 57": "right answer, another format",
             "".join(world.probes["facts"][0]).strip(): "a fact",
             re.search("the .* found a .*|$", general)[0]: "a story"}
    lines |= dict.fromkeys(domain.splitlines()[:100], "")
    return [(i > 5, note + ("" if i > 5 or line in general else ", not in the text"),
             data.encode(world.tokenizer, f"\n{line}\n"))
            for i, (line, note) in enumerate(lines.items())][:12]


@torch.no_grad()
def snapshot(recording, method, step, model):
    """Record a model at a step, if it is one of the page's steps."""
    if step not in recording.steps:
        return
    tokens, base_log_p = recording.tokens, recording.base_log_p
    log_p = losses.log_probs(model(tokens[:, :-1]))  # (R, L, V)
    ids = torch.cat([tokens[:, 1:, None], base_log_p.topk(TOP)[1], log_p.topk(TOP)[1]], dim=-1)
    kl = [losses.kl_divergence(log_p, base_log_p, way) for way in ("reverse", "forward")]
    numbers = torch.stack(kl, dim=-1), ids, log_p.gather(-1, ids), base_log_p.gather(-1, ids)
    numbers = zip(*(values.nan_to_num().clamp(min=-99).tolist() for values in numbers))
    given = [answer(model, recording.world, prompt) for _, prompt, _ in recording.questions]
    recording.models.setdefault(method, []).append([given, [
        [position(*values) for values in zip(base, *row)]
        for base, row in zip(recording.base, numbers)]])


def position(base, kl, ids, log_p, base_log_p):
    """-> [reverse KL, forward KL, place in base, -log p, place, -log p, ...], and fills base.

    The text's token comes first. All but the places are in thousandths of a nat.
    """
    flat = [round(1000 * nats) for nats in kl]
    for i, token in enumerate(ids):
        if i == 0 or token not in ids[:i] and max(log_p[i], base_log_p[i]) > LEAST:
            base[token] = round(-1000 * base_log_p[i])
            flat += [list(base).index(token), round(-1000 * log_p[i])]
    return flat


def write(path, recording, rows):
    """Write the page of a recording and of the rows of metrics of its seed."""
    seen = {token for row in recording.base for tokens in row for token in tokens}
    seen |= {token for *_, tokens in recording.rows for token in tokens}
    content = {"words": {token: recording.world.tokenizer.decode([token]) for token in seen},
               "base": [[list(tokens.items()) for tokens in row] for row in recording.base],
               "skills": SKILLS, "metrics": rows} | {name: getattr(recording, name) for name in (
                   "settings", "steps", "questions", "rows", "models")}
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("page_template.html").read_text("utf-8")
    write_file(path, template.replace("DATA", text, 1).encode())
