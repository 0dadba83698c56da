"""MoL without all the logits in memory: mixture_of_losses from the last hidden states.

With a vocabulary of 150,000 the logits of 4,096 tokens take 2.5 GB in float32, and
mixture_of_losses holds about five tensors of that size. Here only a chunk of tokens has logits at a
time: make them, take the losses, take the gradient with respect to the logits, carry it on to the
hidden states and the head, and forget them. So the gradients are known after the forward pass, no
logits are made twice, and the backward pass only scales.
"""

import math

import torch

from losses import PADDING, cross_entropy, kl_divergence, log_probs


def completed(log_p, tokens, log_q):
    """A distribution of the base of which only some tokens are known -> log-probabilities (..., V).

    log_p          (..., V)  of the model, without gradient, in float32 or higher
    tokens, log_q  (..., k)  the known tokens, and their log-probabilities in the base

    The rest of the base is spread as in the model. So the KL to this distribution and its gradient
    are those of the KL over k + 1 outcomes: each of the known tokens, and any other token.
    """
    tokens, log_q = tokens.long(), log_q.to(log_p.dtype)
    log_p_rest = log_p.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    # Rounded log_q may sum up to more than 1.
    q_rest = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=1e-6)
    return (log_p + q_rest.log() - log_p_rest).scatter(-1, tokens, log_q)


def mixture_from_hidden(hidden, head, targets, is_domain, base_hidden=None, base_head=None,
                        direction="reverse", strength=1.0, chunk=None, stored=None):
    """mixture_of_losses from the last hidden states -> loss, CE part, KL part.

    hidden       (B, T, C)  the input of the model's head, for the same positions as the targets
    head         (V, C)     its weight: logits = hidden @ head.T; None: hidden is the logits
    targets      (B, T)     is_domain (B,), direction and strength: as in mixture_of_losses
    base_hidden  (G, T, C') of the frozen base, for the G general rows; None if G = 0
    base_head    (V, C')    the weight of the base's head; None: base_hidden is the logits
    chunk                   how many tokens have logits in memory at a time; None: 64, or 4 million
                            logits if that is more
    stored                  in place of the base: tokens and log_q of completed, (G, T, k) each

    Returns three scalars in nats per token. Only the loss has a gradient, with respect to hidden
    and head. Logits and sums are in float32 or higher, also under autocast. Raises ValueError if
    the shapes do not fit.
    """
    is_general = ~is_domain.bool()  # a data collator may give 0 and 1
    if base_hidden is None:
        base_hidden, base_head = hidden[:0], head
    of_base = stored or (base_hidden,)
    (B, T), V = targets.shape, hidden.shape[-1] if head is None else len(head)
    for name, found, expected in [
            ("is_domain", is_domain.shape, (B,)), ("hidden", hidden.shape[:2], (B, T)),
            *[("base_hidden", x.shape[:2], (int(is_general.sum()), T)) for x in of_base]]:
        if found != expected:
            raise ValueError(f"{name} begins with the shape {tuple(found)}; targets "
                             f"{tuple(targets.shape)} and is_domain need {expected}")
    is_token = targets != PADDING
    if (is_token & ((targets < 0) | (targets >= V))).any():
        raise ValueError(f"targets must be below {V}, or {PADDING} for padding")
    dtype, learns = torch.promote_types(hidden.dtype, torch.float32), torch.is_grad_enabled()
    by_hidden, by_head = gradients = [
        torch.zeros_like(x, dtype=dtype) if learns and x is not None and x.requires_grad else None
        for x in (hidden, head)]
    weight, base_weight = (x if x is None else x.detach().to(dtype) for x in (head, base_head))
    # The mean is over the tokens of a row, then over the B rows.
    shares = 1 / (is_token.sum(dim=1).clamp(min=1) * B).repeat_interleave(T).to(dtype)  # (B * T,)
    base_row = is_general.cumsum(0) - 1  # (B,)

    def logits_of(hidden, at, weight):
        hidden = hidden.detach().flatten(0, 1)[at].to(dtype)
        return hidden if weight is None else hidden @ weight.T

    def part(at, is_kl):
        """The sum over n tokens, at these places of the flat batch. Their gradients are added."""
        logits = logits_of(hidden, at, weight).requires_grad_(learns)  # (n, V)
        with torch.set_grad_enabled(learns):
            if is_kl:
                in_base = base_row[at // T] * T + at % T
                nats = kl_divergence(logits, completed(
                    log_probs(logits.detach()), *(x.flatten(0, 1)[in_base] for x in stored))
                    if stored else logits_of(base_hidden, in_base, base_weight), direction)
            else:
                nats = cross_entropy(logits[None], targets.flatten()[at][None])[0]
        if learns and (strength or not is_kl):  # no 0 * inf
            by_logits, = torch.autograd.grad(nats, logits, shares[at] * (strength if is_kl else 1))
            if by_hidden is not None:
                by_hidden.flatten(0, 1)[at] = by_logits if head is None else by_logits @ weight
            if by_head is not None:
                by_head.addmm_(by_logits.T, hidden.detach().flatten(0, 1)[at].to(dtype))
        return nats.detach() @ shares[at]

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        ce, kl = (sum(part(at, is_kl) for at in (is_token & (is_general == is_kl)[:, None])
                      .flatten().nonzero()[:, 0].split(chunk or max(2**22 // V, 64)))
                  for is_kl in (False, True))  # padding has no place
        loss = ce + (strength * kl if strength else 0.0)
    return Known.apply(loss, hidden, head, *gradients), ce, kl


class Known(torch.autograd.Function):
    """A loss with gradients that are known already."""

    @staticmethod
    def forward(ctx, loss, hidden, head, *gradients):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss):
        gradients, ctx.gradients = ctx.gradients, None  # scaled where they are, so only once
        return None, *(x if x is None else x.mul_(by_loss) for x in gradients), None, None
