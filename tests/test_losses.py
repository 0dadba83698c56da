import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl

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


def test_both_losses_against_torch_distributions():
    logits, base_logits, targets = random_batch()
    p, q = Categorical(logits=logits), Categorical(logits=base_logits)
    reverse, forward = reference_kl(p, q), reference_kl(q, p)
    torch.testing.assert_close(cross_entropy(logits, targets), -p.log_prob(targets))
    torch.testing.assert_close(kl_divergence(logits, base_logits), reverse)
    torch.testing.assert_close(kl_divergence(logits, base_logits, "forward"), forward)
    torch.testing.assert_close(kl_divergence(logits, base_logits, "mean"), (reverse + forward) / 2)


def test_kl_by_hand():
    p = torch.tensor([[[1 / 2, 1 / 2]]]).log()
    q = torch.tensor([[[1 / 4, 3 / 4]]]).log()
    reverse = 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)
    forward = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)
    assert kl_divergence(p, q).item() == pytest.approx(reverse)
    assert kl_divergence(p, q, "forward").item() == pytest.approx(forward)


def test_the_example_of_the_docstring():
    found = mixture_of_losses(torch.zeros(2, 1, 2), torch.zeros(2, 1, dtype=torch.int64),
                              torch.tensor([True, False]), torch.tensor([[[1 / 4, 3 / 4]]]).log())
    loss, ce, kl = (value.item() for value in found)
    assert [2 * ce, 2 * kl, loss] == pytest.approx([0.693, 0.144, 0.418], abs=5e-4)
    assert all(f"{value:.3f}" in losses.__doc__ for value in (2 * ce, 2 * kl, loss))


def test_mixture_of_losses_by_hand():
    """Two domain sequences and a general one, two tokens each, two words in the vocabulary."""
    half, quarter = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
    logits = torch.tensor([[half, quarter], [quarter, quarter], [half, quarter]]).log()
    targets = torch.tensor([[0, 0], [1, 1], [0, 1]])
    base_logits = torch.tensor([[quarter, quarter]]).log()
    domain = (math.log(2) + math.log(4)) / 2 + math.log(4 / 3)
    general = (1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3) + 0) / 2
    found = mixture_of_losses(logits, targets, torch.tensor([True, True, False]), base_logits)
    assert torch.stack(found).tolist() == pytest.approx(
        [(domain + general) / 3, domain / 3, general / 3])


def test_the_gradients_of_the_docstring():
    """CE: p - onehot. Reverse KL: p (log p - log p_0 - KL). Forward KL: p - p_0."""
    logits, base_logits, targets = random_batch(B=2, T=1, dtype=torch.float64)
    for direction in ("reverse", "forward"):
        logits = logits.detach().requires_grad_()
        loss, _, _ = mixture_of_losses(logits, targets, torch.tensor([True, False]),
                                       base_logits[1:], direction)
        loss.backward()
        p, q = logits.detach().softmax(-1), base_logits.softmax(-1)
        onehot = torch.nn.functional.one_hot(targets, 7)
        ratio = (p / q).log()
        of_kl = p * (ratio - (p * ratio).sum(-1, keepdim=True)) if direction == "reverse" else p - q
        torch.testing.assert_close(2 * logits.grad[0], (p - onehot)[0])
        torch.testing.assert_close(2 * logits.grad[1], of_kl[1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_kl_pushes_nowhere_while_the_model_is_the_base(direction):
    logits, _, targets = random_batch()
    logits.requires_grad_()
    _, _, kl = mol(logits, logits.detach(), targets, direction=direction)
    kl.backward()
    assert kl.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients(direction):
    logits, base_logits, targets = random_batch(T=2, V=3, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: mol(x, base_logits, targets, direction=direction)[0], logits)
    assert torch.autograd.gradcheck(lambda x: mean_cross_entropy(x, targets), logits)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_gradient_reaches_the_base(direction):
    logits, base_logits, targets = random_batch()
    logits.requires_grad_(), base_logits.requires_grad_()
    mol(logits, base_logits, targets, direction=direction)[0].backward()
    assert base_logits.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("changed, rows", [("base", IS_DOMAIN), ("targets", ~IS_DOMAIN)])
def test_the_flag_selects_the_loss(changed, rows):
    """The base changes no gradient of a domain row, the targets change none of a general row."""
    def gradient(logits, *rest):
        logits = logits.clone().requires_grad_()
        mol(logits, *rest)[0].backward()
        return logits.grad

    logits, base_logits, targets = random_batch()
    one = gradient(logits, base_logits, targets)
    other = gradient(logits, base_logits.flip(-1) if changed == "base" else base_logits,
                     (targets + 1) % 7 if changed == "targets" else targets)
    assert torch.equal(one[rows], other[rows]) and not torch.equal(one[~rows], other[~rows])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits_are_finite(direction):
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, base_logits = (1e4 * torch.randint(-1, 2, (2, 50, 9), generator=g).to(dtype)
                               for _ in range(2))
        logits.requires_grad_()
        loss, ce, kl = mixture_of_losses(logits, torch.zeros(2, 50, dtype=torch.int64),
                                         torch.tensor([True, False]), base_logits[1:], direction)
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


def test_float32_whatever_the_type_of_the_logits():
    logits, base_logits, targets = random_batch(dtype=torch.bfloat16)
    in_half = mol(logits, base_logits, targets)
    assert in_half[0].dtype == torch.float32
    assert in_half == mol(logits.float(), base_logits.float(), targets)


def test_one_kind_of_row_alone():
    logits, base_logits, targets = random_batch()
    domain, general = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    loss, ce, kl = mixture_of_losses(logits, targets, domain)
    assert loss == ce == mean_cross_entropy(logits, targets) and kl == 0
    assert loss == mixture_of_losses(logits, targets, domain, base_logits[:0])[0]
    loss, ce, kl = mixture_of_losses(logits, targets, general, base_logits)
    assert loss == kl == kl_divergence(logits, base_logits).mean(dim=1).mean() and ce == 0


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


def test_an_empty_batch_has_loss_zero():
    logits, targets = torch.zeros(0, 2, 3, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64)
    assert mixture_of_losses(logits, targets, torch.zeros(0, dtype=torch.bool)) == (0, 0, 0)
    assert mean_cross_entropy(logits, targets) == 0


def test_strength_weighs_the_kl():
    batch = random_batch()
    one, ce, kl = mol(*batch)
    assert one == ce + kl and mol(*batch, strength=3.0) == (ce + 3 * kl, ce, kl)


def test_strength_zero_leaves_the_cross_entropy_even_if_the_kl_is_infinite():
    logits, base_logits, targets = random_batch()
    base_logits[1, 0, 0] = -math.inf
    loss, ce, kl = mol(logits, base_logits, targets, strength=0.0)
    assert kl == math.inf and loss == ce


def test_bad_arguments():
    logits, base_logits, targets = random_batch()
    with pytest.raises(ValueError, match="direction"):
        kl_divergence(logits, base_logits, "sideways")
    # Each of these gave a number once.
    for told, changed in [
            ("base_logits", {"base_logits": base_logits}), ("base_logits", {"base_logits": None}),
            ("base_logits", {"base_logits": base_logits[:2, :1]}),
            ("same shape", {"base_logits": base_logits[:2, :, :6]}),
            ("logits", {"logits": torch.randn(4, 9, 7)}),
            ("logits", {"logits": torch.randn(5, 5, 7)}),
            ("is_domain", {"is_domain": IS_DOMAIN[:1]}),
            ("is_domain", {"is_domain": IS_DOMAIN[:, None]}),
            ("logits", {"targets": targets[:, :4]}), ("is_domain", {"targets": targets[:3]}),
            ("targets", {"targets": targets.clamp(max=-1)}), ("targets", {"targets": targets + 1})]:
        arguments = {"logits": logits, "targets": targets, "is_domain": IS_DOMAIN,
                     "base_logits": base_logits[:2]} | changed
        with pytest.raises(ValueError, match=told):
            mixture_of_losses(**arguments)


def test_flags_may_be_zero_and_one_and_targets_int32():
    logits, base_logits, targets = random_batch()
    found = mixture_of_losses(logits, targets, IS_DOMAIN.long(), base_logits[~IS_DOMAIN])
    assert found == mol(logits, base_logits, targets) == mol(logits, base_logits, targets.int())
