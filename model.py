"""The GPT: a decoder-only Transformer like GPT-2, with rotary positions. LoRA is at the end.

The model maps tokens (B, T) to logits (B, T, V). Nothing in this file knows about MoL.
Shapes: B sequences, T positions, V vocabulary, C = n_embd channels, nh heads of size hs = C / nh.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


@dataclass
class GPTConfig:
    vocab_size: int = 512
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 8
    n_embd: int = 128

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd}; it must be a multiple of twice n_head")


def rotary_angles(block_size, head_size, device=None):
    """Cosines and sines of the rotation angles of each position -> (2, T, 1, hs).

    Rotary positions (arXiv 2104.09864) rotate pairs of channels. Position t rotates pair i by the
    angle t / c^(2i / hs). The product of a query at t with a key at s then depends only on t - s,
    so windows may start anywhere in a document. Longer texts need slower rotations, a larger c.
    """
    c = 100.0 * max(1, block_size / 64)
    pairs = torch.arange(0, head_size, 2, device=device)
    positions = torch.arange(block_size, device=device)
    angles = torch.outer(positions, c ** (-pairs / head_size))  # (T, hs / 2)
    cos, sin = angles.cos(), angles.sin()
    both = torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])  # (2, T, hs)
    return both.unsqueeze(2)  # the same for every head


def rotate(x, angles):
    """Rotate queries or keys (B, T, nh, hs) by position; channels i and i + hs / 2 are a pair."""
    cos, sin = angles  # (T, 1, hs) each
    other = x.roll(x.shape[-1] // 2, dims=-1)  # (a, b) -> (b, a); sin has the signs
    # x * cos + other * sin. The committed runs used addcmul, which rounds differently.
    return torch.addcmul(x * cos, other, sin)


class Attention(nn.Module):
    """Causal self-attention: each position attends to itself and to earlier positions."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, angles):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(dim=2)
        q, k = rotate(q, angles), rotate(k, angles)  # (B, T, nh, hs) each, as v
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = nn.ModuleDict({
            "up": nn.Linear(config.n_embd, 4 * config.n_embd, bias=False),
            "proj": nn.Linear(4 * config.n_embd, config.n_embd, bias=False),
        })

    def forward(self, x, angles):
        x = x + self.attn(self.ln_1(x), angles)
        x = x + self.mlp["proj"](self.mlp["up"](self.ln_2(x)).relu_())
        return x  # (B, T, C)


class GPT(nn.Module):
    """GPT(config)(tokens (B, T)) -> logits (B, T, V); logits[:, t] predicts the token at t + 1.

    Raises ValueError for a sequence longer than block_size.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # tied

        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # As in GPT-2: each block adds to the residual stream twice, and the variance of the
                # stream should not grow with depth.
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)

    def forward(self, tokens):
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size, {self.config.block_size}")
        x = self.token_embedding(tokens)  # (B, T, C)
        head_size = self.config.n_embd // self.config.n_head
        angles = rotary_angles(self.config.block_size, head_size, x.device)[:, :T].to(x.dtype)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.ln_f(x))  # (B, T, V)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, generator=None, stop=-1):
        """Append up to max_new_tokens sampled tokens to tokens (B, T). Temperature 0 is greedy.

        Generation ends early when every row has produced the token id `stop`.
        """
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.block_size:])[:, -1].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                p = F.softmax(logits / temperature, dim=-1)
                new = torch.multinomial(p, 1, generator=generator)  # (B, 1)
            tokens = torch.cat([tokens, new], dim=1)
            stopped |= new[:, 0] == stop
            if stopped.all():
                break
        return tokens


# --- LoRA: train a low-rank change of the weights ------------------------------------------------

class LoRA(nn.Module):
    """A trained low-rank change of a frozen matrix: W -> W + up @ down, (out, in) both.

    This is eq. 3 of arXiv 2106.09685 with alpha = r. `up` starts at zero, so that nothing changes
    at first.
    """

    def __init__(self, W, rank):
        super().__init__()
        down = torch.randn(rank, W.shape[1]) / math.sqrt(W.shape[1])  # the same on every device
        self.down = nn.Parameter(down.to(W))
        self.up = nn.Parameter(W.new_zeros(W.shape[0], rank))

    def forward(self, W):
        return W + self.up @ self.down


def add_lora(model, rank):
    """Freeze a GPT and add an adapter to each of its matrices, in place. Only adapters are trained.

    Raises ValueError if the model has adapters already.
    """
    if parametrize.is_parametrized(model.head):
        raise ValueError("the model has adapters already; call merge_lora first")
    model.requires_grad_(False)
    for layer in [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    tied = LoRA(model.head.weight, rank)
    for layer in (model.token_embedding, model.head):
        parametrize.register_parametrization(layer, "weight", tied)


@torch.no_grad()
def merge_lora(model):
    """A model with adapters -> a new GPT without adapters that computes the same logits."""
    plain = GPT(model.config).to(model.ln_f.weight)
    for name, layer in plain.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            layer.weight.copy_(model.get_submodule(name).weight)
    return plain
