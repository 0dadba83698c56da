"""What the questions share: make the runs that are missing, keep each as it ends, and draw when all are there.

A question is a file in plots/ with a list of runs: `python plots/ratio.py` makes them on as many processes as there
are cores, one thread each, writes ratio.jsonl and draws ratio.png. A run is one method on one seed, under the
settings of the command line and its own. It is kept whole or not at all, and known again by its settings: a sweep
that was stopped, by Ctrl-C or by a power cut, goes on where it was, and questions in one folder share the runs they have
in common, if they start from the same base. The code is not part of what a run is known by: after changing a method, ask in another folder, --out.
"""

import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import train
from data import BadInput
from eval import evaluate, table

HERE = Path(__file__).parent
NOT_ASKED = ("methods", "general", "domain", "fresh")  # a question names its methods, and asks about the toy world
NOT_OF_A_RUN = NOT_ASKED + ("out", "seed", "base", "device", "compile")


def train_and_mark(s, seed, method, world, base, dtype, also=lambda model: {}):
    """One method on one seed -> its rows of metrics, the base's own at step 0; also(model) is what to mark besides."""
    rows = []

    def mark(model, step):
        rows.append({"step": step, **evaluate(model, base, world, s.block_size), **also(model)})
        train.finite(method, step, rows[-1]["general_loss"] + rows[-1]["domain_loss"])

    mark(base, 0)
    train.continue_training(method, s, seed, world, base, dtype, mark)
    return rows


class Run(NamedTuple):
    label: str  # its name in the table and in the figure
    method: str  # a row of train.METHODS
    settings: dict = {}  # what differs from the command line
    work: Callable = train_and_mark  # (settings, seed, method, world, base, dtype, ...) -> rows of metrics
    how: dict = {}  # what `work` takes besides


# --- one run, in a process of its own --------------------------------------------------------------------------

def start_worker():
    """One thread a process, no output, and an end with the program that started it."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def prepared(s, seed):
    """Settings and seed -> (world, the base or None, device, dtype)."""
    device = train.choose_device(s.device)
    dtype = train.choose_dtype(s.dtype, device)
    world = train.make_world(s, seed, device)
    return world, train.earlier_base(s, seed, world, device, dtype), device, dtype


def make_base(s, seed):
    """Pretrain the base of a seed and keep it in s.out, if it is not there yet -> its loss on held-out general text."""
    world, base, device, dtype = prepared(s, seed)
    if base is None:
        base = train.pretrain(s, seed, world, device, dtype)
        folder = Path(s.out) / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        train.save_model(folder / "base.pt", base, made_from=train.made_from(s, seed, world, dtype))
    return evaluate(base, base, world, s.block_size)["general_loss"]


def make_run(s, seed, run):
    world, base, _, dtype = prepared(s, seed)
    return run.work(s, seed, run.method, world, base.requires_grad_(False), dtype, **run.how)


# --- the runs that are kept ------------------------------------------------------------------------------------

def name_of(s, seed, run):
    """What a run is known by: a digest of its method, seed and settings."""
    settings = {name: value for name, value in asdict(s).items() if name not in NOT_OF_A_RUN}
    return hashlib.sha256(json.dumps([run.method, run.work.__name__, run.how, seed, settings]).encode()).hexdigest()[:16]


def kept(path):
    """A file of metrics -> {name of a run: its rows}, whole runs alone: what is cut short or damaged is left out."""
    runs = defaultdict(list)
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            runs[row["run"]].append(row)
        except (ValueError, KeyError, TypeError):
            continue
    return {name: rows for name, rows in runs.items() if all(row.get("rows") == len(rows) for row in rows)}


def sweep(name, runs, s):
    """Make what is missing of runs x seeds -> the rows of all, in their order, each with its run's label as "method"."""
    out = Path(s.out)
    own = out / f"{name}.jsonl"
    asked = []  # (name of the run, settings, seed, run); two labels may ask for the same run
    for run in runs:
        of_run = replace(s, **run.settings, methods=(run.method,))
        train.check(of_run)
        asked += [(name_of(of_run, seed, run), of_run, seed, run) for seed in s.seed]
    names = {key for key, *_ in asked}
    there = {key: rows for key, rows in kept(own).items() if key in names}

    def labelled():
        return [{**row, "method": run.label, "seed": seed, "run": key, "rows": len(there[key])}
                for key, _, seed, run in asked if key in there for row in there[key]]

    def keep():
        """Write the file again: what is asked, in its order, then what else is in it."""
        others = [row for key, rows in kept(own).items() if key not in names for row in rows]
        of_names = {row["run"]: row["method"] for row in reversed(labelled())}  # a run of two labels is written once
        train.save_metrics(own, [row for row in labelled() if row["method"] == of_names[row["run"]]] + others)

    def from_one_base(seed, *more):
        """Refuse to compare runs of a seed that started from different bases; more: the loss of the one to start from."""
        starts = [there[key][0]["general_loss"] for key, _, of_seed, _ in asked if of_seed == seed and key in there] + [*more]
        if starts and not same_base(min(starts), max(starts)):
            raise BadInput(f"{own}: its runs of seed {seed} started from another base; --base must be theirs, or --out another folder")

    def missing():
        return {key: job for key, *job in asked if key not in there}

    for seed in s.seed:
        from_one_base(seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"--out {out}: cannot write there: {problem}") from None
    if missing():
        with workers() as pool:
            bases = replace(s, out=s.base or str(HERE.parent / "out" / "bases"))
            if not s.base:
                print(f"the bases first, in {bases.out}: some minutes, if they are not there", flush=True)
            seeds = list(dict.fromkeys(seed for _, seed, _ in missing().values()))
            losses = {seed: job.result() for seed, job in [(seed, pool.submit(make_base, bases, seed)) for seed in seeds]}
            for seed, loss in losses.items():
                from_one_base(seed, loss)
            for file in sorted(out.glob("*.jsonl")):  # what other questions made from the same base
                for key, rows in kept(file).items():
                    if key in missing() and same_base(rows[0]["general_loss"], losses[missing()[key][1]]):
                        there[key] = rows
            print(f"{name}: {len(names)} runs, {len(there)} made before, {len(missing())} to make", flush=True)
            for key, seed, rows in make(pool, missing(), bases.out):
                there[key] = rows
                from_one_base(seed)
                keep()
    else:
        print(f"{name}: {len(names)} runs, all made before, 0 to make", flush=True)
    keep()
    return labelled()


def same_base(loss, other):
    """Do two losses on held-out general text belong to one base? Machines round differently; two bases differ by more."""
    return math.isclose(loss, other, rel_tol=1e-4)


@contextmanager
def workers():
    """As many processes as there are cores, eight at most; after an error or Ctrl-C nobody waits for what is under way."""
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, 8), multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise BadInput("a process that made a run was killed, perhaps for want of memory; ask again to go on") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()


def make(pool, missing, base):
    """Make the runs {name: (settings, seed, run)} from the bases in a folder: yields (name, seed, rows) as each ends."""
    began = time.perf_counter()
    jobs = {pool.submit(make_run, replace(of_run, base=base), seed, run): (key, seed, run)
            for key, (of_run, seed, run) in missing.items()}
    for done, job in enumerate(as_completed(jobs), 1):
        key, seed, run = jobs[job]
        yield key, seed, job.result()
        left = (time.perf_counter() - began) / done * (len(jobs) - done)
        print(f"{done:>4}/{len(jobs)}  {run.label}, seed {seed}  {left / 60:5.1f} minutes left", flush=True)


# --- the command line ------------------------------------------------------------------------------------------

def main(name, runs, draw, purpose, tell=table, arguments=None):
    """A question's command line -> exit code. draw(rows, picture) makes its figure, tell(rows) its table."""
    defaults = train.Settings(out=str(HERE), seed=(0, 1, 2), eval_every=50)
    varied = {name for run in runs for name in run.settings}  # a flag for what the question varies would blur its labels
    try:
        s = train.parse(arguments, defaults, f"plots/{name}.py", {*NOT_ASKED, *varied}, purpose.partition("\n")[0])
        own = replace(s, base="", device=defaults.device, compile=defaults.compile)
        if replace(own, out=defaults.out) != defaults and Path(s.out).resolve() == HERE.resolve():
            raise BadInput(f"--out: name a folder of your own; {s.out} holds the runs of the default settings")
        rows = sweep(name, runs, s)
        print(tell(rows))
        picture = Path(s.out) / f"{name}.png"
        draw(rows, picture)
        print(picture)
        return 0
    except (BadInput, OSError) as problem:
        told, code = problem, 2
    except KeyboardInterrupt:
        told, code = "stopped; what was finished is kept, ask again to go on", 130
    print(f"{name}.py: {told}", file=sys.stderr)
    return code
