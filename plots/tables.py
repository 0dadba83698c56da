"""Rows of metrics as Markdown tables, and the numbers that most figures show."""

from statistics import mean

SKILLS = {"no_think": "no-think sums", "think": "think sums", "facts": "facts", "domain": "domain"}
LOSSES = {"general_loss": "general loss", "domain_loss": "domain loss", "kl_to_base": "KL to base"}


def kept(row):
    """General skills kept: exact answers, mean over the skills, %."""
    return 100 * mean(share for skill, share in row["accuracy"].items() if skill != "domain")


def learnt(row):
    """Domain learnt: exact answers, %."""
    return 100 * row["accuracy"]["domain"]


def p_right(row):
    """The probability of the right answer to a general question, mean over the skills, %."""
    return 100 * mean(p for skill, p in row["probability"].items() if skill != "domain")


def ends(seeds, value):
    """The value of the last row of each seed, [[row, ...], ...] -> [number, ...]."""
    return [value(rows[-1]) for rows in seeds]


def metrics_table(rows):
    """Rows of metrics -> a Markdown table: each method's last row, over seeds mean (low-high)."""
    last = {(row["method"], row["seed"]): row for row in rows}.values()
    skills = [skill for skill in SKILLS if skill in rows[0]["accuracy"]]
    lines = [["method", *LOSSES.values(), *(SKILLS[skill] for skill in skills),
              *(["p(right)"] if skills else [])]]
    for method in dict.fromkeys(row["method"] for row in rows):
        seeds = [row for row in last if row["method"] == method]
        lines.append([method, *(cell([row[loss] for row in seeds], 3) for loss in LOSSES),
                      *(cell([row["accuracy"][skill] for row in seeds], 2) for skill in skills)])
        if skills:
            lines[-1].append(cell([p_right(row) / 100 for row in seeds], 2))
    return markdown(lines)


def cell(values, digits):
    """One value, or the mean of several with the lowest and the highest: 0.95 (0.92-0.96)."""
    shown = [f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 makes 0.00 of -0.00
             for value in (mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]}-{shown[2]})"


def markdown(lines):
    """Lines of cells, the heading first -> a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |"
                     for line in [lines[0], rule, *lines[1:]])
