"""The recipe for Hugging Face models, on tiny random ones: each test is a trap that makes no noise.

Skipped where transformers is not installed; CI runs it in an environment of its own.
"""

import copy
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
import tokenizers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,  # noqa: E402
                          PreTrainedTokenizerFast, TrainingArguments)

from plots import real, runs  # noqa: E402
from plots.recipe import MolTrainer, collate  # noqa: E402

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
    """Pairs of a domain and a general row, of unlike lengths, that end with the end token."""
    g = torch.Generator().manual_seed(seed)

    def row(is_domain):
        length = int(torch.randint(4, 9, (1,), generator=g))
        return torch.randint(END, (length,), generator=g).tolist() + [END], is_domain

    return [(row(True), row(False)) for _ in range(count)]


def trainer(folder, model, pairs=None, base=None, micro=2, accumulate=1, **more):
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", max_steps=1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate,
        learning_rate=0.0, max_grad_norm=0.0, disable_tqdm=True, **{
            "remove_unused_columns": False, "dataloader_drop_last": True, **more})
    return MolTrainer(model, args, collate, pairs or pairs_of_rows(), base=base)


def by_hand(model, base, batch):
    """MoL of a batch row by row, each cut to its own length: no padding anywhere."""
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


@pytest.mark.parametrize("name", MODELS)
def test_targets_are_the_next_tokens(name, tmp_path):
    """Unshifted ones raise no error, only the learning is wrong."""
    model, base = MODELS[name](0).eval(), MODELS[name](1).eval()
    batch = collate(pairs_of_rows(2))
    loss = trainer(tmp_path, model, base=base).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, base, batch))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_known_by_the_mask(side, tmp_path):
    """On either side, and with the end token, which the rows end with and should learn."""
    model, base = llama(0).eval(), llama(1).eval()
    batch = collate(pairs_of_rows(2))
    for i, n in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        row = batch["input_ids"][i, :n].clone()
        batch["input_ids"][i], batch["attention_mask"][i] = END, 0
        at = slice(-n, None) if side == "left" else slice(n)
        batch["input_ids"][i, at], batch["attention_mask"][i, at] = row, 1
    assert (batch["attention_mask"] == 0).any()
    loss = trainer(tmp_path, model, base=base).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, base, batch))


def test_labels_of_another_collator_mask_the_prompt(tmp_path):
    model, base = llama(0).eval(), llama(1).eval()
    batch = collate(pairs_of_rows(2))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    batch["labels"] = labels
    loss = trainer(tmp_path, model, base=base).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, base, batch))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_tells_the_same_loss(name, tmp_path):
    """Trainer looks for labels, and without them tells none; the fifth pair is dropped."""
    model, base = MODELS[name](0), MODELS[name](1)
    the_trainer = trainer(tmp_path, model, base=base, per_device_eval_batch_size=2)
    pairs = pairs_of_rows(5, seed=3)
    told = the_trainer.evaluate(pairs)["eval_loss"]
    model.eval(), base.eval()
    expected = [by_hand(model, base, collate(pairs[i:i + 2])).item() for i in (0, 2)]
    assert told == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("kinds", ["domain", "general"])
def test_a_batch_of_one_kind(kinds, tmp_path):
    model, base = gpt2(0).eval(), gpt2(1).eval()
    batch = collate([pair[:1] if kinds == "domain" else pair[1:] for pair in pairs_of_rows(3)])
    loss = trainer(tmp_path, model, base=base).compute_loss(model, batch)
    torch.testing.assert_close(loss, by_hand(model, base, batch))


@pytest.mark.parametrize("name, value", [("remove_unused_columns", True),
                                         ("dataloader_drop_last", False)])
def test_settings_that_would_spoil_the_loss_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        trainer(tmp_path, gpt2(), base=gpt2(1), **{name: value})


def test_a_training_set_that_fills_no_batch_is_refused(tmp_path):
    """Trainer would only warn, and give the model back as it was."""
    with pytest.raises(ValueError, match="3 pairs fill no batch of 4"):
        trainer(tmp_path, gpt2(), pairs_of_rows(3), base=gpt2(1), micro=4)
    trainer(tmp_path, gpt2(), pairs_of_rows(4), base=gpt2(1), micro=4)


def gradients(the_trainer):
    """The gradients of one step of train(), as the optimizer meets them."""
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
    """Four micro-batches of two pairs, or one of eight: with a loss taken for scaled it is 4x.

    With labels in the batch, as another collator would put them there: Trainer counts them.
    """
    def step(micro, accumulate):
        model = MODELS[name](0)
        model.config.attn_pdrop = model.config.resid_pdrop = model.config.embd_pdrop = 0.0
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
    assert base.training and not any(p.requires_grad for p in base.parameters())


def adapters(model):
    """LoRA on a model, its adapters no longer zero."""
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"],
                                             lora_dropout=0.3))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


def test_with_adapters_the_base_is_the_model_without_them(tmp_path):
    model, base = adapters(llama(0)), llama(0).eval()
    batch = collate(pairs_of_rows(2))
    the_trainer = trainer(tmp_path, model)
    the_trainer.model_wrapped = model.train()
    general = ~batch["is_domain"]
    tokens, mask = batch["input_ids"][general], batch["attention_mask"][general]
    with the_trainer.base_of(model) as held, torch.no_grad():
        logits = held(tokens, attention_mask=mask).logits
    assert model.training
    assert torch.equal(logits, base(tokens, attention_mask=mask).logits)
    torch.testing.assert_close(the_trainer.compute_loss(model.eval(), batch),
                               by_hand(model, base, batch))


def test_every_batch_is_mixed_one_to_one(tmp_path):
    """Shuffled, and with a number of pairs that no batch size divides."""
    the_trainer = trainer(tmp_path, gpt2(), pairs=pairs_of_rows(11), base=gpt2(1), micro=3)
    batches = list(the_trainer.get_train_dataloader())
    assert len(batches) == 3  # the last two pairs are dropped
    for batch in batches:
        assert batch["is_domain"].tolist() == [True, False] * 3


class Capped(GPT2LMHeadModel):
    def forward(self, *arguments, **more):
        out = super().forward(*arguments, **more)
        out.logits = out.logits.tanh()
        return out


def capped():
    torch.manual_seed(0)
    return Capped(gpt2().config)


def with_a_bias():
    """Of zeros: no value tells it apart, but it would never be trained."""
    model = llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    return model


def with_adapters_on_the_head():
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("made", [capped, with_a_bias, with_adapters_on_the_head])
def test_a_head_that_does_more_is_refused(made, tmp_path):
    model = made()
    with pytest.raises(ValueError, match="head"):
        trainer(tmp_path, model, base=llama(1)).compute_loss(model, collate(pairs_of_rows(1)))


def test_a_run_that_diverged_is_not_taken_for_another_head(tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    loss = trainer(tmp_path, model, base=llama(1)).compute_loss(model, collate(pairs_of_rows(1)))
    assert loss.isnan()


def test_the_base_reads_under_the_same_autocast_as_the_model(tmp_path):
    """With the same weights nothing is left of the KL, in bfloat16 neither."""
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
    """A step on eight rows, which any number of processes share -> its gradients."""
    pairs = pairs_of_rows(8)
    if rows == "uneven":  # of two processes, the second has every general row
        pairs = [(a, a) if i % 4 < 2 else (b, b) for i, (a, b) in enumerate(pairs)]
    return gradients(trainer(folder, llama(0), pairs, base=llama(1), micro=micro,
                             train_sampling_strategy="sequential"))


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
    """The gradients of one process with eight rows, also where one of two has no general row."""
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


# --- the question that is asked with it ----------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer of its own, as save_pretrained leaves them."""
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.train_from_iterator(["a text to learn tokens from"], tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def test_the_question_on_a_tiny_model(folder, tmp_path, capsys, monkeypatch):
    """Eight runs on one seed, a line of runs.jsonl each; asked again, none is made."""
    monkeypatch.setattr(real, "SHOWN", {"any": ("{}", {"a": "b", "c": "d"})})
    # a random model knows nothing: let every question count as one that the base answers
    known = real.marks
    monkeypatch.setattr(real, "marks", lambda model, tokenizer, probes: (
        (1, 1.0) if len(probes) == 1 else known(model, tokenizer, probes)))
    arguments = ["--model", str(folder), "--steps", "2", "--seed", "3", "--out", str(tmp_path)]
    assert real.main(arguments) == 0
    assert "8 runs, 8 to make" in capsys.readouterr().out
    lines = runs.read(tmp_path / "runs.jsonl")
    assert len(lines) == 8 and (tmp_path / "real.png").stat().st_size > 10_000
    for line in lines:
        before, after = line["rows"]
        assert before["kl_to_base"] == 0 < after["kl_to_base"]
        assert set(after["accuracy"]) == set(real.SHARES)
    assert len({line["base"]["weights"] for line in lines}) == 1  # no run changes the base
    assert real.main(arguments) == 0
    assert "8 runs, 0 to make" in capsys.readouterr().out


def test_a_model_that_knows_nothing_cannot_forget(folder, tmp_path, capsys):
    assert real.main(["--model", str(folder), "--steps", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "answers no question of the kinds shown" in error and error.count("\n") == 1
    assert not (tmp_path / "runs.jsonl").exists()


class Reader(torch.nn.Module):
    """A model that keeps what it was given to read."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        self.read = input_ids.tolist()
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 400))


@pytest.mark.parametrize("has_start", [True, False])
def test_a_start_token_stands_where_the_tokenizer_puts_it(has_start, folder):
    """Before each row and question, not before an answer: some models know little without it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<s>")
    start = tokenizer.bos_token_id
    if has_start:
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", start)])
    text, reader = "a text of tokens", Reader()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    expected, length = [start] * has_start + tokens, len(tokens)
    real.marks(reader, tokenizer, [(text, "b")])
    assert reader.read == [expected]  # the last token, here the answer, is only a target
    assert real.packed([text], tokenizer, length, 1, random.Random(0)) == [expected]
    assert real.pieces(text, tokenizer, length - 1, 1, "prose") == [expected[:-1]]


@pytest.mark.parametrize("arguments, told", [
    (["--model", "/no/such/folder"], "--model /no/such/folder: no causal language model there"),
    (["--model", "FOLDER", "--length", "10000000"], "--length 10000000: the prose has only"),
    (["--model", "FOLDER", "--length", "1"], "--length 1"), (["--steps", "0"], "--steps 0"),
    (["--lora-rank", "-1"], "--lora-rank -1"), (["--lr", "x"], "--lr"), (["--foo"], "--foo")])
def test_bad_input_of_the_question(folder, tmp_path, capsys, arguments, told):
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    command = [sys.executable, str(ROOT / "plots" / "real.py"), *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_figures_folder_takes_the_default_settings_alone(capsys):
    assert real.main(["--steps", "2"]) == 2
    assert "--out: name a folder of your own" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_head(folder, tmp_path, capsys):
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=200, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2)).save_pretrained(small)
    capsys.readouterr()
    assert real.main(["--model", str(small), "--steps", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "its tokenizer has" in error and error.count("\n") == 1


@pytest.mark.parametrize("missing", ["transformers", "peft"])
def test_a_missing_package_is_named(missing, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert real.main(["--model", str(folder), "--steps", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error and missing in error and error.count("\n") == 1


def test_a_base_with_another_vocabulary_is_refused(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1,
                                      n_head=2, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="vocabulary of 50"):
        trainer(tmp_path, gpt2(), base=base).compute_loss(gpt2(), collate(pairs_of_rows(1)))
