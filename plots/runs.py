"""What the questions share: one file of whole runs, found again by what they are.

A question is a file in plots/ with a list of runs and a figure of them: `python plots/ratio.py`
draws ratio.png from plots/runs.jsonl, after making the runs that are not there yet. A run is one
method on one seed, under its own settings. Each is a line of its own, added when the run has ended
and never touched again, so a sweep that is stopped, by Ctrl-C or by a power cut, goes on where it
was, and any number of questions may be asked at once. The code is not part of what a run is known
by: after changing a method, ask in a folder of your own, --out.

Drawing needs neither torch nor a base: both are for making runs, in sweep.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Callable, NamedTuple

from plots.style import fcntl, table, tolerant_console

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
COMMON = {"eval_every": 50}  # what the questions set for all of their runs


class Run(NamedTuple):
    method: str  # a row of train.METHODS
    settings: dict = {}  # what differs from the command line
    work: Callable | None = None  # (method, settings, seed, world, base, ...) -> rows; None: train
    how: dict = {}  # what `work` takes besides

    @property
    def work_name(self):
        return self.work.__name__ if self.work else "train"


# --- the file of runs ----------------------------------------------------------------------------

def read(path):
    """runs.jsonl -> its lines, whole ones alone: one that was cut short counts as not made.

    {"key", "method", "seed", "work", "how", "settings": all of them, resolved, "changed": names of
    those that were not at their default, "base": {"weights", "precision", "recipe"}, "rows"}
    """
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            line = json.loads(line)
            line["rows"][-1]["step"], line["base"]["weights"], line["changed"]
        except (ValueError, KeyError, TypeError, IndexError):
            continue
        found.append(line)
    return found


def add(path, line):
    """Add a line to runs.jsonl, on a line of its own also where the last one was cut short."""
    with open(path, "a+b") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end and file.seek(end - 1) == end - 1 and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def fits(line, run, seed, common):
    """Is a line of runs.jsonl this run? What was asked holds, and all else is at its default."""
    asked = {**common, **run.settings}
    return (line["seed"] == seed and line["method"] == run.method
            and line["work"] == run.work_name and line["how"] == run.how
            and all(line["settings"].get(name) == value for name, value in asked.items())
            and all(name in asked for name in line["changed"]))


def find(lines, run, seed, common):
    """The newest line of a run, or None."""
    return next((line for line in reversed(lines) if fits(line, run, seed, common)), None)


# --- a question's command line -------------------------------------------------------------------

def main(name, runs, draw, purpose, tell=None, arguments=None, seeds=SEEDS):
    """Make what is missing of {label: Run}, draw and tell -> exit code.

    draw(found, picture) makes the figure and tell(found) a table, where found(run) is the rows of
    each seed, [[row, ...], ...].
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    out, common = HERE, COMMON
    lines = read(HERE / "runs.jsonl")
    if arguments or not all(find(lines, run, seed, common)
                            for run in runs.values() for seed in seeds):
        from plots import sweep  # torch, from here on
        code, asked = sweep.make(name, runs, purpose, seeds, arguments)
        if code:
            return code
        out, seeds, common = asked
        lines = read(out / "runs.jsonl")

    def found(run):
        return [find(lines, run, seed, common)["rows"] for seed in seeds]

    picture = out / f"{name}.png"
    try:
        draw(found, picture)
        print(tell(found) if tell else table(labelled(found, runs)))
        print(picture)
        return 0
    except OSError as problem:
        print(f"{name}.py: {problem}", file=sys.stderr)
        return 2


def labelled(found, runs):
    """The rows of {label: Run}, each under its label, for a table."""
    return [{**row, "method": label}
            for label, run in runs.items() for rows in found(run) for row in rows]


def ask(*question, **more):
    """main, for a question that is run as a program: its exit code is the program's."""
    tolerant_console()
    sys.exit(main(*question, **more))
