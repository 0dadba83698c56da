"""All methods that are not from the paper: `python train.py --methods ewc mol`.

A method turns (model, frozen base, data.Batch, settings) into the loss, its CE part and its KL
part: three scalars in nats per token. OTHER_METHODS, at the end, has the rows for train.METHODS.
"""

import copy

import torch

import data
import losses
from plots.huggingface.hidden import completed


# --- targets from the base, on general text ------------------------------------------------------

def best_token(model, base, batch, settings):
    """Replay, but the target at each position of the general text is the base's best token."""
    return replay_of(of_base(base, batch).argmax(dim=-1), model, batch)


def sampled_token(model, base, batch, settings, generator):
    """Replay, but the target at each position of the general text is drawn from the base."""
    p = losses.log_probs(of_base(base, batch)).exp()  # (G, T, V)
    drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)  # (G * T, 1)
    return replay_of(drawn.view(p.shape[:2]), model, batch)


def likely_tokens(model, base, batch, settings):
    """Replay without tokens over `strength` nats under the base (2501.14315, for new data)."""
    targets = batch.targets[~batch.is_domain]  # (G, T)
    nats = losses.cross_entropy(of_base(base, batch), targets)
    return replay_of(targets.masked_fill(nats > settings.strength, losses.PADDING), model, batch)


def answers_only(model, base, batch, settings, marks):
    """Replay without the prompts, for text whose prompts end in a colon, as in wordings.py."""
    tokens = batch.tokens[~batch.is_domain]  # (G, T)
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    line, colon = (places.where(mark[tokens], 0).cummax(dim=1).values for mark in marks)
    return replay_of(batch.targets[~batch.is_domain].masked_fill(colon <= line, losses.PADDING),
                     model, batch)


def marks_of(base, world, settings, seed):
    """Which tokens of the vocabulary have a line break and which a colon -> (V,) twice."""
    words = [world.tokenizer.decode([token]) for token in range(world.tokenizer.n_vocab)]
    return [torch.tensor([mark in word for word in words], device=settings.device)
            for mark in "\n:"]


def ce_and_kl(model, base, batch, settings):
    """MoL, and replay at the same time: half of each."""
    logits, base_logits = model(batch.tokens), of_base(base, batch)  # (B, T, V), (G, T, V)
    loss, ce, kl = losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits,
                                            settings.kl, settings.strength)
    replay = losses.mean_cross_entropy(logits, batch.targets)
    return (loss + replay) / 2, (ce + replay) / 2, kl / 2


def stored(k):
    """MoL whose KL has k + 1 outcomes: the base's k likeliest tokens, and all others together."""
    def method(model, base, batch, settings):
        logits = model(batch.tokens)  # (B, T, V)
        log_q, tokens = losses.log_probs(of_base(base, batch)).topk(k)  # (G, T, k)
        log_p = losses.log_probs(logits[~batch.is_domain].detach())  # (G, T, V)
        return losses.mixture_of_losses(logits, batch.targets, batch.is_domain,
                                        completed(log_p, tokens, log_q.half()), settings.kl,
                                        settings.strength)
    return method


def of_base(base, batch):
    """What the frozen base predicts on the general rows -> logits (G, T, V)."""
    with torch.no_grad():
        return base(batch.tokens[~batch.is_domain])


def replay_of(general_targets, model, batch):
    """Cross-entropy on all rows, with these targets (G, T) on the general ones."""
    targets = batch.targets.clone()  # (B, T)
    targets[~batch.is_domain] = general_targets
    loss = losses.mean_cross_entropy(model(batch.tokens), targets)
    return loss, loss, torch.zeros(())


# --- KL to the base, on domain text --------------------------------------------------------------

def domain_kl(model, base, batch, settings, masked=False):
    """Cross-entropy and forward KL to the base, both on domain text (LwF, arXiv 1606.09282).

    LwF gives the new task a head of its own, and its KL a temperature of 2.
    """
    logits = model(batch.tokens)  # (B, T, V)
    with torch.no_grad():
        base_logits = base(batch.tokens)
    ce = losses.mean_cross_entropy(logits, batch.targets)
    if masked:
        target = batch.targets.unsqueeze(-1)  # (B, T, 1)
        logits, base_logits = (x.float().scatter(-1, target, -1e4) for x in (logits, base_logits))
    kl = losses.kl_divergence(logits, base_logits, "forward").mean()
    return ce + settings.strength * kl, ce, kl


def masked_kl(model, base, batch, settings):
    """domain_kl without the target: both distributions are divided by the sum of the rest.

    From arXiv 2605.29498, whose abstract does not give the direction of the KL.
    """
    return domain_kl(model, base, batch, settings, masked=True)


def asft(model, base, batch, settings):
    """Cross-entropy times p(target), and the KL to the base on the same tokens (2509.23753)."""
    logits = model(batch.tokens)  # (B, T, V)
    nats = losses.cross_entropy(logits, batch.targets)  # (B, T)
    ce = (nats * nats.detach().neg().exp()).mean()
    with torch.no_grad():
        base_logits = base(batch.tokens)
    kl = losses.kl_divergence(logits, base_logits, settings.kl).mean()
    return ce + settings.strength * kl, ce, kl


def disc(model, base, batch, settings):
    """The model sees half a row, the base the whole row: KL on that half (DiSC, 2602.16093)."""
    half = batch.tokens.shape[1] // 2
    with torch.no_grad():
        base_logits = base(batch.tokens)[:, half:]  # (B, T / 2, V)
    kl = losses.kl_divergence(model(batch.tokens[:, half:]), base_logits, settings.kl).mean()
    return kl, torch.zeros(()), kl


# --- weights near the base -----------------------------------------------------------------------

def l2sp(model, base, batch, settings):
    """Cross-entropy plus the distance to the base's weights (arXiv 1802.01483, eq. 2)."""
    return ewc(model, base, batch, settings, importance=None)


def ewc(model, base, batch, settings, importance):
    """L2-SP with a weight for each parameter: its diagonal Fisher (arXiv 1612.00796, eq. 3)."""
    ce = losses.mean_cross_entropy(model(batch.tokens), batch.targets)
    distance = weight_distance(model.parameters(), base.parameters(), importance)
    return ce + settings.strength * distance, ce, torch.zeros(())


def weight_distance(weights, base_weights, importance=None):
    """Half the squared distance between two lists of tensors, weighted by importance -> scalar."""
    weights, base_weights = list(weights), [w.detach() for w in base_weights]
    importance = [1.0] * len(weights) if importance is None else importance
    if len(weights) != len(base_weights):
        raise data.BadInput("--lora-rank: l2sp and ewc need all weights, so a rank of 0")
    terms = zip(importance, weights, base_weights, strict=True)
    return sum((f * (w - w0) ** 2).sum() for f, w, w0 in terms) / 2


def diagonal_fisher(model, tokens, generator=None):
    """How much predictions on tokens (B, T) depend on each weight -> a tensor per parameter.

    F_i = E[ (d log p(y | s) / d theta_i)^2 ] per token, with y drawn from the model.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    fisher = [torch.zeros_like(w) for w in model.parameters()]
    # The draws are independent and the gradients have mean 0, so the squared sum is unbiased.
    for row in tokens:
        logits = model(row[None])  # (1, T, V)
        p = losses.log_probs(logits[0].detach()).exp().cpu()  # (T, V)
        drawn = torch.multinomial(p, 1, generator=generator).T.to(row.device)  # (1, T)
        loss = losses.cross_entropy(logits, drawn).sum()
        for f, gradient in zip(fisher, torch.autograd.grad(loss, list(model.parameters()))):
            f += gradient ** 2 / tokens.numel()
    return fisher


def fisher_of_base(base, world, settings, seed):
    """The diagonal Fisher on 256 rows of general text: EWC needs some of it, too."""
    generator = torch.Generator().manual_seed(seed)
    tokens = data.windows(world.general, 256, settings.block_size, generator)[:, :-1]
    return diagonal_fisher(base, tokens, generator)


# --- a part of the weights -----------------------------------------------------------------------

PARTS = {"embedding": "embedding", "attention": "attn", "mlp": "mlp", "last block": None}


def only(part):
    """Cross-entropy on domain text that trains only the weights with `part` in their name."""
    def method(model, base, batch, settings):
        for name, weight in model.named_parameters():
            weight.requires_grad_((part or f"blocks.{len(model.blocks) - 1}.") in name)
        ce = losses.mean_cross_entropy(model(batch.tokens), batch.targets)
        return ce, ce, torch.zeros(())
    return method


# prepare(base, world, settings, seed) gives a fifth argument of the loss. l2sp and ewc have no
# weight decay: it would pull the weights to zero instead of to the base.
OTHER_METHODS = {
    "argmax": dict(loss=best_token, reads_general=True),
    "sampled": dict(loss=sampled_token, reads_general=True,
                    prepare=lambda base, world, settings, seed:
                    torch.Generator(settings.device).manual_seed(seed)),
    "likely_tokens": dict(loss=likely_tokens, reads_general=True),
    "answers_only": dict(loss=answers_only, reads_general=True, prepare=marks_of),
    "ce_and_kl": dict(loss=ce_and_kl, reads_general=True),
    **{f"stored {k}": dict(loss=stored(k), reads_general=True) for k in (8, 64)},
    "domain_kl": dict(loss=domain_kl),
    "asft": dict(loss=asft),
    "disc": dict(loss=disc),
    "masked_kl": dict(loss=masked_kl),
    "l2sp": dict(loss=l2sp, weight_decay=0.0),
    "ewc": dict(loss=ewc, weight_decay=0.0, prepare=fisher_of_base),
    **{f"ce, {part}": dict(loss=only(weights)) for part, weights in PARTS.items()},
}
