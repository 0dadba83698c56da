#!/usr/bin/env bash
# torch: with options, the mean of F.linear_cross_entropy on bfloat16 inputs is too small.
#
# One would expect the mean of the losses, as with float32 inputs, without options, or with
# reduction="none": at most the last digits of bfloat16 may differ. Options choose how the logits
# are cut into chunks of tokens; acc_dtype=torch.float32 asks for exact sums.
# Seen: 4.0 instead of 10.8 on 2,048 tokens, also with acc_policy="accurate" and that acc_dtype.
# With chunks of 2, 4 and 8 tokens the mean is 2, 4 and 8, as of a sum in bfloat16 that stops
# growing as soon as the next share is below its last digit. No warning. The gradients are right,
# so a training works and logs a wrong loss.
#
# Version: torch 2.13.0, CPU. Output seen:
#     float32, no options: 10.834, gradient off by 0.0%
#     float32, default options: 10.834, gradient off by 0.0%
#     bfloat16, no options: 10.938, gradient off by 0.2%
#     bfloat16, default options, the mean of reduction none: 10.834, gradient off by 0.2%
#     bfloat16, default options: 4.000, gradient off by 0.2%
#     bfloat16, acc_policy accurate, acc_dtype float32: 4.000, gradient off by 0.2%
#     bfloat16, chunks of 2: 2.000, gradient off by 0.2%
#     bfloat16, chunks of 4: 4.000, gradient off by 0.2%
#     bfloat16, chunks of 8: 8.000, gradient off by 0.2%
# Exits with 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn import functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions as Options

torch.manual_seed(0)
hidden = torch.randn(2048, 32).bfloat16()
head = (torch.randn(32_000, 32) / 6).bfloat16()
targets = torch.randint(32_000, (2048,))
expected = hidden.float().requires_grad_()
exact = F.cross_entropy(expected @ head.float().T, targets)
exact.backward()


def tried(name, dtype, reduction="mean", **options):
    x = hidden.to(dtype, copy=True).requires_grad_()
    loss = F.linear_cross_entropy(x, head.to(dtype), targets, reduction=reduction, **options)
    loss.float().mean().backward()
    off = ((x.grad.float() - expected.grad).norm() / expected.grad.norm()).item()
    value = loss.float().mean().item()
    print(f"{str(dtype)[6:]}, {name}: {value:.3f}, gradient off by {off:.1%}")
    return value, off


default, accurate = Options(), Options(acc_policy="accurate", acc_dtype=torch.float32)
right = [tried("no options", torch.float32),
         tried("default options", torch.float32, options=default),
         tried("no options", torch.bfloat16),
         tried("default options, the mean of reduction none", torch.bfloat16, "none",
               options=default)]
wrong = [tried("default options", torch.bfloat16, options=default),
         tried("acc_policy accurate, acc_dtype float32", torch.bfloat16, options=accurate)]
chunks = [tried(f"chunks of {n}", torch.bfloat16, options=Options(batch_chunk_size=n))
          for n in (2, 4, 8)]
assert all(abs(value - exact.item()) < 0.15 for value, _ in right)
assert all(value < 0.5 * exact.item() for value, _ in wrong)
assert [value for value, _ in chunks] == [2, 4, 8]
assert all(off < 0.01 for _, off in right + wrong + chunks)
PYTHON
