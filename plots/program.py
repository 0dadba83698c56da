"""The outside of a program: its flags, the machine it is on, its messages and exit codes.

A dataclass of settings becomes a command line: each field is a flag, its comment the help text.
"""

import argparse
import inspect
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_origin

import torch

from data import BadInput


def read_flags(defaults, words, omit, description, methods):
    """A dataclass of settings, each with a comment -> the same with those of the command line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    comments = dict(re.findall(r"(\w+): .*  # (.+)", inspect.getsource(type(defaults))))
    shorter = {"seeds": "--seed", "general_files": "--general", "domain_files": "--domain"}
    for f in [f for f in fields(defaults) if f.name not in omit]:
        kind = get_args(f.type)[0] if get_origin(f.type) is tuple else f.type
        choices = methods if f.name == "methods" else get_args(kind) or None
        options = {"action": "store_true"} if kind is bool else {
            "action": Once, "type": str if choices else kind, "choices": choices,
            "nargs": "+" if kind is not f.type else None}
        text = comments[f.name]
        if choices is methods:  # many, and some have a comma in their name
            options["metavar"], text = "NAME", f"{text}: {' | '.join(methods)}"
        parser.add_argument(shorter.get(f.name, "--" + f.name.replace("_", "-")), dest=f.name,
                            default=getattr(defaults, f.name), help=text, **options)
    return replace(defaults, **vars(parser.parse_args(words)))


class Once(argparse.Action):
    """Store the value of a flag that is given once. Numbers are finite, and at least 0 or 1."""

    def __call__(self, parser, given, value, flag):
        values = value if self.nargs else [value]
        default = self.default if self.nargs else [self.default]
        lowest = 0 if self.type is float or 0 in default else 1
        if hasattr(self, "given") or len({*values}) < len(values):
            parser.error(f"{flag}: give the flag once, and each value once")
        self.given = True
        if any(x == "" or self.type is not str and not lowest <= x < 2**32 for x in values):
            parser.error(f"{flag} {value}: use " + (
                "a name" if self.type is str else f"a number from {lowest} to {2**32 - 1}"))
        if self.dest in ("general_files", "domain_files", "questions"):
            values = [str(Path(x).resolve()) for x in values]  # eval.py may run in another folder
        setattr(given, self.dest, tuple(values) if self.nargs else values[0])


def on_this_machine(settings):
    """The settings with the device and dtype that "auto" means here. Raises BadInput."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    devices = [gpu.type, "cpu"] if gpu else ["cpu"]
    device = devices[0] if settings.device == "auto" else settings.device
    if device not in devices:
        raise BadInput(f"--device {device}: this machine has {devices}")
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = settings.dtype if settings.dtype != "auto" else "bfloat16" if fast else "float32"
    if settings.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise BadInput(f"--compile: torch.compile does not work here: {reason}") from None
    return replace(settings, device=device, dtype=dtype)


def printable(text):
    """The text with its line breaks as \\n, and "?" for signs that could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text.replace("\n", "\\n"))


def run_program(program):
    """Run program() and exit: 0, 2 with a message for bad input, or 130 after Ctrl-C."""
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no encoding
            sys.stdout.reconfigure(errors="replace")
        program()
        sys.exit(0)
    except KeyboardInterrupt:
        print("stopped; the methods that finished are kept", file=sys.stderr)
        sys.exit(130)
    except (BadInput, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
