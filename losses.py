"""The losses: cross-entropy, KL divergence, and MoL, which mixes the two.

MoL (arXiv 2505.12043) trains a base model p_0 on a domain without losing what it could do before.
Each *sequence* s of n tokens has a flag, and the flag selects its loss:

    s in the domain text:    CE(s) = -(1/n) sum_i log p_theta(s_i | s_<i)
    s in the general text:   KL(s) =  (1/n) sum_i KL[ p_theta(. | s_<i)  ||  p_0(. | s_<i) ]

The loss of a batch is the mean over its sequences. Training moves the logits against the gradient
of the loss. With p = p_theta at one position the gradients are:

    CE     p - onehot(s_i)               pushes up the text's token, right or wrong
    KL     p (log p - log p_0 - KL)      pushes towards the base; the text's token is not in it

As long as the model equals the base, the KL pushes nowhere. An example with two words in the
vocabulary and one token per sequence:

    domain    p_theta = (1/2, 1/2), the token is word 0    CE = log 2 = 0.693
    general   p_theta = (1/2, 1/2), p_0 = (1/4, 3/4)       KL = 1/2 log 2 + 1/2 log(2/3) = 0.144
    loss      (0.693 + 0.144) / 2 = 0.418 nats

Shapes: B sequences, G of them general, T positions, V vocabulary. Losses are in float32 or higher.
Targets of -100 mark padding, which changes no loss. A row of only padding has loss 0.
"""

import torch
from torch.nn import functional as F

PADDING = -100  # the target of a padding position, as in PyTorch and Hugging Face


def log_probs(logits):
    """Log-softmax over the last dimension, in nats, in float32 or higher."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def cross_entropy(logits, targets):
    """-log p(target): logits (B, T, V), targets (B, T) -> nats per token (B, T), 0 at padding."""
    log_p = log_probs(without_padding(logits, targets)).flatten(0, 1)  # (B * T, V)
    nats = F.nll_loss(log_p, targets.flatten().long(), ignore_index=PADDING, reduction="none")
    return nats.view(targets.shape)


def kl_divergence(logits, base_logits, direction="reverse"):
    """KL between model and base over the full vocabulary, (B, T, V) twice -> nats per token (B, T).

    "reverse": KL[p_theta || p_0], as in MoL (arXiv 2509.06650, eq. 2-3). It is large where the
    model predicts what the base does not. "forward": KL[p_0 || p_theta], as in distillation. It is
    large where the model no longer predicts what the base does. "mean": the mean of both. The base
    gets no gradient. Where only the second distribution is 0, the divergence is infinite.
    """
    if logits.shape != base_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and base_logits {tuple(base_logits.shape)} "
                         "must have the same shape")
    if direction == "mean":
        reverse = kl_divergence(logits, base_logits, "reverse")
        return (reverse + kl_divergence(logits, base_logits, "forward")) / 2
    log_p, log_q = log_probs(logits), log_probs(base_logits.detach())
    if direction == "forward":
        log_p, log_q = log_q, log_p
    elif direction != "reverse":
        raise ValueError(f"direction is {direction!r}; it must be 'reverse', 'forward' or 'mean'")
    p = log_p.exp()
    # Where p is 0, log_p - log_q can be NaN, and 0 * NaN is NaN: set it to 0 first.
    log_ratio = (log_p - log_q).masked_fill_(p == 0, 0.0)
    return (p * log_ratio).sum(dim=-1)


def per_sequence(nats, targets):
    """The mean over the tokens of each sequence, (B, T) -> (B,)."""
    is_token = targets != PADDING
    return nats.where(is_token, 0.0).sum(dim=1) / is_token.sum(dim=1).clamp(min=1)


def mean_cross_entropy(logits, targets):
    """Cross-entropy on every sequence of the batch -> scalar, nats per token.

    On domain text alone: naive continual pre-training. On both: replay (arXiv 2403.08763).
    """
    return per_sequence(cross_entropy(logits, targets), targets).sum() / max(len(logits), 1)


def without_padding(logits, targets):
    """Logits (B, T, V) with zeros at padding, so that no NaN there can spread."""
    is_padding = (targets == PADDING).unsqueeze(-1)  # (B, T, 1)
    return logits.masked_fill(is_padding, 0.0) if is_padding.any() else logits


def checked(logits, targets, is_domain, base_logits):
    """The tensors of mixture_of_losses, zero at padding. Raises ValueError if they do not fit."""
    (B, T), is_domain = targets.shape, is_domain.bool()  # a data collator may give 0 and 1
    base_logits = logits[:0] if base_logits is None else base_logits  # right if all rows are domain
    for name, found, expected in [
            ("is_domain", is_domain.shape, (B,)), ("logits", logits.shape[:2], (B, T)),
            ("base_logits", base_logits.shape[:2], (int((~is_domain).sum()), T))]:
        if found != expected:
            raise ValueError(f"{name} begins with the shape {tuple(found)}; targets "
                             f"{tuple(targets.shape)} and is_domain need {expected}")
    if ((targets != PADDING) & ((targets < 0) | (targets >= logits.shape[-1]))).any():
        raise ValueError(f"targets must be below {logits.shape[-1]}, or {PADDING} for padding")
    return (without_padding(logits, targets), is_domain,
            without_padding(base_logits, targets[~is_domain]))


def mixture_of_losses(logits, targets, is_domain, base_logits=None, direction="reverse",
                      strength=1.0):
    """MoL: cross-entropy on domain rows, KL to the base on general rows -> loss, CE part, KL part.

    logits       (B, T, V)  of the model, for the whole batch
    targets      (B, T)     the next tokens; general rows use them only to find the padding
    is_domain    (B,) bool  the flag that selects the loss of each sequence
    base_logits  (G, T, V)  of the frozen base, for the G general rows in batch order; None if G = 0
    direction, strength     of the KL: see kl_divergence; its weight

    Returns three scalars in nats per token. Raises ValueError if the shapes do not fit.

        with torch.no_grad():
            base_logits = base(tokens[~is_domain])
        loss, ce_part, kl_part = mixture_of_losses(model(tokens), targets, is_domain, base_logits)
    """
    logits, is_domain, base_logits = checked(logits, targets, is_domain, base_logits)
    is_general, B = ~is_domain, max(len(targets), 1)
    # The method: the mean loss of each row, (B - G,) and (G,), then the mean over all B rows.
    ce = per_sequence(cross_entropy(logits[is_domain], targets[is_domain]), targets[is_domain])
    kl = per_sequence(kl_divergence(logits[is_general], base_logits, direction),
                      targets[is_general])
    ce_part, kl_part = ce.sum() / B, kl.sum() / B
    loss = ce_part + strength * kl_part
    return (loss if strength else ce_part), ce_part, kl_part  # 0 * infinity is NaN
