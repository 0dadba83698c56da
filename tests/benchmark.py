"""What a step costs, in ratios of medians measured in one run: python tests/benchmark.py.

Steps of all kinds take turns, so that a machine busy with something else slows them alike. With the
path of another file that defines GPT and GPTConfig as nanoGPT's model.py does, its steps take turns
too: python tests/benchmark.py nanoGPT/model.py

    python tests/benchmark.py --memory      MoL from logits against MoL from hidden states, with
                                            the vocabulary of a large model: memory and time
"""

import copy
import importlib.util
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import losses
import train
from eval import evaluate

ROUNDS = 30


def seconds(work):
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def trainer(model, loss, batch, s):
    """-> a function that takes one optimisation step on the batch, on a model of its own."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(s.device, getattr(torch, s.dtype), enabled=s.dtype != "float32"):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


def other_model(path, config):
    """nanoGPT's model of the same size."""
    spec = importlib.util.spec_from_file_location("other", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    return other.GPT(other.GPTConfig(**vars(config), dropout=0.0, bias=False))


def large_vocabulary(vocab_size):
    """MoL on 4,096 tokens, forward and backward -> {"logits": work, "hidden states": work}."""
    torch.manual_seed(0)
    B, T, C, V = 4, 1024, 256, vocab_size
    hidden, base_hidden = torch.randn(B, T, C, requires_grad=True), torch.randn(B // 2, T, C)
    head, base_head = torch.randn(V, C, requires_grad=True), torch.randn(V, C)
    targets = torch.randint(V, (B, T))
    is_domain = torch.arange(B) < B // 2

    def from_logits():
        base_logits = base_hidden @ base_head.T
        losses.mixture_of_losses(hidden @ head.T, targets, is_domain, base_logits)[0].backward()

    def from_hidden():
        losses.mixture_from_hidden(hidden, head, targets, is_domain, base_hidden,
                                   base_head)[0].backward()

    return {"logits": from_logits, "hidden states": from_hidden}


def peak(name, vocab_size):
    """The highest memory that this process came to above its start, in MB."""
    work = large_vocabulary(vocab_size)[name]
    kilobytes = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    work()
    kilobytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (kilobytes[1] - kilobytes[0]) / 1024


def peak_in_a_fresh_process(name, vocab_size):
    command = [sys.executable, __file__, "--peak", name, str(vocab_size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory():
    sizes, names = (50_257, 128_256), ("logits", "hidden states")
    # All of these first: a process starts with the peak of the one that started it.
    peaks = {(name, size): peak_in_a_fresh_process(name, size) for size in sizes for name in names}
    for vocab_size in sizes:
        found = {name: peaks[name, vocab_size] for name in names}
        works = large_vocabulary(vocab_size)
        taken = {name: [] for name in works}
        for _ in range(4):
            for name, work in works.items():
                taken[name].append(seconds(work))
        t = {name: median(times[1:]) for name, times in taken.items()}  # the first warms up
        for name in works:
            print(f"MoL from {name:13}  4,096 tokens, vocabulary {vocab_size:,}: "
                  f"{found[name]:,.0f} MB, {t[name]:.1f} s")
        print(f"hidden states / logits: memory {found['hidden states'] / found['logits']:.3f}, "
              f"time {t['hidden states'] / t['logits']:.2f}")


def main(paths):
    s = train.on_this_machine(train.Settings())
    world = train.make_world(s, 0)
    torch.manual_seed(0)
    base = train.GPT(train.config_of(s, world)).to(s.device).requires_grad_(False)
    both, domain = (
        next(data.batches(world.domain, world.general, s.batch_size, n, s.block_size, 0))
        for n in (s.batch_size, 0))

    # The base on the general rows once: its last hidden states, n_embd numbers per token where
    # logits are vocab_size.
    states = []
    hook = base.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        base(both.tokens[both.general])
    hook.remove()

    def kept(model, batch):
        with torch.no_grad():
            base_logits = base.head(states[0])  # (G, T, V)
        logits = model(batch.tokens)  # (B, T, V)
        return losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits)[0]

    def ce(model, batch):
        return train.ce(model, base, batch, s)

    def mol(model, batch):
        return train.mol(model, base, batch, s)

    steps = {"ce": trainer(base, ce, domain, s), "replay": trainer(base, ce, both, s),
             "mol": trainer(base, mol, both, s), "mol, base kept": trainer(base, kept, both, s),
             "marking": lambda: evaluate(base, base, world)}
    for path in paths:
        rows = both._replace(tokens=both.tokens.contiguous(), targets=both.targets.contiguous())
        other = other_model(path, base.config).to(s.device)
        steps["other"] = trainer(other, lambda model, batch: model(batch.tokens, batch.targets)[1],
                                 rows, s)
    taken = {name: [] for name in steps}
    for _ in range(ROUNDS + 3):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    t = {name: median(times[3:]) for name, times in taken.items()}  # the first warm up

    marking = (1 + 3 * (1 + s.steps // s.eval_every)) * t["marking"]
    pretraining = s.base_steps * t["replay"] * s.base_batch_size / len(both.tokens)
    training = s.steps * (t["ce"] + t["replay"] + t["mol"]) + pretraining
    print(f"{s.device} in {s.dtype}, {torch.get_num_threads()} CPU threads; "
          f"medians of {ROUNDS} steps")
    print(f"mol step / replay step                     {t['mol'] / t['replay']:.2f}"
          "   (compute alone: 3.5 / 3 = 1.17)")
    print(f"mol step with the base kept / replay step  {t['mol, base kept'] / t['replay']:.2f}")
    print(f"replay step / two ce steps                 {t['replay'] / t['ce'] / 2:.2f}"
          "   (the same tokens)")
    print(f"evaluation's share of the default run      {marking / (marking + training):.2f}")
    print(f"tokens a second of a replay step           {both.tokens.numel() / t['replay']:,.0f}")
    if paths:
        print(f"the same / those of {paths[0]}   {t['other'] / t['replay']:.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--memory"]:
        memory()
    elif sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], int(sys.argv[3])))
    else:
        main(sys.argv[1:])
