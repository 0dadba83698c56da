import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl

import losses
from losses import (PADDING, cross_entropy, kl_divergence, mean_cross_entropy,
                    mixture_of_losses)
from plots.huggingface.hidden import mixture_from_hidden

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_are_finite(direction, dtype):
    g = torch.Generator().manual_seed(0)
    logits, base_logits = (1e4 * torch.randint(-1, 2, (2, 50, 9), generator=g).to(dtype)
                           for _ in range(2))
    logits.requires_grad_()
    targets = torch.zeros(2, 50, dtype=torch.int64)
    loss, ce, kl = mixture_of_losses(logits, targets, torch.tensor([True, False]), base_logits[1:],
                                     direction)
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


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("what", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("side", ["model", "base", "both"])
def test_padding_counts_nowhere_whatever_stands_there(direction, what, side):
    """Neither in the loss nor in the gradient."""
    logits, base_logits = torch.zeros(2, 2, 3), torch.zeros(1, 2, 3)
    targets, is_domain = torch.tensor([[0, PADDING], [0, PADDING]]), torch.tensor([True, False])
    expected = mixture_of_losses(logits, targets, is_domain, base_logits, direction)
    if side != "base":
        logits[:, 1] = what
    if side != "model":
        base_logits[0, 1] = what
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


def test_bad_arguments():
    logits, base_logits, targets = random_batch()
    with pytest.raises(ValueError, match="direction"):
        kl_divergence(logits, base_logits, "sideways")
    # The last one would broadcast in silence.
    for bad in (base_logits, None, base_logits[~IS_DOMAIN, :1]):
        with pytest.raises(ValueError, match="base_logits"):
            mixture_of_losses(logits, targets, IS_DOMAIN, bad)


def test_flags_may_be_zero_and_one():
    logits, base_logits, targets = random_batch()
    found = mixture_of_losses(logits, targets, IS_DOMAIN.long(), base_logits[~IS_DOMAIN])
    assert found == mol(logits, base_logits, targets)


# --- from hidden states --------------------------------------------------------------------------

def hidden_batch(dtype=torch.float32):
    """Hidden states and heads of a model and of a narrower base, and targets with padding."""
    g = torch.Generator().manual_seed(0)
    hidden, head, base_hidden, base_head = (
        torch.randn(*shape, generator=g, dtype=dtype)
        for shape in ((4, 5, 6), (7, 6), (4, 5, 3), (7, 3)))
    targets = torch.randint(7, (4, 5), generator=g)
    targets[0, 3:] = targets[2] = targets[3, 4:] = PADDING
    return hidden.requires_grad_(), head.requires_grad_(), base_hidden, base_head, targets


def from_hidden(hidden, head, base_hidden, base_head, targets, is_domain=IS_DOMAIN, **options):
    return mixture_from_hidden(hidden, head, targets, is_domain, base_hidden[~is_domain], base_head,
                               **options)


def from_logits(hidden, head, base_hidden, base_head, targets, is_domain=IS_DOMAIN, **options):
    return mixture_of_losses(hidden @ head.T, targets, is_domain,
                             base_hidden[~is_domain] @ base_head.T, **options)


def assert_same(found, expected, wanted, **tolerance):
    """The three scalars, and their gradients by the wanted tensors."""
    torch.testing.assert_close(found, expected)
    for part, other in zip(found, expected):
        if other.grad_fn:
            torch.testing.assert_close(
                *(torch.autograd.grad(x, wanted, retain_graph=True, materialize_grads=True)
                  for x in (part, other)), **tolerance)


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("domain_rows", [[0, 3], [0, 1, 2, 3], []])
def test_hidden_states_give_the_same_losses_and_gradients(direction, chunk, domain_rows):
    batch = hidden_batch(torch.float64)
    is_domain = torch.zeros(4, dtype=torch.bool)
    is_domain[domain_rows] = True
    options = {"is_domain": is_domain, "direction": direction, "strength": 0.7}
    assert_same(from_hidden(*batch, chunk=chunk, **options), from_logits(*batch, **options),
                batch[:2])


def test_hidden_states_under_autocast():
    batch = hidden_batch()
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = from_logits(*batch), from_hidden(*batch, chunk=3)
        assert_same(found, plain, batch[:2], atol=1e-2, rtol=1e-2)


def test_logits_never_exist_whole(monkeypatch):
    """log_probs sees one chunk at a time, and no logits are kept for the backward pass."""
    sizes, kept, real = [], [], losses.log_probs
    monkeypatch.setattr(losses, "log_probs", lambda logits: sizes.append(logits.numel() // 7)
                        or real(logits))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        loss = from_hidden(*hidden_batch(), chunk=3)[0]
    assert max(sizes) == 3 and sum(sizes) == 10 + 2 * 10  # CE of 10 tokens, both sides of 10 KLs
    assert all(shape[-1:] != (7,) for shape in kept)
    loss.backward()
    assert max(sizes) == 3 and sum(sizes) == 2 * (10 + 2 * 10)  # computed again


def test_a_frozen_head_and_no_gradients():
    """As with adapters, and as in evaluation."""
    hidden, head, *rest = hidden_batch()
    assert_same(from_hidden(hidden, head.detach(), *rest),
                from_logits(hidden, head.detach(), *rest), [hidden])
    with torch.inference_mode():
        assert not from_hidden(hidden, head, *rest)[0].requires_grad


def test_hidden_states_at_padding_count_nowhere():
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    padding = (targets == PADDING).unsqueeze(-1)
    nan = hidden.masked_fill(padding, math.nan), base_hidden.masked_fill(padding, math.nan)
    assert_same(from_hidden(nan[0], head, nan[1], base_head, targets),
                from_logits(hidden, head, base_hidden, base_head, targets), (hidden, head))


def test_only_the_model_learns_from_hidden_states():
    *tensors, targets = hidden_batch(torch.bfloat16)
    loss, _, _ = from_hidden(*(x.requires_grad_() for x in tensors), targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad is not None for x in tensors] == [True, True, False, False]


def test_bad_hidden_states():
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    for told, *bad in [("base_hidden", base_hidden, base_head), ("base_hidden",),
                       ("base_hidden", base_hidden[:2, :1], base_head),
                       ("base_logits", base_hidden[:2], base_head[:6])]:
        with pytest.raises(ValueError, match=told):
            mixture_from_hidden(hidden, head, targets, IS_DOMAIN, *bad)


@pytest.mark.parametrize("told, changed", [
    ("hidden", {"hidden": torch.randn(4, 9, 6)}), ("hidden", {"hidden": torch.randn(5, 5, 6)}),
    ("is_domain", {"is_domain": IS_DOMAIN[:1]}), ("is_domain", {"is_domain": IS_DOMAIN[:, None]}),
    ("hidden", {"targets": torch.zeros(4, 4, dtype=torch.int64)}),
    ("is_domain", {"targets": torch.zeros(5, 5, dtype=torch.int64)})])
def test_every_shape_is_checked_against_the_targets(told, changed):
    """Each of these gave a number once."""
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    x = {"hidden": hidden, "targets": targets, "is_domain": IS_DOMAIN} | changed
    base_hidden = base_hidden[:int((~x["is_domain"]).sum()), :x["targets"].shape[1]]
    with pytest.raises(ValueError, match=f"^{told} begins"):
        mixture_from_hidden(x["hidden"], head, x["targets"], x["is_domain"], base_hidden, base_head)
    with pytest.raises(ValueError, match=f"^{told.replace('hidden', 'logits')} begins"):
        mixture_of_losses(x["hidden"] @ head.T, x["targets"], x["is_domain"],
                          base_hidden @ base_head.T)


def test_a_head_may_be_a_function():
    """With a bias and a soft cap, and another cap for the base."""
    hidden, weight, base_hidden, base_weight, targets = hidden_batch(torch.float64)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def head(hidden):
        return 2 * torch.tanh((hidden @ weight.T + bias) / 2)

    def base_head(hidden):
        return torch.tanh(hidden @ base_weight.T)

    assert_same(from_hidden(hidden, head, base_hidden, base_head, targets, chunk=3),
                mixture_of_losses(head(hidden), targets, IS_DOMAIN,
                                  base_head(base_hidden[~IS_DOMAIN])), (hidden, weight, bias))


def test_the_chunk_follows_the_vocabulary(monkeypatch):
    """16 million logits at a time, or 16 tokens."""
    sizes, real = [], losses.log_probs
    monkeypatch.setattr(losses, "log_probs", lambda logits: sizes.append(logits.shape[-2])
                        or real(logits))
    hidden, targets = torch.zeros(1, 300, 1), torch.zeros(1, 300, dtype=torch.int64)
    for vocab_size, chunk in ((2**17, 128), (2**21, 16)):
        sizes.clear()
        with torch.no_grad():
            mixture_from_hidden(hidden[:, :2 * chunk], torch.zeros(vocab_size, 1),
                                targets[:, :2 * chunk], torch.ones(1))
        assert sizes == [chunk, chunk, 0, 0]  # there are no general rows


@pytest.mark.parametrize("rows, tokens", [(0, 5), (4, 0)])
def test_no_hidden_states_have_loss_zero(rows, tokens):
    hidden, head, _, _, targets = hidden_batch()
    loss, ce, kl = mixture_from_hidden(hidden[:rows, :tokens], head, targets[:rows, :tokens],
                                       torch.ones(rows))
    loss.backward()
    assert loss == ce == kl == 0 and head.grad.eq(0).all()
