"""Which contexts does the general text need? The same two methods on eight texts.

The text decides after which beginnings MoL keeps the base's predictions. `on the base's path` is
the share of tokens before which the base expects every token of the document.
"""

from plots import runs, style
from plots.runs import Run
from plots.tables import GENERAL, SKILLS, kl, learnt, p_right, skill, table
from plots.texts import from_source

RIGHT = {"general_errors": 0.0}
TEXTS = {  # name: (settings, source, how)
    "right answers": (RIGHT, "open", {}),
    "70% wrong": ({}, "open", {}),
    "70% wrong, answered by the base": ({}, "answered", {}),
    "written by the base": ({}, "own samples", {}),
    "right, other format": (RIGHT, "other format", {}),
    "the same, 10,000 documents": (RIGHT | {"general_documents": 10_000}, "other format", {}),
    "the same, a tenth in base format": (RIGHT, "other format", {"own": 0.1}),
    "the same, answered by the base": (RIGHT, "other format, answered", {})}
METHODS = ("replay", "mol")
FORMAT = "right, other format"


def run(method, text):
    settings, source, how = TEXTS[text]
    return Run(method, settings, from_source, {"source": source, **how})


RUNS = {f"{method}, {text}": run(method, text) for text in TEXTS for method in METHODS}
# The time of 250 steps of mol, generation included. A step of mol takes about 1.2 of replay, the
# base's answers about 40 steps, its own text about 180 (python tests/benchmark.py --methods).
RUNS |= {f"{method}, {text}, {steps} steps": run(method, text)._replace(
    settings=TEXTS[text][0] | {"steps": steps, "eval_every": steps})
    for text, of_replay, of_mol in [("70% wrong, answered by the base", 265, 214),
                                    ("written by the base", 90, 73)]
    for method, steps in (("replay", of_replay), ("mol", of_mol))}


def final(row):
    """Think sums whose last number is right, after any working, %."""
    return 100 * row["final"]


COLUMNS = {SKILLS[name]: (skill(name), "exact answers, %") for name in GENERAL}
COLUMNS["think: last number"] = final, "right, %"


def tell(results):
    columns = {"on the base's path": (lambda row: 100 * row["on_path"], 0)}
    columns |= {title: (value, 0) for title, (value, _) in COLUMNS.items()}
    columns |= {"think sums in the other format": (skill("other format"), 0),
                "domain": (learnt, 0), "p(right)": (p_right, 0), "KL": (kl, 2)}
    return table("%, KL in nats", columns, {label: results(run) for label, run in RUNS.items()})


def draw(results, picture, note):
    figure, rows = style.panels(2, 1, 10, 8, height_ratios=(1.7, 1))
    axes = rows[0][0].get_subplotspec().subgridspec(1, len(COLUMNS)).subplots(sharey=True)
    rows[0][0].remove()
    for method, shift in zip(METHODS, (0.15, -0.15)):
        colour = style.COLOURS[method]
        style.dot_rows(axes, {text: (colour, results(run(method, text))) for text in TEXTS},
                       COLUMNS, shift)
        axes[-1].text(0.3, 0.93 + shift / 5, method, color=colour, fontweight="bold",
                      transform=axes[-1].transAxes)
    draw_path(rows[1][0], results(run("mol", FORMAT)))
    style.save(figure, picture, "In another format mol loses the think sums",
               note)


def draw_path(panel, seeds):
    """The KL of mol to the base, token by token of a think answer, in the two formats."""
    for key, dashes in (("kl_other", "-"), ("kl_own", ":")):
        points = {i + 1: [rows[-1][key][i] for rows in seeds]
                  for i in range(len(seeds[0][-1][key]))}
        style.curve(panel, points, style.COLOURS["mol"], ls=dashes)
    panel.set(title=f"mol on {FORMAT}: KL to the base along a right think answer,\n"
              "dotted: in the format of the base, solid: in the format of the text",
              xlabel="token of the answer", ylabel="nats")


if __name__ == "__main__":
    runs.main("contexts", RUNS, draw, __doc__, tell)
