import math
import weakref

import pytest
import torch
from torch.distributions import Categorical, kl_divergence as reference_kl

import losses
from losses import (PADDING, cross_entropy, kl_divergence, mean_cross_entropy, mixture_from_hidden,
                    mixture_of_losses)


def random_batch(B=4, T=5, V=7, dtype=torch.float32, seed=0):
    """logits, base logits, targets, and two domain rows among the four."""
    g = torch.Generator().manual_seed(seed)
    logits, base_logits = (3 * torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    targets = torch.randint(V, (B, T), generator=g)
    return logits, base_logits, targets, torch.tensor([True, False, False, True])


def mol(logits, base_logits, targets, is_domain, **options):
    return mixture_of_losses(logits, targets, is_domain, base_logits[~is_domain], **options)


def test_cross_entropy_against_torch_distributions():
    logits, _, targets, _ = random_batch()
    expected = -Categorical(logits=logits).log_prob(targets)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_kl_against_torch_distributions():
    logits, base_logits, _, _ = random_batch()
    p, q = Categorical(logits=logits), Categorical(logits=base_logits)
    torch.testing.assert_close(kl_divergence(logits, base_logits), reference_kl(p, q))
    torch.testing.assert_close(kl_divergence(logits, base_logits, "forward"), reference_kl(q, p))


def test_kl_by_hand():
    p = torch.tensor([[[1 / 2, 1 / 2]]]).log()
    q = torch.tensor([[[1 / 4, 3 / 4]]]).log()
    reverse = 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)
    forward = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)
    assert kl_divergence(p, q).item() == pytest.approx(reverse)
    assert kl_divergence(p, q, "forward").item() == pytest.approx(forward)


def test_mixture_of_losses_by_hand():
    """Two domain sequences and a general one, two tokens each, two words in the vocabulary."""
    half, quarter = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
    logits = torch.tensor([[half, quarter], [quarter, quarter], [half, quarter]]).log()
    targets = torch.tensor([[0, 0], [1, 1], [0, 1]])
    base_logits = torch.tensor([[quarter, quarter]]).log()
    first = (math.log(2) + math.log(4)) / 2
    second = math.log(4 / 3)
    general = (1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3) + 0) / 2
    is_domain = torch.tensor([True, True, False])
    loss, ce, kl = mixture_of_losses(logits, targets, is_domain, base_logits)
    assert ce.item() == pytest.approx((first + second) / 3)
    assert kl.item() == pytest.approx(general / 3)
    assert loss.item() == pytest.approx((first + second + general) / 3)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradients(direction):
    logits, base_logits, targets, is_domain = random_batch(B=4, T=2, V=3, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_divergence(x, base_logits, direction), logits)
    assert torch.autograd.gradcheck(
        lambda x: mol(x, base_logits, targets, is_domain, direction=direction)[0], logits)
    assert torch.autograd.gradcheck(lambda x: mean_cross_entropy(x, targets), logits)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_no_gradient_reaches_the_base(direction):
    logits, base_logits, targets, is_domain = random_batch()
    logits.requires_grad_(), base_logits.requires_grad_()
    mol(logits, base_logits, targets, is_domain, direction=direction)[0].backward()
    assert base_logits.grad is None and logits.grad.abs().sum() > 0


def gradient(logits, *rest):
    logits = logits.clone().requires_grad_()
    mol(logits, *rest)[0].backward()
    return logits.grad


def test_the_base_changes_nothing_on_domain_rows():
    logits, base_logits, targets, is_domain = random_batch()
    one = gradient(logits, base_logits, targets, is_domain)
    other = gradient(logits, base_logits.flip(-1), targets, is_domain)
    assert torch.equal(one[is_domain], other[is_domain])
    assert not torch.equal(one[~is_domain], other[~is_domain])


def test_the_targets_change_nothing_on_general_rows():
    logits, base_logits, targets, is_domain = random_batch()
    one = gradient(logits, base_logits, targets, is_domain)
    other = gradient(logits, base_logits, (targets + 1) % 7, is_domain)
    assert torch.equal(one[~is_domain], other[~is_domain])
    assert not torch.equal(one[is_domain], other[is_domain])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
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
    inf = math.inf
    p = torch.tensor([[[0.0, 0.0, -inf]]], requires_grad=True)  # (1/2, 1/2, 0)
    q = torch.tensor([[[0.0, 0.0, 0.0]]])  # (1/3, 1/3, 1/3)
    reverse = kl_divergence(p, q)
    assert reverse.item() == pytest.approx(math.log(3 / 2))
    assert kl_divergence(p, q, "forward").item() == inf
    assert kl_divergence(q, p).item() == inf
    assert kl_divergence(p, p.detach()).item() == 0.0
    reverse.sum().backward()
    assert p.grad.isfinite().all()


def test_float32_whatever_the_type_of_the_logits():
    logits, base_logits, targets, is_domain = random_batch(dtype=torch.bfloat16)
    in_half = mol(logits, base_logits, targets, is_domain)
    in_full = mol(logits.float(), base_logits.float(), targets, is_domain)
    assert in_half[0].dtype == torch.float32
    assert in_half == in_full


def test_one_kind_of_row_alone():
    logits, base_logits, targets, _ = random_batch()
    domain, general = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    loss, ce, kl = mixture_of_losses(logits, targets, domain)
    assert loss == ce == mean_cross_entropy(logits, targets) and kl == 0
    assert loss == mixture_of_losses(logits, targets, domain, base_logits[:0])[0]
    loss, ce, kl = mixture_of_losses(logits, targets, general, base_logits)
    assert loss == kl == kl_divergence(logits, base_logits).mean(dim=1).mean() and ce == 0


def test_the_mean_runs_over_sequences_and_skips_padding():
    logits, base_logits, targets, is_domain = random_batch()
    targets[0, 2:] = PADDING  # a domain row with two tokens
    targets[1, 1:] = PADDING  # a general row with one
    loss, ce, kl = mol(logits, base_logits, targets, is_domain)
    nats, divergence = cross_entropy(logits, targets), kl_divergence(logits, base_logits)
    expected_ce = (nats[0, :2].mean() + nats[3].mean()) / 4
    expected_kl = (divergence[1, :1].mean() + divergence[2].mean()) / 4
    torch.testing.assert_close(ce, expected_ce)
    torch.testing.assert_close(kl, expected_kl)
    assert mean_cross_entropy(torch.full((1, 2, 3), -math.inf), torch.full((1, 2), PADDING)) == 0


@pytest.mark.parametrize("direction", ["reverse", "forward", "mean"])
@pytest.mark.parametrize("what", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("side", ["model", "base", "both"])
def test_padding_counts_nowhere_whatever_stands_there(direction, what, side):
    """Not in the loss and not in the gradient: three lines that once showed a nan."""
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
    """loss = CE part + strength * KL part, and the parts themselves stay as they are."""
    batch = random_batch()
    one, ce, kl = mol(*batch)
    assert one == ce + kl and mol(*batch, strength=3.0) == (ce + 3 * kl, ce, kl)
    assert mol(*batch, strength=0.0)[0] == ce


def test_bad_arguments():
    logits, base_logits, targets, is_domain = random_batch()
    with pytest.raises(ValueError, match="direction"):
        kl_divergence(logits, base_logits, "sideways")
    with pytest.raises(ValueError, match="base_logits"):
        mixture_of_losses(logits, targets, is_domain, base_logits)
    with pytest.raises(ValueError, match="base_logits"):
        mixture_of_losses(logits, targets, is_domain)
    with pytest.raises(ValueError, match="base_logits"):
        # would broadcast in silence
        mixture_of_losses(logits, targets, is_domain, base_logits[~is_domain, :1])


def test_flags_of_zero_and_one():
    logits, base_logits, targets, is_domain = random_batch()
    found = mixture_of_losses(logits, targets, is_domain.long(), base_logits[~is_domain])
    assert found == mol(logits, base_logits, targets, is_domain)


def test_the_mean_of_both_directions():
    logits, base_logits = torch.randn(2, 2, 3, 5)
    reverse = kl_divergence(logits, base_logits, "reverse")
    forward = kl_divergence(logits, base_logits, "forward")
    assert torch.allclose(kl_divergence(logits, base_logits, "mean"), (reverse + forward) / 2)


# --- from hidden states --------------------------------------------------------------------------

def hidden_batch(dtype=torch.float32):
    """The model's hidden states and head, the base's, of another width, on all rows; targets."""
    g = torch.Generator().manual_seed(0)
    hidden, head, base_hidden, base_head = (
        torch.randn(*shape, generator=g, dtype=dtype)
        for shape in ((4, 5, 6), (7, 6), (4, 5, 3), (7, 3)))
    targets = torch.randint(7, (4, 5), generator=g)
    targets[0, 3:] = targets[2] = targets[3, 4:] = PADDING
    return hidden, head, base_hidden, base_head, targets


@pytest.mark.parametrize("chunk", [1, 3, 256])
@pytest.mark.parametrize("direction", ["reverse", "forward", "mean"])
@pytest.mark.parametrize("domain_rows", [[0, 3], [0, 1, 2, 3], []])
def test_from_hidden_states_it_is_the_same_loss(direction, chunk, domain_rows):
    """All three scalars, and the gradients of hidden states and head."""
    hidden, head, base_hidden, base_head, targets = hidden_batch(torch.float64)
    is_domain = torch.zeros(4, dtype=torch.bool)
    is_domain[domain_rows] = True
    hidden.requires_grad_(), head.requires_grad_()
    base_hidden = base_hidden[~is_domain]
    plain = mixture_of_losses(hidden @ head.T, targets, is_domain, base_hidden @ base_head.T,
                              direction, strength=0.7)
    found = mixture_from_hidden(hidden, head, targets, is_domain, base_hidden, base_head,
                                direction, strength=0.7, chunk=chunk)
    torch.testing.assert_close(found, plain)
    for one, other in zip(torch.autograd.grad(found[0], (hidden, head)),
                          torch.autograd.grad(plain[0], (hidden, head)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_from_hidden_states():
    hidden, head, base_hidden, base_head, targets = hidden_batch(torch.float64)
    is_domain = torch.tensor([True, False, False, True])

    def loss(hidden, head):
        return mixture_from_hidden(hidden, head, targets, is_domain, base_hidden[~is_domain],
                                   base_head, chunk=4)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_()))


def test_logits_never_exist_whole(monkeypatch):
    sizes, seen = [], []

    def spy(logits, real=losses.log_probs):
        assert sum(there() is not None for there in seen) <= 2  # the other side of the same KL
        sizes.append(logits.numel() // 7)  # tokens
        log_p = real(logits)
        seen.extend([weakref.ref(logits), weakref.ref(log_p)])
        return log_p

    monkeypatch.setattr(losses, "log_probs", spy)
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    is_domain = torch.tensor([True, False, False, True])
    loss, _, _ = mixture_from_hidden(hidden.requires_grad_(), head, targets, is_domain,
                                     base_hidden[~is_domain], base_head, chunk=3)
    loss.backward()
    assert max(sizes) == 3 and sum(sizes) == 10 + 2 * 10  # CE of 10 tokens, both sides of 10 KLs


def test_with_a_frozen_head_and_without_gradients():
    """As with adapters, and as in evaluation."""
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    is_domain = torch.tensor([True, False, False, True])
    rest = targets, is_domain, base_hidden[~is_domain], base_head
    hidden.requires_grad_()
    expected, = torch.autograd.grad(mixture_from_hidden(hidden, head.requires_grad_(), *rest)[0],
                                    hidden)
    loss, ce, kl = mixture_from_hidden(hidden, head.detach(), *rest)
    assert loss.grad_fn.saved_tensors[-1] is None  # the head's, as large as the head
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)
    assert loss.requires_grad and not ce.requires_grad and not kl.requires_grad
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            marked = mixture_from_hidden(hidden, head, *rest)
        torch.testing.assert_close(marked, (loss.detach(), ce, kl))
        assert not marked[0].requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_is_refused(autocast):
    hidden, head, _, _, targets = hidden_batch(torch.float32 if autocast else torch.float16)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        with pytest.raises(ValueError, match="float16 is too coarse"):
            mixture_from_hidden(hidden, head, targets, torch.ones(4))


def test_from_hidden_states_under_autocast():
    """The same as from logits, to bfloat16's rounding."""
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    is_domain = torch.tensor([True, False, False, True])
    base_hidden = base_hidden[~is_domain]
    model = hidden.requires_grad_(), head.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        plain = mixture_of_losses(hidden @ head.T, targets, is_domain, base_hidden @ base_head.T)
        found = mixture_from_hidden(hidden, head, targets, is_domain, base_hidden, base_head,
                                    chunk=3)
    torch.testing.assert_close(found, plain)
    for one, other in zip(torch.autograd.grad(found[0], model),
                          torch.autograd.grad(plain[0], model), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_hidden_states_at_padding_count_nowhere():
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    is_domain = torch.tensor([True, False, False, True])
    head.requires_grad_()

    def found():
        loss = mixture_from_hidden(hidden.requires_grad_(), head, targets, is_domain,
                                   base_hidden[~is_domain], base_head)[0]
        return loss, *torch.autograd.grad(loss, (hidden, head))

    expected = found()
    hidden = hidden.detach().masked_fill((targets == PADDING).unsqueeze(-1), math.nan)
    base_hidden = base_hidden.masked_fill((targets == PADDING).unsqueeze(-1), math.nan)
    torch.testing.assert_close(found(), expected)


def test_only_the_model_learns_from_hidden_states():
    hidden, head, base_hidden, base_head, targets = hidden_batch(torch.bfloat16)
    tensors = [x.requires_grad_() for x in (hidden, head, base_hidden, base_head)]
    loss, _, _ = mixture_from_hidden(hidden, head, targets, torch.zeros(4), base_hidden, base_head)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [x.grad is not None for x in tensors] == [True, True, False, False]


def test_bad_hidden_states():
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    is_domain = torch.tensor([True, False, False, True])
    for bad in [(base_hidden, base_head), (base_hidden[:2, :1], base_head), (),
                (base_hidden[:2], base_head[:6])]:
        with pytest.raises(ValueError, match="base_hidden"):
            mixture_from_hidden(hidden, head, targets, is_domain, *bad)


@pytest.mark.parametrize("rows, tokens", [(0, 5), (4, 0)])
def test_no_hidden_states(rows, tokens):
    hidden, head, _, _, targets = hidden_batch()
    loss, ce, kl = mixture_from_hidden(hidden[:rows, :tokens], head.requires_grad_(),
                                       targets[:rows, :tokens], torch.ones(rows))
    loss.backward()
    assert loss == ce == kl == 0 and head.grad.eq(0).all()
