"""recipe.py and hidden.py, on tiny random models of Hugging Face, and the example.

Skipped without transformers, accelerate and peft. CI runs it in an environment of its own.
"""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PromptTuningConfig, get_peft_model  # noqa: E402
from transformers import (AutoModelForCausalLM, PreTrainedTokenizerFast,  # noqa: E402
                          TrainingArguments, default_data_collator)

from losses import PADDING, kl_divergence, mixture_of_losses  # noqa: E402
from plots.huggingface import hidden as hidden_module  # noqa: E402
from plots.huggingface.hidden import completed, mixture_from_hidden  # noqa: E402
from plots.huggingface.recipe import MolTrainer, collate, mol_loss, store  # noqa: E402

ROOT = Path(__file__).parent.parent
V, END = 50, 49
IS_DOMAIN = torch.tensor([True, False, False, True])


def hidden_batch(dtype=torch.float64):
    """Hidden states and heads of a model and of a narrower base, and targets with padding."""
    g = torch.Generator().manual_seed(0)
    hidden, head, base_hidden, base_head = (
        torch.randn(*shape, generator=g, dtype=dtype)
        for shape in ((4, 5, 6), (7, 6), (4, 5, 3), (7, 3)))
    targets = torch.randint(7, (4, 5), generator=g)
    targets[0, 3:] = targets[2, 4:] = targets[3] = PADDING
    return hidden.requires_grad_(), head.requires_grad_(), base_hidden, base_head, targets


def from_hidden(hidden, head, base_hidden, base_head, targets, is_domain=IS_DOMAIN, **options):
    return mixture_from_hidden(hidden, head, targets, is_domain, base_hidden[~is_domain], base_head,
                               **options)


def from_logits(hidden, head, base_hidden, base_head, targets, is_domain=IS_DOMAIN, **options):
    return mixture_of_losses(hidden @ head.T, targets, is_domain,
                             base_hidden[~is_domain] @ base_head.T, **options)


def assert_same(found, expected, *wanted, **tolerance):
    """The loss and its parts, and the gradients of the loss, here scaled by 3."""
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(
        3 * parts[0], wanted, allow_unused=True, materialize_grads=True)
        for parts in (found, expected)), **tolerance)


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("direction", ["reverse", "forward", "mean"])
@pytest.mark.parametrize("domain_rows, strength", [
    ([0, 3], 0.7), ([0, 1, 2, 3], 1), ([], 2), ([0], 0)])
def test_hidden_states_give_the_same_losses_and_gradients(domain_rows, strength, direction, chunk):
    *batch, is_domain = *hidden_batch(), torch.zeros(4, dtype=torch.bool)
    is_domain[domain_rows] = True
    options = {"is_domain": is_domain, "direction": direction, "strength": strength}
    assert_same(from_hidden(*batch, chunk=chunk, **options), from_logits(*batch, **options),
                *batch[:2])


def test_autocast_changes_nothing_and_the_head_may_be_in_bfloat16():
    """The gradient of the head is summed in float32 and rounded once."""
    hidden, head, *rest = hidden_batch(torch.float32)
    expected = from_hidden(hidden, head, *rest, chunk=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(from_hidden(hidden, head, *rest, chunk=1), expected, hidden, head)
    half = head.detach().bfloat16().requires_grad_()
    whole = half.detach().float().requires_grad_()
    (of_half,), (of_whole,) = (torch.autograd.grad(from_hidden(hidden, x, *rest, chunk=1)[0], x)
                               for x in (half, whole))
    assert of_half.dtype == torch.bfloat16 and of_half.equal(of_whole.bfloat16())


def test_logits_exist_once_and_never_whole(monkeypatch):
    """The losses see a chunk of the tokens that are not padding. Only gradients are kept."""
    sizes, real = [], hidden_module.softmax_
    monkeypatch.setattr(hidden_module, "softmax_", lambda x: sizes.append(x.numel()) or real(x))
    loss, *_ = from_hidden(*hidden_batch(), chunk=2)
    assert max(sizes) == 2 * 7 and sum(sizes) == (3 + 2 * 9) * 7
    assert [x.shape for x in loss.grad_fn.gradients] == [(4, 5, 6), (7, 6)]
    hidden, targets = torch.zeros(1, 300, 1), torch.zeros(1, 300, dtype=torch.int64)
    for vocab_size, chunk in ((2**16, 128), (2**18, 64)):  # 8 million logits, or 64 tokens
        sizes.clear()
        mixture_from_hidden(hidden[:, :2 * chunk], torch.zeros(vocab_size, 1),
                            targets[:, :2 * chunk], torch.ones(1))
        assert sizes == [chunk * vocab_size] * 2 + [0, 0]  # there are no general rows


def test_no_gradient_is_computed_that_nobody_wants(monkeypatch):
    """Of a frozen head, of the base, in evaluation, and for padding, even if it is not a number."""
    hidden, head, *rest, targets = hidden_batch()
    known, apply = [], hidden_module.Known.apply
    monkeypatch.setattr(hidden_module.Known, "apply", lambda *given: known.append(
        [x is not None and bool(x.any()) for x in given[3:]]) or apply(*given))
    assert_same(from_hidden(hidden, head.detach(), *rest, targets),
                from_logits(hidden, head.detach(), *rest, targets), hidden)
    with torch.no_grad():
        assert not from_hidden(hidden, head, *rest, targets)[0].requires_grad
    assert known == [[True, False], [False, False]]
    loss, ce, kl = from_hidden(hidden, head, *(x.requires_grad_() for x in rest), targets)
    loss.backward()
    assert not (ce.requires_grad or kl.requires_grad or rest[0].grad or rest[1].grad)
    padding = (targets == PADDING).unsqueeze(-1)
    nan = hidden.masked_fill(padding, math.nan), rest[0].masked_fill(padding, math.nan)
    assert_same(from_hidden(nan[0], head, nan[1], rest[1], targets),
                from_logits(hidden, head, *rest, targets), hidden, head)


@pytest.mark.parametrize("direction", ["reverse", "forward", "mean"])
@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_stored_tokens_give_the_kl_over_them_and_any_other_token(k, direction):
    """With all tokens, or all but one, of the vocabulary it is the whole KL."""
    hidden, head, base_hidden, base_head, targets = batch = hidden_batch()
    logits, base_logits = hidden @ head.T, base_hidden @ base_head.T
    log_q, tokens = base_logits.log_softmax(-1).topk(k)

    def outcomes(logits):
        """The log-probabilities of the known tokens, and of any other token if there is one."""
        known = logits.log_softmax(-1).gather(-1, tokens)
        rest = (1 - known.exp().sum(-1, keepdim=True)).log()
        return torch.cat([known, rest][:1 + (k < 7)], dim=-1)

    def found():
        return mixture_from_hidden(hidden, head, targets, IS_DOMAIN, direction=direction, chunk=2,
                                   stored=(tokens[~IS_DOMAIN], log_q[~IS_DOMAIN]))

    ce = from_logits(*batch)[1]
    kl = mixture_of_losses(outcomes(logits), targets.clamp(max=0), IS_DOMAIN,
                           outcomes(base_logits)[~IS_DOMAIN], direction=direction)[2]
    assert_same(found(), (ce + kl, ce, kl), hidden, head)
    if k > 5:
        assert_same(found(), from_logits(*batch, direction=direction), hidden, head)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_hidden_states_of_any_layout_and_words_of_no_probability(direction):
    """A transposed tensor, and a word that neither model, the model or the base can predict."""
    hidden, head, base_hidden, base_head, targets = hidden_batch()
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_same(from_hidden(turned, head, base_hidden, base_head, targets, chunk=2),
                from_logits(turned, head, base_hidden, base_head, targets), turned, head)
    logits, base_logits = torch.randn(2, 4, 5, 7).double()
    for some in ((logits, base_logits), (logits,), (base_logits,)):
        for x in some:
            x[..., 6] = -math.inf
        batch = logits, base_logits[~IS_DOMAIN], targets.clamp(max=5)
        found = mixture_from_hidden(batch[0], None, batch[2], IS_DOMAIN, batch[1], None, direction)
        expected = mixture_of_losses(batch[0], batch[2], IS_DOMAIN, batch[1], direction)
        assert all(a == pytest.approx(b) for a, b in zip(found, expected))
        logits[..., 6], base_logits[..., 6] = 0.0, 0.0


def test_an_infinite_kl_of_strength_0_is_left_out():
    hidden, head, _, _, targets = hidden_batch()
    stored = torch.zeros(2, 5, 1).int(), torch.full((2, 5, 1), -math.inf)
    loss, ce, kl = mixture_from_hidden(hidden, head, targets, IS_DOMAIN, strength=0, stored=stored)
    loss.backward()
    assert loss == ce and kl == math.inf and hidden.grad.isfinite().all()


def test_completed_is_a_distribution_also_if_nothing_is_left():
    """Rounded to float16, the known tokens can have more than all of the mass."""
    log_p = torch.randn(3, 7).log_softmax(-1)
    for log_q in (torch.tensor([0.0, -20]), torch.tensor([0.5005, 0.5005]).log()):
        found = completed(log_p, torch.tensor([[2, 4]] * 3).int(), log_q.half().expand(3, 2))
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert found.exp().sum(-1).sub(1).abs().max() < 2e-3
        assert (kl_divergence(log_p, found) < 30).all()


@pytest.mark.parametrize("told, changed", [
    ("logits begins", {"hidden": torch.randn(4, 9, 6)}),
    ("logits begins", {"hidden": torch.randn(5, 5, 6)}),
    ("is_domain begins", {"is_domain": IS_DOMAIN[:1]}),
    ("is_domain begins", {"is_domain": IS_DOMAIN[:, None]}),
    ("base_logits begins", {"base_hidden": torch.randn(2, 1, 3)}),
    ("base_logits begins", {"base_hidden": None}),
    ("base_logits begins", {"stored": [torch.zeros(2, 1, 3)] * 2}),
    ("have the same shape", {"base_head": torch.randn(6, 3)}),
    ("direction is 'up'", {"direction": "up"}),
    ("targets must be below 7", {"targets": torch.full((4, 5), 7)})])
def test_every_shape_is_checked(told, changed):
    """Some of these gave a number once."""
    names = "hidden", "head", "base_hidden", "base_head", "targets", "is_domain"
    given = dict(zip(names, (*hidden_batch(), IS_DOMAIN)))
    given["base_hidden"] = given["base_hidden"][~IS_DOMAIN]
    with pytest.raises(ValueError, match=told):
        mixture_from_hidden(**given | changed)


@pytest.mark.parametrize("rows, tokens", [(0, 5), (4, 0)])
def test_no_hidden_states_have_loss_zero(rows, tokens):
    hidden, head, _, _, targets = hidden_batch()
    loss, ce, kl = mixture_from_hidden(hidden[:rows, :tokens], head, targets[:rows, :tokens],
                                       torch.ones(rows))
    loss.backward()
    assert loss == ce == kl == 0 and head.grad.eq(0).all()


SMALL = {
    "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "initializer_range": 0.5, "init_std": 0.5, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_groups": 1,
    "mamba_n_heads": 2, "mamba_n_groups": 1, "mamba_d_state": 8}
# Their logits are computed whole: Phi has a bias in the head, Gemma 2 caps, the others scale.
WHOLE = "Phi", "Gemma2", "Cohere", "Granite", "FalconH1"
REFUSED = "Rwkv", "xLSTM", "RecurrentGemma", "Roberta", "Bart"  # with padding on the left
ARCHITECTURES = {
    **dict.fromkeys(("GPT2", "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3Text", "Phi",
                     "Phi3", "Olmo2", "SmolLM3", "Mixtral", "Cohere", "GPTNeoX", "GptOss", "Glm4",
                     "Bloom"), {}),
    "Gemma2": {"final_logit_softcapping": 3.0}, "Granite": {"logits_scaling": 1.01},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 8}, "Mamba": {"state_size": 4},
    "Mamba2": {"num_heads": 4, "state_size": 4}, "Llama4Text": {"intermediate_size_mlp": 32},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "FalconH1": {"lm_head_multiplier": 0.7, "mamba_d_ssm": 16, "mamba_d_head": 8},
    "Qwen3Next": {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                  "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
                  "layer_types": ["linear_attention", "full_attention"]},
    "DeepseekV3": {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "head_dim": 4,
                   "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1,
                   "topk_group": 1, "first_k_dense_replace": 1},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "Jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "Rwkv": {"attention_hidden_size": 16}, "xLSTM": {"num_heads": 2},
    "RecurrentGemma": {"lru_width": 16}, "Roberta": {"is_decoder": True},
    "Bart": {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2,
             "decoder_ffn_dim": 32, "is_encoder_decoder": False}}


def tiny(name, seed=0, **more):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")
    return AutoModelForCausalLM.from_config(config(**SMALL | ARCHITECTURES[name] | more))


def llama(seed=0, **more):
    return tiny("Llama", seed, pad_token_id=None, **more)


def pairs_of_rows(count=8, seed=0):
    """Pairs of a domain row and a general row of different lengths, with the end token last."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(END, (length,), generator=g).tolist() + [END]
            for length in torch.randint(4, 9, (2 * count,), generator=g).tolist()]
    return [((domain, True), (general, False)) for domain, general in zip(rows[::2], rows[1::2])]


def trainer(folder, model, pairs=None, base=None, micro=2, accumulate=1, options={}, **more):
    """options are of MolTrainer, more are TrainingArguments."""
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, max_grad_norm=0.0, disable_tqdm=True,
        **{"save_strategy": "no", "max_steps": 1, "learning_rate": 0.0, **more})
    return MolTrainer(model, args, **{"data_collator": collate, "base": base,
                                      "train_dataset": pairs or pairs_of_rows(), **options})


def by_hand(model, base, batch, **options):
    """MoL of a batch row by row, each cut to its own length, so that there is no padding."""
    losses = []
    for tokens, mask, labels, is_domain in zip(batch["input_ids"], batch["attention_mask"].bool(),
                                               batch["labels"], batch["is_domain"][:, None]):
        row = tokens[mask][None]
        base_logits = None if is_domain else base(row).logits[:, :-1]
        losses.append(mixture_of_losses(model(row).logits[:, :-1], labels[mask][None, 1:],
                                        is_domain, base_logits, **options)[0])
    return sum(losses) / len(losses)


def padded_on_the_left(batch):
    """With the token that ends each row, which is a target."""
    for i, n in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name in ("input_ids", "labels", "attention_mask"):
            batch[name][i] = batch[name][i].roll(-n)
    batch["input_ids"][batch["attention_mask"] == 0] = END
    return batch


def chat(rows):
    """Dicts, as of a dataset with columns, where the labels of a prompt are -100."""
    return [{"input_ids": tokens, "labels": [PADDING] * 3 + tokens[3:], "is_domain": flag}
            for tokens, flag in rows]


@pytest.mark.parametrize("items", [
    [chat(pair) for pair in pairs_of_rows(2)], chat(pairs_of_rows(2)[0]),
    [pair[:1] for pair in pairs_of_rows(3)], [pair[1:] for pair in pairs_of_rows(3)]])
def test_the_loss_is_mol_by_hand(items, tmp_path):
    """Padding on the right may have the token that ends each row. Labels may be left out."""
    model, base, batch = llama(0).eval(), llama(1).eval(), collate(items)
    batch["input_ids"][batch["attention_mask"] == 0] = END
    options = {"strength": 3.0, "direction": "forward"}
    the_trainer = trainer(tmp_path, model, base=base, options=options | {"chunk": 2})
    torch.testing.assert_close(the_trainer.compute_loss(model, batch),
                               by_hand(model, base, batch, **options))
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, PADDING)
    expected = by_hand(model, base, batch)
    del batch["labels"]
    torch.testing.assert_close(mol_loss(model, base, batch)[0], expected)


def test_documents_in_one_row_are_apart_if_their_positions_begin_again():
    model, base = llama(0).eval(), llama(1).eval()
    documents = [row for pair in pairs_of_rows(2) for row in pair]
    rows = [([t for row, _ in documents for t in row], is_domain) for is_domain in (True, False)]
    positions = torch.cat([torch.arange(len(row)) for row, _ in documents])
    batch = collate([rows]) | {"position_ids": positions.expand(2, -1)}
    starts = positions == 0
    batch["labels"] = batch["input_ids"].masked_fill(starts, -100)  # no token across documents
    found = mol_loss(model, base, batch)
    for part, is_domain in zip(found[1:], (True, False)):
        nats = [len(row[1:]) * by_hand(model, base, collate([((row, is_domain),)]))
                for row, _ in documents]
        torch.testing.assert_close(part, sum(nats) / (~starts).sum() / 2)
    batch["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="rows without padding"):
        mol_loss(model, base, batch)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_full_logits_or_refused(name):
    """Also with padding on the left, whatever the positions of the model are."""
    model, base = tiny(name, 0).eval(), tiny(name, 1).eval()
    padded = padded_on_the_left(collate(pairs_of_rows(2)))
    if name in REFUSED:
        with pytest.raises(ValueError, match="does not ignore padding on the left"):
            mol_loss(model, base, padded)
        return
    for batch in (collate(pairs_of_rows(2)), padded):
        assert_same([mol_loss(model, base, batch)[0]], [by_hand(model, base, batch)],
                    *model.parameters(), atol=1e-4, rtol=1e-3)
    assert model.has_plain_head == (name not in WHOLE) and model.changed_by == []


def test_logits_of_a_plain_head_never_exist_whole():
    """Neither those of the model nor those of the base: their heads do not even run. They are as
    before, also if a forward pass fails."""
    seen, models, batch = [], (llama(0).eval(), llama(1)), collate(pairs_of_rows(2))
    expected = mol_loss(*models, batch)[0]  # tries the heads
    for model in models:
        model.lm_head.register_forward_hook(lambda *given: seen.append(given[2].shape))
    assert mol_loss(*models, batch, chunk=8)[0] == expected
    assert seen == [(2, 8, 16), (1, 1, 1)]  # the hidden states of the base, the loss
    with patch.object(models[1].model, "forward", None), pytest.raises(TypeError):
        mol_loss(*models, batch)
    assert mol_loss(*models, batch)[0] == expected
    assert models[0](batch["input_ids"]).logits.shape == (*batch["input_ids"].shape, V)
    with torch.no_grad():
        models[0].lm_head.weight[0, 0] = torch.nan  # not refused as another kind of head
    assert mol_loss(*models, batch)[0].isnan()


def test_a_compiled_model_gets_the_positions(tmp_path):
    """Learned positions and padding on the left. It is compiled again for another shape only."""
    model, base = tiny("GPT2").eval(), tiny("GPT2", 1).eval()
    the_trainer = trainer(tmp_path, model, base=base, torch_compile_backend="eager")
    batch = padded_on_the_left(collate(pairs_of_rows(2)))
    compiled = the_trainer.accelerator.prepare(model)
    assert compiled is not model
    torch.testing.assert_close(the_trainer.compute_loss(compiled, batch),
                               by_hand(model, base, batch))
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    the_trainer.compute_loss(compiled, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def with_lora(model=None, trained=False, **more):
    model = get_peft_model(model or llama(0), LoraConfig(**{
        "r": 2, "target_modules": ["q_proj", "v_proj"], **more}))
    for name, weight in model.named_parameters():
        if trained and ("lora_B" in name or "lora_embedding_A" in name):
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_with_adapters_the_base_is_the_model_without_them(modules):
    """And without dropout, also while the model trains. The gradient is not lost: a backward pass
    without adapters would give none, and no error. Merged, the model says what it said before."""
    model = with_lora(trained=True, target_modules=modules, lora_dropout=0.3).eval()
    base, batch = llama(0).eval(), collate(pairs_of_rows(2))
    frozen = next(p for name, p in model.named_parameters() if "lora_B" in name)
    frozen.requires_grad_(False)
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert_same([mol_loss(model, None, batch)[0]], [by_hand(model, base, batch)], *learnt,
                atol=1e-4, rtol=1e-4)
    general = collate([pair[1:] for pair in pairs_of_rows(2)])
    assert len({mol_loss(model.train(), None, general)[0].item() for _ in range(3)}) == 3
    assert all(module.training for module in model.modules())
    assert not frozen.requires_grad and all(p.requires_grad for p in learnt)
    expected = model.eval()(batch["input_ids"]).logits
    torch.testing.assert_close(model.merge_and_unload()(batch["input_ids"]).logits, expected,
                               atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spread, more", [
    (0.5, {"trained": True}), (0.02, {"trained": True}), (0.05, {"init_lora_weights": "pissa"}),
    (0.05, {"init_lora_weights": "olora"})])
def test_adapters_that_change_the_model_are_refused_by_their_weights(spread, more, tmp_path):
    """Training that continues may have them. PiSSA and OLoRA are refused by name too."""
    plain = llama(initializer_range=spread)
    mol_loss(plain, llama(1), collate(pairs_of_rows(1)))  # what this finds out does not hold then
    model = with_lora(plain, **more)
    model.peft_config["default"].init_lora_weights = True
    with pytest.raises(ValueError, match="already change the model"):
        trainer(tmp_path, model).train()
    trainer(tmp_path, model).evaluate(pairs_of_rows(1))


def test_evaluation_has_the_same_loss_for_each_set(tmp_path, monkeypatch, caplog):
    """Of five pairs, the last is a smaller batch; of single rows, the sets are the two losses.
    Several processes would count some rows of a smaller batch twice, which is warned about."""
    model, base, pairs = llama(0).eval(), llama(1).eval(), pairs_of_rows(5, seed=3)
    sets = {"both": pairs, "domain": [pairs[0][:1]], "general": [pairs[0][1:]]}
    the_trainer = trainer(tmp_path, model, base=base, per_device_eval_batch_size=2,
                          options={"eval_dataset": sets})
    found = the_trainer.evaluate()
    for name, some in sets.items():
        assert found[f"eval_{name}_loss"] == pytest.approx(
            by_hand(model, base, collate(some)).item(), rel=1e-5)
    ce, kl = the_trainer.predict(pairs[:1]).predictions  # the parts of the loss
    assert ce + kl == pytest.approx(by_hand(model, base, collate(pairs[:1])).item(), rel=1e-5)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    for count, is_warned in ((4, False), (3, True)):
        the_trainer.evaluate(pairs[:count])
        assert ("twice" in caplog.text) == is_warned


def test_the_log_has_the_means_of_both_losses(tmp_path, caplog):
    """Per row of each kind that has targets, over all steps since the last log."""
    pairs = pairs_of_rows(8)
    pairs = [pair[i % 3 > 0:] if i % 3 else pair[:1] for i, pair in enumerate(pairs)]
    empty = (([3], True),)
    model, base = llama(0), llama(1)
    the_trainer = trainer(tmp_path, model, [*pairs[:6], empty, pairs[6], empty, empty], base,
                          max_steps=5, logging_steps=4, train_sampling_strategy="sequential")
    the_trainer.train()
    the_trainer.log(logs := {"loss": 0.0})
    assert not {"ce", "kl"} & {*logs}  # the last step had no targets
    assert "a batch has no target" in caplog.text
    logged = next(log for log in the_trainer.state.log_history if "ce" in log)
    model.eval(), base.eval()
    for name, is_domain in (("ce", True), ("kl", False)):
        rows = [(row,) for pair in pairs[:7] for row in pair if row[1] == is_domain]
        assert logged[name] == pytest.approx(by_hand(model, base, collate(rows)).item(), rel=1e-5)


@pytest.mark.parametrize("told, rows, base, options", [
    *[("an item of the dataset must be", [row] * 4, llama(1), {}) for row in (
        {"input_ids": [1, 2]}, ([1, 2], True), ([1, 2], [3, 4]))],
    ("a batch has no is_domain", [{"input_ids": [1, 2], "labels": [1, 2]}] * 4, llama(1),
     {"data_collator": default_data_collator}),
    ("MoL needs base=", None, None, {}),
    ("have the same shape", None, llama(vocab_size=60), {})])
def test_what_the_first_batch_refuses(told, rows, base, options, tmp_path):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, llama(), rows, base, options=options).train()


def from_checkpoint(folder):
    """A model saved during a training, and a copy of it as base, as in the docstring."""
    trainer(folder, llama(), base=llama(1), save_strategy="steps").train()
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-1")
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("made, more, told", [
    (lambda _: (model := llama(), model), {}, "it shares weights"),
    (lambda _: (with_lora(model := llama()), model), {}, "it shares weights"),
    (lambda _: (with_lora(init_lora_weights="pissa"), None), {}, "these change the base"),
    (lambda _: (with_lora(init_lora_weights="olora"), None), {}, "these change the base"),
    (lambda _: (with_lora(bias="lora_only"), None), {}, "these change the base"),
    (lambda _: (get_peft_model(llama(), PromptTuningConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM")), None), {}, "adapters that add no tokens"),
    (lambda _: (with_lora(llama(tie_word_embeddings=True), target_modules=["embed_tokens"],
                          ensure_weight_tying=True), None), {}, "no adapters on tied"),
    (from_checkpoint, {}, "the original model as base"),
    (lambda _: (tiny("Mixtral", output_router_logits=True), tiny("Mixtral")), {},
     "output_router_logits=False"),
    (None, {"label_smoothing_factor": 0.1}, "no label smoothing"),
    (None, {"train_sampling_strategy": "group_by_length"}, "group_by_length"),
    (None, {"options": {"compute_loss_func": print}}, "compute_loss_func"),
    (None, {"options": {"compute_metrics": print}}, "compute_metrics"),
    (lambda _: (None, llama(1)), {"options": {"model_init": lambda: llama()}}, "model_init")])
def test_what_would_make_the_loss_wrong_is_refused_at_once(made, more, told, tmp_path):
    model, base = made(tmp_path) if made else (llama(), llama(1))
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, model, base=base, **more)


def test_fsdp_1_is_refused(tmp_path):
    the_trainer = trainer(tmp_path, llama(), base=llama(1))
    the_trainer.is_fsdp_enabled = True  # and accelerate says that it is not version 2
    with pytest.raises(ValueError, match="fsdp_version 2"):
        the_trainer.refuse_what_is_wrong(llama(1))


def test_stored_rows_and_new_adapters_need_no_base(tmp_path):
    """With padding, as chats, and if all 50 tokens are stored the loss is that of the base."""
    pairs = [chat(pair) for pair in pairs_of_rows(4)]
    stored, some = ([(domain, *store(llama(1).train(), [general], k)) for domain, general in pairs]
                    for k in (V, 5))
    row = stored[0][1]
    assert row["base_tokens"].dtype == torch.int32 and row["base_log_probs"].dtype == torch.float16
    assert row["base_tokens"].shape == row["base_log_probs"].shape == (len(row["input_ids"]), V)
    model, base = llama(0).eval(), llama(1).eval()
    batch = collate(stored)
    assert (batch["attention_mask"] == 0).any()
    before = mol_loss(model, None, batch)
    torch.testing.assert_close(before, mol_loss(model, base, collate(pairs)), atol=2e-3, rtol=2e-3)
    kl = [mol_loss(tiny("Gemma2"), None, collate(rows))[2] for rows in (some, stored)]
    assert 0 < kl[0] < kl[1]  # logits computed whole
    columns = [row for pair in stored for row in pair]
    trainer(tmp_path, model, columns, max_steps=4, learning_rate=1e-3).train()
    assert mol_loss(model, base, collate(pairs))[0] < before[0]
    trainer(tmp_path, with_lora(trained=True), columns).train()  # not refused: they have a base
    for use_dora in (False, True):
        trainer(tmp_path, with_lora(use_dora=use_dora)).train()
    with pytest.raises(ValueError, match="an item of the dataset"):
        collate([stored[0], pairs[0]])  # the second general row has nothing stored


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Four micro-batches of two pairs, or one of eight. Trainer, left alone, would multiply by 4.
    The base has dropout, but no chance: it is asleep."""
    def weights(micro, accumulate):
        model, base = llama(0), tiny("GPT2").train()
        trainer(tmp_path, model, base=base, micro=micro, accumulate=accumulate, optim="sgd",
                learning_rate=1.0, lr_scheduler_type="constant").train()
        assert not base.training and not any(p.requires_grad for p in base.parameters())
        return model.state_dict()

    torch.testing.assert_close(weights(2, 4), weights(8, 1), atol=1e-6, rtol=1e-4)


def test_every_batch_is_mixed_one_to_one(tmp_path):
    """Also when they are shuffled and the last batch is smaller."""
    the_trainer = trainer(tmp_path, llama(), pairs_of_rows(11), llama(1), micro=3)
    for batch, count in zip(the_trainer.get_train_dataloader(), (3, 3, 3, 2), strict=True):
        assert batch["is_domain"].tolist() == [True, False] * count


def test_bfloat16(tmp_path, caplog):
    """The base has the same autocast as the model: with the same weights the KL is 0. Weights that
    train in bfloat16 are warned about."""
    model, batch = llama(0), collate(pairs_of_rows(4))
    the_trainer = trainer(tmp_path, model, base=copy.deepcopy(model), bf16=True)
    prepared = the_trainer.accelerator.prepare(model).eval()
    _, parts = the_trainer.compute_loss(prepared, batch, return_outputs=True)
    _, ce, _ = mol_loss(llama(0).eval(), llama(0).eval(), batch)
    assert parts["kl"] == 0
    torch.testing.assert_close(parts["ce"], ce, atol=0.02, rtol=0.02)
    assert parts["ce"] != ce  # it was bfloat16
    assert "16 bits" not in caplog.text
    trainer(tmp_path, llama(0).bfloat16(), base=llama(1))
    assert "Trained weights in 16 bits" in caplog.text


def save_bytes_model(folder, dtype=torch.float32, **tokenizer):
    """Save a tiny random model and its tokenizer, which has a token for each byte."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([""], vocab_size=257, special_tokens=["<end>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", **tokenizer
                            ).save_pretrained(folder)
    llama(vocab_size=257, eos_token_id=0, num_hidden_layers=1, initializer_range=0.2
          ).to(dtype).save_pretrained(folder)


def test_the_example_trains_merges_and_continues(tmp_path):
    save_bytes_model(folder := tmp_path / "model")
    for name in ("domain", "general", "little", "latin"):
        (tmp_path / name).mkdir()
        for file in "ab" if name != "little" else "a":
            (tmp_path / name / f"{file}.txt").write_text(f"{name} text with words. " * 900)
    (tmp_path / "latin" / "c.txt").write_bytes(b"\xe9")

    def example(model, domain):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "plots.huggingface.example", model,
             tmp_path / domain, tmp_path / "general", tmp_path / "out"], cwd=ROOT, text=True,
            capture_output=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})

    first, second = example(folder, "domain"), example(folder, "domain")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "eval_domain_loss" in first.stdout and "eval_general_loss" in first.stdout
    assert "begins" in first.stdout and "continues from" in second.stdout
    assert "'kl'" in first.stdout and "'kl'" not in second.stdout  # it had nothing left to do
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    for model, domain, told in ((folder, "little", "two .txt files or more; it has 1"),
                                (folder, "latin", "c.txt: 'utf-8' codec"),
                                (tmp_path / "none", "domain", "no causal language model there")):
        refused = example(model, domain)
        assert refused.returncode == 2 and told in refused.stderr.splitlines()[-1]
