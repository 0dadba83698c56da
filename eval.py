"""How a model is marked: losses on held-out text, KL to the base, answers to probes.

    python eval.py --out out                   mark the checkpoints of a run again, print the table
    python eval.py --out out --ask "37+45="    let every model of the run answer a prompt

Marking is always done in float32, so a table does not depend on the precision that trained the
models. The end of the file saves and loads checkpoints.
"""

import hashlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import data
from data import BadInput, printable
from losses import PADDING, cross_entropy, kl_divergence
from model import GPT, GPTConfig
from plots.style import Parser, table, tolerant_console, whole


# --- marking -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, base, world):
    """Mark a model on held-out text and probes -> one row of metrics, losses in nats per token.

    {"general_loss", "domain_loss", "kl_to_base", "accuracy": {skill: share answered exactly},
    "probability": {skill: mean probability of the right answer}}
    KL is the reverse one, KL[p_theta || p_0], on the held-out general text, whatever a method
    trained with.
    """
    block_size = base.config.block_size
    general = heldout_windows(world.heldout_general, block_size)  # (B, T + 1)
    domain = heldout_windows(world.heldout_domain, block_size)
    logits = model(general[:, :-1])  # (B, T, V)
    marks = {skill: mark_probes(model, world.tokenizer, probes)
             for skill, probes in world.probes.items()}
    return {
        "general_loss": cross_entropy(logits, general[:, 1:]).mean().item(),
        "domain_loss": cross_entropy(model(domain[:, :-1]), domain[:, 1:]).mean().item(),
        "kl_to_base": kl_divergence(logits, base(general[:, :-1])).mean().item(),
        "accuracy": {skill: exact for skill, (exact, _) in marks.items()},
        "probability": {skill: probability for skill, (_, probability) in marks.items()},
    }


def heldout_windows(stream, block_size, most=64):
    """At most `most` windows of a stream (N,), evenly spaced -> (B, block_size + 1).

    They overlap by one token, so that no token is a target twice.
    """
    windows = stream.unfold(0, block_size + 1, block_size)
    return windows[::math.ceil(len(windows) / most)]


def in_tokens(probes, tokenizer):
    """Probes (prompt, answer) -> rows of tokens, and how many of each are the prompt's."""
    rows, asked = [], []
    for prompt, answer in probes:
        prompt = tokenizer.encode_ordinary("\n" + prompt)  # a document begins where another ended
        rows.append(prompt + tokenizer.encode_ordinary(answer))
        asked.append(len(prompt))
    return rows, asked


@torch.no_grad()
def mark_probes(model, tokenizer, probes):
    """Probes (prompt, answer) -> share answered exactly, mean probability of the whole answer.

    Greedy decoding yields exactly the answer if and only if each of its tokens is the likeliest one
    after the prompt and the answer so far, so a single forward over prompt + answer marks all the
    probes. The probability of the answer is the product of its tokens'.
    """
    rows, asked = in_tokens(probes, tokenizer)
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    padded = [row + [0] * (longest - len(row)) for row in rows]
    tokens = torch.tensor(padded, device=device)  # (P, L)
    position = torch.arange(longest)
    is_answer = torch.stack([(position >= n) & (position < len(row))
                             for n, row in zip(asked, rows)]).to(device)  # (P, L)
    logits = model(tokens[:, :-1])  # (P, L - 1, V)
    targets = tokens[:, 1:].where(is_answer[:, 1:], PADDING)
    exact = ((logits.argmax(dim=-1) == targets) | (targets == PADDING)).all(dim=1)  # (P,)
    probability = (-cross_entropy(logits, targets).sum(dim=1)).exp()  # (P,)
    return exact.sum().item() / len(probes), probability.mean().item()


# --- answers -------------------------------------------------------------------------------------

def answer(model, world, prompt, most=40):
    """The model's greedy answer: the rest of the line, or `most` tokens of your own text."""
    tokenizer = world.tokenizer
    device = next(model.parameters()).device
    tokens = torch.tensor([tokenizer.encode_ordinary("\n" + prompt)], device=device)
    end = tokenizer.encode_single_token("\n") if world.probes else None
    out = model.generate(tokens, most, temperature=0, stop=end)[0, tokens.shape[1]:]
    return " ".join(tokenizer.decode(out.tolist()).split())


def answers(models, world, prompts):
    """Every prompt, and under it what each model {name: GPT} makes of it, as text."""
    width = max(map(len, models))
    lines = []
    for prompt in prompts:
        lines.append(f"\n> {printable(prompt)}")
        for name, model in models.items():
            lines.append(f"  {name:{width}}  {printable(answer(model, world, prompt))}")
    return "\n".join(lines)


# --- checkpoints: saved and loaded ---------------------------------------------------------------

def save_model(path, model, **more):
    with whole(path) as name:
        torch.save({"config": asdict(model.config), "model": model.state_dict(), **more}, name)


def save_world(path, world, base):
    """What marking needs of a world: held-out texts and questions; and the digest of its base."""
    count = world.tokenizer.n_vocab
    vocabulary = [world.tokenizer.decode_single_token_bytes(token) for token in range(count)]
    kept = {name: getattr(world, name)
            for name in ("heldout_general", "heldout_domain", "probes", "prompts")}
    with whole(path) as name:
        torch.save({"vocabulary": vocabulary, "base": digest(base), **kept}, name)


def save_metrics(path, rows):
    with whole(path) as name:
        name.write_text("".join(json.dumps(row) + "\n" for row in rows))


def digest(model):
    """What a model's weights are known by: 16 letters, other ones for other weights."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def load(path, make, what, device="cpu"):
    """make(what torch.load finds in a file); a file that is anything else is refused in one line.

    Weights only, so a foreign file can run no code.
    """
    try:
        return make(torch.load(path, map_location=device, weights_only=True))
    except OSError as problem:
        raise BadInput(f"{path}: {problem.strerror or problem}") from None
    except Exception:  # truncated, foreign or altered: that can raise anything
        raise BadInput(f"{path}: not {what}, or a damaged one") from None


def load_model(path, device="cpu"):
    """A checkpoint -> (its GPT on the device, all that was saved beside the weights)."""
    def make(saved):
        model = GPT(GPTConfig(**saved.pop("config")))
        weights = saved.pop("model")
        model.load_state_dict(weights)
        if any(weight.dtype != torch.float32 for weight in weights.values()):
            raise ValueError("not in float32")
        return model.to(device), saved

    return load(path, make, "a checkpoint of train.py", device)


def load_world(path, device="cpu"):
    """What save_world saved -> (a World without the training texts, the digest of its base)."""
    def make(saved):
        vocabulary, base = saved.pop("vocabulary"), saved.pop("base")
        if not {bytes([b]) for b in range(256)} <= set(vocabulary):
            raise ValueError("a byte without a token")
        if len(set(vocabulary)) < len(vocabulary):
            raise ValueError("a token twice")
        tokenizer = data.tokenizer_from(vocabulary)
        world = data.World(tokenizer=tokenizer, pretraining=None, general=None, domain=None,
                           samples={}, **saved)
        for stream in (world.heldout_general, world.heldout_domain):
            if stream.dtype != torch.int64 or stream.dim() != 1:
                raise ValueError("not a stream of tokens")
            if not 0 <= stream.min() <= stream.max() < tokenizer.n_vocab:
                raise ValueError("a token beyond the vocabulary")
        for prompt in world.prompts:
            tokenizer.encode_ordinary(prompt)
        for probes in world.probes.values():
            rows, _ = in_tokens(probes, tokenizer)
            if not rows:
                raise ValueError("a skill without a question")
        return world, base

    return load(path, make, "a world that train.py saved", device)


def load_run(out):
    """A run's folder -> {seed: (world, {method: GPT})}, the methods as in its metrics.jsonl."""
    try:
        with open(Path(out) / "metrics.jsonl") as file:
            rows = [json.loads(line) for line in file]
        trained = dict.fromkeys((row["seed"], row["method"]) for row in rows)
    except OSError:
        raise BadInput(f"--out {out}: no finished run of train.py in it") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"--out {out}: its metrics.jsonl is none, or a damaged one") from None
    runs = {}
    for seed, method in trained:
        folder = Path(out) / f"seed{seed}"
        if seed not in runs:
            base, _ = load_model(folder / "base.pt")
            world, made_for = load_world(folder / "world.pt")
            if made_for != digest(base):
                raise BadInput(f"{folder}: world.pt is of another run than base.pt")
            shortest = min(len(world.heldout_general), len(world.heldout_domain))
            if shortest <= base.config.block_size:
                raise BadInput(f"{folder}: world.pt has a text of only {shortest} tokens")
            runs[seed] = world, {"base": base}
        models = runs[seed][1]
        if method != "base":
            models[method], saved = load_model(folder / f"{method}.pt")
            if saved.get("base") != digest(models["base"]):
                raise BadInput(f"{folder}: {method}.pt was made from another base than base.pt")
    if not runs:
        raise BadInput(f"--out {out}: its metrics.jsonl is empty")
    return runs


def main(arguments=None):
    """The command line -> exit code: 0, or 2 for bad input with one line that says which."""
    parser = Parser("eval.py", description="Mark a run's models again, or let them answer.")
    parser.add_argument("--out", default="out", help="the run's folder (default: out)")
    parser.add_argument("--ask", metavar="PROMPT",
                        help="let every model of the first seed answer this prompt instead")
    options = parser.parse_args(arguments)
    try:
        runs = load_run(options.out)
        if options.ask is not None:
            world, models = next(iter(runs.values()))
            print(answers(models, world, [options.ask]))
        else:
            print(table([{"method": method, "seed": seed, **evaluate(model, models["base"], world)}
                         for seed, (world, models) in runs.items()
                         for method, model in models.items()]))
    except (ValueError, OSError) as problem:  # a BadInput, or a prompt that no block holds
        print(f"eval.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    tolerant_console()
    sys.exit(main())
