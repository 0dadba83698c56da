"""Tests of a model, in float32: losses on held-out text, KL to the base, answers to questions.

    python eval.py "37+45=" "Q: alarm 691? A:"      let every model of a run answer prompts
"""

import argparse
import io
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data import BadInput, encode, make_world
from losses import PADDING, cross_entropy, kl_divergence
from model import GPT, GPTConfig


# --- metrics -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, base, world):
    """Test a model -> losses and KL[p_theta || p_0] in nats per token, and scores per skill."""
    general = heldout_windows(world.heldout_general, base.config.block_size)  # (B, T + 1)
    domain = heldout_windows(world.heldout_domain, base.config.block_size)
    logits = model(general[:, :-1])  # (B, T, V)
    scores = {skill: score_probes(model, world.tokenizer, probes)
              for skill, probes in world.probes.items()}
    return {
        "general_loss": cross_entropy(logits, general[:, 1:]).mean().item(),
        "domain_loss": cross_entropy(model(domain[:, :-1]), domain[:, 1:]).mean().item(),
        "kl_to_base": kl_divergence(logits, base(general[:, :-1])).mean().item(),
        "accuracy": {skill: accuracy for skill, (accuracy, _) in scores.items()},
        "probability": {skill: probability for skill, (_, probability) in scores.items()},
    }


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
    """Continue a prompt greedily: to the end of the line, or by 40 tokens for your own text."""
    tokenizer = world.tokenizer
    tokens = encode(tokenizer, "\n" + prompt)[None].to(next(model.parameters()).device)  # (1, T)
    stop = tokenizer.encode_single_token("\n") if world.probes else -1
    new = model.generate(tokens, most, temperature=0, stop=stop)[0, tokens.shape[1]:]
    return " ".join(tokenizer.decode(new.tolist()).split())


def show_answers(models, world, prompts):
    """Print each prompt, and below it the answer of each model {name: GPT}."""
    for prompt in prompts:
        print(f"\n> {printable(prompt)}")
        for name, model in models.items():
            print(f"  {name:{max(map(len, models))}}  {printable(answer(model, world, prompt))}")


def printable(text):
    """The text with "?" for each unprintable character, which could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def main():
    parser = argparse.ArgumentParser(description="Let every model of a run answer prompts.")
    parser.add_argument("prompts", nargs="*", help="default: questions of the first seed")
    parser.add_argument("--out", type=Path, default="out", help="the folder of a run")
    given = parser.parse_args()
    settings = json.loads((given.out / "settings.json").read_text()) | {"device": "cpu"}
    row = json.loads((given.out / "metrics.jsonl").read_text().partition("\n")[0])  # of the base
    world = make_world(argparse.Namespace(**settings), row["seed"])
    paths = [given.out / f"seed{row['seed']}" / f"{name}.pt" for name in settings["methods"]]
    models = {path.stem: load_model(path) for path in (paths[0].with_name("base.pt"), *paths)
              if path.exists()}  # a run that was stopped lacks some
    base = models["base"]
    if (base.config.vocab_size != world.tokenizer.n_vocab
            or abs(evaluate(base, base, world)["general_loss"] - row["general_loss"]) > 0.01):
        raise BadInput(f"--out {given.out}: the text or the code has changed since this run")
    show_answers(models, world, given.prompts or world.prompts)


# --- files and errors ----------------------------------------------------------------------------

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
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # so that no file is ever half written
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def run_program(program):
    """Run program() and exit: 0, 2 with a message for bad input, or 130 after Ctrl-C."""
    message, code = "", 0
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no encoding
            sys.stdout.reconfigure(errors="replace")
        program()
        print(end="", flush=True)
    except (BadInput, OSError, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 2
        message = f"error: {error}" if code == 2 else "stopped; the methods that finished are kept"
    if message:
        print(printable(message), file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # a closed output: exit must not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


if __name__ == "__main__":
    run_program(main)
