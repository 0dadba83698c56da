"""Judges tests/exercises.py. All tests fail at first, and the normal test run leaves them out.

    python -m pytest tests/test_exercises.py -k mol
"""

import importlib
import math
import os

import pytest
import torch

import losses

yours = importlib.import_module(os.environ.get("EXERCISES", "exercises"))  # or "solutions"
# Two words: p is (1/2, 1/2), p_0 is (1/4, 3/4).
EVEN, BASE = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
CE, KL, OTHER_KL = math.log(2), math.log(4 / 3) / 2, math.log(27 / 16) / 4  # OTHER_KL: p_0 || p


def random_logits(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(found, expected, message):
    assert isinstance(found, torch.Tensor), f"return a tensor, not {type(found).__name__}"
    found, expected = found.float(), torch.as_tensor(expected, dtype=torch.float32)
    assert found.shape == expected.shape, f"the shape is {found.shape}, not {expected.shape}"
    assert torch.allclose(found, expected, atol=1e-4), (
        f"{message}: {found.tolist()}, expected {expected.tolist()}")


def test_row_ce():
    check(yours.row_ce(EVEN.repeat(3, 1), torch.tensor([0, 1, 1])), CE, "two even words cost log 2")
    check(yours.row_ce(BASE[None] + 5, torch.tensor([0])), math.log(4),
          "logits are not probabilities: use log_softmax")
    check(yours.row_ce(BASE.repeat(2, 1), torch.tensor([0, 1])), math.log(16 / 3) / 2,
          "take the mean over the positions, of -log p of each target")


def test_reverse_kl():
    check(yours.reverse_kl(BASE[None], BASE[None]), [0.0], "it is 0 where the model is the base")
    check(yours.reverse_kl(EVEN.repeat(2, 1) + 5, BASE.repeat(2, 1) - 2), [KL, KL],
          "the model weighs the logarithms, and logits need log_softmax")


def test_padded_mean():
    nats, targets = torch.tensor([[1.0, 2.0, 6.0], [4.0, 8.0, 0.0]]), torch.zeros(2, 3).long()
    check(yours.padded_mean(nats, targets), [3.0, 4.0], "one mean per sequence")
    targets[0, 2], targets[1] = -100, -100
    check(yours.padded_mean(nats, targets), [1.5, 0.0], "divide by the number of tokens, not by T")
    nats[0, 2], nats[1] = math.nan, math.nan
    check(yours.padded_mean(nats, targets), [1.5, 0.0], "0 times NaN is NaN: use where")


def test_mol():
    logits, is_domain = random_logits(2, 3, 2), torch.tensor([True, False])
    base, targets = BASE.repeat(1, 3, 1), torch.zeros(2, 3).long()
    other = torch.tensor([[0] * 3, [1] * 3])  # other tokens in the general row
    check(yours.mol(logits, targets, is_domain, base), yours.mol(logits, other, is_domain, base),
          "general rows must not use the text's tokens")
    for flags in (is_domain, ~is_domain):
        check(yours.mol(EVEN.repeat(2, 3, 1), targets, flags, base), (CE + KL) / 2,
              "CE for the row that the flag names, KL for the other, divided by two rows")
    logits, targets = BASE.repeat(4, 2, 1), torch.zeros(4, 2).long()
    is_domain, expected = torch.tensor([False, True, True, True]), (3 * math.log(4) + OTHER_KL) / 4
    check(yours.mol(logits, targets, is_domain, EVEN.repeat(1, 2, 1)), expected,
          "every row has the same weight: the sum over all rows, divided by B")
    check(yours.mol(logits, targets, is_domain | True, BASE.repeat(0, 2, 1)), math.log(4),
          "a batch without general rows has only cross-entropy")
    targets[:2, 1] = -100
    check(yours.mol(logits, targets, is_domain, EVEN.repeat(1, 2, 1)), expected,
          "padding must not count, not in general rows either")


def test_kl_push():
    base, logits = random_logits(4, 6), random_logits(4, 6, seed=1).requires_grad_()
    check(yours.kl_push(base, base), torch.zeros(4, 6), "at the base nothing is pushed")
    losses.kl_divergence(logits, base).sum().backward()
    check(yours.kl_push(logits.detach(), base), -logits.grad,
          "autograd says otherwise; the push is minus the gradient")


def test_soft_replay():
    check(yours.soft_replay(EVEN[None], BASE[None]), [CE], "two even words cost log 2")
    base, logits = random_logits(4, 6), random_logits(4, 6, seed=1).requires_grad_()
    yours.soft_replay(logits, base).sum().backward()
    check(logits.grad, logits.softmax(-1).detach() - base.softmax(-1), "its gradient is p - p_0")


def test_batch_1_to_2():
    tokens, targets, is_domain = yours.batch_1_to_2(torch.arange(50), 100 + torch.arange(50), 3, 8,
                                                    torch.Generator())
    assert tokens.shape == targets.shape == (9, 8), "3 general rows need 6 domain rows of 8 tokens"
    assert is_domain.tolist() == [True] * 6 + [False] * 3, "first the domain rows, as booleans"
    check(targets, tokens + 1, "the target is the next token of the same text")
    assert ((tokens < 100).all(dim=1) == is_domain).all(), "the flag must fit the text of the row"


def test_likeliest_kl():
    logits, base = random_logits(5, 20), random_logits(5, 20, seed=1)
    full = losses.kl_divergence(logits, base)
    check(yours.likeliest_kl(logits, base, k=19), full, "with 19 of 20 words nothing is lost")
    check(yours.likeliest_kl(torch.zeros(1, 4), torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), k=1),
          [math.log(0.5) / 4 + 0.75 * math.log(1.5)], "all others together are one word")


@pytest.mark.parametrize("case", yours.TABLE)
def test_table(case):
    p_0, p, pushes = yours.TABLE[case]
    for loss, by_hand in pushes.items():
        assert by_hand is not None, f"{case}: fill in the pushes of {loss}"
        logits = torch.tensor(p).log()[None, None].requires_grad_()
        (losses.cross_entropy(logits, torch.tensor([[1]])) if loss == "CE" else
         losses.kl_divergence(logits, torch.tensor(p_0).log()[None, None], loss)).sum().backward()
        push = (-logits.grad).flatten().tolist()
        assert by_hand == pytest.approx(push, abs=0.0051), f"{case}, {loss}: {push} says autograd"
