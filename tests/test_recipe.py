"""recipe.py on tiny random models of Hugging Face, and the experiment real.py that uses it.

Skipped without transformers, accelerate and peft. CI runs it in an environment of its own.
"""

import copy
import gzip
import io
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
import tokenizers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
import transformers  # noqa: E402
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel,  # noqa: E402
                          LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          TrainingArguments, default_data_collator)

import losses  # noqa: E402
from plots import runs  # noqa: E402
from plots.huggingface import real, recipe  # noqa: E402
from plots.huggingface.recipe import MolTrainer, collate  # noqa: E402

ROOT = Path(__file__).parent.parent
V, END = 50, 49


def llama(seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.5, **more))


def gpt2(seed=0, **more):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=END,
        eos_token_id=END, initializer_range=0.5, **more))


MODELS = {"llama": llama, "gpt2": gpt2}


def pairs_of_rows(count=8, seed=0):
    """Pairs of a domain row and a general row of different lengths, with the end token last."""
    g = torch.Generator().manual_seed(seed)

    def row(is_domain):
        length = int(torch.randint(4, 9, (1,), generator=g))
        return torch.randint(END, (length,), generator=g).tolist() + [END], is_domain

    return [(row(True), row(False)) for _ in range(count)]


def trainer(folder, model, pairs=None, base=None, micro=2, accumulate=1, options={}, **more):
    """options are of MolTrainer, more are TrainingArguments."""
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, max_grad_norm=0.0, disable_tqdm=True,
        **{"save_strategy": "no", "max_steps": 1, "learning_rate": 0.0, **more})
    return MolTrainer(model, args, **{"data_collator": collate, "base": base,
                                      "train_dataset": pairs or pairs_of_rows(), **options})


def by_hand(model, base, batch):
    """MoL of a batch row by row, each cut to its own length, so that there is no padding."""
    losses = []
    labels = batch.get("labels", batch["input_ids"])
    for tokens, mask, labels, is_domain in zip(batch["input_ids"], batch["attention_mask"].bool(),
                                               labels, batch["is_domain"]):
        row, is_target = tokens[mask][None], labels[mask][1:] != -100
        logits = model(row).logits[0, :-1][is_target]
        if is_domain:
            losses.append(F.cross_entropy(logits, row[0, 1:][is_target]))
        else:
            log_p = logits.log_softmax(-1)
            log_q = base(row).logits[0, :-1][is_target].log_softmax(-1)
            losses.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return sum(losses) / len(losses)


def padded_with_the_end_token(batch, side):
    """Padding on one side. It has the same token as the end of each row, which is a target."""
    for i, n in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        row = batch["input_ids"][i, :n].clone()
        batch["input_ids"][i], batch["attention_mask"][i] = END, 0
        at = slice(-n, None) if side == "left" else slice(n)
        batch["input_ids"][i, at], batch["attention_mask"][i, at] = row, 1
    assert (batch["attention_mask"] == 0).any()
    return batch


def with_labels(batch):
    """As of another collator, where the labels of a prompt are -100."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("name, batch", [
    ("llama", collate(pairs_of_rows(2))), ("gpt2", collate(pairs_of_rows(2))),
    ("llama", padded_with_the_end_token(collate(pairs_of_rows(2)), "left")),
    ("llama", padded_with_the_end_token(collate(pairs_of_rows(2)), "right")),
    ("llama", with_labels(collate(pairs_of_rows(2)))),
    ("gpt2", collate([pair[:1] for pair in pairs_of_rows(3)])),
    ("gpt2", collate([pair[1:] for pair in pairs_of_rows(3)]))],
    ids=["llama", "gpt2", "left padding", "right padding", "labels", "domain", "general"])
def test_the_loss_is_mol_by_hand(name, batch, tmp_path):
    model, base = MODELS[name](0).eval(), MODELS[name](1).eval()
    loss = trainer(tmp_path, model, base=base).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, base, batch))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_has_the_same_loss(name, tmp_path):
    """Trainer has none without labels. The fifth pair is a smaller batch, and counts as a pair."""
    model, base = MODELS[name](0), MODELS[name](1)
    the_trainer = trainer(tmp_path, model, base=base, per_device_eval_batch_size=2)
    pairs = pairs_of_rows(5, seed=3)
    loss = the_trainer.evaluate(pairs)["eval_loss"]
    model.eval(), base.eval()
    assert loss == pytest.approx(by_hand(model, base, collate(pairs)).item(), rel=1e-5)


def test_two_evaluation_sets_are_the_two_losses(tmp_path):
    """Of one pair each, less than a batch."""
    (domain, general), = pairs_of_rows(1)
    model, base = llama(0), llama(1)
    the_trainer = trainer(tmp_path, model, base=base, options={
        "eval_dataset": {"domain": [(domain,)], "general": [(general,)]}})
    found = the_trainer.evaluate()
    for name, row in (("domain", domain), ("general", general)):
        assert found[f"eval_{name}_loss"] == pytest.approx(
            by_hand(model.eval(), base.eval(), collate([(row,)])).item(), rel=1e-5)


def test_the_log_has_the_means_of_both_losses(tmp_path):
    """Per row of each kind, over all steps since the last log, here batches of unlike rows."""
    pairs = pairs_of_rows(8)
    pairs = [pair[i % 3 > 0:] if i % 3 else pair[:1] for i, pair in enumerate(pairs)]
    model, base = llama(0), llama(1)
    the_trainer = trainer(tmp_path, model, pairs, base, max_steps=4, logging_steps=4,
                          train_sampling_strategy="sequential")
    the_trainer.train()
    logged = next(log for log in the_trainer.state.log_history if "loss" in log)
    model.eval(), base.eval()
    for name, is_domain in (("ce", True), ("kl", False)):
        rows = [(row,) for pair in pairs for row in pair if row[1] == is_domain]
        assert logged[name] == pytest.approx(by_hand(model, base, collate(rows)).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"strength": 3.0}, {"direction": "forward"}, {"chunk": 2}])
def test_the_options_of_the_loss(options, tmp_path):
    model, base, batch = llama(0).eval(), llama(1).eval(), collate(pairs_of_rows(2))
    expected = losses.mixture_of_losses(
        model(batch["input_ids"]).logits[:, :-1], batch["input_ids"][:, 1:].where(
            batch["attention_mask"][:, 1:] == 1, -100), batch["is_domain"],
        base(batch["input_ids"][~batch["is_domain"]]).logits[:, :-1],
        **{"direction": "reverse", "strength": 1.0} | {k: v for k, v in options.items()
                                                       if k != "chunk"})[0]
    loss = trainer(tmp_path, model, base=base, options=options).compute_loss(model, batch)
    torch.testing.assert_close(loss, expected)


def test_documents_in_one_row_are_apart_if_their_positions_begin_again(tmp_path):
    model, base = llama(0).eval(), llama(1).eval()
    documents = [row for pair in pairs_of_rows(2) for row in pair]
    rows = [([t for row, _ in documents for t in row], is_domain) for is_domain in (True, False)]
    positions = torch.cat([torch.arange(len(row)) for row, _ in documents])
    batch = collate([rows]) | {"position_ids": positions.expand(2, -1)}
    starts = positions == 0
    batch["labels"] = batch["input_ids"].masked_fill(starts, -100)  # no token across documents
    found = trainer(tmp_path, model, base=base).mixture(model, batch)
    for part, is_domain in zip(found[1:], (True, False)):
        nats = [len(row[1:]) * by_hand(model, base, collate([((row, is_domain),)]))
                for row, _ in documents]
        torch.testing.assert_close(part, sum(nats) / (~starts).sum() / 2)
    batch["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="rows without padding"):
        trainer(tmp_path, model, base=base).mixture(model, batch)


@pytest.mark.parametrize("rows, collator", [
    ([{"input_ids": [1, 2], "is_domain": True}] * 4, collate),
    ([([1, 2], True)] * 4, collate), ([([1, 2], [3, 4])] * 4, collate),
    ([{"input_ids": [1, 2], "labels": [1, 2]}] * 4, default_data_collator)],
    ids=["dicts", "no pairs", "no flags", "default collator"])
def test_other_rows_are_refused_with_what_a_row_is(rows, collator, tmp_path):
    with pytest.raises(ValueError, match="an item of the dataset must be|a batch has no is_domain"):
        trainer(tmp_path, llama(), rows, llama(1), options={"data_collator": collator}).train()


def from_checkpoint(folder):
    """A model saved during a training, and a copy of it as base, as in the docstring."""
    trainer(folder, llama(0), base=llama(0), save_strategy="steps", save_steps=1).train()
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint-1")
    return model, copy.deepcopy(model)


def with_lora(trained=False, **more):
    model = get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))
    for name, weight in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("made, told", [
    (lambda _: (llama(), None), "base=copy.deepcopy"),
    (lambda _: (model := llama(), model), "it shares weights"),
    (lambda _: (get_peft_model(model := llama(), LoraConfig(target_modules=["q_proj"])), model),
     "it shares weights"),
    (lambda _: (with_lora(trained=True), None), "already change the model"),
    (lambda _: (with_lora(init_lora_weights="pissa"), None), "already change the model"),
    (lambda _: (with_lora(init_lora_weights="olora"), None), "already change the model"),
    (lambda _: (with_lora(bias="lora_only"), None), "bias='none'"),
    (from_checkpoint, "the original model as base"),
    (lambda _: (llama(), tiny("GPT2", vocab_size=60)), "logits have shape"),
    (lambda _: (tiny("Mixtral", output_router_logits=True), tiny("Mixtral")),
     "output_router_logits=False")],
    ids=["none", "the model", "the model of the adapters", "trained adapters", "pissa", "olora",
         "bias", "checkpoint", "another vocabulary", "router"])
def test_a_wrong_base_or_model_is_refused_at_once(made, told, tmp_path):
    model, base = made(tmp_path)
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, model, base=base)


@pytest.mark.parametrize("more, told", [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0"),
    ({"train_sampling_strategy": "group_by_length"}, "rows in any order"),
    ({"options": {"compute_loss_func": print}}, "no compute_loss_func"),
    ({"options": {"compute_metrics": print}}, "no compute_loss_func, compute_metrics"),
    ({"options": {"model_init": lambda: llama()}, "model": None}, "or model_init")])
def test_settings_that_mol_has_no_use_for_are_refused(more, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path, **{"model": llama(), "base": llama(1), **more})


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_new_adapters_need_no_base(more, tmp_path):
    trainer(tmp_path, with_lora(**more)).train()


def gradients(the_trainer):
    """The gradients that the optimizer gets in one step of train()."""
    found = {}

    def keep(optimizer, *rest):
        found.update({name: p.grad.clone() for name, p in the_trainer.model.named_parameters()
                      if p.grad is not None})

    the_trainer.create_optimizer()
    the_trainer.optimizer.register_step_pre_hook(keep)
    the_trainer.train()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_those_of_the_whole_batch(name, tmp_path):
    """Four micro-batches of two pairs, or one of eight. With labels Trainer would multiply by 4."""
    def step(micro, accumulate):
        model = MODELS[name](0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        the_trainer = trainer(tmp_path, model, base=MODELS[name](1), micro=micro,
                              accumulate=accumulate)
        the_trainer.data_collator = lambda pairs: (
            (batch := collate(pairs)) | {"labels": batch["input_ids"]})
        return gradients(the_trainer)

    whole, accumulated = step(8, 1), step(2, 4)
    assert whole and whole.keys() == accumulated.keys()
    for key in whole:
        torch.testing.assert_close(accumulated[key], whole[key], atol=1e-6, rtol=1e-4)


def test_the_base_has_no_dropout_and_stays_frozen(tmp_path):
    model, base = gpt2(0), gpt2(0, resid_pdrop=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    the_trainer = trainer(tmp_path, model.eval(), base=base.train())
    batch = collate([pair[1:] for pair in pairs_of_rows(4)])
    losses = {the_trainer.compute_loss(model, batch).item() for _ in range(5)}
    assert len(losses) == 1
    assert not base.training and not any(p.requires_grad for p in base.parameters())


def test_with_adapters_the_base_is_the_model_without_them(tmp_path, monkeypatch):
    """And without dropout, also while the model trains."""
    model, base = with_lora(lora_dropout=0.3), llama(0).eval()
    batch = collate(pairs_of_rows(2))
    the_trainer = trainer(tmp_path, model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    torch.testing.assert_close(the_trainer.compute_loss(model.eval(), batch),
                               by_hand(model, base, batch))
    read, real = [], recipe.hidden_and_head
    monkeypatch.setattr(recipe, "hidden_and_head", lambda *given: read.append(real(*given))
                        or read[-1])
    the_trainer.compute_loss(model.train(), batch)
    assert all(module.training for module in model.modules())
    expected = base(batch["input_ids"][~batch["is_domain"]]).logits[:, :-1]
    is_token = batch["attention_mask"][~batch["is_domain"]][:, 1:] == 1
    torch.testing.assert_close(base.lm_head(read[0][0])[is_token], expected[is_token])


def test_every_batch_is_mixed_one_to_one(tmp_path):
    """Also when they are shuffled and the last batch is smaller."""
    the_trainer = trainer(tmp_path, gpt2(), pairs=pairs_of_rows(11), base=gpt2(1), micro=3)
    for batch, count in zip(the_trainer.get_train_dataloader(), (3, 3, 3, 2), strict=True):
        assert batch["is_domain"].tolist() == [True, False] * count


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5,
         "pad_token_id": 0}
NEO = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.5}
# Phi has a bias in the head. Gemma 2 caps the logits and these others scale them, so their logits
# are computed whole.
WHOLE = "Gemma2", "Cohere", "Granite", "FalconH1"
ARCHITECTURES = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5},
    "Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {}, "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Gemma3Text": {"head_dim": 8},
    "Phi": {}, "Phi3": {}, "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 8, "init_std": 0.5},
    "Mamba": {"state_size": 4}, "Olmo2": {}, "SmolLM3": {}, "Mixtral": {"num_local_experts": 4},
    "Cohere": {}, "Granite": {"logits_scaling": 1.01}, "GPTNeoX": {},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], **NEO},
    "FalconH1": {"lm_head_multiplier": 0.7, "mamba_d_ssm": 16, "mamba_n_heads": 2,
                 "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}}


def tiny(name, seed=0, **more):
    torch.manual_seed(seed)
    settings = ARCHITECTURES[name] if name in ("GPT2", "GPTNeo") else SMALL | ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, **settings, **more})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_full_logits(name, tmp_path):
    """Also with padding on the left, whatever the positions of the model are."""
    model, base = tiny(name, 0).eval(), tiny(name, 1).eval()
    the_trainer = trainer(tmp_path, model, base=base)
    assert (the_trainer.head is None) == (name in WHOLE)
    for batch in (collate(pairs_of_rows(2)),
                  padded_with_the_end_token(collate(pairs_of_rows(2)), "left")):
        found, expected = the_trainer.compute_loss(model, batch), by_hand(model, base, batch)
        torch.testing.assert_close(found, expected)
        for pair in zip(*(torch.autograd.grad(loss, model.parameters(), materialize_grads=True,
                                              allow_unused=True) for loss in (found, expected))):
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)


def test_adapters_on_the_head(tmp_path):
    model = get_peft_model(llama(0), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    the_trainer = trainer(tmp_path, model)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    batch = collate(pairs_of_rows(2))
    torch.testing.assert_close(the_trainer.compute_loss(model.eval(), batch),
                               by_hand(model, llama(0).eval(), batch))


def test_logits_of_a_known_head_never_exist_whole(tmp_path):
    """The head of model and base sees one position, and then chunks."""
    seen, model = [], llama(0)
    batch = collate(pairs_of_rows(2))
    the_trainer = trainer(tmp_path, model, base=llama(1), options={"chunk": 3})
    model.lm_head.register_forward_hook(lambda *_: seen.append(_[2].shape[:-1].numel()))
    the_trainer.compute_loss(model, batch)
    assert seen[0] == len(batch["input_ids"]) and max(seen[1:]) == 3


def test_weights_that_are_not_numbers_are_not_refused_as_another_head(tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    loss = trainer(tmp_path, model, base=llama(1)).compute_loss(model, collate(pairs_of_rows(1)))
    assert loss.isnan()


def test_a_compiled_model_gets_the_positions(tmp_path):
    """Learned positions and padding on the left. The backend makes no code, which takes long."""
    model, base = gpt2(0).eval(), gpt2(1).eval()
    the_trainer = trainer(tmp_path, model, base=base, torch_compile_backend="eager")
    batch = padded_with_the_end_token(collate(pairs_of_rows(2)), "left")
    compiled = the_trainer.accelerator.prepare(model)
    assert compiled is not model
    torch.testing.assert_close(the_trainer.compute_loss(compiled, batch),
                               by_hand(model, base, batch))


def test_no_hook_stays_if_a_forward_pass_fails(tmp_path):
    model, batch = llama(0).eval(), collate(pairs_of_rows(2))
    the_trainer, forward = trainer(tmp_path, model, base=llama(1)), model.model.forward
    expected = the_trainer.compute_loss(model, batch)
    model.model.forward = None
    with pytest.raises(TypeError):
        the_trainer.compute_loss(model, batch)
    model.model.forward = forward
    assert the_trainer.compute_loss(model, batch) == expected
    assert model(batch["input_ids"]).logits.shape[1] == batch["input_ids"].shape[1]


def test_the_base_has_the_same_autocast_as_the_model(tmp_path):
    """With the same weights the KL is 0, in bfloat16 too."""
    model = llama(0)
    the_trainer = trainer(tmp_path, model, base=copy.deepcopy(model), bf16=True)
    prepared = the_trainer.accelerator.prepare(model).eval()
    batch = collate(pairs_of_rows(4))
    _, parts = the_trainer.compute_loss(prepared, batch, return_outputs=True)
    full, _, _ = trainer(tmp_path, llama(0), base=llama(0)).mixture(llama(0).eval(), batch)
    assert parts["kl"] == 0
    torch.testing.assert_close(parts["ce"], full, atol=0.02, rtol=0.02)
    assert parts["ce"] != full  # it was bfloat16


def one_step(folder, rows, micro):
    """A step on eight rows, shared by all processes -> its gradients and the logged losses."""
    pairs = pairs_of_rows(8)
    if rows == "uneven":  # of two processes, the second has every general row
        pairs = [(a, a) if i % 4 < 2 else (b, b) for i, (a, b) in enumerate(pairs)]
    the_trainer = trainer(folder, llama(0), pairs, base=llama(1), micro=micro, logging_steps=1,
                          train_sampling_strategy="sequential")
    found, log = gradients(the_trainer), the_trainer.state.log_history[0]
    return found | {name: torch.tensor(log[name]) for name in ("ce", "kl")}


PROCESS = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import torch, test_recipe
found = test_recipe.one_step(sys.argv[3], sys.argv[4], 2)
if os.environ["RANK"] == "0":
    torch.save(found, sys.argv[3] + "/gradients.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("rows", ["mixed", "uneven"])
def test_two_processes_are_one(rows, tmp_path):
    """They have the gradients of one process, also where one of them has no general rows."""
    (tmp_path / "step.py").write_text(PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         tmp_path / "step.py", ROOT, ROOT / "tests", tmp_path, rows],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = one_step(tmp_path, rows, 4)
    assert found.keys() == expected.keys() and expected
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)


# --- the experiment real.py ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model and its tokenizer, saved by save_pretrained."""
    folder = tmp_path_factory.mktemp("model")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["a text to learn tokens from"], tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    save_llama(folder, 300)
    return folder


def save_llama(folder, vocab_size):
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)


WORDS = "Active Basic Common Direct Early Fast Given Hybrid Inner Joint Known Local".split()


@pytest.fixture
def experiment(monkeypatch, tmp_path_factory):
    """(arguments) -> exit code, output and errors of real.py with few facts, on short texts."""
    vera = tmp_path_factory.mktemp("vera") / "vera.dict.gz"
    with gzip.open(vera, "wt") as file:
        for word in WORDS:
            file.write(f"{word[0]}XY\n       {word} eXchange sYstem (ATM, UNI)\n       \n")
        file.write("ZZZ\n       A Game (slang)\n       \n")
    manual, countries = real.manual(), real.countries()
    monkeypatch.setattr(real, "manual", lambda: [text[:20_000] for text in manual])
    monkeypatch.setattr(real, "countries", lambda: dict([*countries.items()][:10]))

    def program(*arguments):
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            runs.main("real", real.SEARCH | real.RUNS, real.draw, real.__doc__, real.tell,
                      real.Settings(), real.make, ("general", "domain"),
                      arguments=["--vera", str(vera), "--steps", "2", *map(str, arguments)])
        return ended.value.code, output.getvalue(), errors.getvalue()
    return program


def test_all_runs_on_a_tiny_model(folder, tmp_path, experiment):
    arguments = "--model", folder, "--seed", 3, "--out", tmp_path
    _, output, _ = experiment(*arguments, "--methods", "mol")
    assert "10 runs, 10 to make" in output and "| mol " in output and "| ce " not in output
    code, output, _ = experiment(*arguments)
    count = len(real.SEARCH)
    assert code == 0 and f"{count} runs, {count - 10} to make" in output
    assert (tmp_path / "real.png").stat().st_size > 10_000
    lines = [*runs.read_runs(tmp_path / "runs.jsonl", real.Settings()).values()]
    assert len(lines) == count and len({line["base"] for line in lines}) == 1
    assert len({line["rows"][1]["kl_to_base"] for line in lines}) == count  # all differ
    for line in lines:
        before, after = line["rows"]
        assert before["kl_to_base"] == 0 < after["kl_to_base"]
        for rows in (line["rows"][:1], line["rows"]):
            every = sum(len(real.scores(rows, "plain", "dsn", "right", choice))
                        for choice in (True, False))
            assert every == len(before["kinds"]) == before["kinds"].count("d") + 2 * 10 + 118
    of_share = [line["rows"][1]["kl_to_base"] for line in sorted(
        lines, key=lambda line: line["settings"]["share"]) if line["settings"]["share"] < 1]
    assert of_share == sorted(of_share) and len(of_share) == 3
    for label in real.RUNS:
        assert f"| {label} " in output
    assert f"{count} runs, 0 to make" in experiment(*arguments)[1]


@pytest.mark.parametrize("has_start", [True, False])
def test_rows_and_questions_have_the_start_token_of_the_tokenizer(has_start, folder):
    """The options have the probabilities that whole rows give."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<s>")
    start = tokenizer.bos_token_id
    if has_start:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", start)])
    text = "a text of tokens"
    tokens = [start] * has_start + tokenizer.encode(text, add_special_tokens=False)
    length = len(tokens)
    assert real.packed([text], tokenizer, length, 1, random.Random(0)) == [tokens]
    assert real.pieces(text, tokenizer, length - 1, 1) == [tokens[:-1]]
    torch.manual_seed(1)
    save_llama(folder / "other", 301)
    model = AutoModelForCausalLM.from_pretrained(folder / "other").eval()
    options, texts = ("b", "longer", "c d e", "another one"), [text, "other", "a", "and a last"]
    found = real.probabilities(model, tokenizer, [
        real.Question("", "", text, options) for text in texts])
    for text, probabilities in zip(texts, found):
        tokens = [start] * has_start + tokenizer.encode(text, add_special_tokens=False)
        nats = []
        for option in options:
            answer = tokenizer.encode(f" {option}", add_special_tokens=False)
            log_p = model(torch.tensor([tokens + answer])).logits[0].log_softmax(-1)
            nats.append(sum(log_p[len(tokens) - 1 + i, token] for i, token in enumerate(answer)))
        torch.testing.assert_close(torch.tensor(probabilities), torch.stack(nats).softmax(0),
                                   atol=0.02, rtol=0)


def test_a_chat_has_one_start_token(folder, monkeypatch):
    """Also if both the tokenizer and its template add one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<s>")
    tokenizer.chat_template = "{{ bos_token }}user {{ messages[0].content }} assistant "
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    seen, probabilities = [], real.probabilities
    monkeypatch.setattr(real, "probabilities", lambda model, tokenizer, asked: (
        seen.extend(asked) or probabilities(model, tokenizer, asked)))
    save_llama(folder / "chat", 301)
    model = AutoModelForCausalLM.from_pretrained(folder / "chat").eval()
    question = real.Question("stated", "What is b?", "b is", ("b", "c", "d", "e"))
    real.test(model, model, tokenizer, [question], 32)
    assert [question.begun for question in seen] == ["b is", "user What is b? assistant b is"]


def test_the_general_texts(folder):
    """Wrong text has other capitals. The base goes on after a start or after a quarter of a row."""
    settings = real.Settings(steps=4, length=32)
    model, tokenizer = real.load(folder)
    texts = {text: real.general_rows(text, settings, model, tokenizer)
             for text in ("right", "wrong", "samples", "answers")}
    assert all(len(row) == 32 for rows in texts.values() for row in rows)
    right, wrong = ("".join(map(tokenizer.decode, texts[text])) for text in ("right", "wrong"))
    assert "Gabon is Libreville" in right and "Gabon is Lib" not in wrong and "Gabon is" in wrong
    for before, after in zip(texts["right"], texts["answers"]):
        assert after[:8] == before[:8] and after[8:] != before[8:]
        logits = model(torch.tensor([after])).logits[0]
        logits[:, model.generation_config.eos_token_id] = -math.inf  # no answer ends early
        assert logits.argmax(dim=-1).tolist()[7:-1] == after[8:]
    assert {row[0] for row in texts["samples"]} == {tokenizer.eos_token_id}
    assert len(set(map(tuple, texts["samples"]))) == 16


def test_what_a_general_text_names_is_stated(monkeypatch):
    monkeypatch.setattr(real, "countries", lambda: {
        "Oman": ("Muscat", "Asia"), "Mali": ("Bamako", "Africa"), "Fiji": ("Suva", "Oceania"),
        "Chad": ("Niamey", "Europe")})
    asked = real.questions({"ABR": ("Available Bit Rate", "b", "c", "d")}, ["In Fiji", "Somalia"])
    kinds = {question.begun: question.kind for question in asked}
    assert kinds["The capital of Fiji is"] == kinds["Fiji is a country in"] == "stated"
    assert kinds["The capital of Mali is"] == "never stated"
    assert kinds["The abbreviation ABR is short for"] == "domain"
    assert all(len(set(question.options)) == 4 for question in asked)
    assert asked[1].options[0] == "Muscat"


def test_the_interval_holds_questions_and_seeds():
    """Seeds that differ more than questions widen it; every fifth question is left out."""
    def seed(right):
        return [{"kinds": "d" * len(right)}, {"plain": {"right": right}}]

    which = "plain", "d", "right"
    assert real.interval([seed("1" * 50)], *which) == (100, 100, 100)
    middle, low, high = real.interval([seed("10" * 100)], *which)
    assert middle == 50 and 40 < low < 45 and 55 < high < 60
    assert real.interval([seed("1" * 50), seed("0" * 50)], *which) == (50, 0, 100)
    assert real.interval([seed("10" * 100)], *which, base=seed("00" * 100))[0] == 50
    assert real.interval([seed("10" * 100)], *which, base=seed("10" * 100)) == (0, 0, 0)
    assert real.scores(seed("0111101111"), *which) == [100] * 8
    assert real.scores(seed("0111101111"), *which, choice=True) == [0, 0]


def test_a_model_in_bfloat16_is_loaded_in_float32(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    assert real.load(tmp_path)[0].dtype == torch.float32


@pytest.mark.parametrize("arguments, told", [
    (["--model", "/no/such/folder"], "--model /no/such/folder: no causal language model there"),
    (["--model", "FOLDER", "--vera", "/no/file"], "--vera /no/file: [Errno 2] No such file"),
    (["--model", "FOLDER", "--length", "4096"], "--length 4096: the model reads 2048 tokens"),
    (["--model", "FOLDER", "--length", "1"], "--length"), (["--seed", "-1"], "--seed"),
    (["--seed", "0", "0"], "give each value once"), (["--lr", "1"], "--lr"),
    (["--model", "FOLDER", "--out", str(runs.HERE)], "name a folder of your own")])
def test_bad_input_is_one_message(arguments, told, folder, tmp_path, experiment, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [folder if argument == "FOLDER" else argument for argument in arguments]
    refused(experiment("--out", tmp_path, *arguments), told)
    assert not (tmp_path / "runs.jsonl").exists()


def refused(ended, told):
    code, _, errors = ended
    assert code == 2 and told in errors.splitlines()[-1] and errors.count("error: ") == 1


def test_a_damaged_model_is_refused(folder, tmp_path, experiment):
    shutil.copytree(folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(experiment("--model", tmp_path / "damaged", "--out", tmp_path),
            "no causal language model there")


def test_a_loss_that_is_not_a_number_is_not_kept(folder, tmp_path, experiment, monkeypatch):
    test = real.test
    monkeypatch.setattr(real, "test", lambda *given: test(*given) | {"prose_loss": math.nan})
    refused(experiment("--model", folder, "--out", tmp_path), "the loss is no longer a number")
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_a_missing_package_is_named(missing, folder, tmp_path, experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    refused(experiment("--model", folder, "--out", tmp_path), missing)


# --- the example ---------------------------------------------------------------------------------

def test_the_example_trains_merges_and_continues(folder, tmp_path):
    for name, words in (("domain", 900), ("general", 400), ("little", 9)):
        (tmp_path / name).mkdir()
        for file in "ab":
            (tmp_path / name / f"{file}.txt").write_text(f"{name} text with words. " * words)
    arguments = [sys.executable, "-W", "ignore", "-m", "plots.huggingface.example", folder, tmp_path / "domain",
                 tmp_path / "general", tmp_path / "out"]
    first, second = (subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True,
                                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
                     for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "eval_domain_loss" in first.stdout and "eval_general_loss" in first.stdout
    assert "begins" in first.stdout and "continues from" in second.stdout
    assert "'kl'" in first.stdout and "'kl'" not in second.stdout  # it had nothing left to do
    arguments[-3] = tmp_path / "little"
    too_little = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert too_little.returncode == 1 and "4096 are needed" in too_little.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
