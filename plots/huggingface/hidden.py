"""MoL without all the logits in memory, which with a vocabulary of 150,000 take GBs.

Only a chunk of tokens has logits at a time: make them, take the losses, take the gradient by the
logits, carry it on to the hidden states and the head, and forget them. Backward only scales it.
"""

import math

import torch

from losses import PADDING, checked, log_probs


def completed(log_p, tokens, log_q):
    """A distribution of the base of which only some tokens are known -> log-probabilities (..., V).

    log_p          (..., V)  of the model, without gradient, in float32 or higher
    tokens, log_q  (..., k)  the known tokens, and their log-probabilities in the base

    The rest of the base is spread as in the model. So the KL to this distribution and its gradient
    are those of the KL over k + 1 outcomes: each of the known tokens, and any other token.
    """
    tokens, log_q = tokens.long(), log_q.to(log_p.dtype)
    log_p_rest = log_p.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    q_rest = 1 - log_q.exp().sum(-1, keepdim=True)  # rounded, it may be 0 or less
    return (log_p + q_rest.clamp(min=1e-6).log() - log_p_rest).scatter(-1, tokens, log_q)


def mixture_from_hidden(hidden, head, targets, is_domain, base_hidden=None, base_head=None,
                        direction="reverse", strength=1.0, chunk=None, stored=None):
    """mixture_of_losses from the last hidden states -> loss, CE part, KL part.

    hidden (B, T, C) is the input of the model's head, and head (V, C) its weight; if head is None,
    hidden is the logits. base_hidden (G, T, C') and base_head (V, C') are the same of the base.
    stored, in place of both, has tokens and log_q of completed, (G, T, k) each. The logits of chunk
    tokens are in memory at a time: as a default 64, or 8 million logits if that is more.

    Returns three scalars in nats per token, in float32 or higher, also under autocast. Only the
    loss has a gradient: that of hidden and head. Raises ValueError if the shapes do not fit.
    """
    for x in stored or [base_hidden]:
        checked(hidden[..., :1], targets.where(targets == PADDING, 0), is_domain,
                x if x is None else x[..., :1])
    (B, T), is_general, is_token = targets.shape, ~is_domain.bool(), targets != PADDING
    V = hidden.shape[-1] if head is None else len(head)
    if (is_token & ((targets < 0) | (targets >= V))).any():
        raise ValueError(f"targets must be below {V}, or {PADDING} for padding")
    learns, dtype = torch.is_grad_enabled(), torch.promote_types(hidden.dtype, torch.float32)
    weight, base_weight = (x if x is None else x.to(dtype) for x in (head, base_head))
    by_hidden, by_head = (torch.zeros_like(x, dtype=dtype) if learns and x is not None
                          and x.requires_grad else None for x in (hidden, head))
    # The mean is over the tokens of a row, then over the B rows.
    shares = 1 / (is_token.sum(dim=1).clamp(min=1) * B).repeat_interleave(T).to(dtype)  # (B * T,)

    def logits_of(hidden, at, weight):
        hidden = hidden[at // T, at % T].to(dtype)
        return hidden if weight is None else (weight @ hidden.T).T  # the faster order on a CPU

    def part(at, is_kl):
        """The share of n tokens, at these places of the flat batch. Their gradients are added."""
        logits = logits_of(hidden, at, weight)  # (n, V)
        if is_kl:
            in_base = (is_general.cumsum(0) - 1)[at // T] * T + at % T
            if stored:
                base_logits = completed(log_probs(logits), *(
                    x[in_base // T, in_base % T] for x in stored))
            else:
                base_logits = (logits_of(base_hidden, in_base, base_weight) if len(at) else
                               logits.clone())
        nats, by_logits = (kl_and_gradient(logits, base_logits, direction) if is_kl else
                           ce_and_gradient(logits, targets.flatten()[at]))
        if learns and (strength or not is_kl):  # no 0 * inf
            weights = (shares[at] * (strength if is_kl else 1))[:, None]
            if by_hidden is not None:
                by_hidden[at // T, at % T] = weights * (
                    by_logits if weight is None else (weight.T @ by_logits.T).T)
            if by_head is not None:
                by_head.addmm_(by_logits.T, weights * hidden[at // T, at % T].to(dtype))
        return nats @ shares[at]

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        size = chunk or max(2**18 // V * 32, 64)  # multiples of 32 are faster
        ce, kl = (sum(part(at, is_kl) for at in (is_token & (is_general == is_kl)[:, None])
                      .flatten().nonzero()[:, 0].split(size)) for is_kl in (False, True))
        loss = ce + (strength * kl if strength else 0.0)
    return Known.apply(loss, hidden, head, by_hidden, by_head), ce, kl


class Known(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx, loss, hidden, head, *gradients):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss):
        gradients, ctx.gradients = ctx.gradients, None  # scaled where they are, so only once
        # Views, or autograd would copy them into .grad.
        scaled = [x if x is None else x.mul_(by_loss).view(x.shape) for x in gradients]
        return None, *scaled, None, None


# The losses of logits (n, V) and their gradients with respect to the logits, by the formulas of
# losses.py -> nats (n,), (n, V). They overwrite the logits. What is added to all logits of a token
# cancels out.

def ce_and_gradient(logits, targets):
    at = targets[:, None]
    shift_(logits)
    found = logits.gather(1, at)  # (n, 1)
    p, log_sum = softmax_(logits)
    return log_sum - found[:, 0], p.scatter_add_(1, at, -torch.ones_like(found))


def kl_and_gradient(logits, base_logits, direction):
    if direction == "mean":
        both = (kl_and_gradient(logits.clone(), base_logits.clone(), "reverse"),
                kl_and_gradient(logits, base_logits, "forward"))
        return [reverse.add_(forward).div_(2) for reverse, forward in zip(*both)]
    if direction not in ("forward", "reverse") or logits.shape != base_logits.shape:
        raise ValueError(f"direction is {direction!r}; it must be 'reverse', 'forward' or 'mean'; "
                         "model and base must have the same shape of logits, and so vocabulary")
    parts = shift_(logits) - shift_(base_logits)  # log p - log q + constant
    (p, log_sum), (q, base_log_sum) = softmax_(logits), softmax_(base_logits)
    first, constant = (q if direction == "forward" else p), log_sum - base_log_sum
    mean = parts.mul_(first).sum(dim=1)
    if not mean.isfinite().all():  # 0 * infinity is NaN
        mean = parts.masked_fill_(first == 0, 0.0).sum(dim=1)
    if direction == "forward":
        return constant - mean, p.sub_(q)
    return mean - constant, parts.sub_(p.mul_(mean[:, None]))


def shift_(logits):
    """The largest logit of a token becomes 0, so that no exponential overflows."""
    return logits.sub_(logits.amax(dim=1, keepdim=True))


def softmax_(logits):
    """Of shifted logits -> p (n, V), the log of the sum of the exponentials (n,)."""
    total = logits.exp_().sum(dim=1, keepdim=True)
    return logits.div_(total), total[:, 0].log()
