"""What must the general text contain? Contexts, facts, and no domain text. replay and mol.

The text decides after which beginnings MoL keeps the base's predictions. `on the base's path` is
the share of tokens before which the base expects every token of the document. Other texts have
right answers but name only a share of the countries and of the sums, or have a share of domain
documents. `filtered` drops documents with a token that the base finds unlikely.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import HELDOUT, SUMMARY, ends, kept, learnt, of, skill, sweep_tables, table
from plots.texts import from_source

METHODS = ("replay", "mol")
RIGHT = {"general_errors": 0.0}
TEXTS = {  # name: (settings, source, how)
    "right answers": (RIGHT, "open", {}),
    "70% wrong": ({}, "open", {}),
    "70% wrong, answered by the base": ({}, "answered", {}),
    "written by the base": ({}, "own samples", {}),
    "right, other format": (RIGHT, "other format", {}),
    "other format, 10,000 documents": (RIGHT | {"general_documents": 10_000}, "other format", {}),
    "other format, a tenth in base format": (RIGHT, "other format", {"own": 0.1}),
    "other format, answered by the base": (RIGHT, "other format, answered", {})}
NAMED = (0.1, 0.5, 1.0)
OVERLAPS = (0.05, 0.25, 0.5)


def run(method, text, **more):
    settings, source, how = TEXTS[text]
    return Run(method, {**settings, **more}, from_source, {"source": source, **how})


def named(method, share, **how):
    return Run(method, {**RIGHT, "eval_every": 250}, from_source,
               {"source": "some items", "share": share, **how})


def overlap(method, share, settings, **how):
    return Run(method, {**RIGHT, "eval_every": 250, **settings}, from_source,
               {"source": "overlap", "share": share, **how})


OF_TEXT = {f"{text}: {method}": run(method, text) for text in TEXTS for method in METHODS}
# The time of 250 steps of mol, generation included. A step of mol takes about 1.2 of replay, the
# base's answers about 40 steps, its own text about 180 (python tests/benchmark.py --methods).
OF_TEXT |= {
    f"{text}: {method}, {steps} steps": run(method, text, steps=steps, eval_every=steps)
    for text, of_replay, of_mol in [("70% wrong, answered by the base", 265, 214),
                                    ("written by the base", 90, 73)]
    for method, steps in (("replay", of_replay), ("mol", of_mol))}
NO_QUESTIONS = named("mol", 1.0, question=False)
ITEMS = {method: {share: named(method, share) for share in NAMED} for method in METHODS}
ITEMS["mol, no questions"] = {1.0: NO_QUESTIONS}
DOMAIN = {label: {share: overlap(method, share, settings, **how) for share in OVERLAPS}
          for label, method, settings, how in [
              ("replay", "replay", {}, {}), ("mol", "mol", {}, {}),
              ("mol, strength 0.3", "mol", {"strength": 0.3}, {}),
              ("mol, forward KL", "mol", {"kl": "forward"}, {}),
              ("mol, filtered", "mol", {}, {"limit": 5.0})]}
RUNS = OF_TEXT | {f"{label}, {share:.0%} {what}": run
                  for what, lines in (("of the items", ITEMS), ("domain documents", DOMAIN))
                  for label, points in lines.items() for share, run in points.items()}


def tell(results):
    def found(lines):
        return {label: {share: results(run) for share, run in points.items()}
                for label, points in lines.items()}

    columns = {"on the base's path": (of("on_path", 100), 0), "think sums": (skill("think"), 0),
               "last number": (of("final", 100), 0), "other format": (skill("other format"), 0)}
    skills = {"capitals named": (skill("named"), 0),
              "capitals not named, %": (skill("not named"), 0),
              "no-think sums": (skill("no_think"), 0), "think sums": (skill("think"), 0)}
    return "\n\n".join([
        table("general text", {label: results(run) for label, run in OF_TEXT.items()},
              columns | SUMMARY | HELDOUT),
        sweep_tables("share that the text names", found(ITEMS), "{:.0%}".format, skills),
        sweep_tables("domain documents", found(DOMAIN), "{:.0%}".format,
                     {"domain, %": (learnt, 0), **HELDOUT, "general skills, %": (kept, 0)})])


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, len(OVERLAPS), 10, 3.6, sharex=True, sharey=True)
    marks = {"mol": "o", "mol, strength 0.3": "^", "mol, forward KL": "s"}
    for panel, share in zip(axes, OVERLAPS):
        for label, mark in marks.items():
            seeds = results(DOMAIN[label][share])
            panel.plot(ends(seeds, learnt), ends(seeds, kept), mark, ms=8, alpha=0.7, label=label,
                       color=style.COLOURS["mol"], mfc="none" if mark == "o" else None)
        panel.set(title=f"{share:.0%} domain documents", xlabel="domain: exact answers, %")
    axes[0].set_ylabel("general skills, %")
    axes[0].legend(loc="lower left", fontsize=10)
    style.save(figure, picture, "If 25% of the general text is domain text, reverse KL at strength "
               "1 does not learn it", "a mark per seed; replay learns all")


if __name__ == "__main__":
    runs.main("contexts", RUNS, draw, __doc__, tell)
