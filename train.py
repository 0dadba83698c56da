"""The whole experiment: pretrain a base, continue it on a domain by each method, mark, tabulate, draw.

    python train.py                            the toy world, seed 0
    python train.py --seed 0 1 2               three seeds, each with its own world and its own base
    python train.py --general FILE... --domain FILE...      your own text

All methods start from the same base, read the same domain sequences in the same order, and share learning rate,
steps, batch and, but for those that hold the weights themselves, weight decay. A method is one function below and one row in METHODS.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import data
import losses
from data import BadInput
from eval import SKILLS, answers, evaluate, heldout_windows, load, load_model, table
from model import GPT, GPTConfig
from plots import forgetting, tradeoff


# --- settings --------------------------------------------------------------------------------------------------

def setting(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Settings:
    out: str = setting("out", "folder for the metrics, checkpoints and figures")
    seed: tuple[int, ...] = setting((0,), "one or several: each makes its own world, base and batches")
    methods: tuple[str, ...] = setting(("ce", "replay", "mol"), "how to continue the base, any of: {methods}")

    # continual pre-training
    steps: int = setting(400, "steps of every method")
    lr: float = setting(2e-3, "peak learning rate of every method")
    batch_size: int = setting(16, "domain sequences a step; general ones come on top, see ratio")
    ratio: float = setting(1.0, "general sequences for each domain one, in methods that read general text")
    kl: str = setting("reverse", "direction of mol's KL: reverse (model || base), forward (base || model) or their mean")
    strength: float = setting(1.0, "weight of what protects the base: the KL of mol and lwf, the distance of l2sp and ewc")
    lora_rank: int = setting(0, "train low-rank adapters of this rank instead of the weights; 0 trains the weights")
    general_errors: float = setting(0.7, "share of wrong answers in the toy world's general text, 0 to 1")
    general_documents: int = setting(2000, "documents of the toy world's general text; short of it they are seen again and again")
    eval_every: int = setting(25, "steps between two evaluations")

    # the base
    base_steps: int = setting(1400, "steps of pretraining")
    base_lr: float = setting(5e-3, "peak learning rate of pretraining")
    base_batch_size: int = setting(32, "sequences a step of pretraining")
    n_layer: int = setting(3, "layers")
    n_head: int = setting(4, "attention heads a layer")
    n_embd: int = setting(128, "width: channels of the residual stream")
    block_size: int = setting(64, "tokens of a sequence")
    vocab_size: int = setting(512, "tokens of the vocabulary, learnt from the general text; 256 or more")
    base: str = setting("", "take the base from this earlier run's folder; its settings must fit")
    fresh: bool = setting(False, "pretrain the base again even if a fitting one is there")

    # your own text
    general: tuple[str, ...] = setting((), "UTF-8 files or folders in place of the toy general text; needs --domain")
    domain: tuple[str, ...] = setting((), "UTF-8 files or folders in place of the toy domain text; needs --general")

    # the machine
    device: str = setting("auto", "auto, cpu, cuda or mps; auto takes the first there is of cuda, mps, cpu")
    dtype: str = setting("auto", "auto, float32 or bfloat16; auto takes bfloat16 where the device computes in it")
    compile: bool = setting(False, "run the models through torch.compile")


def parse(arguments, defaults=Settings(), program="train.py", without=(),
          purpose="Pretrain a small GPT, continue it on a domain by each method, and watch what it forgets."):
    """Command line -> Settings: every field of the dataclass is a flag, but for those that a program is without."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(message)

    parser = Parser(description=purpose, usage=f"python {program} [--setting value ...]", allow_abbrev=False)
    for f in fields(Settings):
        if f.name in without:
            continue
        default = getattr(defaults, f.name)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        meaning = f.metadata["help"].format(methods=", ".join(METHODS))
        options = {"help": meaning + (f" (default: {shown})" if shown else ""), "default": default}
        if f.type is bool:
            options["action"] = "store_true"
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "type": f.type.__args__[0], "metavar": "X"}
        else:
            options |= {"type": f.type, "metavar": "X"}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return replace(defaults, **vars(parser.parse_args(arguments)))


def check(s):
    """Refuse what cannot work, before anything is written."""
    if not s.out:
        raise BadInput("--out is empty; it must name a folder")
    for method in s.methods:
        if method not in METHODS or s.methods.count(method) > 1:
            raise BadInput(f"--methods {method}: it must be one of {', '.join(METHODS)}, each once at most")
    for name in ("steps", "batch_size", "eval_every", "base_steps", "base_batch_size", "lr", "base_lr", "general_documents"):
        if not 0 < getattr(s, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: it must be above 0")
    if not 0 <= s.ratio <= 1000:
        raise BadInput(f"--ratio {s.ratio}: it must be between 0 and 1000")
    if s.ratio and not round(s.ratio * s.batch_size):
        raise BadInput(f"--ratio {s.ratio}: with --batch-size {s.batch_size} that is no general sequence at all")
    if not 0 <= s.general_errors <= 1:
        raise BadInput(f"--general-errors {s.general_errors}: a share, it must be between 0 and 1")
    if s.kl not in ("reverse", "forward", "mean"):
        raise BadInput(f"--kl {s.kl}: it must be reverse, forward or mean")
    if not 0 <= s.strength < math.inf:
        raise BadInput(f"--strength {s.strength}: it must be 0 or more")
    if s.lora_rank < 0:
        raise BadInput(f"--lora-rank {s.lora_rank}: it must be 0 or more")
    for method in {"l2sp", "ewc"} & set(s.methods):
        if s.lora_rank:
            raise BadInput(f"--lora-rank {s.lora_rank}: adapters leave the base's weights as they are, so {method} has nothing to hold")
    if bool(s.general) != bool(s.domain):
        raise BadInput("--general and --domain go together: give both, or neither for the toy world")
    if s.base and s.fresh:
        raise BadInput("--base and --fresh: take an earlier base or pretrain a new one, not both")
    if not 0 <= min(s.seed) <= max(s.seed) < 2**32 or len(set(s.seed)) < len(s.seed):
        raise BadInput(f"--seed {' '.join(map(str, s.seed))}: seeds must be between 0 and 2**32 - 1, each once at most")
    if s.vocab_size < 256:
        raise BadInput(f"--vocab-size {s.vocab_size}: it must be at least 256, one token for each byte")
    try:
        GPTConfig(s.vocab_size, s.block_size, s.n_layer, s.n_head, s.n_embd)
    except ValueError as problem:
        raise BadInput(f"--{problem}".replace("_", "-")) from None


def choose_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if name not in there:
        raise BadInput(f"--device {name}: it must be auto, cpu, cuda or mps")
    if not there[name]:
        raise BadInput(f"--device {name}: this machine has none, or this torch was built without it; leave the flag out")
    return name


def choose_dtype(name, device):
    """bfloat16 only where the hardware computes in it: emulated, it was measured many times slower than float32."""
    if name not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"--dtype {name}: it must be auto, float32 or bfloat16")
    if name != "auto":
        return getattr(torch, name)
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        cpu = torch.cpu.get_capabilities()
        native = any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        native = False  # MPS: some Apple chips emulate it, and none has been measured
    return torch.bfloat16 if native else torch.float32


# --- methods ---------------------------------------------------------------------------------------------------
# A method turns (model, base, batch, settings) into the scalar loss of one step.

def ce(model, base, batch, s):
    """Cross-entropy on all that the batch holds: with general text in it, that text is imitated, mistakes and all."""
    return losses.mean_cross_entropy(model(batch.tokens), batch.targets)


def mol(model, base, batch, s):
    """Cross-entropy on domain rows, KL to the frozen base on general rows: arXiv 2505.12043."""
    with torch.no_grad():
        base_logits = base(batch.tokens[~batch.is_domain])  # (G, T, V): the base reads general rows only
    _, ce, kl = losses.mixture_of_losses(model(batch.tokens), batch.targets, batch.is_domain, base_logits, s.kl)
    return ce + s.strength * kl  # the paper's weight is 1


def lwf(model, base, batch, s):
    """Learning without Forgetting (1606.09282): cross-entropy on domain text, and distillation from the base on the same.

    Distillation is forward KL, as there; its temperature is 1 here, where theirs is 2.
    """
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens)
    kl = losses.kl_divergence(logits, base_logits, "forward").mean()
    return losses.mean_cross_entropy(logits, batch.targets) + s.strength * kl


def l2sp(model, base, batch, s):
    """Cross-entropy, and the squared distance to the base's weights: L2-SP, 1802.01483."""
    return ce(model, base, batch, s) + s.strength * losses.weight_distance(model.parameters(), base.parameters())


def ewc(model, base, batch, s, fisher):
    """The same distance, weights that matter on general text counting more: Elastic Weight Consolidation, 1612.00796."""
    return ce(model, base, batch, s) + s.strength * losses.weight_distance(model.parameters(), base.parameters(), fisher)


def fisher(base, world, s, seed):
    """The diagonal Fisher of the base on 256 sequences of the general text, once before the first step."""
    generator = torch.Generator().manual_seed(seed)
    return losses.diagonal_fisher(base, data.windows(world.general, 256, s.block_size, generator)[:, :-1], generator)


class Method(NamedTuple):
    loss: Callable  # (model, base, batch, settings) -> scalar, and what `prepare` made as the last argument
    reads_general: bool = False  # does a batch hold general sequences too?
    prepare: Callable | None = None  # (base, world, settings, seed) -> what the loss needs besides, computed once
    weight_decay: float = 0.1  # AdamW's pull of the matrices to zero


METHODS = {
    "ce": Method(ce),  # naive continual pre-training
    "replay": Method(ce, reads_general=True),
    "mol": Method(mol, reads_general=True),
    "lwf": Method(lwf),
    "l2sp": Method(l2sp, weight_decay=0.0),  # a pull to the base instead of the pull to zero
    "ewc": Method(ewc, prepare=fisher, weight_decay=0.0),
}


# --- training --------------------------------------------------------------------------------------------------

def fit(label, model, step_loss, batches, steps, lr, dtype, mark, mark_every, weight_decay):
    """The loop that every training goes through: AdamW, a short warm-up, linear decay to zero, clipped gradients.

    step_loss(batch) is the loss of one step; mark(step) is called every mark_every steps and after the last.
    """
    device = next(model.parameters()).device
    learnt = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learnt if p.dim() > 1]
    gains = [p for p in learnt if p.dim() == 1]  # LayerNorm's: decay would pull them to zero
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 10)
    show = progress(label, steps)
    for step, batch in zip(range(1, steps + 1), batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / warmup, (steps + 1 - step) / (steps + 1 - warmup))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step_loss(batch)
        value = finite(label, step, loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        show(step, value, batch.tokens.numel())
        if step % mark_every == 0 or step == steps:
            mark(step)


def finite(label, step, loss):
    """The loss itself, or the end of the run if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise BadInput(f"{label}: the loss is {loss} at step {step}; a lower learning rate may help")
    return loss


def progress(label, steps):
    """-> show(step, loss, tokens): one live line on a terminal, ten plain ones in a file."""
    began = time.perf_counter()
    live = sys.stdout.isatty()
    seen = last = 0

    def show(step, loss, tokens):
        nonlocal seen, last
        seen += tokens
        now = time.perf_counter()
        if (now - last > 0.2 if live else step * 10 // steps > (step - 1) * 10 // steps) or step == steps:
            last = now
            left = (now - began) / step * (steps - step)
            print(f"{label:>8}  step {step:>5}/{steps}  loss {loss:7.3f}  {seen / (now - began) / 1000:6.1f}k tokens/s"
                  f"  {left:4.0f} s left", end="\r" if live and step < steps else "\n", flush=True)

    return show


def pretrain(s, seed, world, device, dtype):
    """A base from nothing -> the GPT as it was when it was best on held-out general text, the text that it is marked on."""
    torch.manual_seed(seed)
    model = GPT(config_of(s, world)).to(device)  # initialised on the CPU: the same start on every device
    forward = torch.compile(model) if s.compile else model
    heldout = heldout_windows(world.heldout_general, s.block_size)
    best = {"loss": math.inf}

    @torch.no_grad()
    def mark(step):
        loss = finite("base", step, losses.mean_cross_entropy(model(heldout[:, :-1]), heldout[:, 1:]).item())
        if loss < best["loss"]:
            best.update(loss=loss, step=step, model=copy.deepcopy(model.state_dict()))

    batches = data.batches(world.domain, world.pretraining, 0, s.base_batch_size, s.block_size, f"pretraining {seed}")
    fit("base", model, lambda batch: losses.mean_cross_entropy(forward(batch.tokens), batch.targets),
        batches, s.base_steps, s.base_lr, dtype, mark, max(1, s.base_steps // 20), weight_decay=0.1)
    print(f"{'base':>8}  kept from step {best['step']}, the best on held-out general text: {best['loss']:.3f} nats per token")
    model.load_state_dict(best["model"])
    return model


def continue_training(method, s, seed, world, base, dtype, mark, held_to=None):
    """The base, continued by one method -> a new GPT; the base itself stays as it is.

    mark(model, step) is called every s.eval_every steps. held_to is the model to stay near, if it is another than the base.
    """
    step_loss, reads_general, prepare, weight_decay = METHODS[method]
    model = copy.deepcopy(base).requires_grad_(True)
    if s.lora_rank:
        torch.manual_seed(seed)
        model.add_lora(s.lora_rank)
    frozen = held_to or (model.without_lora if s.lora_rank else base)
    forward, frozen = (torch.compile(model), torch.compile(frozen)) if s.compile else (model, frozen)
    n_general = round(s.ratio * s.batch_size) if reads_general else 0
    batches = data.batches(world.domain, world.general, s.batch_size, n_general, s.block_size, seed)
    prepared = [prepare(held_to or base, world, s, seed)] if prepare else []
    fit(method, model, lambda batch: step_loss(forward, frozen, batch, s, *prepared),
        batches, s.steps, s.lr, dtype, lambda step: mark(model, step), s.eval_every, weight_decay)
    model.merge_lora()
    return model


# --- the experiment --------------------------------------------------------------------------------------------

def make_world(s, seed, device):
    """The texts of one seed on the device; refuses those that are too short for the settings."""
    if s.general:
        world = data.text_world(s.general, s.domain, s.vocab_size)
    else:
        world = data.toy_world(seed, s.general_errors, s.vocab_size, general_documents=s.general_documents)
    for name in ("pretraining", "general", "domain", "heldout_general", "heldout_domain"):
        stream = getattr(world, name)
        if len(stream) < s.block_size + 1:
            where = ("--domain" if "domain" in name else "--general") if s.general else "the toy world"
            raise BadInput(f"{where}: too short: {len(stream)} tokens of {name} text, where --block-size {s.block_size} "
                           f"needs {s.block_size + 1}")
        setattr(world, name, stream.to(device))
    longest = max((len(world.tokenizer.encode_ordinary("\n" + "".join(p))) for ps in world.probes.values() for p in ps), default=0)
    if longest > s.block_size + 1:
        raise BadInput(f"--block-size {s.block_size}: the toy world's longest document needs {longest - 1}")
    return world


def config_of(s, world):
    return GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd)


def made_from(s, seed, world, dtype):
    """All that a base depends on, besides the code and the machine: kept with it, to know it again."""
    settings = {name: getattr(s, name) for name in ("base_steps", "base_lr", "base_batch_size")}
    text = hashlib.sha256(world.pretraining.cpu().numpy().tobytes()).hexdigest()
    return {**settings, **asdict(config_of(s, world)), "seed": seed, "dtype": str(dtype), "text": text}


def earlier_base(s, seed, world, device, dtype):
    """The base that an earlier run left for the same settings and text -> GPT, or None where there is none."""
    path = Path(s.base or s.out) / f"seed{seed}" / "base.pt"
    if s.fresh or not (path.exists() or s.base):
        return None
    try:
        model, saved = load_model(path, device), load(path)
        if "made_from" not in saved:
            raise BadInput(f"{path}: not a base of train.py")
    except BadInput as problem:
        raise BadInput(f"--base {s.base}: no base of seed {seed} there: {problem}" if s.base else
                       f"{problem}; delete it, or pretrain a new base with --fresh") from None
    wanted = made_from(s, seed, world, dtype)
    other = ", ".join(name for name in wanted if saved["made_from"].get(name) != wanted[name])
    if not other:
        print(f"{'base':>8}  reused from {path}: its settings are unchanged (--fresh retrains)")
        return model
    if s.base:
        raise BadInput(f"--base {s.base}: its base of seed {seed} was made with another {other}")
    print(f"{'base':>8}  in {path} was made with another {other}: pretraining a new one")
    return None


def save(path, write):
    """write(temporary name), then move into place: a file is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def save_model(path, model, **more):
    saved = {"config": asdict(model.config), "model": model.state_dict(), **more}
    save(path, lambda name: torch.save(saved, name))


def save_metrics(path, rows):
    save(path, lambda name: name.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def save_world(path, world):
    saved = {name: getattr(world, name) for name in ("heldout_general", "heldout_domain", "probes", "prompts")}
    vocabulary = [world.tokenizer.decode_single_token_bytes(token) for token in range(world.tokenizer.n_vocab)]
    save(path, lambda name: torch.save({"vocabulary": vocabulary, **saved}, name))


def prepare(s):
    """Make the output folder, clear an earlier run's results from it, all but its bases, and note the settings."""
    out = Path(s.out)
    try:
        for seed in s.seed:
            (out / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        if (out / "metrics.jsonl").exists():
            print(f"the results of the earlier run in {out} make way, all but its bases")
        save(out / "settings.json", lambda name: name.write_text(json.dumps(asdict(s), indent=1) + "\n"))
        for name in ("metrics.jsonl", "forgetting.png", "tradeoff.png"):
            (out / name).unlink(missing_ok=True)
        for folder in out.glob("seed*"):
            for name in ("world", *METHODS):
                (folder / f"{name}.pt").unlink(missing_ok=True)
    except OSError as problem:
        raise BadInput(f"--out {out}: cannot write there: {problem}") from None


def run(s, seed, world, base, device, dtype, rows, seconds):
    """One seed: the base and every method, marked along the way -> {method: GPT}. Adds to rows and to seconds."""
    out = Path(s.out)
    folder = out / f"seed{seed}"
    save_world(folder / "world.pt", world)

    def timed(what, work, *arguments):
        began, marking = time.perf_counter(), seconds["evaluation"]
        result = work(*arguments)
        seconds[what] += time.perf_counter() - began - (seconds["evaluation"] - marking)
        return result

    def mark(method, model, step):
        row = timed("evaluation", evaluate, model, base, world, s.block_size)
        finite(method, step, row["general_loss"] + row["domain_loss"])
        return {"method": method, "seed": seed, "step": step, **row}

    if base is None:
        base = timed("base", pretrain, s, seed, world, device, dtype)
    save_model(folder / "base.pt", base, made_from=made_from(s, seed, world, dtype))
    base.requires_grad_(False)
    models = {"base": base}
    start = mark("base", base, 0)
    rows.append(start)
    save_metrics(out / "metrics.jsonl", rows)
    for skill, share in start["accuracy"].items():
        if skill != "domain" and round(share, 4) < 0.95:  # 190 of 200 in float32 is a little less
            print(f"{'base':>8}  has not mastered {SKILLS[skill]}: {share:.0%} exact; raise --base-steps before comparing methods")

    for method in s.methods:
        curve = [{**start, "method": method}]
        models[method] = timed(method, continue_training, method, s, seed, world, base, dtype,
                               lambda model, step: curve.append(mark(method, model, step)))
        save_model(folder / f"{method}.pt", models[method])
        rows += curve  # only now: metrics.jsonl never holds half a method
        save_metrics(out / "metrics.jsonl", rows)
    return models


def experiment(s):
    """Everything, from the settings to the figures."""
    check(s)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    worlds = {seed: make_world(s, seed, device) for seed in s.seed}
    bases = {seed: earlier_base(s, seed, world, device, dtype) for seed, world in worlds.items()}
    prepare(s)  # nothing has been written before this line

    out, rows, seconds = Path(s.out), [], defaultdict(float)
    first = s.seed[0]
    print(f"on {device} in {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads; results go to {out}")
    for kind, documents in worlds[first].samples.items():
        for document in documents:
            print(f"{kind:>9} | {document}")
    for seed, world in worlds.items():
        print(f"seed {seed}: {len(world.pretraining):,} tokens to pretrain on, then {len(world.general):,} general "
              f"and {len(world.domain):,} domain ones")
        models = run(s, seed, world, bases[seed], device, dtype, rows, seconds)
        if seed == first:
            shown = answers(models, world, world.prompts)
    print(f"\nafter {s.steps} steps; losses in nats per token, skills in share of exact answers")
    print(table(rows))
    print(f"\nthe same prompts, answered by every model (seed {first})")
    print(shown)
    forgetting.draw(out / "metrics.jsonl", out / "forgetting.png")
    tradeoff.draw(out / "metrics.jsonl", out / "tradeoff.png")
    print(f"\n{out / 'forgetting.png'} and {out / 'tradeoff.png'} show the curves; seconds taken: "
          + ", ".join(f"{what} {seconds[what]:.0f}" for what in ("base", *s.methods, "evaluation")))


def main(arguments=None):
    """The command line -> exit code: 0, 2 for bad input with one line that says which, 130 when interrupted."""
    try:
        experiment(parse(arguments))
        return 0
    except (BadInput, OSError) as problem:
        told, code = problem, 2
    except KeyboardInterrupt:
        told, code = "stopped; what was finished is kept", 130
    if sys.stdout.isatty():
        print()  # leave the live line
    print(f"train.py: {told}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows a question mark
    sys.exit(main())
