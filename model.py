"""The GPT: a decoder-only Transformer after GPT-2, small enough to read in one go.

Tokens go in, one row of logits per position comes out. Nothing in this file knows about MoL: any
language model that maps tokens (B, T) to logits (B, T, V) could stand in its place.

Letters in the margin: B sequences, T positions, V vocabulary, C = n_embd channels, nh heads of hs = C / nh.
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
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}; it must be divisible by n_head, {self.n_head}")


class Attention(nn.Module):
    """Causal self-attention: every position looks at itself and at what came before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class Block(nn.Module):
    """One layer: attention mixes positions, the MLP works on each alone; both add to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = nn.ModuleDict({
            "up": nn.Linear(config.n_embd, 4 * config.n_embd, bias=False),
            "proj": nn.Linear(4 * config.n_embd, config.n_embd, bias=False),
        })

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp["proj"](F.gelu(self.mlp["up"](self.ln_2(x))))
        return x  # (B, T, C)


class LoRA(nn.Module):
    """A low-rank change beside a frozen matrix: W + up @ down (arXiv 2106.09685, eq. 3, with alpha = r).

    `up` starts at zero, so at first the layer is what it was; with `on` False it is that again.
    """

    def __init__(self, weight, rank):
        super().__init__()
        n_out, n_in = weight.shape
        self.down = nn.Parameter((torch.randn(rank, n_in) / math.sqrt(n_in)).to(weight.device))
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))
        self.on = True

    def forward(self, weight):
        return weight + self.up @ self.down if self.on else weight  # (out, in)


class GPT(nn.Module):
    """GPT(config)(tokens (B, T)) -> logits (B, T, V), in nats before normalisation.

    logits[:, t] predicts the token after position t. Raises ValueError for a sequence longer than block_size.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # tied: one matrix reads tokens and writes them

        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Each block adds to the residual stream twice; the smaller start keeps it from growing with depth.
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("proj.weight") else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)

    def forward(self, tokens):
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size, {self.config.block_size}")
        positions = torch.arange(T, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))  # (B, T, V)

    def add_lora(self, rank):
        """Freeze the model and put an adapter beside every matrix but the positions': from now on only those learn."""
        self.requires_grad_(False)
        for layer in [self.token_embedding, *(layer for layer in self.blocks.modules() if isinstance(layer, nn.Linear))]:
            parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
        adapter, = self.token_embedding.parametrizations.weight
        parametrize.register_parametrization(self.head, "weight", adapter)  # tied, and stays so

    def without_lora(self, tokens):
        """The logits (B, T, V) of the model as it was before add_lora: the base, with no second copy of its weights."""
        adapters = [module for module in self.modules() if isinstance(module, LoRA)]
        for adapter in adapters:
            adapter.on = False
        try:
            return self(tokens)
        finally:
            for adapter in adapters:
                adapter.on = True

    def merge_lora(self):
        """Add every adapter into its matrix: the same function, and a plain GPT again."""
        for layer in [layer for layer in self.modules() if parametrize.is_parametrized(layer)]:
            # The head is the embedding, which comes first: to merge it too would add the adapter twice.
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=layer is not self.head)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, generator=None, stop=None):
        """Continue tokens (B, T) by max_new_tokens sampled ones -> (B, T + new).

        temperature 0 is greedy; top_k keeps only the k likeliest tokens. Each step sees the last block_size
        tokens. With `stop`, a token id, generation ends as soon as every row has produced it.
        """
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.block_size:])[:, -1].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                    logits = logits.masked_fill(logits < kth, -torch.inf)
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)  # (B, 1)
            tokens = torch.cat([tokens, new], dim=1)
            stopped |= new[:, 0] == stop if stop is not None else False
            if stopped.all():
                break
        return tokens
