"""The whole experiment: pretrain a base, continue it on a domain by each method, mark, draw.

    python train.py                            the toy world, seed 0
    python train.py --seed 0 1 2               three seeds, each with its own world and its own base
    python train.py --general FILE... --domain FILE...      your own text

All methods start from the same base, read the same domain sequences in the same order, and share
learning rate, steps and, except for those that hold the weights themselves, weight decay.
A method is one function below and one row in METHODS; the loop that runs it is `train`. How the
experiment is set up, on what machine and in which files, stands behind them.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import data
import losses
from data import BadInput, printable
from eval import (answers, digest, evaluate, heldout_windows, load_model, save_metrics, save_model,
                  save_world)
from model import GPT, GPTConfig, add_lora, merge_lora
from plots import forgetting, tradeoff
from plots.style import (LOSSES, SKILLS, Parser, clear_leftovers, locked, table, tolerant_console,
                         whole, wrong_answers)


# --- methods -------------------------------------------------------------------------------------
# A method turns (model, base, batch, settings) into the scalar loss of one step. model and base are
# GPTs, the base frozen; s are the Settings below.

def ce(model, base, batch, s):
    """Cross-entropy on all of the batch: general text in it is imitated, mistakes and all."""
    return losses.mean_cross_entropy(model(batch.tokens), batch.targets)


def mol(model, base, batch, s):
    """Cross-entropy on domain rows, KL to the frozen base on general rows: arXiv 2505.12043."""
    with torch.no_grad():
        base_logits = base(batch.tokens[batch.general])  # (G, T, V): it reads general rows only
    logits = model(batch.tokens)  # (B, T, V)
    loss, _, _ = losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits,
                                          s.kl, s.strength)
    return loss


def domain_kl(model, base, batch, s):
    """Cross-entropy and forward KL to the base, both on domain text, strength s.

    Learning without Forgetting (1606.09282) adds these two, but learns the new task with a head of
    its own. On the one head of a language model both pull the same logits, to (data + s * base) /
    (1 + s): at strength 1 what is new and what was known stand one against one.
    """
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens)
    kl = losses.kl_divergence(logits, base_logits, "forward").mean()
    return losses.mean_cross_entropy(logits, batch.targets) + s.strength * kl


def weight_distance(weights, base_weights, importance=None):
    """Half the squared distance from the base's weights, each weighted by its importance -> scalar.

    With importance 1, L2-SP (arXiv 1802.01483, eq. 2 without the new head); with the diagonal
    Fisher, EWC (arXiv 1612.00796, eq. 3). The arguments are iterables of tensors in the same order;
    no gradient reaches the last two.
    """
    weights, base_weights = list(weights), [w.detach() for w in base_weights]
    importance = [1.0] * len(weights) if importance is None else importance
    terms = zip(importance, weights, base_weights, strict=True)
    return sum((f * (w - w0) ** 2).sum() for f, w, w0 in terms) / 2


def l2sp(model, base, batch, s):
    """Cross-entropy, and the squared distance to the base's weights: L2-SP, 1802.01483."""
    distance = weight_distance(model.parameters(), base.parameters())
    return ce(model, base, batch, s) + s.strength * distance


def ewc(model, base, batch, s, importance):
    """The same distance, weights that matter on general text counting more: EWC, 1612.00796."""
    distance = weight_distance(model.parameters(), base.parameters(), importance)
    return ce(model, base, batch, s) + s.strength * distance


def fisher(base, world, s, seed):
    """The diagonal Fisher of the base on 256 sequences of general text, once before step 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = data.windows(world.general, 256, s.block_size, generator)[:, :-1]
    return diagonal_fisher(base, tokens, generator)


def diagonal_fisher(model, tokens, generator=None):
    """How much predictions on these tokens (B, T) depend on each weight -> a tensor per parameter.

    F_i = E[ (d log p(y | s) / d theta_i)^2 ] per token, with y drawn from the model itself at every
    position. To second order KL[p_0 || p_theta] per token is half of (theta - theta_0)' F (theta -
    theta_0), F in full: for a small step EWC at strength 1 is MoL's KL with all of F left out
    except its diagonal. Steps are not small here.
    """
    model = copy.deepcopy(model).requires_grad_(True)  # a frozen base stays frozen
    fisher = [torch.zeros_like(w) for w in model.parameters()]
    # Each position is drawn by itself, so the square of a sequence's gradient is right on average.
    for row in tokens:
        logits = model(row[None])  # (1, T, V)
        p = losses.log_probs(logits[0].detach()).exp().cpu()  # (T, V)
        drawn = torch.multinomial(p, 1, generator=generator).T.to(row.device)  # (1, T)
        loss = losses.cross_entropy(logits, drawn).sum()
        for f, gradient in zip(fisher, torch.autograd.grad(loss, list(model.parameters()))):
            f += gradient ** 2 / tokens.numel()
    return fisher


class Method(NamedTuple):
    loss: Callable  # (model, base, batch, settings) -> scalar; what `once` made comes last
    reads_general: bool = False  # does a batch hold general sequences too?
    once: Callable | None = None  # (base, world, settings, seed) -> what else the loss needs
    weight_decay: float = 0.1  # AdamW's pull of the matrices to zero


METHODS = {
    "ce": Method(ce),  # naive continual pre-training
    "replay": Method(ce, reads_general=True),
    "mol": Method(mol, reads_general=True),
    "domain_kl": Method(domain_kl),
    "l2sp": Method(l2sp, weight_decay=0.0),  # a pull to the base instead of the pull to zero
    "ewc": Method(ewc, once=fisher, weight_decay=0.0),
}


# --- training ------------------------------------------------------------------------------------

def train(name, s, seed, world, base, mark, start=None, label=None):
    """Continue the base by one method -> (the new GPT, rows); the base itself stays as it is.

    mark(model) -> what a row of metrics holds besides method, seed and step. It is called before
    the first step, every s.eval_every steps and after the last. start is the model to continue, if
    it is another than the base that the method looks at; label, the name to show of the progress.
    """
    method, label = METHODS[name], label or name
    model = copy.deepcopy(start or base).requires_grad_(True)
    if s.lora_rank:
        torch.manual_seed(seed)
        add_lora(model, s.lora_rank)
    forward, frozen = (torch.compile(model), torch.compile(base)) if s.compile else (model, base)
    once = [method.once(base, world, s, seed)] if method.once else []
    n_general = round(s.ratio * s.batch_size) if method.reads_general else 0
    batches = data.batches(world.domain, world.general, s.batch_size, n_general, s.block_size, seed)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(learnt, method.weight_decay)

    def row(step):
        with torch.no_grad():
            return {"method": name, "seed": seed, "step": step, **mark(model)}

    rows = [row(0)]
    show = progress(label, s.steps)
    for step, batch in zip(range(1, s.steps + 1), batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        with torch.autocast(s.device, getattr(torch, s.dtype), enabled=s.dtype != "float32"):
            loss = method.loss(forward, frozen, batch, s, *once)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        value = loss.item()  # read when the step is under way: on a GPU reading waits for the loss
        refuse_nan(label, step, value)
        show(step, value, batch.tokens.numel())
        if step % s.eval_every == 0 or step == s.steps:
            rows.append(row(step))
            refuse_nan(label, step, *(rows[-1].get(key, 0.0) for key in LOSSES))
    return merge_lora(model) if s.lora_rank else model, rows


def adamw(learnt, weight_decay):
    """AdamW that decays the matrices but not LayerNorm's gains, which decay would pull to zero."""
    matrices, gains = [p for p in learnt if p.dim() > 1], [p for p in learnt if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(step, s):
    """A tenth of the steps up to the peak, then straight down, to end just above zero."""
    warmup = max(1, s.steps // 10)
    return s.lr * min(step / warmup, (s.steps + 1 - step) / (s.steps + 1 - warmup))


def refuse_nan(label, step, *nats):
    """The end of the run if a loss is NaN or infinite."""
    for value in nats:
        if not math.isfinite(value):
            raise BadInput(f"{label}: the loss is {value} at step {step}; "
                           "a lower learning rate may help")


def config_of(s, world):
    return GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd)


def pretrain(s, seed, world):
    """A base from nothing -> the GPT as it was when it was best on the held-out general text.

    That is the text it is marked on. Pretraining is plain cross-entropy on the pretraining text
    from random weights, so it goes through the same loop as `ce`.
    """
    torch.manual_seed(seed)
    blank = GPT(config_of(s, world)).to(s.device)  # drawn on the CPU: the same on every device
    heldout = heldout_windows(world.heldout_general, s.block_size)  # (B, T + 1)
    best = {"loss": math.inf}

    def mark(model):
        loss = losses.mean_cross_entropy(model(heldout[:, :-1]), heldout[:, 1:]).item()
        if loss < best["loss"]:
            best.update(loss=loss, model=copy.deepcopy(model))
        return {"general_loss": loss}

    settings = replace(s, steps=s.base_steps, lr=s.base_lr, batch_size=s.base_batch_size,
                       lora_rank=0, eval_every=max(1, s.base_steps // 20))
    text = replace(world, domain=world.pretraining)
    _, rows = train("ce", settings, f"pretraining {seed}", text, blank, mark, label="base")
    step = next(row["step"] for row in rows if row["general_loss"] == best["loss"])
    print(f"    base  kept from step {step}, the best on held-out general text: "
          f"{best['loss']:.3f} nats per token")
    if step <= s.base_steps // 10:
        print("    base  was best so early that it has learnt little: is the held-out text like "
              "the rest, and is there enough of both?")
    return best["model"]


def progress(label, steps):
    """-> show(step, loss, tokens): one live line on a terminal, ten plain ones in a file."""
    began = time.perf_counter()
    live = sys.stdout.isatty()
    seen = last = 0

    def show(step, loss, tokens):
        nonlocal seen, last
        seen += tokens
        now = time.perf_counter()
        due = now - last > 0.2 if live else step * 10 // steps > (step - 1) * 10 // steps
        if not due and step < steps:
            return
        last, taken = now, now - began
        left = f"{taken / step * (steps - step):4.0f} s left" if step < steps else f"{taken:.0f} s"
        print(f"{label:>8}  step {step:>5}/{steps}  loss {loss:7.3f}  "
              f"{seen / taken / 1000:6.1f}k tokens/s  {left:10}",
              end="\r" if live and step < steps else "\n", flush=True)

    return show


# --- the experiment ------------------------------------------------------------------------------

def experiment(s):
    """Everything, from the settings to the figures."""
    began = time.perf_counter()
    s = on_this_machine(check(s))
    worlds = {seed: make_world(s, seed) for seed in s.seed}
    bases = {seed: earlier_base(s, seed, world) for seed, world in worlds.items()}
    out, first, rows = Path(s.out), s.seed[0], []
    make_folders(s)
    with locked(out):
        clear(s)  # an earlier run's results were not touched before this line
        print(f"on {s.device} in {s.dtype}, {torch.get_num_threads()} CPU threads; "
              f"results go to {out}")
        for kind, documents in worlds[first].samples.items():
            for document in documents:
                print(f"{kind:>9} | {printable(document)}")
        for seed, world in worlds.items():
            print(f"seed {seed}: {len(world.pretraining):,} tokens to pretrain on, then "
                  f"{len(world.general):,} general and {len(world.domain):,} domain ones")
            base = (bases[seed] or pretrain(s, seed, world)).requires_grad_(False)
            folder = out / f"seed{seed}"
            save_model(folder / "base.pt", base, made_from=made_from(s, seed, world))
            save_world(folder / "world.pt", world, base)
            rows.append({"method": "base", "seed": seed, "step": 0, **evaluate(base, base, world)})
            save_metrics(out / "metrics.jsonl", rows)
            warn_of_gaps(rows[-1])
            models = {"base": base}
            for name in s.methods:
                models[name], curve = train(name, s, seed, world, base,
                                            lambda model: evaluate(model, base, world))
                save_model(folder / f"{name}.pt", models[name], base=digest(base))
                rows += curve  # only now: metrics.jsonl never holds half a method
                save_metrics(out / "metrics.jsonl", rows)
            if seed == first:
                shown = answers(models, world, world.prompts)
        remark = "" if s.general else wrong_answers(s.general_errors, s.error_kind)
        units = "" if s.general else ("; skills in share of exact answers; p(right): the mean "
                                      "probability of a right general answer")
        print(f"\nafter {s.steps} steps{remark}\nlosses in nats per token{units}")
        print(table(rows))
        print(f"\nthe same prompts, answered by every model (seed {first})")
        print(shown)
        forgetting.draw(rows, out / "forgetting.png", remark)
        tradeoff.draw(rows, out / "tradeoff.png", remark)
    print(f"\n{out / 'forgetting.png'} and {out / 'tradeoff.png'} show the curves; "
          f"{time.perf_counter() - began:.0f} s in all")


def make_world(s, seed):
    """The texts of one seed on the device; refuses those that are too short for the settings."""
    if s.general:
        world = data.text_world(s.general, s.domain, s.vocab_size, s.out)
    else:
        world = data.toy_world(seed, s.general_errors, s.error_kind, s.vocab_size,
                               general_documents=s.general_documents)
    for name in ("pretraining", "general", "domain", "heldout_general", "heldout_domain"):
        stream = getattr(world, name)
        if len(stream) < s.block_size + 1:
            flag = "--domain" if "domain" in name else "--general"
            raise BadInput(f"{flag if s.general else 'the toy world'}: too short: {len(stream)} "
                           f"tokens of {name} text, where --block-size {s.block_size} needs "
                           f"{s.block_size + 1}")
        setattr(world, name, stream.to(s.device))
    documents = ["\n" + prompt + answer
                 for probes in world.probes.values() for prompt, answer in probes]
    longest = max((len(world.tokenizer.encode_ordinary(text)) for text in documents), default=0)
    if longest > s.block_size + 1:
        raise BadInput(f"--block-size {s.block_size}: the toy world's longest document needs "
                       f"{longest - 1}")
    return world


def warn_of_gaps(row):
    """Say which skills a base has not mastered: what it never knew, no method can forget."""
    for skill, share in row["accuracy"].items():
        if skill != "domain" and share < 0.95:
            print(f"    base  has not mastered {SKILLS[skill]}: {share:.0%} exact; raise "
                  "--base-steps before comparing methods")


# --- settings ------------------------------------------------------------------------------------

def setting(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Settings:
    out: str = setting("out", "folder for the metrics, checkpoints and figures")
    seed: tuple[int, ...] = setting((0,), "one or several: each makes its own world, base, batches")
    methods: tuple[str, ...] = setting(("ce", "replay", "mol"),
                                       "how to continue the base, any of: {methods}")

    # continual pre-training
    steps: int = setting(250, "steps of every method")
    lr: float = setting(3e-3, "peak learning rate of every method")
    batch_size: int = setting(16, "domain sequences per step; general ones come on top, see ratio")
    ratio: float = setting(1.0, "general sequences for each domain one, where a method reads them")
    kl: str = setting("reverse", "direction of mol's KL: reverse (model || base), forward "
                                 "(base || model) or their mean")
    strength: float = setting(1.0, "weight of what protects the base: the KL of mol and domain_kl, "
                                   "the distance of l2sp and ewc")
    lora_rank: int = setting(0, "train low-rank adapters of this rank instead of the weights; 0 "
                                "trains the weights")
    general_errors: float = setting(0.7, "share of wrong answers in the toy world's general text, "
                                         "0 to 1")
    error_kind: str = setting("bias", "what is wrong there: bias, the same mistake every time, or "
                                      "noise, another answer each time")
    general_documents: int = setting(2000, "documents of the toy world's general text; short of it "
                                           "they are seen again and again")
    eval_every: int = setting(25, "steps between two evaluations")

    # the base
    base_steps: int = setting(1000, "steps of pretraining")
    base_lr: float = setting(4e-3, "peak learning rate of pretraining")
    base_batch_size: int = setting(24, "sequences per step of pretraining")
    n_layer: int = setting(2, "layers")
    n_head: int = setting(8, "attention heads per layer")
    n_embd: int = setting(128, "width: channels of the residual stream")
    block_size: int = setting(64, "tokens of a sequence")
    vocab_size: int = setting(512, "tokens of the vocabulary, learnt from the general text; 256 or "
                                   "more")
    base: str = setting("", "take the base from this earlier run's folder; its settings must fit")
    fresh: bool = setting(False, "pretrain the base again even if a fitting one is there")

    # your own text
    general: tuple[str, ...] = setting((), "UTF-8 files or folders in place of the toy general "
                                           "text; needs --domain")
    domain: tuple[str, ...] = setting((), "UTF-8 files or folders in place of the toy domain text; "
                                          "needs --general")

    # the machine
    device: str = setting("auto", "auto, cpu, cuda or mps; auto takes the first that works of "
                                  "cuda, mps, cpu")
    dtype: str = setting("auto", "auto, float32 or bfloat16; auto is bfloat16 on a CUDA device "
                                 "that computes in it, else float32")
    compile: bool = setting(False, "run the models through torch.compile")


def parse(arguments, defaults=Settings(), program="train.py", without=(),
          purpose="Pretrain a small GPT, continue it on a domain by each method, and watch what it "
                  "forgets."):
    """Command line -> Settings: every field of the dataclass is a flag, except those in `without`.

    A flag of several values that is given twice holds the values of both.
    """
    parser = Parser(program, description=purpose, usage=f"python {program} [--setting value ...]",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        if f.name in without:
            continue
        default = getattr(defaults, f.name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        meaning = f.metadata["help"].format(methods=", ".join(METHODS))
        options = {"help": meaning + (f" (default: {shown})" if shown else "")}
        if f.type is bool:
            options["action"] = "store_true"
        elif isinstance(default, tuple):
            of_one = f.type.__args__[0]
            options |= {"nargs": "+", "action": "extend", "type": of_one, "metavar": "X"}
        else:
            options |= {"type": f.type, "metavar": "X"}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(arguments))
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return replace(defaults, **given | lists)


def check(s):
    """The settings, if they can work; refuses what cannot, before anything is written."""
    def refuse_unless(fine, name, must):
        if not fine:
            value = getattr(s, name)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise BadInput(f"--{name.replace('_', '-')} {shown}: {must}")

    refuse_unless(s.out, "out", "it is empty; it must name a folder")
    for method in s.methods:
        if method not in METHODS or s.methods.count(method) > 1:
            raise BadInput(f"--methods {method}: it must be one of {', '.join(METHODS)}, each once "
                           "at most")
    for name in ("steps", "batch_size", "eval_every", "base_steps", "base_batch_size", "lr",
                 "base_lr", "general_documents"):
        refuse_unless(0 < getattr(s, name) < math.inf, name, "it must be above 0")
    refuse_unless(0 <= s.ratio <= 1000, "ratio", "it must be between 0 and 1000")
    refuse_unless(not s.ratio or round(s.ratio * s.batch_size), "ratio",
                  f"with --batch-size {s.batch_size} that is no general sequence at all")
    refuse_unless(0 <= s.general_errors <= 1, "general_errors",
                  "a share, it must be between 0 and 1")
    refuse_unless(s.error_kind in ("noise", "bias"), "error_kind", "it must be noise or bias")
    refuse_unless(s.kl in ("reverse", "forward", "mean"), "kl",
                  "it must be reverse, forward or mean")
    refuse_unless(0 <= s.strength < math.inf, "strength", "it must be 0 or more")
    refuse_unless(s.lora_rank >= 0, "lora_rank", "it must be 0 or more")
    for method in {"l2sp", "ewc"} & set(s.methods):
        refuse_unless(not s.lora_rank, "lora_rank",
                      f"adapters leave the base's weights as they are: {method} has none to hold")
    if bool(s.general) != bool(s.domain):
        raise BadInput("--general and --domain go together: give both, or neither for the toy "
                       "world")
    if s.base and s.fresh:
        raise BadInput("--base and --fresh: take an earlier base or pretrain a new one, not both")
    refuse_unless(0 <= min(s.seed) <= max(s.seed) < 2**32 and len(set(s.seed)) == len(s.seed),
                  "seed", "seeds must be between 0 and 2**32 - 1, each once at most")
    refuse_unless(s.vocab_size >= 256, "vocab_size",
                  "it must be at least 256, one token for each byte")
    try:
        GPTConfig(s.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd)
    except ValueError as problem:
        raise BadInput(f"--{problem}".replace("_", "-")) from None
    return s


# --- the machine ---------------------------------------------------------------------------------

def on_this_machine(s):
    """The settings with device and dtype decided; refuses what this machine cannot do."""
    device = choose_device(s.device)
    if s.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        except Exception as problem:  # no compiler, no Python headers: torch raises many kinds
            reason = str(problem).strip().partition("\n")[0]
            raise BadInput(f"--compile: this machine cannot ({reason}); leave it out") from None
    return replace(s, device=device, dtype=choose_dtype(s.dtype, device))


def choose_device(name):
    """auto -> the first of cuda, mps and cpu that can add two numbers."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name != "auto" and name not in there:
        raise BadInput(f"--device {name}: it must be auto, cpu, cuda or mps")
    for device in there if name == "auto" else [name]:
        if not there[device]:
            continue
        try:
            torch.ones(2, device=device).sum().item()
            return device
        except RuntimeError as problem:  # a card that this torch has no kernels for
            reason = str(problem).partition("\n")[0]
            print(f"there is a {device} device, but this torch cannot use it: {reason}")
    raise BadInput(f"--device {name}: this machine has none that this torch can use; leave it out")


def choose_dtype(name, device):
    """auto -> bfloat16 on a CUDA device that computes in it, otherwise float32.

    On a CPU float32 is as fast, and rounds alike on more machines.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"--dtype {name}: it must be auto, float32 or bfloat16")
    if name == "auto":
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    return name


# --- files ---------------------------------------------------------------------------------------

BASE_SETTINGS = ("base_steps", "base_lr", "base_batch_size", "n_layer", "n_head", "n_embd",
                 "block_size", "vocab_size", "dtype")


def made_from(s, seed, world):
    """All that a base depends on, besides code and machine: kept with it, to know it again."""
    text = hashlib.sha256(world.pretraining.cpu().numpy().tobytes()).hexdigest()
    return {**{name: getattr(s, name) for name in BASE_SETTINGS}, "seed": seed, "text": text}


def earlier_base(s, seed, world):
    """The base that an earlier run left for the same settings and text -> GPT, or None."""
    path = Path(s.base or s.out) / f"seed{seed}" / "base.pt"
    if s.fresh or not (path.exists() or s.base):
        return None
    try:
        model, saved = load_model(path, s.device)
        if not isinstance(saved.get("made_from"), dict):
            raise BadInput(f"{path}: not a base of train.py")
    except BadInput as problem:
        raise BadInput(f"--base {s.base}: no base of seed {seed} there: {problem}" if s.base else
                       f"{problem}; delete it, or pretrain a new base with --fresh") from None
    wanted = made_from(s, seed, world)
    other = ", ".join(key for key in wanted if saved["made_from"].get(key) != wanted[key])
    if not other:
        print(f"    base  reused from {path}: its settings are unchanged (--fresh retrains)")
        return model
    if s.base:
        raise BadInput(f"--base {s.base}: its base of seed {seed} was made with another {other}")
    print(f"    base  in {path} was made with another {other}: a new one will take its place")
    return None


def make_folders(s):
    for seed in s.seed:
        try:
            (Path(s.out) / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise BadInput(f"--out {s.out}: cannot write there: {problem}") from None


def clear(s):
    """Clear an earlier run's results, except its bases, and note the settings."""
    out = Path(s.out)
    if (out / "metrics.jsonl").exists():
        print(f"the results of the earlier run in {out} make way")
    with whole(out / "settings.json") as name:
        name.write_text(json.dumps(asdict(s), indent=1) + "\n")
    for name in ("metrics.jsonl", "forgetting.png", "tradeoff.png"):
        (out / name).unlink(missing_ok=True)
    for folder in (out, *out.glob("seed*")):
        clear_leftovers(folder)
        for name in ("world", *METHODS):
            (folder / f"{name}.pt").unlink(missing_ok=True)


# --- the command line ----------------------------------------------------------------------------

def explain(program, problem):
    """One line for what a user can mend -> exit code: 2, or 130 after Ctrl-C; raises the rest."""
    told, code = problem, 2
    if isinstance(problem, KeyboardInterrupt):
        told, code = "stopped; what was finished is kept", 130
    elif not isinstance(problem, (BadInput, OSError)):
        if "memory" not in f"{type(problem).__name__} {problem}".lower():
            raise problem  # a fault of the program's own
        told = "out of memory; a smaller model, batch or block needs less"
    if sys.stdout.isatty():
        print()  # leave the live line
    print(f"{program}: {printable(str(told))}", file=sys.stderr)
    return code


def main(arguments=None):
    """The command line -> exit code: 0, 2 for bad input with one line that says which."""
    try:
        experiment(parse(arguments))
        return 0
    except (Exception, KeyboardInterrupt) as problem:
        return explain("train.py", problem)


if __name__ == "__main__":
    tolerant_console()
    sys.exit(main())
