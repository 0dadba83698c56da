"""What if the general text names few of the facts, or has domain text in it? All answers are right.

The text is drawn from only a share of the countries and of the sums, or has a share of domain
documents. `filtered` drops documents with a token that the base finds unlikely.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import SKILLS, learnt, skill, table
from plots.texts import from_source

NAMED = (0.1, 0.5, 1.0)
OVERLAPS = (0.05, 0.25, 0.5)
METHODS = ("replay", "mol")
COLOURS = style.COLOURS | {"replay": style.COLOURS["replay, right answers"]}
LIMIT = 5.0  # nats


def some_items(method, share, **how):
    return Run(method, {"general_errors": 0.0, "eval_every": 250}, from_source,
               {"source": "some items", "share": share, **how})


def overlap(method, share, **how):
    if not share:  # nothing to filter either
        return Run(method, {"general_errors": 0.0})
    return Run(method, {"general_errors": 0.0, "eval_every": 250}, from_source,
               {"source": "overlap", "share": share, **how})


RUNS = {f"{method}, {share:.0%} of the items": some_items(method, share)
        for share in NAMED for method in METHODS}
RUNS |= {"mol, all items, no questions": some_items("mol", 1.0, question=False)}
RUNS |= {f"{method}, {share:.0%} domain documents": overlap(method, share)
         for share in (0, *OVERLAPS) for method in METHODS}
RUNS |= {f"mol, {share:.0%} domain documents, filtered": overlap("mol", share, limit=LIMIT)
         for share in OVERLAPS}


def sums(row):
    return (skill("no_think")(row) + skill("think")(row)) / 2


def tell(results):
    columns = {name: (skill(name), 0) for name in ("named", "not named", *SKILLS)}
    return table("exact answers, %", columns, {label: results(run) for label, run in RUNS.items()})


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 3, 10, 4, sharey=True, subplot_kw={"ylim": (-5, 105)})
    named, lacking = ({method: {100 * share: results(some_items(method, share)) for share in shares}
                       for method in METHODS} for shares in (NAMED, NAMED[:-1]))
    domain = {label: {100 * share: results(overlap(label.split(",")[0], share, **how))
                      for share in (0, *OVERLAPS)}
              for label, how in (("replay", {}), ("mol", {}), ("mol, filtered", {"limit": LIMIT}))}
    for panel, sweeps, value, title, xlabel in zip(
            axes, (lacking, named, domain), (skill("not named"), sums, learnt),
            ("capitals that it lacks", "new sums", "domain learnt"),
            ("countries in the text, %", "sums it is drawn from, %", "domain documents, %")):
        style.sweep(panel, {label: (COLOURS[label.split(",")[0]], ":" if "," in label else "-",
                                    points, value) for label, points in sweeps.items()})
        panel.set(title=title, xlabel=xlabel)
    axes[0].set_ylabel("exact answers, %")
    style.save(figure, picture, "Most facts that the text lacks are lost", note)


if __name__ == "__main__":
    runs.main("coverage", RUNS, draw, __doc__, tell)
