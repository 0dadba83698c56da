"""MoL without all the logits in memory: mixture_of_losses from the last hidden states.

With a vocabulary of 150,000 the logits of 4,096 tokens take 2.5 GB in float32, and
mixture_of_losses holds about five tensors of that size. Here only a chunk of tokens has logits at a
time: make them, take the losses, take the gradient with respect to the logits, carry it on to the
hidden states and the head, and forget them. So the gradients are known after the forward pass, no
logits are made twice, and the backward pass only scales.
"""

import torch

from losses import PADDING, log_probs


def mixture_from_hidden(hidden, head, targets, is_domain, base_hidden=None, base_head=None,
                        direction="reverse", strength=1.0, chunk=None):
    """mixture_of_losses from the last hidden states -> loss, CE part, KL part.

    hidden       (B, T, C)  the input of the model's head, for the same positions as the targets
    head         (V, C)     the weight of the head; logits = hidden @ head.T
    targets      (B, T)     is_domain (B,), direction and strength: as in mixture_of_losses
    base_hidden  (G, T, C') of the frozen base, for the G general rows; None if G = 0
    base_head    (V, C')    the weight of the base's head
    chunk                   how many tokens have logits in memory at a time; None: 16 million
                            logits, which are 64 tokens with a vocabulary of 262,144

    Returns three scalars in nats per token. Only the loss has a gradient, with respect to hidden
    and head. Logits and sums are in float32 or higher, also under autocast. Raises ValueError if
    the shapes do not fit.
    """
    is_general = ~is_domain.bool()  # a data collator may give 0 and 1
    if base_hidden is None:
        base_hidden, base_head = hidden[:0], head
    (B, T), V = targets.shape, len(head)
    for name, found, expected in [
            ("is_domain", is_domain.shape, (B,)), ("hidden", hidden.shape[:2], (B, T)),
            ("base_hidden", base_hidden.shape[:2], (int(is_general.sum()), T)),
            ("base_head", base_head.shape[:1], (V,))]:
        if found != expected:
            raise ValueError(f"{name} begins with the shape {tuple(found)}; targets "
                             f"{tuple(targets.shape)}, is_domain and head need {expected}")
    if direction not in ("reverse", "forward", "mean"):
        raise ValueError(f"direction is {direction!r}; it must be 'reverse', 'forward' or 'mean'")
    is_token = targets != PADDING
    if (is_token & ((targets < 0) | (targets >= V))).any():
        raise ValueError(f"targets must be below {V}, or {PADDING} for padding")
    # Where the tokens of each kind are in the flat batch. Padding is nowhere.
    places = [some.flatten().nonzero()[:, 0] for some in (
        is_token & ~is_general[:, None], is_token & is_general[:, None], is_token[is_general])]
    # A token counts 1 / share: the mean over the tokens of a row, then over the B rows.
    shares = (is_token.sum(dim=1).clamp(min=1) * B).repeat_interleave(T)  # (B * T,)
    is_wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head)]
    with torch.autocast(hidden.device.type, enabled=False):
        return InChunks.apply(hidden, head, base_hidden, base_head, targets.flatten(), shares,
                              places, is_wanted, direction, strength, chunk or max(2**24 // V, 16))


class InChunks(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, head, base_hidden, base_head, targets, shares, places, is_wanted,
                direction, strength, chunk):
        ctx.like = [(x.shape, x.dtype) for x in (hidden, head)]
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
        hidden, base_hidden = hidden.flatten(0, 1), base_hidden.flatten(0, 1)  # (tokens, C)
        head, base_head, weights = head.to(dtype), base_head.to(dtype), 1 / shares.to(dtype)
        by_hidden, by_head = ctx.gradients = [
            torch.zeros_like(x, dtype=dtype) if wanted else None
            for x, wanted in zip((hidden, head), is_wanted)]
        ce = kl = weights.new_zeros(())

        def log_probs_of(hidden, at, head):
            return log_probs(hidden[at].to(dtype) @ head.T)  # (n, V)

        def carry_on(by_logits, at, weights):
            """The gradient of n tokens with respect to their logits, (n, V), times weights (n,)."""
            if by_hidden is not None:
                by_hidden[at] = by_logits @ head * weights[:, None]
            if by_head is not None:
                by_head.addmm_(by_logits.T, hidden[at].to(dtype) * weights[:, None])

        domain, general, in_base = (x.split(chunk) for x in places)
        for at in domain:
            nats, by_logits = cross_entropy(log_probs_of(hidden, at, head), targets[at])
            ce = ce + nats @ weights[at]
            carry_on(by_logits, at, weights[at])
        for at, at_base in zip(general, in_base):
            nats, by_logits = kl_divergence(log_probs_of(hidden, at, head), log_probs_of(
                base_hidden, at_base, base_head), direction)
            kl = kl + nats @ weights[at]
            if strength:  # no 0 * inf
                carry_on(by_logits, at, strength * weights[at])
        ctx.mark_non_differentiable(ce, kl)
        return ce + (strength * kl if strength else 0.0), ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss, by_ce, by_kl):
        gradients, ctx.gradients = ctx.gradients, None  # scaled where they are, so only once
        return *(x if x is None else x.mul_(by_loss).view(shape).to(dtype)
                 for x, (shape, dtype) in zip(gradients, ctx.like)), *[None] * 9


def completed(log_p, tokens, log_q):
    """The base's log-probabilities (..., V) from those of its likeliest tokens, twice (..., k).

    The rest of the base's probability is shared out like that of the model, log_p (..., V). So a KL
    and its gradient see k + 1 outcomes.
    """
    log_q = log_q.float()
    rests = [torch.log1p(-some.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
             for some in (log_q, log_p.gather(-1, tokens))]
    return (log_p + rests[0] - rests[1]).scatter(-1, tokens, log_q)


# The losses from log-probabilities (n, V), and their gradients with respect to the logits by the
# formulas of losses.py -> nats (n,), (n, V). They work in place to save memory and time.

def cross_entropy(log_p, targets):
    nats = -log_p.gather(1, targets[:, None])[:, 0]
    p = log_p.exp_()
    p[torch.arange(len(p), device=p.device), targets] -= 1
    return nats, p


def kl_divergence(log_p, log_q, direction):
    if direction == "mean":
        both = [kl_divergence(log_p.clone(), log_q.clone(), one) for one in ("reverse", "forward")]
        return [(reverse + forward) / 2 for reverse, forward in zip(*both)]
    if direction == "forward":
        q = log_q.exp()
        return torch.linalg.vecdot(q, log_q.sub_(log_p)), log_p.exp_().sub_(q)
    p, log_ratio = log_p.exp(), log_p.sub_(log_q)
    kl = torch.linalg.vecdot(p, log_ratio)
    return kl, log_ratio.sub_(kl[:, None]).mul_(p)
