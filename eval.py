"""Tests of a model, in float32: losses on held-out text, KL to the base, answers to questions.

    python eval.py "37+45=" "Q: alarm 691? A:"      let every model of a run answer prompts
    python eval.py --tokens "36+21=64"              what each model expects at each token
"""

import argparse
import io
import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data import BadInput, encode, make_world
from losses import PADDING, cross_entropy, kl_divergence, log_probs
from model import GPT, GPTConfig
from plots.program import printable, run_program


# --- metrics -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, base, world):
    """Test a model -> losses and KL[p_theta || p_0] in nats per token, and scores per skill."""
    general_loss, kl_to_base = heldout_losses(model, world.heldout_general, base)
    domain_loss, _ = heldout_losses(model, world.heldout_domain)
    scores = {skill: score_probes(model, world.tokenizer, probes)
              for skill, probes in world.probes.items()}
    return {"general_loss": general_loss, "domain_loss": domain_loss, "kl_to_base": kl_to_base,
            "accuracy": {skill: exact for skill, (exact, _) in scores.items()},
            "probability": {skill: p for skill, (_, p) in scores.items()}}


@torch.no_grad()
def heldout_losses(model, tokens, base=None, at_once=2**22):
    """Held-out tokens (N,) -> mean cross-entropy and mean KL to a base, in nats per token.
    At most about `at_once` logits are in memory. Raises BadInput if a loss is not finite."""
    windows, nats = heldout_windows(tokens, model.config.block_size), []  # (B, T + 1)
    for some in windows.split(max(1, at_once // windows[0].numel() // model.config.vocab_size)):
        logits = model(some[:, :-1])  # (b, T, V)
        ce = cross_entropy(logits, some[:, 1:])  # (b, T)
        kl = kl_divergence(logits, base(some[:, :-1])) if base else torch.zeros_like(ce)
        nats.append((ce, kl))
    ce, kl = (torch.cat(part).mean().item() for part in zip(*nats))
    if not math.isfinite(ce):
        raise BadInput(f"the loss on held-out text is {ce}: try a lower --lr or --base-lr")
    return ce, kl


def heldout_windows(tokens, block_size, most=64):
    """Evenly spaced windows of tokens (N,) -> (B, block_size + 1). No token is a target twice."""
    windows = tokens.unfold(0, block_size + 1, block_size)
    return windows[::math.ceil(len(windows) / most)]


@torch.no_grad()
def score_probes(model, tokenizer, probes):
    """Probes (prompt, answer) -> share answered exactly, mean probability of the right answer.

    Greedy decoding gives the exact answer if and only if every token of the answer is the most
    likely one after the right tokens before it. So one forward pass tests all probes.
    """
    pairs = [(encode(tokenizer, "\n" + prompt), encode(tokenizer, right))
             for prompt, right in probes]
    tokens = [torch.cat(pair) for pair in pairs]
    targets = [torch.cat([torch.full_like(prompt, PADDING), right]) for prompt, right in pairs]
    tokens = pad_sequence(tokens, batch_first=True)[:, :-1]  # (P, L)
    logits = model(tokens.to(next(model.parameters()).device))  # (P, L, V)
    targets = pad_sequence(targets, True, PADDING)[:, 1:].to(logits.device)  # (P, L)
    exact = ((logits.argmax(dim=-1) == targets) | (targets == PADDING)).all(dim=1)  # (P,)
    probability = (-cross_entropy(logits, targets).sum(dim=1)).exp()  # (P,)
    return exact.sum().item() / len(probes), probability.mean().item()


# --- answers to prompts --------------------------------------------------------------------------

def answer(model, world, prompt, most=40):
    """Continue a prompt greedily, to the end of the line if the world has questions."""
    tokenizer = world.tokenizer
    tokens = encode(tokenizer, "\n" + prompt)[None].to(next(model.parameters()).device)  # (1, T)
    stop = tokenizer.encode_single_token("\n") if world.probes else -1
    new = model.generate(tokens, most, temperature=0, stop=stop)[0, tokens.shape[1]:]
    return tokenizer.decode(new.tolist()).strip()


def show_answers(models, world, prompts):
    """Print each prompt, and below it the answer of each model {name: GPT}."""
    for prompt in prompts:
        print(f"\n> {printable(prompt)}")
        for name, model in models.items():
            print(f"  {name:{max(map(len, models))}}  {printable(answer(model, world, prompt))}")


@torch.no_grad()
def show_tokens(models, world, texts):
    """Print each token, and what each model {name: GPT} expects there, with its probability."""
    for text in texts:
        tokens = encode(world.tokenizer, "\n" + text)[:models["base"].config.block_size + 1]  # (T,)
        best = [log_probs(model(tokens[None, :-1]))[0].exp().max(-1) for model in models.values()]
        print(f"\n{'token':8}" + "".join(f"{name:>15}" for name in models))
        for i, words in enumerate(zip(tokens[1:], *(ids for _, ids in best))):
            word, *expected = (repr(world.tokenizer.decode([token])) for token in words)
            print(f"{word:8}" + "".join(f"{e:>10} {p[i]:.2f}" for e, (p, _) in zip(expected, best)))


def show_texts(seed, world, block_size):
    """Print the sizes of the texts and how they begin."""
    for name in ("general", "domain"):
        tokens, tested = getattr(world, name), heldout_windows(getattr(world, f"heldout_{name}"),
                                                               block_size)[:, 1:]
        print(f"seed {seed}: {len(tokens):,} {name} tokens to train, {tested.numel():,} to test. "
              f"The text begins: {printable(world.tokenizer.decode(tokens[:60].tolist()))} ...")


def main():
    parser = argparse.ArgumentParser(description="Let every model of a run answer prompts.")
    parser.add_argument("prompts", nargs="*", help="default: questions of the first seed; write "
                        "-- before a prompt that begins with a minus sign")
    parser.add_argument("--out", type=Path, default="out", help="the folder of a run")
    parser.add_argument("--tokens", action="store_true", help="show each token of the prompts")
    given = parser.parse_args()
    try:
        settings = json.loads((given.out / "settings.json").read_text()) | {"device": "cpu"}
        row = json.loads((given.out / "metrics.jsonl").read_text().partition("\n")[0])  # the base
        folder = given.out / f"seed{row['seed']}"
        paths = [folder / f"{name}.pt" for name in settings["methods"]]
        world = make_world(argparse.Namespace(**settings), row["seed"])
    except (AttributeError, KeyError, json.JSONDecodeError) as error:
        raise BadInput(f"--out {given.out}: not a run of this version: {error}")
    base = load_model(folder / "base.pt")
    models = {"base": base} | {path.stem: load_model(path) for path in paths
                               if path.exists()}  # a run that was stopped lacks some
    if (base.config.vocab_size != world.tokenizer.n_vocab
            or abs(heldout_losses(base, world.heldout_general)[0] - row["general_loss"]) > 0.01):
        raise BadInput(f"--out {given.out}: the text or the code has changed since this run")
    (show_tokens if given.tokens else show_answers)(models, world, given.prompts or world.prompts)


# --- files and messages --------------------------------------------------------------------------

def start_run(settings, names):
    """Make the folders of a run; delete the results and checkpoints {name}.pt of an earlier one."""
    out = Path(settings.out)
    for folder in (out, *(out / f"seed{seed}" for seed in settings.seeds)):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fails if the folder is not writable
    with suppress(ImportError):  # Windows has no such lock
        import fcntl
        if hasattr(start_run, "lock"):
            start_run.lock.close()  # of an earlier run of this process
        start_run.lock = open(out / ".lock", "w")  # held until the process ends
        try:
            fcntl.flock(start_run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"--out {out}: another run is writing there") from None
    write_file(out / "settings.json", json.dumps(asdict(settings), indent=1).encode())
    patterns = "metrics.jsonl", "forgetting.png", "page.html", *(f"seed*/{x}.pt" for x in names)
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        path.unlink()


def save_model(path, model):
    content = io.BytesIO()
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, content)
    write_file(path, content.getvalue())


def load_model(path, device="cpu"):
    """A checkpoint -> its GPT. Raises BadInput."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**saved["config"]))
        model.load_state_dict(saved["model"])
    except Exception:  # a foreign or damaged file can raise anything
        raise BadInput(f"{path}: missing, damaged, or not a checkpoint of train.py") from None
    return model.to(device)


def write_file(path, content):
    """Write a file, whole or not at all, and make its folder."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    run_program(main)
