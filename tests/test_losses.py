import itertools
import math

import pytest
import torch

import losses
from losses import (PADDING, cross_entropy, kl_divergence, mean_cross_entropy, mixture_of_losses)

IS_DOMAIN = torch.tensor([True, False, False, True])
DIRECTIONS = ["reverse", "forward", "mean"]


def random_batch(B=4, T=5, V=7, dtype=torch.float32):
    """logits, base logits, targets; of four rows the first and the last are domain rows."""
    g = torch.Generator().manual_seed(0)
    logits, base_logits = (3 * torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    return logits, base_logits, torch.randint(V, (B, T), generator=g)


def mol(logits, base_logits, targets, **options):
    return mixture_of_losses(logits, targets, IS_DOMAIN, base_logits[~IS_DOMAIN], **options)


def test_mixture_of_losses_by_hand():
    """Two domain sequences and a general one, two tokens each, two words in the vocabulary."""
    half, quarter = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
    logits = torch.tensor([[half, quarter], [quarter, quarter], [half, quarter]]).log()
    targets, is_domain = torch.tensor([[0, 0], [1, 1], [0, 1]]), torch.tensor([True, True, False])
    base_logits = torch.tensor([[quarter, quarter]]).log()
    ce, kl = math.log(2), (math.log(2) + math.log(2 / 3)) / 2  # the example of the docstring
    assert all(f"{nats:.3f}" in losses.__doc__ for nats in (ce, kl, (ce + kl) / 2))
    domain, reverse = (ce + math.log(4)) / 2 + math.log(4 / 3), kl / 2
    forward = (math.log(1 / 2) + 3 * math.log(3 / 2)) / 8
    for direction, general in zip(DIRECTIONS, (reverse, forward, (reverse + forward) / 2)):
        found = mixture_of_losses(logits, targets, is_domain, base_logits, direction)
        assert torch.stack(found).tolist() == pytest.approx(
            [(domain + general) / 3, domain / 3, general / 3])


def test_the_flag_selects_the_loss_with_the_gradients_of_the_docstring():
    """CE: p - onehot. Reverse KL: p (log p - log p_0 - KL). Forward KL: p - p_0. Base: none."""
    logits, base_logits, targets = random_batch(dtype=torch.float64)
    p, q = logits.softmax(-1), base_logits.softmax(-1)
    onehot, ratio = torch.nn.functional.one_hot(targets, 7), (p / q).log()
    reverse, forward = p * (ratio - (p * ratio).sum(-1, keepdim=True)), p - q
    logits.requires_grad_(), base_logits.requires_grad_()
    for direction, of_kl in zip(DIRECTIONS, (reverse, forward, (reverse + forward) / 2)):
        logits.grad = None
        mol(logits, base_logits, targets, direction=direction)[0].backward()
        expected = torch.where(IS_DOMAIN[:, None, None], p - onehot, of_kl) / (4 * 5)  # / (B * T)
        torch.testing.assert_close(logits.grad, expected)
        assert base_logits.grad is None


def test_extreme_logits_are_finite():
    dtypes = torch.float32, torch.bfloat16, torch.float16
    for dtype, direction in itertools.product(dtypes, DIRECTIONS):
        *both, targets = random_batch(T=50)
        logits, base_logits = (1e4 * x.sign().to(dtype) for x in both)
        loss, ce, kl = mol(logits.requires_grad_(), base_logits, targets, direction=direction)
        loss.backward()
        assert loss.isfinite() and ce > 1000 and kl > 1000 and logits.grad.isfinite().all()


def test_zeros_in_a_distribution():
    """Zeros of the first distribution add nothing, of the second alone give inf, never NaN."""
    p = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)  # (1/2, 1/2, 0)
    q = torch.tensor([[[0.0, 0.0, 0.0]]])  # (1/3, 1/3, 1/3)
    reverse = kl_divergence(p, q)
    assert reverse.item() == pytest.approx(math.log(3 / 2))
    assert kl_divergence(p, q, "forward").item() == kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p.detach()).item() == 0.0
    reverse.sum().backward()
    assert p.grad.isfinite().all()


def test_float32_whatever_the_types_of_the_arguments():
    """Logits in half precision, flags 0 and 1, targets in int32."""
    logits, base_logits, targets = random_batch(dtype=torch.bfloat16)
    found = mixture_of_losses(logits, targets.int(), IS_DOMAIN.long(), base_logits[~IS_DOMAIN])
    assert found[0].dtype == torch.float32
    assert found == mol(logits.float(), base_logits.float(), targets)


def test_a_batch_of_one_kind_of_row_or_of_no_rows():
    logits, base_logits, targets = random_batch()
    domain, general = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    loss, ce, kl = mixture_of_losses(logits, targets, domain)
    assert loss == ce == mean_cross_entropy(logits, targets) and kl == 0
    assert loss == mixture_of_losses(logits, targets, domain, base_logits[:0])[0]
    loss, ce, kl = mixture_of_losses(logits, targets, general, base_logits)
    assert loss == kl == kl_divergence(logits, base_logits).mean(dim=1).mean() and ce == 0
    assert mixture_of_losses(logits[:0], targets[:0], domain[:0]) == (0, 0, 0)
    assert mean_cross_entropy(logits[:0], targets[:0]) == 0


def test_the_mean_runs_over_sequences_and_skips_padding():
    logits, base_logits, targets = random_batch()
    targets[0, 2:] = PADDING  # a domain row with two tokens
    targets[1, 1:] = PADDING  # a general row with one
    _, ce, kl = mol(logits, base_logits, targets)
    nats, divergence = cross_entropy(logits, targets), kl_divergence(logits, base_logits)
    torch.testing.assert_close(ce, (nats[0, :2].mean() + nats[3].mean()) / 4)
    torch.testing.assert_close(kl, (divergence[1, :1].mean() + divergence[2].mean()) / 4)
    assert mean_cross_entropy(torch.full((1, 2, 3), -math.inf), torch.full((1, 2), PADDING)) == 0


def test_padding_counts_nowhere_whatever_stands_there():
    """Neither in the loss nor in the gradient, in the model's logits and in the base's."""
    targets, is_domain = torch.tensor([[0, PADDING], [0, PADDING]]), torch.tensor([True, False])
    for direction, what in itertools.product(DIRECTIONS, (math.nan, -math.inf, math.inf)):
        logits, base_logits = torch.zeros(2, 2, 3), torch.zeros(1, 2, 3)
        expected = mixture_of_losses(logits, targets, is_domain, base_logits, direction)
        logits[:, 1] = base_logits[0, 1] = what
        logits.requires_grad_()
        with torch.autograd.set_detect_anomaly(True):  # no nan on the way back either
            found = mixture_of_losses(logits, targets, is_domain, base_logits, direction)
            found[0].backward()
        assert found == expected and logits.grad.isfinite().all()
        assert (logits.grad[:, 1] == 0).all() and logits.grad[0, 0].abs().sum() > 0


def test_strength_weighs_the_kl_and_zero_leaves_it_out_even_if_it_is_infinite():
    logits, base_logits, targets = random_batch()
    one, ce, kl = mol(logits, base_logits, targets)
    assert one == ce + kl
    assert mol(logits, base_logits, targets, strength=3.0) == (ce + 3 * kl, ce, kl)
    base_logits[1, 0, 0] = -math.inf
    assert mol(logits, base_logits, targets, strength=0.0) == (ce, ce, math.inf)


def test_bad_arguments():
    logits, base_logits, targets = random_batch()
    with pytest.raises(ValueError, match="direction"):
        kl_divergence(logits, base_logits, "sideways")
    # Each of these gave a number once.
    for told, name, bad in [
            ("base_logits", "base_logits", base_logits), ("base_logits", "base_logits", None),
            ("base_logits", "base_logits", base_logits[:2, :1]),
            ("same shape", "base_logits", base_logits[:2, :, :6]),
            ("logits", "logits", torch.randn(4, 9, 7)), ("logits", "logits", torch.randn(5, 5, 7)),
            ("is_domain", "is_domain", IS_DOMAIN[:1]), ("is_domain", "is_domain", IS_DOMAIN[None]),
            ("logits", "targets", targets[:, :4]), ("is_domain", "targets", targets[:3]),
            ("targets", "targets", targets.clamp(max=-1)), ("targets", "targets", targets + 1)]:
        good = {"logits": logits, "targets": targets, "is_domain": IS_DOMAIN,
                "base_logits": base_logits[:2]}
        with pytest.raises(ValueError, match=told):
            mixture_of_losses(**good | {name: bad})
