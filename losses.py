"""The losses: cross-entropy, KL divergence, and MoL, which mixes the two.

MoL (arXiv 2505.12043) trains a base model p_0 on a domain without losing what it could do before.
Each *sequence* s of n tokens has a flag, and the flag selects its loss:

    s in the domain text:    CE(s) = -(1/n) sum_i log p_theta(s_i | s_<i)
    s in the general text:   KL(s) =  (1/n) sum_i KL[ p_theta(. | s_<i)  ||  p_0(. | s_<i) ]

The loss of a batch is the mean over its sequences. The model learns the tokens of the domain text.
On general text it is trained to predict what the base predicts; the tokens there are only context.

An example with two words in the vocabulary and one token per sequence:

    domain    p_theta = (1/2, 1/2), the token is word 0    CE = log 2 = 0.693
    general   p_theta = (1/2, 1/2), p_0 = (1/4, 3/4)       KL = 1/2 log 2 + 1/2 log(2/3) = 0.144
    loss      (0.693 + 0.144) / 2 = 0.418 nats

This file needs only torch. Shapes: B sequences, G of them general, T positions, V vocabulary.
Losses are computed in float32 or higher. Targets of -100 mark padding, which changes neither
losses nor gradients. A sequence of only padding and an empty batch have loss 0.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PADDING = -100  # the target of a padding position, as in PyTorch and Hugging Face


def log_probs(logits):
    """Log-softmax over the last dimension, in nats, in float32 or higher."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def without_padding(logits, targets):
    """Logits or hidden states (B, T, ...), zero at padding, so that no NaN there can spread."""
    is_padding = (targets == PADDING).unsqueeze(-1)  # (B, T, 1)
    return logits.masked_fill(is_padding, 0.0) if is_padding.any() else logits


def cross_entropy(logits, targets):
    """-log p(target): logits (B, T, V), targets (B, T) -> nats per token (B, T), 0 at padding."""
    log_p = log_probs(without_padding(logits, targets)).flatten(0, 1)  # (B * T, V)
    nats = F.nll_loss(log_p, targets.flatten(), ignore_index=PADDING, reduction="none")
    return nats.view(targets.shape)


def kl_divergence(logits, base_logits, direction="reverse"):
    """KL between model and base over the full vocabulary, (B, T, V) twice -> nats per token (B, T).

    "reverse" is KL[p_theta || p_0], as in MoL (arXiv 2509.06650, eq. 2-3). It is large where the
    model predicts what the base does not. "forward" is KL[p_0 || p_theta], as in distillation. It
    is large where the model no longer predicts what the base does. "mean" is the mean of both. The
    base gets no gradient. A term is 0 where the first distribution is 0. Where only the second is
    0, the divergence is infinite.
    """
    if logits.shape != base_logits.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, base_logits "
                         f"{tuple(base_logits.shape)}; they must be the same")
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


def mixture_of_losses(logits, targets, is_domain, base_logits=None, direction="reverse",
                      strength=1.0):
    """MoL: cross-entropy on domain rows, KL to the base on general rows -> loss, CE part, KL part.

    logits       (B, T, V)  of the model, for the whole batch
    targets      (B, T)     the next tokens; general rows use them only to find the padding
    is_domain    (B,) bool  the flag that selects the loss of each sequence
    base_logits  (G, T, V)  of the frozen base, for the G general rows in batch order; None if G = 0
    direction               of the KL, see kl_divergence
    strength                weight of the KL; 1 is MoL as in the formula above

    Returns three scalars in nats per token, loss = CE part + strength * KL part. A part is the sum
    over its rows divided by all B rows. Raises ValueError if the shapes do not fit.

        with torch.no_grad():
            base_logits = base(tokens[~is_domain])
        loss, ce, kl = mixture_of_losses(model(tokens), targets, is_domain, base_logits)
    """
    if base_logits is None:
        base_logits = logits[:0]  # right only if there are no general rows
    domain, general = rows_of(targets, is_domain, logits=logits, base_logits=base_logits)

    # index_select is faster than logits[domain], mainly in the backward pass.
    domain_targets, general_targets = targets[domain], targets[general]
    ce = cross_entropy(logits.index_select(0, domain), domain_targets)  # (B - G, T)
    kl = kl_divergence(without_padding(logits.index_select(0, general), general_targets),
                       without_padding(base_logits, general_targets), direction)  # (G, T)
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


def mean_cross_entropy(logits, targets):
    """Cross-entropy on every sequence of the batch -> scalar, nats per token.

    On domain text alone this is naive continual pre-training. On both corpora it is replay (arXiv
    2403.08763).
    """
    return per_sequence(cross_entropy(logits, targets), targets).sum() / max(len(logits), 1)


# --- MoL without all the logits in memory --------------------------------------------------------

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
