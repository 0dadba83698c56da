"""The whole experiment: pretrain a base, train it on a domain with each method, test what is left.

    python train.py                            the toy world, seed 0
    python train.py --seed 0 1 2               three seeds, each with its own world and base
    python train.py --general FILE... --domain FILE...      your own text

All methods start from the same base and read the same domain sequences. The settings come last.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean
from typing import Callable, NamedTuple

import torch

import data
import losses
from data import BadInput
from eval import (evaluate, heldout_windows, load_model, printable, run_program, save_model,
                  show_answers, write_file)
from model import GPT, GPTConfig, add_lora, merge_lora
from plots import forgetting
from plots.methods import OTHER_METHODS
from plots.tables import metrics_table


# --- methods -------------------------------------------------------------------------------------
# A method turns (model, base, batch, settings) into the loss, its CE part and its KL part: three
# scalars in nats per token. The base is frozen, the batch is a data.Batch.

def ce(model, base, batch, settings):
    """Cross-entropy on all rows: domain rows for the method ce, general rows too for replay."""
    loss = losses.mean_cross_entropy(model(batch.tokens), batch.targets)
    return loss, loss, torch.zeros(())


def mol(model, base, batch, settings):
    """Cross-entropy on domain rows, KL to the frozen base on general rows (arXiv 2505.12043)."""
    with torch.no_grad():
        base_logits = base(batch.tokens[batch.general])  # (G, T, V)
    logits = model(batch.tokens)  # (B, T, V)
    return losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits,
                                    settings.kl, settings.strength)


class Method(NamedTuple):
    loss: Callable
    reads_general: bool = False  # do its batches have general rows?
    weight_decay: float = 0.1
    prepare: Callable | None = None  # (base, world, settings, seed) -> a fifth argument of the loss


METHODS = {
    "ce": Method(ce),  # naive continual pre-training
    "replay": Method(ce, reads_general=True),
    "mol": Method(mol, reads_general=True),
}
METHODS |= {name: Method(**row) for name, row in OTHER_METHODS.items()}


# --- training ------------------------------------------------------------------------------------

def train(name, settings, seed, world, base, test, label=None):
    """Train a copy of the base with a method -> the trained GPT, rows of metrics.

    test(model) returns the metrics of one row, {name: value}. It runs at step 0, every eval_every
    steps, and at the last step.
    """
    method, label = METHODS[name], label or name
    model = copy.deepcopy(base).requires_grad_(True)
    if settings.lora_rank:
        torch.manual_seed(seed)
        add_lora(model, settings.lora_rank)
    forward, frozen = map(torch.compile, (model, base)) if settings.compile else (model, base)
    prepared = [method.prepare(base, world, settings, seed)] if method.prepare else []
    n_general = round(settings.ratio * settings.batch_size) if method.reads_general else 0
    batches = data.batches(world.domain, world.general, settings.batch_size, n_general,
                           settings.block_size, seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(parameters, method.weight_decay)

    rows = [{"method": name, "seed": seed, "step": 0, **test(model)}]
    parts, started = [], time.perf_counter()
    for step, batch in zip(range(1, settings.steps + 1), batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast(settings.device, getattr(torch, settings.dtype),
                            enabled=settings.dtype != "float32"):
            loss, ce_part, kl_part = method.loss(forward, frozen, batch, settings, *prepared)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        values = [value.item() for value in (loss, ce_part, kl_part)]
        stop_if_not_finite(label, step, values[0])
        parts.append(values[1:])
        print_progress(label, step, settings.steps, started, *values)
        if step % settings.eval_every == 0 or step == settings.steps:
            ce_mean, kl_mean = map(mean, zip(*parts))  # since the last row
            parts.clear()
            rows.append({"method": name, "seed": seed, "step": step, "ce": ce_mean, "kl": kl_mean,
                         **test(model)})
            stop_if_not_finite(label, step, rows[-1].get("general_loss", 0.0))
    return merge_lora(model) if settings.lora_rank else model, rows


def adamw(parameters, weight_decay):
    """AdamW with weight decay on the matrices, but not on the gains of LayerNorm."""
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(step, settings):
    """Linear warmup over a tenth of the steps, then linear decay to just above zero."""
    warmup, end = max(1, settings.steps // 10), settings.steps + 1
    return settings.lr * min(step / warmup, (end - step) / (end - warmup))


def stop_if_not_finite(label, step, loss):
    if not math.isfinite(loss):
        raise BadInput(f"{label}: the loss is {loss} at step {step}; try a lower learning rate")


def print_progress(label, step, steps, started, loss, ce_part, kl_part):
    if step * 10 // steps > (step - 1) * 10 // steps:  # ten times per run
        seconds = (time.perf_counter() - started) * (steps - step) / step
        print(f"{label:>8}  step {step:>5}/{steps}  loss {loss:6.3f}  ce {ce_part:6.3f}  "
              f"kl {kl_part:6.3f}  {seconds:4.0f} s left", flush=True)


# --- the base ------------------------------------------------------------------------------------

BASES = Path(__file__).parent / "out" / "bases"
BASE_SETTINGS = ("base_steps", "base_lr", "base_batch_size", "n_layer", "n_head", "n_embd",
                 "block_size", "vocab_size", "dtype")


def pretrain(settings, seed, world):
    """Method ce from random weights, pretraining text as domain -> best GPT on held-out text."""
    torch.manual_seed(seed)
    blank = GPT(GPTConfig(world.tokenizer.n_vocab, settings.block_size, settings.n_layer,
                          settings.n_head, settings.n_embd)).to(settings.device)
    heldout = heldout_windows(world.heldout_general, settings.block_size)  # (B, T + 1)
    best = {"loss": math.inf}

    @torch.no_grad()
    def test(model):
        loss = losses.mean_cross_entropy(model(heldout[:, :-1]), heldout[:, 1:]).item()
        if loss < best["loss"]:
            best.update(loss=loss, model=copy.deepcopy(model))
        return {"general_loss": loss}

    settings = replace(settings, steps=settings.base_steps, lr=settings.base_lr, lora_rank=0,
                       batch_size=settings.base_batch_size,
                       eval_every=max(1, settings.base_steps // 20))
    train("ce", settings, f"pretraining {seed}", replace(world, domain=world.pretraining), blank,
          test, label="base")
    return best["model"]


# The source code that a base depends on, as it was when this program started.
BASE_CODE = [inspect.getsource(part) for part in (
    inspect.getmodule(GPT), data, losses.log_probs, losses.without_padding, losses.cross_entropy,
    losses.per_sequence, losses.mean_cross_entropy, heldout_windows, ce, train, adamw,
    learning_rate, pretrain)]


def get_base(settings, seed, world):
    """The frozen base of a seed. Its file is named by a digest of everything it depends on."""
    parts = ([getattr(settings, name) for name in (*BASE_SETTINGS, "device", "compile")], seed,
             METHODS["ce"].weight_decay, METHODS["ce"].loss.__qualname__, BASE_CODE,
             torch.get_num_threads(), torch.__version__)
    key = hashlib.sha256(repr(parts).encode())
    for tokens in (world.pretraining, world.heldout_general):
        key.update(tokens.cpu().numpy().tobytes())
    path = BASES / f"{key.hexdigest()[:16]}.pt"
    if path.exists():
        print(f"    base  loaded from {path}")
    else:
        BASES.mkdir(parents=True, exist_ok=True)
        save_model(path, pretrain(settings, seed, world))
    return load_model(path, settings.device).requires_grad_(False)


# --- main ----------------------------------------------------------------------------------------

def main(arguments=None):
    settings, started, rows = parse(arguments), time.perf_counter(), []
    out = Path(settings.out)
    worlds = {seed: data.make_world(settings, seed) for seed in settings.seeds}
    with run_folder(settings):
        print(f"{settings.device}, {settings.dtype}, {torch.get_num_threads()} threads, to {out}")
        for seed, world in worlds.items():
            for name, tokens in (("general", world.general), ("domain", world.domain)):
                start = world.tokenizer.decode(tokens[:60].tolist()).replace("\n", " / ")
                print(f"seed {seed}: {len(tokens):,} {name} tokens: {printable(start)} ...")
            base = get_base(settings, seed, world)
            models = {"base": base}
            save_model(out / f"seed{seed}" / "base.pt", base)
            rows.append({"method": "base", "seed": seed, "step": 0, **evaluate(base, base, world)})
            for name in settings.methods:
                models[name], curve = train(name, settings, seed, world, base,
                                            lambda model: evaluate(model, base, world))
                save_model(out / f"seed{seed}" / f"{name}.pt", models[name])
                rows += curve
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_file(out / "metrics.jsonl", lines.encode())
        print("\nlosses: nats per token; skills: share of exact answers; p(right): probability "
              f"of the right\nanswers\n\n{metrics_table(rows)}\n\nanswers of seed {seed}")
        show_answers(models, world, world.prompts)
        forgetting.draw(rows, out / "forgetting.png")
    print(f"\n{out / 'forgetting.png'} shows the curves; {time.perf_counter() - started:.0f} s")


@contextmanager
def run_folder(settings):
    """Make and lock the folders of a run. If all are writable, delete an earlier run's results."""
    out = Path(settings.out)
    for folder in (BASES, out, *(out / f"seed{seed}" for seed in settings.seeds)):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fails if the folder is not writable
    with open(out / ".lock", "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no such lock
        except BlockingIOError:
            raise BadInput(f"--out {out}: another run is writing there") from None
        write_file(out / "settings.json", json.dumps(asdict(settings), indent=1).encode())
        checkpoints = [f"seed*/{name}.pt" for name in ("base", *METHODS)]
        for pattern in ("metrics.jsonl", "forgetting.png", *checkpoints):
            for path in out.glob(pattern):
                path.unlink()
        yield


# --- settings ------------------------------------------------------------------------------------

def setting(default, meaning, low=None, high=math.inf, **options):
    """A dataclass field that is also a flag: default, help text, valid range, argparse options."""
    several = {"nargs": "+"} if isinstance(default, tuple) else {}
    kind = type((*default, "")[0] if several else default)  # an empty tuple is of str

    def convert(text):
        value = kind(text)
        if text != default and not (text if low is None else low <= value <= high):
            valid = "not empty" if low is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}, it must be {valid}")
        return value

    convert.__name__ = kind.__name__  # argparse names it in "invalid int value"
    options |= {"action": "store_true"} if kind is bool else {"type": convert}
    return field(default=default, metadata={"help": meaning, **options, **several})


@dataclass
class Settings:
    out: str = setting("out", "folder for the metrics, checkpoints and the figure")
    seeds: tuple = setting((0,), "one or more; each has its own world and base", 0, 2**32 - 1)
    methods: tuple = setting(("ce", "replay", "mol"), "one or more", choices=METHODS)
    # continual pre-training
    steps: int = setting(250, "steps of each method", 1)
    lr: float = setting(3e-3, "peak learning rate", 1e-30)
    batch_size: int = setting(16, "domain sequences per step", 1)
    ratio: float = setting(1.0, "general sequences per domain sequence", 0, 1000)
    kl: str = setting("reverse", "direction of the KL", choices=("reverse", "forward", "mean"))
    strength: float = setting(1.0, "weight of the KL", 0)
    lora_rank: int = setting(0, "rank of low-rank adapters; 0 trains all weights", 0)
    general_errors: float = setting(0.7, "share of wrong answers in the toy general text", 0, 1)
    error_kind: str = setting("bias", "wrong answers: same or new ones", choices=("bias", "noise"))
    general_documents: int = setting(2000, "documents of the toy general text", 1)
    eval_every: int = setting(25, "steps between two evaluations", 1)
    # the base
    base_steps: int = setting(1000, "steps of pretraining", 1)
    base_lr: float = setting(4e-3, "peak learning rate of pretraining", 1e-30)
    base_batch_size: int = setting(24, "sequences per step of pretraining", 1)
    n_layer: int = setting(2, "layers", 1)
    n_head: int = setting(8, "attention heads per layer", 1)
    n_embd: int = setting(128, "channels of the residual stream", 1)
    block_size: int = setting(64, "tokens per sequence", 1)
    vocab_size: int = setting(512, "tokens in the vocabulary", 256)
    # your own text
    general: tuple = setting((), "UTF-8 files or folders, in place of the toy general text")
    domain: tuple = setting((), "UTF-8 files or folders, in place of the toy domain text")
    device: str = setting("auto", "auto: GPU if available", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = setting("auto", "of training", choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "use torch.compile")

    def checked(self):
        """These settings, with the device and dtype of this machine. Raises BadInput."""
        gpu = torch.accelerator.current_accelerator(check_available=True)
        devices = [gpu.type, "cpu"] if gpu else ["cpu"]
        device = devices[0] if self.device == "auto" else self.device
        texts = [Path(path).resolve() for path in (*self.general, *self.domain)]
        for wrong, message in [
                (device not in devices, f"--device {device}: this machine has {devices}"),
                (bool(self.general) != bool(self.domain), "give --general and --domain together"),
                (Path(self.out).resolve() in texts, f"--out {self.out}: it is a folder of texts"),
                (0 < self.ratio * self.batch_size <= 0.5,
                 f"--ratio {self.ratio}: it rounds to no general sequence per step"),
                (self.n_embd % (2 * self.n_head),
                 f"--n-embd {self.n_embd}: it must be a multiple of twice --n-head")]:
            if wrong:
                raise BadInput(message)
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = self.dtype if self.dtype != "auto" else "bfloat16" if fast else "float32"
        return replace(self, device=device, dtype=dtype)


def parse(arguments=None, defaults=Settings(), omit=(), description=__doc__.partition("\n")[0]):
    """The command line -> checked settings. Every field that is not omitted is a flag."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(defaults):
        if f.name not in omit:
            flag = "--seed" if f.name == "seeds" else "--" + f.name.replace("_", "-")
            parser.add_argument(flag, dest=f.name, default=getattr(defaults, f.name), **f.metadata)
    given = vars(parser.parse_args(arguments))
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if any(len(set(values)) < len(values) for values in lists.values()):
        parser.error("--methods, --seed, --general and --domain: give each value once")
    try:
        return replace(defaults, **given | lists).checked()
    except BadInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    run_program(main)
