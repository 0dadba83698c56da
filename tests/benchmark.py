"""What a step costs, as ratios of medians measured in one run: python tests/benchmark.py (a minute; not a test).

Steps of all kinds take turns, so that a machine busy with something else slows them alike.
"""

import copy
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


def trainer(base, loss, batch, dtype):
    """-> a function that takes one optimisation step on the batch, on a model of its own."""
    model = copy.deepcopy(base).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(batch.tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


def main():
    s = train.Settings()
    device = train.choose_device(s.device)
    dtype = train.choose_dtype(s.dtype, device)
    world = train.make_world(s, 0, device)
    torch.manual_seed(0)
    base = train.GPT(train.config_of(s, world)).to(device).requires_grad_(False)
    both = next(data.batches(world.domain, world.general, s.batch_size, s.batch_size, s.block_size, 0))
    domain = next(data.batches(world.domain, world.general, s.batch_size, 0, s.block_size, 0))

    # The base on the general rows once: its last hidden states, n_embd numbers a token where logits are vocab_size.
    states = []
    hook = base.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        logits = base(both.tokens[~both.is_domain])
    hook.remove()

    def kept(model, batch):
        with torch.no_grad():
            base_logits = base.head(states[0])  # (G, T, V)
        return losses.mixture_of_losses(model(batch.tokens), batch.targets, batch.is_domain, base_logits)[0]

    def ce(model, batch):
        return train.ce(model, base, batch, s)

    def mol(model, batch):
        return train.mol(model, base, batch, s)

    steps = {"ce": trainer(base, ce, domain, dtype), "replay": trainer(base, ce, both, dtype), "mol": trainer(base, mol, both, dtype),
             "mol, base kept": trainer(base, kept, both, dtype), "replay, float32": trainer(base, ce, both, torch.float32),
             "marking": lambda: evaluate(base, base, world, s.block_size)}
    for step in steps.values():
        step()
    taken = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    t = {name: median(times) for name, times in taken.items()}
    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        exact = torch.equal(base.head(states[0]), logits)

    marking = (1 + 3 * s.steps // s.eval_every) * t["marking"]
    training = s.steps * (t["ce"] + t["replay"] + t["mol"]) + s.base_steps * t["replay"] * s.base_batch_size / len(both.tokens)
    tokens = both.tokens.numel()
    print(f"{device} in {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads; medians of {ROUNDS} steps")
    print(f"mol step / replay step                          {t['mol'] / t['replay']:.2f}   (compute alone: 3.5 / 3 = 1.17)")
    print(f"mol step with the base kept / replay step       {t['mol, base kept'] / t['replay']:.2f}   (the base's logits bit-identical: {exact})")
    print(f"replay step / two ce steps                      {t['replay'] / t['ce'] / 2:.2f}   (the same tokens)")
    print(f"evaluation's share of the default run           {marking / (marking + training):.2f}")
    print(f"tokens/s / tokens/s in float32                  {t['replay, float32'] / t['replay']:.2f}   ({tokens / t['replay']:,.0f} a second)")


if __name__ == "__main__":
    main()
