"""Rows of metrics as Markdown tables, and the numbers that they and the figures show."""

import math
from statistics import mean, stdev

SKILLS = {"no_think": "no-think sums", "think": "think sums", "facts": "facts", "domain": "domain"}
GENERAL_SKILLS = ("no_think", "think", "facts")


# --- numbers of a row ----------------------------------------------------------------------------

def kept(row):
    """Exact answers, mean over the general skills, or over all of your own questions, %."""
    return 100 * mean(row["accuracy"][name] for name in general_skills(row))


def general_skills(row):
    """The three of the toy world, or those of your own questions."""
    return GENERAL_SKILLS if {*GENERAL_SKILLS} <= row["accuracy"].keys() else row["accuracy"]


def p_right(row):
    """The probability of the right answer to a general question, mean over the skills, %."""
    return 100 * mean(row["probability"][name] for name in general_skills(row))


def skill(name):
    """-> a function of a row: exact answers in a skill, %; None if it was not tested."""
    return lambda row: 100 * row["accuracy"][name] if name in row["accuracy"] else None


def of(key, factor=1):
    """-> a function of a row: the value of a key."""
    return lambda row: factor * row[key]


learnt, kl, domain_loss = skill("domain"), of("kl_to_base"), of("domain_loss")

# {column: (value, digits)} of most experiments
SUMMARY = {"general skills, %": (kept, 0), "p(right), %": (p_right, 0), "domain, %": (learnt, 0),
           "KL": (kl, 2), "domain loss": (domain_loss, 2)}
HELDOUT = {"domain, held-out wordings, %": (skill("held-out wordings"), 0)}


def ends(seeds, value):
    """The value of the last row of each seed, [[row, ...], ...] -> [number, ...]."""
    return [value(rows[-1]) for rows in seeds]


# The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26


def difference(values, others):
    """Paired over seeds, values - others -> its mean and its 95% interval (mean, low, high).

    The interval is that of a paired t-test. If it contains 0, no difference was found.
    """
    pairs = [a - b for a, b in zip(values, others, strict=True)]
    half = math.inf  # one seed says nothing about the next
    if len(pairs) > 1:
        t = T_QUANTILES[min(len(pairs) - 1, len(T_QUANTILES)) - 1]
        half = t * stdev(pairs) / math.sqrt(len(pairs))
    return mean(pairs), mean(pairs) - half, mean(pairs) + half


# --- tables --------------------------------------------------------------------------------------

def metrics_table(rows):
    """Rows of metrics -> a Markdown table: each method's last row, over seeds mean (low-high)."""
    last = {(row["method"], row["seed"]): row for row in rows}.values()
    columns = {"general loss": (of("general_loss"), 3), "domain loss": (domain_loss, 3),
               "KL to base": (kl, 3)}
    columns |= {SKILLS.get(name, name): (lambda row, name=name: row["accuracy"][name], 2)
                for name in rows[0]["accuracy"]}
    if rows[0]["accuracy"]:
        columns["p(right)"] = lambda row: p_right(row) / 100, 2
    return table("method", {method: [[row] for row in last if row["method"] == method]
                            for method in dict.fromkeys(row["method"] for row in rows)}, columns)


def table(heading, lines, columns=SUMMARY):
    """{label: rows of each seed}, {column: (value, digits)} -> a table of the last rows."""
    return markdown([[heading, *columns], *(
        [label, *(cell(ends(seeds, value), digits) for value, digits in columns.values())]
        for label, seeds in lines.items())])


def sweep_tables(heading, lines, shown="{}".format, columns=SUMMARY):
    """{label: {x: rows of each seed}} -> for each of {title: (value, digits)} a table against x."""
    every = list(dict.fromkeys(x for points in lines.values() for x in points))
    return "\n\n".join(markdown([[f"{title} by {heading}", *map(shown, every)], *(
        [label, *(cell(ends(points[x], value), digits) if x in points else "" for x in every)]
        for label, points in lines.items())]) for title, (value, digits) in columns.items())


def differences_table(lines, reference):
    """How {label: rows of each seed} differ from the line `reference`: paired, 95% intervals.

    A difference whose interval contains 0 is in brackets.
    """
    shown = [[f"minus {reference}", *SUMMARY]]
    for label in [label for label in lines if label != reference]:
        shown.append([label])
        for value, digits in SUMMARY.values():
            found = difference(ends(lines[label], value), ends(lines[reference], value))
            text = "{0:+.{3}f} ({1:+.{3}f} to {2:+.{3}f})".format(*found, digits + 1)
            shown[-1].append(text if found[1] * found[2] > 0 else f"[{text}]")
    return markdown(shown)


def cell(values, digits):
    """One value, or the mean of several with the lowest and the highest: 0.95 (0.92-0.96).

    None, of a seed that was not tested, is left out.
    """
    values = [value for value in values if value is not None]
    if not values:
        return ""
    shown = [f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 makes 0.00 of -0.00
             for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]}-{shown[2]})"


def markdown(lines):
    """Lines of cells, the heading first -> a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |"
                     for line in [lines[0], rule, *lines[1:]])
