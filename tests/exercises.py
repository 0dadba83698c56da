"""Eight functions to write, from easy to hard, and one table to fill by hand.

    python -m pytest tests/test_exercises.py -k mol      judges one
    python -m pytest tests/test_exercises.py             judges all

Each takes at most ten lines. You may use torch, and from the fourth function on also data.windows
and losses.log_probs, cross_entropy, kl_divergence and per_sequence. Shapes: B sequences, G of them
general, T positions, V vocabulary. Losses are in nats. The shapes are always right.
"""

import torch  # noqa: F401

import data  # noqa: F401
import losses

PADDING = losses.PADDING  # -100, the target of a padding position


def row_ce(logits, targets):
    """Cross-entropy of one row: logits (T, V), targets (T,) -> the mean of -log p(target), scalar.

    log p is the logarithm of the softmax of the logits.
    """
    raise NotImplementedError


def reverse_kl(logits, base_logits):
    """KL[p || p_0] at each position: logits of the model and the base, (T, V) twice -> (T,).

    The sum over the vocabulary of p (log p - log p_0). p is the model, p_0 the base.
    """
    raise NotImplementedError


def padded_mean(nats, targets):
    """The mean over the tokens of each sequence: nats (B, T), targets (B, T) -> (B,).

    Where the target is PADDING there is no token, whatever nats says. A sequence of padding has 0.
    """
    raise NotImplementedError


def mol(logits, targets, is_domain, base_logits):
    """MoL -> scalar. Four lines are enough.

    logits (B, T, V), targets (B, T), is_domain (B,) bool, base_logits (G, T, V) of the general rows
    only. A domain row has the cross-entropy of its targets, a general row the KL to the base; both
    are means over the tokens of the row. The loss is the sum over all rows divided by B.
    """
    raise NotImplementedError


def kl_push(logits, base_logits):
    """How reverse KL pushes each logit: (T, V) twice -> (T, V), minus the gradient of the KL.

    Write the formula, without autograd. Which words does it not need?
    """
    raise NotImplementedError


def soft_replay(logits, base_logits):
    """Replay with the same targets as forward KL: logits of model and base, (T, V) twice -> (T,).

    The cross-entropy whose targets are the base's probabilities, not the text's tokens. Its
    gradient is that of forward KL. Then why is its value higher?
    """
    raise NotImplementedError


def batch_1_to_2(domain, general, n_general, block_size, generator):
    """A batch with two domain rows per general row -> tokens, targets, is_domain.

    domain (N,) and general (M,) are the tokens of two texts. First come the domain rows, drawn by
    data.windows, then n_general general rows. tokens and targets are (B, block_size), is_domain
    (B,) bool. The target of a token is the next one.
    """
    raise NotImplementedError


def likeliest_kl(logits, base_logits, k=8):
    """KL[p || p_0] with only k of the base's probabilities per position: (T, V) twice -> (T,).

    Keep the k tokens that the base finds likeliest. All others become one more word, for the model
    and for the base: its probability is the sum of theirs. So it is never above the full KL.
    """
    raise NotImplementedError


# By hand, to two digits: the push of each loss on three words, that is minus the gradient with
# respect to their logits. The text's token is the second word. CE: 1 for the text's token, else 0,
# minus p. Reverse KL: -p (log p - log p_0 - KL). Forward KL: p_0 - p. autograd confirms.
TABLE = {
    # p_0, p: {loss: the three pushes}
    "at the base": ((0.50, 0.25, 0.25), (0.50, 0.25, 0.25),
                    {"CE": None, "reverse": None, "forward": None}),
    "off it": ((0.50, 0.25, 0.25), (0.25, 0.50, 0.25),
               {"CE": None, "reverse": None, "forward": None}),
    "far off": ((0.96, 0.02, 0.02), (0.001, 0.998, 0.001),
                {"CE": None, "reverse": None, "forward": None}),
}
