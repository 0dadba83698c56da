"""How a model is marked: losses on held-out text, KL to the base, exact match on probes; the table; the answers.

    python eval.py --out out                   mark the checkpoints of a run again and print the table
    python eval.py --out out --ask "37+45="    let every model of the run answer a prompt

Marking is always done in float32, so a table does not depend on the precision that trained the models.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean

import torch

import data
from data import BadInput
from losses import cross_entropy, kl_divergence
from model import GPT, GPTConfig

SKILLS = {"no_think": "no-think sums", "think": "think sums", "facts": "facts", "domain": "domain"}
LOSSES = {"general_loss": "general loss", "domain_loss": "domain loss", "kl_to_base": "KL to base"}


# --- marking ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, base, world, block_size):
    """Mark a model on held-out text and on the probes -> one row of metrics, losses in nats per token.

    {"general_loss", "domain_loss", "kl_to_base", "accuracy": {skill: share of the probes answered exactly}}
    KL is the reverse one, KL[p_theta || p_0], on the held-out general text, whatever a method trained with.
    """
    general, domain = (heldout_windows(text, block_size) for text in (world.heldout_general, world.heldout_domain))
    logits = model(general[:, :-1])  # (B, T, V)
    return {
        "general_loss": cross_entropy(logits, general[:, 1:]).mean().item(),
        "domain_loss": cross_entropy(model(domain[:, :-1]), domain[:, 1:]).mean().item(),
        "kl_to_base": kl_divergence(logits, base(general[:, :-1])).mean().item(),
        "accuracy": {skill: exact_match(model, world.tokenizer, probes) for skill, probes in world.probes.items()},
    }


def heldout_windows(stream, block_size, most=64):
    """At most `most` windows of a stream (N,), evenly spaced and never overlapping in targets -> (B, block_size + 1)."""
    windows = stream.unfold(0, block_size + 1, block_size)
    return windows[::math.ceil(len(windows) / most)]


@torch.no_grad()
def exact_match(model, tokenizer, probes):
    """The share of the probes (prompt, answer) whose whole answer the model would give by greedy decoding.

    Greedy decoding yields exactly the answer if and only if each of its tokens is the likeliest one after the
    prompt and the answer so far, so a single forward over prompt + answer marks all the probes.
    """
    rows, asked = [], []
    for prompt, answer in probes:
        prompt = tokenizer.encode_ordinary("\n" + prompt)  # a document begins where another ended
        rows.append(prompt + tokenizer.encode_ordinary(answer))
        asked.append(len(prompt))
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (P, L)
    position = torch.arange(longest)
    is_answer = torch.stack([(position >= n) & (position < len(row)) for n, row in zip(asked, rows)]).to(device)
    right = model(tokens[:, :-1]).argmax(dim=-1) == tokens[:, 1:]  # (P, L - 1)
    return (right | ~is_answer[:, 1:]).all(dim=1).float().mean().item()


def answer(model, world, prompt, most=40):
    """The model's greedy answer on one line: the rest of the toy world's line, or `most` tokens of your own text."""
    tokenizer = world.tokenizer
    device = next(model.parameters()).device
    tokens = torch.tensor([tokenizer.encode_ordinary("\n" + prompt)], device=device)
    end = tokenizer.encode_single_token("\n") if world.probes else None
    out = model.generate(tokens, most, temperature=0, stop=end)[0, tokens.shape[1]:]
    return " ".join(tokenizer.decode(out.tolist()).split())


# --- what people see -------------------------------------------------------------------------------------------

def table(rows):
    """Rows of metrics -> a Markdown table of each method's last. With several seeds: mean (lowest-highest)."""
    rows = list({(row["method"], row["seed"]): row for row in rows}.values())
    skills = [skill for skill in SKILLS if skill in rows[0]["accuracy"]]
    lines = [["method", *LOSSES.values(), *(SKILLS[skill] for skill in skills)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        lines.append([method,
                      *(cell([row[loss] for row in of_method], 3) for loss in LOSSES),
                      *(cell([row["accuracy"][skill] for row in of_method], 2) for skill in skills)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines)


def cell(values, digits):
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def answers(models, world, prompts):
    """Every prompt, and under it what each model {name: GPT} makes of it, as text."""
    width = max(map(len, models))
    lines = []
    for prompt in prompts:
        lines.append(f"\n> {prompt}")
        lines += [f"  {name:{width}}  {answer(model, world, prompt)}" for name, model in models.items()]
    return "\n".join(lines)


# --- checkpoints -----------------------------------------------------------------------------------------------

def load(path, device="cpu"):
    """A file that train.py saved -> its dict. Weights only, so a foreign file can run no code."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except Exception:  # truncated or foreign: torch raises half a dozen kinds
        raise BadInput(f"{path}: not a checkpoint of train.py, or a truncated one") from None
    if not isinstance(saved, dict):
        raise BadInput(f"{path}: not a checkpoint of train.py")
    return saved


def load_model(path, device="cpu", config=None):
    """A checkpoint -> its GPT, on the device. With `config`, a model of another size is refused."""
    saved = load(path, device)
    try:
        saved_config = GPTConfig(**saved["config"])
        model = GPT(saved_config).to(device)
        model.load_state_dict(saved["model"])
    except Exception:  # the wrong type, keys, sizes or shapes
        raise BadInput(f"{path}: not a checkpoint of train.py") from None
    if config and saved_config != config:
        raise BadInput(f"{path}: a model of another size, {saved_config}; expected {config}")
    return model


def load_world(path, device="cpu"):
    """What a run saved of its world -> a World without the training texts."""
    saved = load(path, device)
    try:
        tokenizer = data.tokenizer_from(saved.pop("vocabulary"))
        return data.World(tokenizer=tokenizer, pretraining=None, general=None, domain=None, samples={}, **saved)
    except Exception:
        raise BadInput(f"{path}: not a world that train.py saved") from None


def load_run(out):
    """A run's folder -> {seed: (world, {method: GPT})}, the methods in the order of its metrics.jsonl."""
    try:
        with open(Path(out) / "metrics.jsonl") as file:
            trained = list(dict.fromkeys((row["seed"], row["method"]) for row in map(json.loads, file)))
    except OSError:
        raise BadInput(f"--out {out}: no finished run of train.py in it") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"--out {out}: its metrics.jsonl is not one of train.py's, or is damaged") from None
    runs = {}
    for seed, method in trained:
        folder = Path(out) / f"seed{seed}"
        if seed not in runs:
            world, base = load_world(folder / "world.pt"), load_model(folder / "base.pt")
            if base.config.vocab_size != world.tokenizer.n_vocab:
                raise BadInput(f"{folder}: base.pt and world.pt are of different runs")
            runs[seed] = world, {"base": base}
        if method != "base":
            runs[seed][1][method] = load_model(folder / f"{method}.pt", config=runs[seed][1]["base"].config)
    if not runs:
        raise BadInput(f"--out {out}: its metrics.jsonl is empty")
    return runs


def main(arguments=None):
    """The command line -> exit code: 0, or 2 for bad input with one line that says which."""
    parser = argparse.ArgumentParser(description="Mark a run's checkpoints again, or let its models answer a prompt.")
    parser.add_argument("--out", default="out", help="the run's folder (default: out)")
    parser.add_argument("--ask", metavar="PROMPT", help="let every model of the first seed answer this prompt instead")
    options = parser.parse_args(arguments)
    try:
        runs = load_run(options.out)
        if options.ask is not None:
            world, models = next(iter(runs.values()))
            print(answers(models, world, [options.ask]))
        else:
            print(table([{"method": method, "seed": seed, **evaluate(model, models["base"], world, model.config.block_size)}
                         for seed, (world, models) in runs.items() for method, model in models.items()]))
    except (BadInput, OSError) as problem:
        print(f"eval.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows a question mark
    sys.exit(main())
