"""What if the general text says the right things in other words than the base would?

Its answers are right, but its prompts and sentences are not those of the pretraining text: other
endings after beginnings that the base knows, or other words from the start. Every model is tested
in the base's words and in those of the text.
"""

import random
from dataclasses import replace
from statistics import mean

import data
from eval import evaluate
from plots import runs
from plots.runs import Run
from plots.tables import GENERAL_SKILLS, HELDOUT, SUMMARY, differences_table, of, table
from plots.texts import answers_of, documents_of, kinds_of, on_path, test_on_text, to_tokens
from train import continue_pretraining

TEXTS = ("other endings", "other beginnings")
TENTH = "replay, a tenth in the base's words"
WAYS = {  # method, settings, how
    "replay": ("replay", {}, {}), "mol": ("mol", {}, {}),
    "replay, base's answers": ("replay", {}, {"answered": True}),
    "replay, base's answers, no prompts": ("answers_only", {}, {"answered": True}),
    "mol, forward KL": ("mol", {"kl": "forward"}, {}),
    TENTH: ("replay", {}, {"own": 0.1}),
    "mol, a tenth in the base's words": ("mol", {}, {"own": 0.1})}


def in_words(text, prompt, answer):
    """A document of the base -> the same in other words, (prompt, answer). Prompts end in a colon.

    37+45=82 becomes 37+45: 82, or add 37, 45: 82.
    """
    endings, value = text == "other endings", answer.split()[-1].rstrip(".")
    if not prompt:  # the old fox walked to the lake and found a coin.
        _, mood, hero, verb, _, _, place, *_, thing = answer[:-2].split()
        return ((f"the {mood} {hero} {verb} to the {place}:", f" a {thing} lay there.\n") if endings
                else (f"tell of a {hero}:", f" a {thing}, at the {place}.\n"))
    if "+" in prompt:
        a, b = map(int, prompt.removesuffix("=").removesuffix(" think:").split("+"))
        if prompt.endswith("="):
            return f"{a}+{b}:" if endings else f"add {a}, {b}:", f" {value}\n"
        steps = f" {a // 10 + b // 10}0, {a % 10 + b % 10:02}, {value}\n"
        return f"{a}+{b} think so:" if endings else f"work out {a}, {b}:", steps
    country = next(word for word in prompt.split()[1:] if word[0].isupper()).rstrip("?")
    known = prompt[:prompt.index(country)].removeprefix("Q: ")  # the capital of
    return f"{known}{country}, say:" if endings else f"who rules {country}:", f" {value}.\n"


def other_kinds(text, seed):
    """The general documents of a seed in other words -> {name: Kind}."""
    return {name: kind._replace(train=[in_words(text, *pair) for pair in kind.train],
                                heldout=[in_words(text, *pair) for pair in kind.heldout])
            for name, kind in kinds_of(seed).items()}


def unseen_text(text, seed, world):
    """Held-out documents in other words -> tokens (N,)."""
    rng = random.Random(f"unseen {seed}")
    return to_tokens(data.draw_text(other_kinds(text, seed), 400, rng, "heldout"), world)


def in_other_words(method, settings, seed, world, base, text, own=0.0, answered=False):
    """A run on right answers in other words. Its last row has on_path and the test on its text.

    own: the share of documents in the base's words. answered: the base answers the prompts.
    """
    other, rng = other_kinds(text, seed), random.Random(f"{text} {seed}")
    count = round(own * settings.general_documents)
    lines = (data.draw_text(other, settings.general_documents - count, rng)
             + data.draw_text(kinds_of(seed), count, rng)).splitlines(keepends=True)
    rng.shuffle(lines)
    if answered:
        prompts = [prompt for prompt, _ in documents_of("".join(lines), other)]
        answers = answers_of(base, world, {*prompts})
        lines = [prompt + answers[prompt] for prompt in prompts]
    probes = {f"other {name}": [in_words(text, *pair) for pair in world.probes[name]]
              for name in GENERAL_SKILLS}
    world = replace(world, general=to_tokens("".join(lines), world), probes=world.probes | probes)
    model, rows = continue_pretraining(method, settings, seed, world, base,
                                       lambda model: evaluate(model, base, world))
    rows[-1] |= {"on_path": on_path(base, world),
                 **test_on_text("other", model, base, unseen_text(text, seed, world))}
    return rows


def run(way, text, eval_every=250):
    method, settings, how = WAYS[way]
    return Run(method, {"general_errors": 0.0, "eval_every": eval_every, **settings},
               in_other_words, {"text": text, **how})


RUNS = {f"{way}, {text}": run(way, text) for text in TEXTS for way in WAYS}


def in_words_of_text(row):
    return 100 * mean(row["accuracy"][f"other {name}"] for name in GENERAL_SKILLS)


def tell(results):
    columns = {"on the base's path, %": (of("on_path", 100), 0), **SUMMARY,
               "skills in the text's words, %": (in_words_of_text, 0),
               "KL in the text's words": (of("other_kl"), 2), **HELDOUT}
    found = {text: {way: results(run(way, text)) for way in WAYS} for text in TEXTS}
    tables = [table(text, lines, columns) for text, lines in found.items()]
    return "\n\n".join(tables + [differences_table(found["other beginnings"], reference)
                                 for reference in ("replay", TENTH)])


if __name__ == "__main__":
    runs.main("wordings", RUNS, None, __doc__, tell)
