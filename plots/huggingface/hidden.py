"""MoL without all the logits in memory: mixture_of_losses from the last hidden states."""

import torch
from torch.utils.checkpoint import checkpoint

from losses import cross_entropy, kl_divergence, per_sequence, without_padding


def mixture_from_hidden(hidden, head, targets, is_domain, base_hidden=None, base_head=None,
                        direction="reverse", strength=1.0, chunk=None):
    """mixture_of_losses from the last hidden states -> the same three scalars, same gradients.

    hidden       (B, T, C)  the input of the model's head, for the same positions as the targets
    head         (V, C)     the weight of the head; logits = hidden @ head.T. Or a function from
                            (N, C) to logits (N, V), for a head with a bias or a soft cap
    base_hidden  (G, T, C') of the frozen base, for the G general rows; None if G = 0
    base_head    (V, C')    the weight of the base's head, or a function
    chunk                   how many tokens have logits in memory at a time; None: 16 million
                            logits, which are 64 tokens with a vocabulary of 262,144

    With a vocabulary of 150,000 the logits of 4,096 tokens take 2.5 GB in float32, and
    mixture_of_losses holds about five tensors of that size. This function computes the logits of
    one chunk of tokens, keeps only their losses, and computes the logits again in the backward
    pass. Raises ValueError if the shapes do not fit.
    """
    if base_hidden is None:
        base_hidden, base_head = hidden[:0], head
    domain, general = rows_of(targets, is_domain, hidden=hidden, base_hidden=base_hidden)

    def logits_of(hidden, head):  # (N, C) -> (N, V)
        return head(hidden) if callable(head) else hidden @ head.T

    def ce_of(hidden, targets):  # (N, C), (N,) -> (N,)
        return cross_entropy(logits_of(hidden, head)[None], targets[None])[0]

    def kl_of(hidden, base_hidden):  # (N, C), (N, C') -> (N,)
        with torch.no_grad():
            base_logits = logits_of(base_hidden, base_head)
        return kl_divergence(logits_of(hidden, head), base_logits, direction)

    def in_chunks(nats_of, x, y):  # (rows, T, ...) each -> (rows, T); keeps no logits
        pairs = zip(x.flatten(0, 1).split(chunk), y.flatten(0, 1).split(chunk))
        nats = [checkpoint(nats_of, *pair, use_reentrant=False) for pair in pairs]
        return torch.cat(nats).view(x.shape[:2])

    if chunk is None:
        with torch.no_grad():
            vocab_size = logits_of(hidden[:0].flatten(0, 1), head).shape[-1]
        chunk = max(2**24 // vocab_size, 16)
    domain_targets, general_targets = targets[domain], targets[general]
    ce = in_chunks(ce_of, without_padding(hidden[domain], domain_targets), domain_targets)
    kl = in_chunks(kl_of, without_padding(hidden[general], general_targets),
                   without_padding(base_hidden, general_targets))
    return loss_and_parts(ce, kl, domain_targets, general_targets, strength)


def rows_of(targets, is_domain, **tensors):
    """The indices of the domain rows (B - G,) and of the general rows (G,), from the flag (B,).

    The first tensor must be (B, T, ...), the second (G, T, ...). Raises ValueError otherwise.
    """
    is_domain = is_domain.bool()  # a data collator may give 0 and 1
    domain, general = is_domain.nonzero().squeeze(1), (~is_domain).nonzero().squeeze(1)
    B, T = targets.shape
    shapes = [("is_domain", is_domain.shape, (B,))]
    shapes += [(name, x.shape[:2], (rows, T)) for (name, x), rows in zip(tensors.items(),
                                                                         (B, len(general)))]
    for name, found, expected in shapes:
        if found != expected:
            raise ValueError(f"{name} begins with the shape {tuple(found)}; targets "
                             f"{tuple(targets.shape)} and is_domain need {expected}")
    return domain, general


def loss_and_parts(ce, kl, domain_targets, general_targets, strength):
    """Token losses of the domain rows and of the general rows -> loss, CE part, KL part."""
    count = max(len(ce) + len(kl), 1)
    ce = per_sequence(ce, domain_targets).sum() / count
    kl = per_sequence(kl, general_targets).sum() / count
    return ce + strength * kl, ce, kl
