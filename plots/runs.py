"""Make the missing runs of an experiment, keep them in runs.jsonl, and read them again.

`python -m plots.quality` makes the runs of quality.py that are not in runs.jsonl, draws quality.png
and prints tables. A run is one method on one seed with its own settings. When it has finished, it
becomes one line:

    {"method", "seed", "work", "how", "settings", "base": digest of the base's weights, "rows"}

So an experiment that was stopped continues where it was. A line does not record the code: after you
change a method, name another folder with --out.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from data import BadInput, alarms, make_world
from eval import evaluate
from plots.program import read_flags, run_program
from plots.style import seeds_note
from train import BASE_SETTINGS, METHODS, Settings, continue_pretraining, get_base, parse

HERE = Path(__file__).parent
DEFAULTS = Settings(out=str(HERE), seeds=(0, 1, 2, 3, 4), eval_every=50, dtype="float32",
                    general_errors=0.7)
FEW_SEEDS = replace(DEFAULTS, seeds=(0, 1, 2))  # for experiments with runs of over a minute


class Run(NamedTuple):
    method: str  # a key of train.METHODS
    settings: dict = {}  # those that differ from DEFAULTS
    work: Callable | None = None  # (method, settings, seed, world, base, **how), not just training
    how: dict = {}
    seeds: int | None = None  # only the first ones

    @property
    def work_name(self):
        return self.work.__name__ if self.work else "train"


# --- runs.jsonl ----------------------------------------------------------------------------------

def read_runs(path, defaults=DEFAULTS):
    """runs.jsonl -> {identity: line}. Skips damaged lines. Settings missing there are default."""
    lines = {}
    for text in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        try:
            line = json.loads(text)
            lines[identity(line["method"], line["work"], line["how"],
                           of_run(defaults) | line["settings"], line["seed"])] = line
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def append_run(path, line):
    """Add a line in one write, so that two programs can append at once."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")


def identity(method, work, how, settings, seed):  # a key of a dictionary
    return method, work, *sorted(how.items()), *sorted(settings.items()), seed


def of_run(settings):
    """The settings that a run depends on, without those that say where and what to run."""
    others = ("out", "seeds", "methods", "general_files", "domain_files", "questions",
              "device", "compile")
    return {name: value for name, value in asdict(settings).items() if name not in others}


def identity_of(run, settings, seed):
    return identity(run.method, run.work_name, run.how, of_run(replace(settings, **run.settings)),
                    seed)


# --- the command line of an experiment -----------------------------------------------------------

def main(*experiment, **options):
    run_program(lambda: run_experiment(*experiment, **options))


def run_experiment(name, runs, draw, description, tell, defaults=DEFAULTS, make=None,
                   omit=("methods", "general_files", "domain_files", "questions"),
                   arguments=None):
    """Make the missing runs of {label: Run}, draw the figure, if there is one, and print tables.

    draw(results, picture, note on the seeds) and tell(results) -> text call results(run) -> the
    rows of each seed. make: makes the runs of an experiment whose settings are not those of train.
    """
    varied = {key for run in runs.values() for key in run.settings}
    omit, title = {*omit, *varied}, description.partition("\n")[0]
    settings = (read_flags(defaults, arguments, omit, title, METHODS) if make else
                parse(arguments, defaults, omit, title))
    out = Path(settings.out)
    changed = (of_run(settings), settings.seeds) != (of_run(defaults), defaults.seeds)
    if changed and out.resolve() == Path(defaults.out).resolve():
        raise BadInput(f"--out {out}: it is for the default settings; name a folder of your own")
    path = out / "runs.jsonl"
    lines = read_runs(path, defaults)
    wanted = {identity_of(run, settings, seed): (run, replace(settings, **run.settings), seed)
              for run in runs.values() for seed in settings.seeds[:run.seeds]}
    missing = [job for key, job in wanted.items() if key not in lines]
    print(f"{name}: {len(wanted)} runs, {len(missing)} to make", flush=True)
    if missing:
        out.mkdir(parents=True, exist_ok=True)
        (make or make_in_processes)(missing, path)
        lines = read_runs(path, defaults)

    def results(run):
        return [lines[identity_of(run, settings, seed)]["rows"]
                for seed in settings.seeds[:run.seeds]]

    if draw:
        draw(results, out / f"{name}.png", seeds_note(len(settings.seeds)))
        print(out / f"{name}.png")
    print(tell(results))


# --- making runs ---------------------------------------------------------------------------------

def make_in_processes(jobs, path):
    """Make (run, settings, seed) on one process per core; append each to runs.jsonl when done."""
    print("a base that is new takes about a minute", flush=True)
    bases = {base_of(line): line["base"] for line in read_runs(path).values()}
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), start_worker)
    started = time.perf_counter()
    try:
        futures = {pool.submit(make_run, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            (run, _, seed), line = futures[future], future.result()
            if bases.setdefault(base_of(line), line["base"]) != line["base"]:
                raise BadInput(f"{path}: the runs of seed {seed} have another base than this "
                               "machine and code make; use a folder of your own, --out")
            append_run(path, line)
            print(progress(done, len(jobs), run, seed, started), flush=True)
    except BrokenProcessPool:
        raise BadInput("a process ended early, perhaps for lack of memory; run the command again "
                       "to continue") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def progress(done, count, run, seed, started):
    minutes = (time.perf_counter() - started) / done * (count - done) / 60
    varied = "".join(f", {key} {value}" for key, value in (run.settings | run.how).items())
    return f"{done:>4}/{count}  {run.method}, seed {seed}{varied}  {minutes:.1f} minutes left"


def start_worker():
    """One thread per process and no output. The process ends when its parent does."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def base_of(line):
    """What tells the base of a line from the others: its seed and settings."""
    return line["seed"], *(line["settings"].get(name) for name in BASE_SETTINGS)


def digest_of(model):
    """16 hexadecimal digits that identify the weights of a model."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def make_run(run, settings, seed):
    """Make one run -> its line of runs.jsonl."""
    world = make_world(settings, seed)
    base = get_base(settings, seed, world)
    # Alarms in wordings that the domain text has for other alarms only.
    heldout = {"held-out wordings": alarms(random.Random(f"domain {seed}")).heldout}
    world = replace(world, probes=world.probes | heldout)
    if run.work:
        rows = run.work(run.method, settings, seed, world, base, **run.how)
    else:
        _, rows = continue_pretraining(run.method, settings, seed, world, base,
                                       lambda model: evaluate(model, base, world))
    return line_of(run, settings, seed, base, rows)


def line_of(run, settings, seed, base, rows):
    return {"method": run.method, "seed": seed, "work": run.work_name, "how": run.how,
            "settings": of_run(settings), "base": digest_of(base), "rows": rows}
