"""The losses, and nothing around them: cross-entropy, KL divergence, MoL, which mixes the two.
At the end stand the terms of its rivals.

MoL (arXiv 2505.12043) continues the training of a base model p_0 on a domain without forgetting the
rest. Each *sequence* s carries a flag, and the flag picks its loss:

    s in the domain text:    CE(s) = -(1/n) sum_i log p_theta(s_i | s_<i)
    s in the general text:   KL(s) =  (1/n) sum_i KL[ p_theta(. | s_<i)  ||  p_0(. | s_<i) ]

The batch's loss is the mean over its sequences. Domain text says what to learn. General text only
supplies the contexts in which to stay as you were: its tokens are read but never imitated, the
targets are the base's own.

Tensors in, tensors out (except the Fisher, which asks the model itself), so this file drops into
any trainer. B sequences, T positions, V vocabulary. Logits of any float type are computed with in
float32 at least. Targets of -100 mark padding, which counts nowhere, whatever logits stand there:
not in a loss and not in a gradient. A sequence of padding alone counts as 0, and so does an empty
batch.
"""

import copy

import torch
from torch.nn import functional as F

PADDING = -100  # PyTorch's and Hugging Face's mark for a target that is no token


def log_probs(logits):
    """Log-softmax over the last dimension, in nats; in float32 at least, bfloat16 is too coarse."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def without_padding(logits, targets):
    """Logits (B, T, V) with zeros where the target is padding, whatever stood there, nan too."""
    is_padding = (targets == PADDING).unsqueeze(-1)  # (B, T, 1)
    return logits.masked_fill(is_padding, 0.0) if is_padding.any() else logits  # a copy if need be


def cross_entropy(logits, targets):
    """-log p(target): logits (B, T, V), targets (B, T) -> nats per token (B, T), 0 at padding."""
    log_p = log_probs(without_padding(logits, targets)).flatten(0, 1)  # (B * T, V)
    nats = F.nll_loss(log_p, targets.flatten(), ignore_index=PADDING, reduction="none")
    return nats.view(targets.shape)


def kl_divergence(logits, base_logits, direction="reverse"):
    """KL between model and base over the full vocabulary, (B, T, V) twice -> nats per token (B, T).

    "reverse" is KL[p_theta || p_0], the student first, as in MoL (arXiv 2509.06650, eq. 2-3): the
    model may say nothing that the base would not. "forward" is KL[p_0 || p_theta], as in
    distillation: it must still say all that the base would. "mean" is half of each. No gradient
    reaches the base. A token to which the first distribution gives 0 adds nothing; one to which
    only the second gives 0 makes the divergence infinite.
    """
    if direction == "mean":
        reverse = kl_divergence(logits, base_logits, "reverse")
        return (reverse + kl_divergence(logits, base_logits, "forward")) / 2
    log_p, log_q = log_probs(logits), log_probs(base_logits.detach())
    if direction == "forward":
        log_p, log_q = log_q, log_p
    elif direction != "reverse":
        raise ValueError(f"direction is {direction!r}; it must be 'reverse', 'forward' or 'mean'")
    p = log_p.exp()
    # Where p is 0 the ratio may be inf - inf; it is replaced before the product, or 0 * nan would
    # be nan.
    log_ratio = torch.where(p > 0, log_p - log_q, 0.0)
    return (p * log_ratio).sum(dim=-1)


def per_sequence(nats, targets):
    """The mean over each sequence's tokens, (B, T) -> (B,): short ones weigh as much as long."""
    is_token = targets != PADDING
    return nats.where(is_token, 0.0).sum(dim=1) / is_token.sum(dim=1).clamp(min=1)


def mixture_of_losses(logits, targets, is_domain, base_logits=None, direction="reverse",
                      strength=1.0):
    """MoL: cross-entropy on domain rows, KL to the base on general ones -> loss, CE part, KL part.

    logits       (B, T, V)  the model's, for the whole batch
    targets      (B, T)     the next tokens; on general rows they serve only to show the padding
    is_domain    (B,) bool  the flag that picks each sequence's loss
    base_logits  (G, T, V)  the frozen base's, for the G general rows alone; None if G is 0
    direction               of the KL, see kl_divergence
    strength                the weight of the KL; the paper has 1: the corpus ratio is the weight

    Three scalars in nats per token, loss = CE part + strength * KL part. Either part is 0 in a
    batch without its rows. Raises ValueError if base_logits has another shape than the general
    rows. Only the shape can be checked: that its rows stand in the order of the batch is for the
    caller to see to.

        with torch.no_grad():
            base_logits = base(tokens[~is_domain])
        loss, ce, kl = mixture_of_losses(model(tokens), targets, is_domain, base_logits)
    """
    is_domain = is_domain.bool()  # a data collator may hand over 0 and 1
    domain = is_domain.nonzero().squeeze(1)  # (B - G,), row numbers
    general = (~is_domain).nonzero().squeeze(1)  # (G,)
    if base_logits is None:
        base_logits = logits[:0]  # no rows: right only if there are no general ones
    expected = (len(general), *logits.shape[1:])
    if tuple(base_logits.shape) != expected:
        raise ValueError(f"base_logits {tuple(base_logits.shape)} do not fit the general rows "
                         f"{expected}")

    ce = cross_entropy(logits[domain], targets[domain])  # (B - G, T)
    kl = kl_divergence(without_padding(logits[general], targets[general]),
                       without_padding(base_logits, targets[general]), direction)  # (G, T)
    count = max(len(logits), 1)  # the mean is over the rows of both kinds
    ce = per_sequence(ce, targets[domain]).sum() / count
    kl = per_sequence(kl, targets[general]).sum() / count
    return ce + strength * kl, ce, kl


def mean_cross_entropy(logits, targets):
    """Cross-entropy on every sequence of the batch, whatever its corpus -> scalar, nats per token.

    On domain rows alone this is naive continual pre-training; on both corpora it is replay (arXiv
    2403.08763).
    """
    return per_sequence(cross_entropy(logits, targets), targets).sum() / max(len(logits), 1)


# --- rivals: they hold the weights instead of what the model says --------------------------------

def weight_distance(weights, base_weights, importance=None):
    """Half the squared distance from the base's weights, each weighted by its importance -> scalar.

    With importance 1, L2-SP (arXiv 1802.01483, eq. 2 without the new head); with the diagonal
    Fisher, EWC (arXiv 1612.00796, eq. 3). The arguments are iterables of tensors in the same order;
    no gradient reaches the last two.
    """
    weights, base_weights = list(weights), [w.detach() for w in base_weights]
    importance = [1.0] * len(weights) if importance is None else importance
    terms = zip(importance, weights, base_weights, strict=True)
    return sum((f * (w - w0) ** 2).sum() for f, w, w0 in terms) / 2


def diagonal_fisher(model, tokens, generator=None):
    """How much predictions on these tokens (B, T) depend on each weight -> a tensor per parameter.

    F_i = E[ (d log p(y | s) / d theta_i)^2 ] per token, with y drawn from the model itself at every
    position. To second order KL[p_0 || p_theta] per token is half of (theta - theta_0)' F (theta -
    theta_0), F in full: for a small step EWC at strength 1 is MoL's KL with all of F left out
    except its diagonal. Steps are not small here.
    """
    model = copy.deepcopy(model).requires_grad_(True)  # a frozen base stays frozen
    fisher = [torch.zeros_like(w) for w in model.parameters()]
    # Each position is drawn by itself, so the square of a sequence's gradient is right on average.
    for row in tokens:
        logits = model(row[None])  # (1, T, V)
        p = log_probs(logits[0].detach()).exp().cpu()  # (T, V)
        drawn = torch.multinomial(p, 1, generator=generator).T.to(row.device)  # (1, T)
        loss = cross_entropy(logits, drawn).sum()
        for f, gradient in zip(fisher, torch.autograd.grad(loss, list(model.parameters()))):
            f += gradient ** 2 / tokens.numel()
    return fisher
