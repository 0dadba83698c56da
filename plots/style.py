"""What figures and tables share: the table itself, one colour per method, curves with their spread.

Nothing here needs torch: a figure is drawn from metrics alone.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's own backend may be missing

import matplotlib  # noqa: E402, after the choice of its backend
from matplotlib.figure import Figure  # noqa: E402

SKILLS = {"no_think": "no-think sums", "think": "think sums", "facts": "facts", "domain": "domain"}
LOSSES = {"general_loss": "general loss", "domain_loss": "domain loss", "kl_to_base": "KL to base"}

# Okabe and Ito's palette and an indigo of Tol's, told apart by colour-blind readers too.
COLOURS = {"ce": "#D55E00", "replay": "#0072B2", "replay, right answers": "#332288",
           "mol": "#009E73"}
WIDTHS = {"replay": 5.0, "mol": 2.0}  # so that both show where they lie on each other
SPARE = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # for methods of your own

STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
         "axes.titlelocation": "left", "savefig.dpi": 150}


# --- files and the command line ------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def tolerant_console():
    """A console that lacks a letter shows a question mark; a notebook's needs no such care."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def whole(path):
    """A temporary name to write to, moved into place at the end: a file is whole or not there.

    Raises OSError if it cannot be written, on a full disk for example; nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save raises the latter
        told = getattr(problem, "strerror", None) or str(problem).partition("\n")[0]
        raise OSError(f"{path}: cannot be written: {told}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder, wait=False):
    """The folder for this program alone until the block ends, or the program, however it ends.

    Raises OSError if another has it, or waits. Where there are no such locks, on Windows, it has
    none.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OSError(f"--out {folder}: another run is writing there; wait for its end, or "
                          "name another folder") from None
        yield
    finally:
        os.close(handle)


def clear_leftovers(folder):
    """Remove the temporary files that programs which were killed left in a folder."""
    for left in Path(folder).glob("*.[0-9]*.tmp"):
        left.unlink(missing_ok=True)


def read(path):
    """metrics.jsonl -> its rows."""
    with open(path) as file:
        return [json.loads(line) for line in file]


# --- what is told of rows of metrics -------------------------------------------------------------

def table(rows):
    """Rows of metrics -> a Markdown table of each method's last; over seeds mean (low-high)."""
    rows = list({(row["method"], row["seed"]): row for row in rows}.values())
    skills = [skill for skill in SKILLS if skill in rows[0]["accuracy"]]
    lines = [["method", *LOSSES.values(), *(SKILLS[skill] for skill in skills),
              *(["p(right)"] if skills else [])]]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        lines.append([method])
        lines[-1] += [cell([row[loss] for row in of_method], 3) for loss in LOSSES]
        lines[-1] += [cell([row["accuracy"][skill] for row in of_method], 2) for skill in skills]
        if skills:
            lines[-1].append(cell([probability(row) for row in of_method], 2))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def cell(values, digits):
    """One value, or the mean of several with the lowest and the highest: 0.95 (0.92-0.96)."""
    def shown(value):
        return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0.0 makes 0.00 of -0.00

    if len(values) == 1:
        return shown(values[0])
    return f"{shown(mean(values))} ({shown(min(values))}-{shown(max(values))})"


def general(row):
    """The mean exact match over the general skills, 0 to 1."""
    return mean(share for skill, share in row["accuracy"].items() if skill != "domain")


def probability(row):
    """The mean probability of the right answer over the general skills, 0 to 1."""
    return mean(p for skill, p in row["probability"].items() if skill != "domain")


KEPT_AND_LEARNT = {
    "general skills kept: exact answers, %": lambda row: 100 * general(row),
    "domain learnt: exact answers, %": lambda row: 100 * row["accuracy"]["domain"],
}


def last(seeds):
    """The rows of each seed, [[row, ...], ...] -> the last of each."""
    return [rows[-1] for rows in seeds]


def ends(seeds, value):
    """The value of each seed's last row."""
    return [value(row) for row in last(seeds)]


def by_step(rows):
    """Rows of metrics -> {method: {step: [one row per seed]}}."""
    methods = defaultdict(lambda: defaultdict(list))
    for row in rows:
        methods[row["method"]][row["step"]].append(row)
    return {method: dict(steps) for method, steps in methods.items()}


def title(what, ends):
    """The message of a figure, read off the metrics: ends {name: [each seed's last row]}."""
    shares = [f"{name} {mean(map(general, rows)):.0%}" for name, rows in ends.items()]
    return f"{what}: {'; '.join(shares)}"


def message(methods, base, marked, remark=""):
    """The title of a run's figure: what each method ends with, the mean over seeds."""
    ends = {method: list(steps.values())[-1] for method, steps in methods.items()}
    if marked:
        return title(f"General skills, exact answers{remark}", {"base": base, **ends})

    def loss(rows):
        return mean(row["general_loss"] for row in rows)

    return "General loss, nats above the base: " + ", ".join(
        f"{method} {loss(rows) - loss(base):+.2f}" for method, rows in ends.items())


def visible(token):
    """A token as a label of an axis, with a sign for its line break or blank."""
    return token.replace("\n", "\u21b5").replace(" ", "\u00b7")


# --- drawing -------------------------------------------------------------------------------------

def colour(method, methods):
    others = [name for name in methods if name not in COLOURS and name != "base"]
    return COLOURS.get(method) or SPARE[others.index(method) % len(SPARE)]


def figure(width, height):
    """An empty figure, in inches, in the house's style, drawn by no window system."""
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def panels(rows, columns, width, height, **options):
    """A figure of rows x columns panels -> (figure, panels[row][column])."""
    with matplotlib.rc_context(STYLE):
        made = figure(width, height)
        return made, made.subplots(rows, columns, squeeze=False, **options)


def spread(seeds):
    """What the lines and bands of a figure are: of how many seeds, in words."""
    if seeds == 1:
        return "one seed"
    return f"curves: the mean of {seeds} seeds, bands: lowest to highest"


def save(figure, picture, what, remark):
    """Put the message above and the remark below, and write the file."""
    with matplotlib.rc_context(STYLE):
        figure.suptitle(what, x=0.01, ha="left", wrap=True)
        figure.supxlabel(remark, fontsize=10, color="dimgrey")
        with whole(picture) as temporary:
            figure.savefig(temporary, format="png")


def curve(axes, points, colour, width, **line):
    """The mean over seeds as a line, the range as a band; points {x: [one value per seed]}."""
    x = list(points)
    low, high = [min(points[at]) for at in x], [max(points[at]) for at in x]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(x, [mean(points[at]) for at in x], color=colour, lw=width, **line)


def dots(axes, points, colour, label):
    """The mean over seeds as a dot, the range as a line; points {y: [one value per seed]}."""
    y = list(points)
    low, high = [min(points[at]) for at in y], [max(points[at]) for at in y]
    axes.hlines(y, low, high, color=colour, lw=2)
    means = [mean(points[at]) for at in y]
    axes.plot(means, y, color=colour, marker="o", ms=7, ls="none", label=label)


def label_ends(axes, ends, apart=0.07):
    """Names beside the ends of curves, moved apart if they touch; ends {name: (colour, y)}."""
    low, high = axes.get_ylim()
    height = {name: (y - low) / (high - low) for name, (_, y) in ends.items()}  # 0 bottom, 1 top
    ceiling = 1.0 + apart
    for name in sorted(ends, key=height.get, reverse=True):
        ceiling = min(height[name], ceiling - apart)
        axes.text(1.03, ceiling, name, color=ends[name][0], transform=axes.transAxes, va="center",
                  fontweight="bold")


def main(draw, script):
    """The command line of a run's figure: draw it from a metrics.jsonl."""
    parser = Parser(description="Draw a figure again from the metrics of a run.")
    parser.add_argument("metrics", type=Path, help="the run's metrics.jsonl")
    parser.add_argument("picture", nargs="?", type=Path, help="default: beside the metrics")
    options = parser.parse_args()
    tolerant_console()
    picture = options.picture or options.metrics.with_name(Path(script).stem + ".png")
    try:
        draw(read(options.metrics), picture, errors_of(options.metrics.with_name("settings.json")))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        parser.error(f"cannot draw {options.metrics} as {picture}: {problem!r}")
    print(picture)


def errors_of(settings):
    """What a run's settings.json says of its general text, for the title; empty if it is gone."""
    try:
        settings = json.loads(Path(settings).read_text())
        return wrong_answers(settings["general_errors"], settings["error_kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def wrong_answers(share, kind):
    how = {"noise": "at random", "bias": "always in the same way"}[kind]
    return f" ({share:.0%} of the general text's answers wrong{', ' + how if share else ''})"
