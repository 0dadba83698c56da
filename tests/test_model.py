import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from model import GPT, GPTConfig, add_lora, merge_lora, rotary_angles, rotate

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16)


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(SMALL)


def test_the_shape_the_first_loss_and_the_tied_embedding():
    """A new model gives all V tokens about the same probability: its loss is log V."""
    model = small_model()
    tokens, targets = torch.randint(11, (2, 100, 8))
    logits = model(tokens)
    assert logits.shape == (100, 8, 11)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert loss == pytest.approx(math.log(11), abs=0.05)
    assert model.head.weight is model.token_embedding.weight


def test_the_product_of_query_and_key_depends_on_their_distance_and_no_two_look_alike():
    q, k = torch.randn(2, 16)
    angles = rotary_angles(40, 16)
    at = [rotate(x.expand(40, 1, 16), angles).squeeze(1) for x in (q, k)]  # (T, hs) each
    products = at[0] @ at[1].T  # (T, T)
    for distance in (0, 1, 5, 30):
        along = products.diagonal(-distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert not torch.allclose(products[5, 4], products[6, 4], atol=1e-3)
    assert torch.allclose(at[0].norm(dim=1), q.norm().expand(40), atol=1e-4)
    for block_size in (64, 1024, 8192):  # the slowest rotation is less than a turn
        cos = rotary_angles(block_size, 16)[0, :, 0, 7]  # (T,)
        assert (cos.diff() <= 0).all()


def test_position_reaches_the_model():
    """One layer without positions could not tell the order of the tokens; two layers could."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, n_layer=1))
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 4]])
    assert not torch.allclose(model(one)[0, -1], model(other)[0, -1], atol=1e-5)


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


def test_generate_is_greedy_or_sampled_and_stops_when_every_row_has():
    model = small_model()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    greedy = model.generate(prompt, 12, temperature=0)  # longer than the block: the window slides
    assert greedy.shape == (2, 15) and torch.equal(greedy[:, :3], prompt)
    assert greedy[0, 3] == model(prompt)[0, -1].argmax()

    def sampled(seed, temperature=1.0):
        return model.generate(prompt, 12, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(0), sampled(0)) and not torch.equal(sampled(0), sampled(1))
    assert torch.equal(sampled(0, temperature=1e-4), greedy)
    stop = greedy[0, 3].item()  # the first row stops at once, the second one never
    assert stop not in greedy[1, 3:8]
    for rows, end in ((greedy[:1], 4), (greedy, 8)):
        stopped = model.generate(rows[:, :3], 5, temperature=0, stop=stop)
        assert torch.equal(stopped, rows[:, :end])


def test_bad_sizes_are_refused():
    for n_embd in (10, 12):  # heads need pairs of channels
        with pytest.raises(ValueError, match="n_embd.*n_head"):
            GPTConfig(n_embd=n_embd, n_head=4)
    with pytest.raises(ValueError, match="block_size, 8"):
        small_model()(torch.zeros(1, 9, dtype=torch.int64))


def test_lora_starts_as_nothing_is_up_times_down_and_merges_into_a_plain_model():
    model, tokens = small_model(), torch.randint(SMALL.vocab_size, (2, 8))
    before, layer = model(tokens), model.blocks[0].attn.proj
    W = layer.weight.detach().clone()
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, rank=2)
    assert torch.equal(model(tokens), before)
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.rpartition(".")[2] for name in learnt} == {"up", "down"}
    assert len(learnt) == 2 * (4 * SMALL.n_layer + 1)  # head and embedding share theirs

    for weight in learnt.values():
        torch.nn.init.normal_(weight)
    after, lora = model(tokens), layer.parametrizations.weight[0]
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.allclose(layer.weight, W + torch.einsum("or,ri->oi", lora.up, lora.down))

    plain = merge_lora(model)
    assert torch.allclose(plain(tokens), after, atol=1e-5)
    assert set(plain.state_dict()) == set(GPT(SMALL).state_dict())
    assert plain.head.weight is plain.token_embedding.weight
    assert is_parametrized(model.head)  # the model stays as it is
