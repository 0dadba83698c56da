import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(SMALL)


def test_shape_and_first_loss():
    """A fresh model guesses evenly: its loss is that of a fair die with V sides."""
    model = small_model()
    tokens, targets = torch.randint(11, (2, 4, 8))
    logits = model(tokens)
    assert logits.shape == (4, 8, 11)
    assert F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() == pytest.approx(math.log(11), abs=0.05)


def test_a_later_token_never_changes_an_earlier_logit():
    model = small_model()
    tokens = torch.randint(11, (1, 8))
    before = model(tokens)
    for t in range(8):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_it_overfits_one_batch():
    model = small_model()
    tokens = torch.randint(11, (2, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_embeddings_are_tied():
    model = small_model()
    assert model.head.weight is model.token_embedding.weight
    assert len(model.state_dict()) == 1 + sum(1 for _ in model.parameters())


def test_generate():
    model = small_model()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = model.generate(prompt, 12, temperature=0)  # longer than the block: the window slides
    assert greedy.shape == (2, 15) and torch.equal(greedy[:, :3], prompt)
    assert greedy[0, 3] == model(prompt)[0, -1].argmax()
    assert torch.equal(model.generate(prompt, 12, top_k=1), greedy)

    def sampled(seed, **options):
        return model.generate(prompt, 12, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sampled(0), sampled(0)) and not torch.equal(sampled(0), sampled(1))
    top = model(prompt)[:, -1].topk(2).indices
    first = torch.stack([sampled(seed, top_k=2)[:, 3] for seed in range(20)], dim=1)  # (2, 20)
    assert all(set(row.tolist()) == set(best.tolist()) for row, best in zip(first, top))


def test_generate_stops():
    model = small_model()
    prompt = torch.tensor([[1, 2, 3]])
    free = model.generate(prompt, 5, temperature=0)
    stopped = model.generate(prompt, 5, temperature=0, stop=free[0, 3].item())
    assert torch.equal(stopped, free[:, :4])


@pytest.mark.parametrize("options, told", [({"n_embd": 10, "n_head": 4}, "divisible by n_head"), ({"n_layer": 0}, "n_layer")])
def test_bad_config(options, told):
    with pytest.raises(ValueError, match=told):
        GPTConfig(**options)


def test_bad_arguments():
    model = small_model()
    with pytest.raises(ValueError, match="block_size, 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature"):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), 1, temperature=-1)
    with pytest.raises(ValueError, match="top_k"):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), 1, top_k=0)


def test_lora_starts_at_zero_and_comes_off():
    """With fresh adapters the model is what it was; trained, it is another, and with the adapters off the base again."""
    model, tokens = GPT(SMALL), torch.randint(SMALL.vocab_size, (2, 8))
    before = model(tokens)
    model.add_lora(rank=2)
    assert torch.equal(model(tokens), before)
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(name.rpartition(".")[2] for name in learnt) == {"up", "down"} and len(learnt) == 2 * (4 * SMALL.n_layer + 1)
    optimizer = torch.optim.SGD(learnt.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    after = model(tokens)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(model.without_lora(tokens), before)
    assert torch.equal(model(tokens), after)  # and on again
    model.merge_lora()
    assert torch.allclose(model(tokens), after, atol=1e-5)
    assert set(model.state_dict()) == set(GPT(SMALL).state_dict())
    assert model.head.weight is model.token_embedding.weight


def test_lora_is_up_times_down():
    model = GPT(SMALL)
    weight = model.blocks[0].attn.proj.weight.detach().clone()
    model.add_lora(rank=2)
    layer = model.blocks[0].attn.proj
    adapter = layer.parametrizations.weight[0]
    adapter.up.data = torch.randn_like(adapter.up)
    assert torch.allclose(layer.weight, weight + torch.einsum("or,ri->oi", adapter.up, adapter.down))
