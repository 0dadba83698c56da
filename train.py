"""Pretrain a small GPT, train it further on a domain with each method, and see what it forgets.

    python train.py                                         the toy world, seed 0
    python train.py --out out/wrong --general-errors 0.7    wrong answers in the general text
    python train.py --general FILE... --domain FILE...      your own text

All methods start from the same base and read the same domain rows. Read from top to bottom.
"""

import copy
import hashlib
import inspect
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Callable, Literal, NamedTuple

import torch

import data
import losses
from data import BadInput
from eval import (evaluate, heldout_losses, heldout_windows, load_model, save_model, show_answers,
                  show_texts, start_run, write_file)
from model import GPT, GPTConfig, add_lora, merge_lora
from plots import forgetting, page
from plots.methods import OTHER_METHODS
from plots.program import on_this_machine, read_flags, run_program
from plots.tables import metrics_table


@dataclass
class Settings:
    out: str = "out"  # folder for the metrics, checkpoints and the figure
    seeds: tuple[int, ...] = (0,)  # one or more; each has its own world and base
    methods: tuple[str, ...] = ("ce", "replay", "mol")  # one or more
    steps: int = 250  # steps of each method
    lr: float = 3e-3  # peak learning rate
    batch_size: int = 16  # domain sequences per step
    ratio: float = 1.0  # general sequences per domain sequence
    kl: Literal["reverse", "forward", "mean"] = "reverse"  # direction of the KL
    strength: float = 1.0  # weight of the KL
    lora_rank: int = 0  # rank of low-rank adapters; 0 trains all weights
    eval_every: int = 25  # steps between two evaluations
    general_errors: float = 0.0  # share of wrong answers in the toy general text
    error_kind: Literal["bias", "noise"] = "bias"  # wrong answers: the same each time, or new ones
    general_documents: int = 2000  # documents of the toy general text
    base_steps: int = 1000  # steps of pretraining
    base_lr: float = 4e-3  # peak learning rate of pretraining
    base_batch_size: int = 24  # sequences per step of pretraining
    n_layer: int = 2  # layers
    n_head: int = 8  # attention heads per layer
    n_embd: int = 128  # channels of the residual stream
    block_size: int = 64  # tokens per sequence
    vocab_size: int = 512  # tokens in the vocabulary
    general_files: tuple[str, ...] = ()  # UTF-8 files or folders, in place of the toy general text
    domain_files: tuple[str, ...] = ()  # UTF-8 files or folders, in place of the toy domain text
    questions: str = ""  # file about your own text; a line is prompt, tab, answer, tab, skill
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of training
    compile: bool = False  # use torch.compile


# --- the methods ---------------------------------------------------------------------------------
# (model, base, batch, settings) -> the loss, its CE part and its KL part: scalars in nats per token

def next_token_loss(model, base, batch, settings):
    """Cross-entropy on all rows: domain rows for the method ce, general rows too for replay."""
    loss = losses.mean_cross_entropy(model(batch.tokens), batch.targets)
    return loss, loss, torch.zeros(())


def mol_loss(model, base, batch, settings):
    """Cross-entropy on domain rows, KL to the frozen base on general rows (arXiv 2505.12043)."""
    with torch.no_grad():
        base_logits = base(batch.tokens[~batch.is_domain])  # (G, T, V)
    logits = model(batch.tokens)  # (B, T, V)
    return losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits,
                                    settings.kl, settings.strength)


class Method(NamedTuple):
    loss: Callable
    reads_general: bool = False  # do its batches have general rows?
    weight_decay: float = 0.1
    prepare: Callable | None = None  # (base, world, settings, seed) -> a fifth argument of the loss

METHODS = {
    "ce": Method(next_token_loss),  # naive continual pre-training
    "replay": Method(next_token_loss, reads_general=True),
    "mol": Method(mol_loss, reads_general=True),
}
METHODS |= {name: Method(**row) for name, row in OTHER_METHODS.items()}  # of plots/methods.py


# --- training ------------------------------------------------------------------------------------

def optimise(model, loss_of, batches, steps, lr, settings, label, weight_decay=0.1):
    """Train a model in place with loss_of(batch) -> loss, CE part, KL part. It yields (step, CE
    part, KL part) after each step. Raises BadInput if the loss is not finite."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([  # no weight decay on the gains of LayerNorm
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
        betas=(0.9, 0.98), fused=True)
    warmup, end = max(1, steps // 10), steps + 1  # linear warmup, then linear decay
    started = time.perf_counter()
    for step, batch in zip(range(1, steps + 1), batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (end - step) / (end - warmup))
        with torch.autocast(settings.device, getattr(torch, settings.dtype),
                            enabled=settings.dtype != "float32"):
            loss, ce_part, kl_part = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        loss, ce_part, kl_part = loss.item(), ce_part.item(), kl_part.item()
        if not math.isfinite(loss):
            raise BadInput(f"{label}: the loss is {loss} at step {step}; try a lower learning rate")
        if step * 10 // steps > (step - 1) * 10 // steps:  # ten times per run
            seconds = (time.perf_counter() - started) * (steps - step) / step
            print(f"{label:>8}  step {step:>5}/{steps}  loss {loss:6.3f}  ce {ce_part:6.3f}  "
                  f"kl {kl_part:6.3f}  {seconds:4.0f} s left", flush=True)
        yield step, ce_part, kl_part


def continue_pretraining(name, settings, seed, world, base, test, watch=lambda step, model: 0):
    """Train a copy of the base with a method -> the trained GPT, rows of metrics.

    test(model) -> the metrics of a row, every eval_every steps. watch(step, model) sees every step.
    """
    method = METHODS[name]
    model = copy.deepcopy(base).requires_grad_(True)
    if settings.lora_rank:
        torch.manual_seed(seed)
        add_lora(model, settings.lora_rank)
    forward, frozen = map(torch.compile, (model, base)) if settings.compile else (model, base)
    prepared = [method.prepare(base, world, settings, seed)] if method.prepare else []
    n_general = round(settings.ratio * settings.batch_size) if method.reads_general else 0
    batches = data.batches(world.domain, world.general, settings.batch_size, n_general,
                           settings.block_size, seed)
    def loss_of(batch):
        return method.loss(forward, frozen, batch, settings, *prepared)

    rows, parts = [{"method": name, "seed": seed, "step": 0, **test(model)}], []
    watch(0, model)
    for step, ce_part, kl_part in optimise(model, loss_of, batches, settings.steps, settings.lr,
                                           settings, name, method.weight_decay):
        parts.append((ce_part, kl_part))
        if step % settings.eval_every == 0 or step == settings.steps:
            ce_part, kl_part = map(mean, zip(*parts))  # since the last row
            parts.clear()
            rows.append({"method": name, "seed": seed, "step": step, "ce": ce_part, "kl": kl_part,
                         **test(model)})
        watch(step, model)
    return merge_lora(model) if settings.lora_rank else model, rows


# --- the base ------------------------------------------------------------------------------------

def pretrain(settings, seed, world):
    """Train a GPT from random weights on next tokens -> its best checkpoint on held-out text."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(world.tokenizer.n_vocab, settings.block_size, settings.n_layer,
                          settings.n_head, settings.n_embd)).to(settings.device)
    forward = torch.compile(model) if settings.compile else model
    batches = data.batches(world.pretraining, world.general, settings.base_batch_size, 0,
                           settings.block_size, f"pretraining {seed}")
    steps, every = settings.base_steps, max(1, settings.base_steps // 20)
    best, best_step, (best_loss, _) = None, 0, heldout_losses(model, world.heldout_general)
    for step, *_ in optimise(model, lambda batch: next_token_loss(forward, None, batch, settings),
                             batches, steps, settings.base_lr, settings, "base"):
        if step % every == 0 or step == steps:
            loss, _ = heldout_losses(model, world.heldout_general)
            if loss < best_loss:
                best, best_step, best_loss = copy.deepcopy(model), step, loss
    if not best:
        raise BadInput(f"--base-lr {settings.base_lr}: pretraining never improved the held-out "
                       "loss; try a lower rate or more --base-steps")
    print(f"    base  kept step {best_step} of {steps}, held-out loss {best_loss:.2f}", flush=True)
    return best


BASES = Path(__file__).parent / "out" / "bases"
BASE_SETTINGS = ("base_steps", "base_lr", "base_batch_size", "n_layer", "n_head", "n_embd",
                 "block_size", "vocab_size", "dtype")
BASE_CODE = [inspect.getsource(part) for part in (  # as it was when this program started
    inspect.getmodule(GPT), data, losses.log_probs, losses.cross_entropy, losses.without_padding,
    losses.per_sequence, losses.mean_cross_entropy, heldout_losses, heldout_windows, optimise,
    next_token_loss, pretrain)]


def get_base(settings, seed, world):
    """The frozen base of a seed, a stored one if its settings, text and code match."""
    key = hashlib.sha256(repr((
        [getattr(settings, name) for name in (*BASE_SETTINGS, "device", "compile")], seed,
        BASE_CODE, torch.get_num_threads(), torch.__version__)).encode())
    for tokens in (world.pretraining, world.heldout_general):
        key.update(tokens.cpu().numpy().tobytes())
    path = BASES / f"{key.hexdigest()[:16]}.pt"
    if not path.exists():
        save_model(path, pretrain(settings, seed, world))
    print(f"    base  {path}")
    return load_model(path, settings.device).requires_grad_(False)


# --- main ----------------------------------------------------------------------------------------

def main(arguments=None):
    settings, started, rows = parse(arguments), time.perf_counter(), []
    out = Path(settings.out)
    own = settings.general_files and data.make_world(settings, settings.seeds[0])  # for all seeds
    worlds = {seed: own or data.make_world(settings, seed) for seed in settings.seeds}
    print(f"{settings.device}, {settings.dtype}, {torch.get_num_threads()} threads, to {out}")
    bases = {}
    for seed, world in worlds.items():
        show_texts(seed, world, settings.block_size)
        bases[seed] = get_base(settings, seed, world)
    start_run(settings, ("base", *METHODS))
    for seed, world in worlds.items():
        models = {"base": (base := bases[seed])}
        save_model(out / f"seed{seed}" / "base.pt", base)
        rows.append({"method": "base", "seed": seed, "step": 0, **evaluate(base, base, world)})
        recording = page.start(settings, world, base)
        for name in settings.methods:
            models[name], curve = continue_pretraining(
                name, settings, seed, world, base, lambda model: evaluate(model, base, world),
                lambda step, model: page.snapshot(recording, name, step, model))
            save_model(out / f"seed{seed}" / f"{name}.pt", models[name])
            rows += curve
            write_file(out / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in rows).encode())
    print("\nlosses: nats per token; skills: share of exact answers; p(right): probability of the "
          f"right\nanswers\n\n{metrics_table(rows)}\n\nanswers of seed {seed}")
    show_answers(models, world, world.prompts)
    forgetting.draw(rows, out / "forgetting.png")
    page.write(out / "page.html", recording, [row for row in rows if row["seed"] == seed])
    print(f"\ncurves: {out}/forgetting.png, tokens: {out}/page.html; "
          f"{time.perf_counter() - started:.0f} s")


# --- the command line ----------------------------------------------------------------------------

def parse(arguments=None, defaults=Settings(), omit=(), description=__doc__.partition("\n")[0]):
    """The command line -> checked settings. Every field that is not omitted is a flag."""
    s = on_this_machine(read_flags(defaults, arguments, omit, description, METHODS))
    readers = [name for name in s.methods if METHODS[name].reads_general]
    rows = s.ratio * s.batch_size  # general ones
    toy = ["--" + name.replace("_", "-") for name in ("general_errors", "error_kind",
           "general_documents") if getattr(s, name) != getattr(Settings, name)]
    for wrong, message in [
            (readers and (round(rows) == 0 or abs(rows - round(rows)) > 1e-6),
             f"--ratio {s.ratio}: {' and '.join(readers)} would read {rows:g} general sequences"),
            (s.n_embd % (2 * s.n_head), f"--n-embd {s.n_embd}: use a multiple of twice --n-head"),
            (s.lora_rank > s.n_embd, f"--lora-rank {s.lora_rank}: use at most --n-embd"),
            (s.vocab_size < 256, f"--vocab-size {s.vocab_size}: use at least 256, one per byte"),
            (s.questions and not s.general_files, "--questions needs --general and --domain"),
            (s.general_errors > 1, f"--general-errors {s.general_errors}: use a share, 0 to 1"),
            (s.general_files and toy, f"{', '.join(toy)}: no effect on your own text")]:
        if wrong:
            raise BadInput(message)
    return s


if __name__ == "__main__":
    run_program(main)
