"""The losses, and nothing around them: cross-entropy, KL divergence, MoL, which mixes the two.

MoL (arXiv 2505.12043) continues the training of a base model p_0 on a domain without forgetting the
rest. Each *sequence* s carries a flag, and the flag picks its loss:

    s in the domain text:    CE(s) = -(1/n) sum_i log p_theta(s_i | s_<i)
    s in the general text:   KL(s) =  (1/n) sum_i KL[ p_theta(. | s_<i)  ||  p_0(. | s_<i) ]

The batch's loss is the mean over its sequences. Domain text says what to learn. General text only
supplies the contexts in which to stay as you were: its tokens are read but never imitated, the
targets are the base's own.

Tensors in, tensors out, so this file drops into any trainer. B sequences, T positions, V
vocabulary. Whatever float type the logits have, losses are computed in float32 at least. Targets of
-100 mark padding, which counts nowhere, whatever logits stand there: not in a loss and not in a
gradient. A sequence of padding alone counts as 0, and so does an empty batch.
"""

import torch
from torch.nn import functional as F

PADDING = -100  # PyTorch's and Hugging Face's mark for a target that is no token


def log_probs(logits):
    """Log-softmax over the last dimension, in nats; in float32 at least, bfloat16 is too coarse."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def without_padding(logits, targets):
    """Logits or hidden states (B, T, ...), zero where the target is padding, even if nan."""
    is_padding = (targets == PADDING).unsqueeze(-1)  # (B, T, 1)
    return logits.masked_fill(is_padding, 0.0) if is_padding.any() else logits


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
    log_ratio = (log_p - log_q).masked_fill_(p == 0, 0.0)
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
    domain, general = rows_of(is_domain)
    if base_logits is None:
        base_logits = logits[:0]  # no rows: right only if there are no general ones
    expected = (len(general), *logits.shape[1:])
    if tuple(base_logits.shape) != expected:
        raise ValueError(f"base_logits {tuple(base_logits.shape)} do not fit the general rows "
                         f"{expected}")

    ce = cross_entropy(logits[domain], targets[domain])  # (B - G, T)
    kl = kl_divergence(without_padding(logits[general], targets[general]),
                       without_padding(base_logits, targets[general]), direction)  # (G, T)
    count = max(len(logits), 1)
    ce = per_sequence(ce, targets[domain]).sum() / count
    kl = per_sequence(kl, targets[general]).sum() / count
    return ce + strength * kl, ce, kl


def rows_of(is_domain):
    """The flag (B,) -> the numbers of the domain rows (B - G,) and of the general ones (G,)."""
    is_domain = is_domain.bool()  # a data collator may hand over 0 and 1
    return is_domain.nonzero().squeeze(1), (~is_domain).nonzero().squeeze(1)


def mean_cross_entropy(logits, targets):
    """Cross-entropy on every sequence of the batch, whatever its corpus -> scalar, nats per token.

    On domain rows alone this is naive continual pre-training; on both corpora it is replay (arXiv
    2403.08763).
    """
    return per_sequence(cross_entropy(logits, targets), targets).sum() / max(len(logits), 1)


# --- the same loss where logits do not fit in memory ---------------------------------------------

def mixture_from_hidden(hidden, head, targets, is_domain, base_hidden=None, base_head=None,
                        direction="reverse", strength=1.0, chunk=256):
    """mixture_of_losses from the last hidden states -> the same three numbers.

    hidden       (B, T, C)  the model's, what its head would turn into logits
    head         (V, C)     the weight of the head; logits = hidden @ head.T
    base_hidden  (G, T, C') the base's, for the G general rows alone; None if G is 0
    base_head    (V, C')    the weight of the base's head
    chunk                   tokens whose logits exist at a time; each chunk reads the whole head

    With a vocabulary of 150,000 the logits of 4,096 tokens take 2.5 GB in float32, and the plain
    loss holds about five such tensors. Here a few tokens' logits are made, turned into nats and
    into their part of the gradient, and dropped. So the gradient is ready before the backward pass,
    which multiplies it by what comes from above; for a moment the head's, (V, C), is there twice.
    Only the loss has a gradient, its two parts have none. Raises ValueError if the shapes do not
    fit, and in float16, where a token's part of the gradient would often be 0.
    """
    domain, general = rows_of(is_domain)
    if base_hidden is None:
        base_hidden, base_head = hidden[:0], head  # no rows, as in mixture_of_losses
    if base_hidden.shape[:2] != (len(general), hidden.shape[1]) or len(base_head) != len(head):
        raise ValueError(f"base_hidden {tuple(base_hidden.shape)} and base_head "
                         f"{tuple(base_head.shape)} do not fit {len(general)} general rows of "
                         f"{hidden.shape[1]} tokens and a vocabulary of {len(head)}")
    if (hidden.flatten(0, 1)[:1] @ head[:1].T).dtype == torch.float16:  # under autocast too
        raise ValueError("float16 is too coarse for mixture_from_hidden; take bfloat16 or float32, "
                         "or mixture_of_losses on the logits")
    head_leaf, base_head = leaf(head), base_head.detach()

    def ce_of(hidden, targets):  # (N, C), (N,) -> (N,)
        return cross_entropy((hidden @ head_leaf.T)[None], targets[None])[0]

    def kl_of(hidden, base_hidden):  # (N, C), (N, C') -> (N,)
        return kl_divergence(hidden @ head_leaf.T, base_hidden @ base_head.T, direction)

    # A token counts 1 / (its sequence's tokens * the batch's sequences).
    tokens = (targets != PADDING).sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    divisors = (tokens * len(targets)).expand_as(targets)  # (B, T)
    inputs, gradients = [], []

    def part(nats_of, rows, others, strength=1.0):
        """These rows' part of the loss, a scalar; the gradient of strength times it is kept."""
        total = 0.0
        tensors = without_padding(hidden[rows], targets[rows]), others, divisors[rows]
        for piece, other, divisor in zip(*(x.flatten(0, 1).split(chunk) for x in tensors)):
            piece_leaf = leaf(piece)
            nats = (nats_of(piece_leaf, other) / divisor).sum()
            if nats.requires_grad:
                with torch.autocast(nats.device.type, enabled=False):  # as for any backward pass
                    (strength * nats).backward()
            inputs.append(piece)
            gradients.append(piece_leaf.grad)
            total += nats.detach()
        return total

    ce = part(ce_of, domain, targets[domain])
    kl = part(kl_of, general, without_padding(base_hidden, targets[general]), strength)
    loss = ce + strength * kl
    return WithGradient.apply(loss, *inputs, head, *gradients, head_leaf.grad), ce, kl


def leaf(x):
    """The same values, where a backward pass ends and leaves its gradient in .grad."""
    return x.detach().requires_grad_(x.requires_grad)


class WithGradient(torch.autograd.Function):
    """(loss, *inputs, *gradients) -> loss, whose gradients with respect to the inputs are those."""

    @staticmethod
    def forward(ctx, loss, *inputs_and_gradients):
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2:])
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, from_above):
        gradients = [None if x is None else from_above * x for x in ctx.saved_tensors]
        return None, *gradients, *(None for _ in gradients)
