"""Rows of metrics as Markdown tables, and the numbers that most figures show."""

import math
from statistics import mean, stdev

SKILLS = {"no_think": "no-think sums", "think": "think sums", "facts": "facts", "domain": "domain"}
GENERAL = ("no_think", "think", "facts")
LOSSES = {"general_loss": "general loss", "domain_loss": "domain loss", "kl_to_base": "KL to base"}


def kept(row):
    """Exact answers, mean over the general skills, or over all of your own questions, %."""
    return 100 * mean(row["accuracy"][skill] for skill in general(row))


def general(row):
    return GENERAL if "facts" in row["accuracy"] else list(row["accuracy"])


def learnt(row):
    """Domain learnt: exact answers, %."""
    return 100 * row["accuracy"]["domain"]


def p_right(row):
    """The probability of the right answer to a general question, mean over the skills, %."""
    return 100 * mean(row["probability"][skill] for skill in general(row))


def skill(name):
    """-> a function of a row: exact answers in a skill, %; None if it was not tested."""
    return lambda row: 100 * row["accuracy"][name] if name in row["accuracy"] else None


def kl(row):
    return row["kl_to_base"]


def domain_loss(row):
    return row["domain_loss"]


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


def metrics_table(rows):
    """Rows of metrics -> a Markdown table: each method's last row, over seeds mean (low-high)."""
    last = {(row["method"], row["seed"]): row for row in rows}.values()
    columns = {name: (lambda row, key=key: row[key], 3) for key, name in LOSSES.items()}
    columns |= {SKILLS.get(skill, skill): (lambda row, skill=skill: row["accuracy"][skill], 2)
                for skill in rows[0]["accuracy"] if skill in (*SKILLS, *general(rows[0]))}
    if len(columns) > len(LOSSES):
        columns["p(right)"] = lambda row: p_right(row) / 100, 2
    return table("method", columns, {method: [[row] for row in last if row["method"] == method]
                                     for method in dict.fromkeys(row["method"] for row in rows)})


def table(heading, columns, lines):
    """{column: (value, digits)}, {label: rows of each seed} -> Markdown, of the last rows."""
    cells = [[cell(ends(seeds, value), digits) for value, digits in columns.values()]
             for seeds in lines.values()]
    return markdown([[heading, *columns], *([label, *row] for label, row in zip(lines, cells))])


def cell(values, digits):
    """One value, or the mean of several with the lowest and the highest: 0.95 (0.92-0.96)."""
    if None in values:
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


def differences_table(results, runs, reference):
    """How the last rows of {label: Run} differ from those of the run `reference`: paired, 95%.

    A difference whose interval contains 0 is in brackets.
    """
    values = {"kept, %": (kept, 1), "p(right), %": (p_right, 1), "domain, %": (learnt, 1),
              "domain loss": (domain_loss, 3), "KL to base": (kl, 3)}
    lines = [[f"minus {reference}", *values]]
    for label in [label for label in runs if label != reference]:
        lines.append([label])
        for value, digits in values.values():
            middle, low, high = difference(*(ends(results(runs[name]), value)
                                             for name in (label, reference)))
            shown = f"{middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
            lines[-1].append(shown if low * high > 0 else f"[{shown}]")
    return markdown(lines)
