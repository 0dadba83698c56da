"""What if the general text names few of the facts, or has domain text in it? All answers are right.

The text is drawn from only a share of the countries and of the sums, or has a share of domain
documents. `filtered` drops documents with a token that the base finds unlikely.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import skill, sweep_table
from plots.texts import from_source

NAMED = (0.1, 0.5, 1.0)
OVERLAPS = (0, 0.05, 0.25, 0.5)
COLOURS = {"replay": style.COLOURS["replay, right answers"], "mol": style.COLOURS["mol"]}
FILTERED = {"limit": 5.0}  # nats
RIGHT = {"general_errors": 0.0}


def named(method, share, **how):
    return Run(method, {**RIGHT, "eval_every": 250}, from_source,
               {"source": "some items", "share": share, **how})


def overlap(method, share, **how):
    if not share:  # nothing to filter either
        return Run(method, RIGHT)
    return Run(method, {**RIGHT, "eval_every": 250}, from_source,
               {"source": "overlap", "share": share, **how})


NO_QUESTIONS = named("mol", 1.0, question=False)
LINES = {"replay": ("replay", {}), "mol": ("mol", {}), "mol, filtered": ("mol", FILTERED)}
RUNS = {f"{method}, {share:.0%} of the items": named(method, share)
        for share in NAMED for method in COLOURS}
RUNS |= {"mol, all items, no questions": NO_QUESTIONS}
RUNS |= {f"{label}, {share:.0%} domain documents": overlap(method, share, **how)
         for share in OVERLAPS for label, (method, how) in LINES.items()}


def points(results, run, shares, method, **how):
    return {100 * share: results(run(method, share, **how)) for share in shares}


def tell(results):
    few = {method: points(results, named, NAMED, method) for method in COLOURS}
    few["mol, no questions"] = {100: results(NO_QUESTIONS)}
    few = {f"{title}: {label}": (some, skill(name), 0) for title, name in (
        ("capitals in the text", "named"), ("capitals not in the text", "not named"),
        ("no-think sums", "no_think"), ("think sums", "think"), ("domain", "domain"))
        for label, some in few.items()}
    domain = {f"{title}: {label}": (points(results, overlap, OVERLAPS, method, **how), skill(name),
                                    0)
              for title, name in (("domain", "domain"), ("no-think sums", "no_think"),
                                  ("think sums", "think"), ("facts", "facts"))
              for label, (method, how) in LINES.items()}
    return "\n\n".join(sweep_table(heading, lines, "{:.0f}%".format) for heading, lines in (
        ("countries and sums in the text", few), ("domain documents in the text", domain)))


def draw(results, picture, note):
    figure, (axes,) = style.panels(1, 2, 10, 4, sharey=True, subplot_kw={"ylim": (-5, 105)})
    style.sweep(axes[0], {method: (colour, "-", points(results, named, NAMED[:-1], method),
                                   skill("not named")) for method, colour in COLOURS.items()})
    style.sweep(axes[1], {label: (COLOURS[method], ":" if how else "-", points(
        results, overlap, OVERLAPS, method, **how), skill("domain"))
        for label, (method, how) in LINES.items()})
    axes[0].set(title="capitals that the text does not name", ylabel="exact answers, %",
                xlabel="countries in the general text, %")
    axes[1].set(title="domain learnt", xlabel="domain documents in the general text, %")
    style.save(figure, picture, "mol loses what the text lacks, and does not learn what it shows",
               note)


if __name__ == "__main__":
    runs.main("coverage", RUNS, draw, __doc__, tell)
