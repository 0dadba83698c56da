"""Make the runs that a question lacks, on as many processes as there are cores, one thread each.

The bases come first. They lie in out/bases, each in a folder named after what it is made from, and
serve all questions.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from data import BadInput
from eval import digest, evaluate, load_model, save_model
from plots.runs import COMMON, HERE, add, find, read
from plots.style import clear_leftovers, locked

BASES = HERE.parent / "out" / "bases"
NOT_ASKED = ("methods", "general", "domain", "fresh", "base")  # the runs and BASES say
NOT_OF_A_RUN = (*NOT_ASKED, "out", "seed", "device", "compile")


# --- one run, in a process of its own ------------------------------------------------------------

def start_worker():
    """One thread per process, no output, and an end with the program that started it."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def base_for(s, seed):
    """The base of a seed, made if it is not there yet -> world, base, what the base is known by."""
    world = train.make_world(s, seed)
    of = train.made_from(s, seed, world)
    recipe = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    folder = Path(s.base) / recipe
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        clear_leftovers(folder)
        if (folder / "base.pt").exists():
            base, _ = load_model(folder / "base.pt", s.device)
        else:
            base = train.pretrain(s, seed, world)
            save_model(folder / "base.pt", base, made_from=of)
    known_by = {"weights": digest(base), "precision": s.dtype, "recipe": recipe}
    return world, base.requires_grad_(False), known_by


def make_base(s, seed):
    return base_for(s, seed)[-1]


def make_run(run, s, seed):
    """One method on one seed -> its line of runs.jsonl."""
    world, base, known_by = base_for(s, seed)
    if run.work:
        rows = run.work(run.method, s, seed, world, base, **run.how)
    else:
        _, rows = train.train(run.method, s, seed, world, base,
                              lambda model: evaluate(model, base, world))
    settings = settings_of(s)
    at_default = settings_of(train.on_this_machine(replace(train.Settings(), device=s.device)))
    changed = {name: value for name, value in settings.items() if value != at_default[name]}
    key = [run.method, f"seed {seed}", *(f"{name} {value}" for name, value in changed.items()),
           *(f"{name} {value}" for name, value in run.how.items()),
           f"from {known_by['weights']} in {s.dtype}"]
    return {"key": ", ".join(key), "method": run.method, "seed": seed, "work": run.work_name,
            "how": run.how, "settings": settings, "changed": list(changed), "base": known_by,
            "rows": rows}


def settings_of(s):
    """The settings that a run depends on; where it was made and kept is not among them."""
    return {name: value for name, value in asdict(s).items() if name not in NOT_OF_A_RUN}


# --- all that are missing ------------------------------------------------------------------------

def make(name, runs, purpose, seeds, arguments):
    """A question's command line -> exit code, (folder, seeds, settings common to its runs)."""
    try:
        out, seeds, common, s = asked_of(name, runs, purpose, seeds, arguments)
        lines = read(out / "runs.jsonl")
        wanted = {}  # two labels may ask for the same run
        for run in runs.values():
            of_run = train.check(replace(s, **run.settings, methods=(run.method,)))
            for seed in seeds:
                line = find(lines, run, seed, common)
                if line is None or not made_with(line, of_run):
                    wanted[repr((run, seed))] = run, of_run, seed
        count = len({repr(run) for run in runs.values()}) * len(seeds)
        print(f"{name}: {count} runs, {count - len(wanted)} made before, {len(wanted)} to make",
              flush=True)
        if wanted:
            out.mkdir(parents=True, exist_ok=True)
            make_all(wanted.values(), out / "runs.jsonl")
        return 0, (out, seeds, common)
    except (Exception, KeyboardInterrupt) as problem:
        return train.explain(f"{name}.py", problem), None


def asked_of(name, runs, purpose, usual_seeds, arguments):
    """The command line -> folder, seeds, the settings common to all runs, and all settings."""
    varied = {key for run in runs.values() for key in run.settings}  # flags that would blur labels
    defaults = replace(train.Settings(out=str(HERE), seed=usual_seeds), **COMMON)
    s = train.parse(arguments, defaults, f"plots/{name}.py", {*NOT_ASKED, *varied},
                    purpose.partition("\n")[0])
    given = {key: value for key, value in settings_of(s).items()
             if value != settings_of(defaults)[key]}
    out = Path(s.out)
    if out.resolve() == HERE.resolve() and (given or s.seed != usual_seeds):
        raise BadInput(f"--out: name a folder of your own; {s.out} holds the runs of the default "
                       "settings")
    s = replace(train.on_this_machine(s), base=str(BASES))
    given = {key: getattr(s, key) for key in given}
    return out, s.seed, {**COMMON, **given}, s


def made_with(line, s):
    """Do the settings of a run that is there equal those asked for, today's defaults among them?"""
    settings = settings_of(s)
    return all(settings.get(name) == value for name, value in line["settings"].items())


def make_all(wanted, path):
    """Make runs (Run, settings, seed), bases first, and add each to runs.jsonl as it ends."""
    with workers() as pool:
        print(f"the bases first, in {BASES}: a minute each, if they are not there", flush=True)
        bases = {}
        for _, s, seed in wanted:
            of = tuple(getattr(s, name) for name in train.BASE_SETTINGS)
            bases.setdefault((seed, of), pool.submit(make_base, s, seed))
        for (seed, _), job in bases.items():
            base = job.result()
            for line in read(path):
                if (line["base"]["recipe"] == base["recipe"]
                        and line["base"]["weights"] != base["weights"]):
                    raise BadInput(f"{path}: its runs of seed {seed} started from another base "
                                   "than this machine makes; ask in a folder of your own, --out")
        began = time.perf_counter()
        jobs = {pool.submit(make_run, *job): job for job in wanted}
        for done, job in enumerate(as_completed(jobs), 1):
            add(path, job.result())
            run, _, seed = jobs[job]
            left = (time.perf_counter() - began) / done * (len(jobs) - done)
            which = ", ".join(f"{key} {value}" for key, value in (run.settings | run.how).items())
            print(f"{done:>4}/{len(jobs)}  {run.method}, seed {seed}{which and ', '}{which}  "
                  f"{left / 60:.1f} minutes left", flush=True)


@contextmanager
def workers():
    """A process per core, eight at most; after an error or Ctrl-C nobody waits for their work."""
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, 8), multiprocessing.get_context("spawn"),
                               initializer=start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise BadInput("a process that made a run was killed, perhaps for want of memory; ask "
                       "again to go on") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
