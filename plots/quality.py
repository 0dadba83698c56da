"""How many answers of the general text can be wrong, and in which way? Does replay imitate them?

A perfect imitator of the text that was used gives an answer the share that it has in this text. It
answers with the most frequent one. replay is also tested on 100 questions of the text per skill.
"""

import random
from collections import Counter, defaultdict
from operator import itemgetter
from statistics import mean

import data
from eval import evaluate, score_probes
from plots import runs, style
from plots.runs import Run
from plots.tables import GENERAL, SKILLS, kept, metrics_table, p_right, table
from plots.texts import documents_of, kinds_of
from train import train

SHARES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0)
KINDS = {"noise": "noise: a new wrong answer each time", "bias": "bias: always the same one"}


def imitator(text, kinds):
    """A text -> {skill: {prompt: (share of right answers, is the most frequent one right)}}.

    Of several most frequent answers each counts in part.
    """
    answers = defaultdict(Counter)
    for prompt, answer in documents_of(text, kinds):
        answers[prompt][answer] += 1
    found = {skill: {} for skill in GENERAL}
    for skill in GENERAL:
        for prompt, right in kinds[skill].train:
            if given := answers.get(prompt):
                first = [answer for answer in given if given[answer] == max(given.values())]
                found[skill][prompt] = (given[right] / given.total(),
                                        (right in first) / len(first))
    return found


def marked_on_text(method, settings, seed, world, base, most=100):
    """A run that is also tested on questions of its general text.

    Its last row has "questions": {skill: [(share right in the text, most frequent right, answered
    exactly, probability of the right answer), ...]}.
    """
    model, rows = train(method, settings, seed, world, base,
                        lambda model: evaluate(model, base, world))
    kinds, questions = kinds_of(seed), {}
    for skill, found in imitator(world.tokenizer.decode(world.general.tolist()), kinds).items():
        right = dict(kinds[skill].train)
        chosen = random.Random(f"questions {seed}").sample(sorted(found), min(most, len(found)))
        questions[skill] = [
            [round(value, 3) for value in (*found[prompt], *score_probes(
                model, world.tokenizer, [(prompt, right[prompt])]))] for prompt in chosen]
    rows[-1]["questions"] = questions
    return rows


def run(method, share, kind):
    """Without wrong answers both kinds are the same run."""
    settings = {"general_errors": share, **({"error_kind": kind} if share else {})}
    if method == "mol":
        return Run(method, settings)
    return Run(method, settings | {"eval_every": 250}, marked_on_text)


RUNS = {f"{method}, {share:.0%} {kind if share else 'wrong'}": run(method, share, kind)
        for kind in KINDS for share in SHARES for method in ("replay", "mol")}


def of_questions(column):
    """The mean of a column over the questions of the text, mean over the skills, %."""
    def value(row):
        return 100 * mean(mean(question[column] for question in row["questions"][skill])
                          for skill in GENERAL)
    return value


IN_TEXT, MOST_FREQUENT, EXACT, P_RIGHT = map(of_questions, range(4))


def exact_where(text_is_right):
    """Exact answers to all questions whose most frequent answer in the text is right/wrong, %."""
    def value(row):
        return 100 * mean(question[2] for skill in GENERAL for question in row["questions"][skill]
                          if question[1] == text_is_right)
    return value


def imitator_of_wrong(kind, documents, seed):
    """How often the imitator of a text with 70% wrong answers is right, by skill, %."""
    kinds, rng = kinds_of(seed), random.Random(f"open {seed}")
    text = data.draw_text(kinds, documents, rng, errors=0.7, error_kind=kind)
    return {skill: 100 * mean(first for _, first in found.values())
            for skill, found in imitator(text, kinds).items()}


def tell(results):
    columns = {"test questions": kept, "questions of the text": EXACT, "imitator": MOST_FREQUENT,
               "where the text is right": exact_where(1), "where it is wrong": exact_where(0)}
    lines = {f"replay, {share:.0%} {kind}": results(run("replay", share, kind))
             for kind in KINDS for share in SHARES[1:-1]}
    imitators = {f"{kind}, {documents:,} documents": [
        [imitator_of_wrong(kind, documents, seed)] for seed in range(3)]
        for kind in KINDS for documents in (2_000, 40_000)}
    return "\n\n".join([
        metrics_table(runs.labelled(results, RUNS)),
        table("exact answers, %", {name: (value, 0) for name, value in columns.items()}, lines),
        table("imitator, seeds 0 to 2", {SKILLS[skill]: (itemgetter(skill), 0)
                                         for skill in GENERAL}, imitators)])


def draw(results, picture, note):
    figure, rows = style.panels(2, 2, 10, 6.4, sharex=True, sharey=True)
    for axes, kind in zip(rows, KINDS):
        mol, replay = ({100 * share: results(run(method, share, kind)) for share in SHARES}
                       for method in ("mol", "replay"))
        green, blue = style.COLOURS["mol"], style.COLOURS["replay"]
        for panel, of_what, value, of_text, of_imitator in (
                (axes[0], "exact answers, %", kept, EXACT, MOST_FREQUENT),
                (axes[1], "p(right), %", p_right, P_RIGHT, IN_TEXT)):
            style.sweep(panel, {"mol": (green, "-", mol, value),
                                "replay": (blue, "-", replay, value),
                                "replay on the text": (blue, ":", replay, of_text),
                                "imitator": ("black", "--", replay, of_imitator)},
                        label=panel is axes[1])
            panel.set(ylabel=of_what)
        axes[0].set_title(KINDS[kind], fontweight="bold")
    for panel in rows[1]:
        panel.set_xlabel("wrong answers in the general text, %")
    style.save(figure, picture, "Replay takes over the share of right answers, mol does not", note)


if __name__ == "__main__":
    runs.main("quality", RUNS, draw, __doc__, tell)
