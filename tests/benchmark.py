"""What a step costs, in ratios of medians.

    python tests/benchmark.py                       the steps of ce, replay and mol
    python tests/benchmark.py nanoGPT/model.py      also those of another file with GPT, GPTConfig
    python tests/benchmark.py --methods             those of plots/: step, memory, preparation
    python tests/benchmark.py --memory              losses from hidden states, with a large
                                                    vocabulary, and those of TRL if it is installed
    python tests/benchmark.py --real                memory and step of the methods of real.py
    python tests/benchmark.py --bases               SmolLM2 with a base in fewer bits; needs the
                                                    packages of real.py and bitsandbytes

Steps of all kinds take turns, so that other programs on the machine slow them alike.
"""

import copy
import email.message
import gc
import importlib.util
import inspect
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import losses
import train
from eval import evaluate
from model import GPT, GPTConfig, add_lora
from plots import texts
from plots.methods import fisher_of_base
from plots.huggingface.hidden import mixture_from_hidden

ROUNDS = 30


def seconds(work):
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def trainer(model, loss, batch, s, lora=False):
    """-> a function that makes one step on the batch, with a copy of the model."""
    model = copy.deepcopy(model).requires_grad_(True)
    if lora:
        add_lora(model, 8)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        with torch.autocast(s.device, getattr(torch, s.dtype), enabled=s.dtype != "float32"):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return value.item()

    return step


def other_model(path, config):
    """The model of another file, in the same size."""
    spec = importlib.util.spec_from_file_location("other", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    return other.GPT(other.GPTConfig(**vars(config), dropout=0.0, bias=False))


def large_vocabulary(which, vocab_size, count):
    """A function of `which` that computes a loss of `count` tokens and its gradients."""
    torch.manual_seed(0)
    B, T, C, V = 4, count // 4, 576, vocab_size
    hidden, head = (x.requires_grad_() for x in (torch.randn(B, T, C), torch.randn(V, C) / 24))
    base_hidden, base_head = torch.randn(B, T, C), torch.randn(V, C) / 24
    targets = torch.randint(V, (B, T))
    loss, function = which.split(": ")
    is_domain = torch.arange(B) < {"MoL": B // 2, "CE": B, "KL": 0}[loss]
    of_base = base_hidden[~is_domain]

    def ours():
        return mixture_from_hidden(hidden, head, targets, is_domain, of_base, base_head)[0]

    def before():
        return old.mixture_from_hidden(hidden, head, targets, is_domain, of_base, base_head)[0]

    def full_logits():
        return losses.mixture_of_losses(hidden @ head.T, targets, is_domain,
                                        of_base @ base_head.T)[0]

    def trl():
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        return ChunkedDivergenceFunction.apply(
            hidden.flatten(0, 1), head, None, base_hidden.flatten(0, 1), base_head, None,
            1.0)[0].mean()

    def torchs():
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
        return torch.nn.functional.linear_cross_entropy(
            hidden.flatten(0, 1), head, targets.flatten(), options=LinearCrossEntropyOptions())

    if function == "before":  # as it was, from the history of this repository
        old = ModuleType("old")
        exec(subprocess.run(["git", "show", f"{BEFORE}:losses.py"], cwd=Path(__file__).parent,
                            capture_output=True, text=True, check=True).stdout, vars(old))
    return {"here": ours, "before": before, "full logits": full_logits, "TRL": trl,
            "torch": torchs}[function]


BEFORE = "5541baf"  # the last commit that computed the logits again in the backward pass
LARGE = [("MoL", 4096, vocab_size, ("full logits", "before", "here"))
         for vocab_size in (50_257, 128_256)]
LARGE += [("KL", 2048, 49_152, ("TRL", "here")), ("CE", 4096, 50_257, ("torch", "here"))]


def measure(which, vocab_size, count):
    """Print the MB that a loss takes above the start of this process, its seconds and its value."""
    large_vocabulary(which, 1000, 64)().backward()  # warms up
    loss = large_vocabulary(which, vocab_size, count)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, began, values = resident("VmRSS"), time.process_time(), []
    taken = seconds(lambda: (values.append(loss()), values[0].backward()))
    print(resident("VmHWM") - start, taken, time.process_time() - began, values[0].item())


def resident(which):
    """MB of this process: VmRSS now, VmHWM at the peak."""
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def memory(rounds=3):
    """Each run in a process of its own, in turns; medians, and their ratios to the last line."""
    for name, count, vocab_size, functions in LARGE:
        found = {function: [] for function in functions}
        for _ in range(rounds):
            for function in functions:
                done = subprocess.run(
                    [sys.executable, __file__, "--measure", f"{name}: {function}", str(vocab_size),
                     str(count)], capture_output=True, text=True)
                if done.returncode:
                    print(f"{function}: {done.stderr.splitlines()[-1]}", flush=True)
                    continue
                found[function].append([*map(float, done.stdout.split())])
        found = {function: [*map(median, zip(*runs))] for function, runs in found.items() if runs}
        print(f"{name}, {count:,} tokens, vocabulary {vocab_size:,}, width 576, "
              f"{torch.get_num_threads()} threads", flush=True)
        for function, (megabytes, taken, busy, value) in found.items():
            ratios = [here / other for here, other in zip(found["here"], (megabytes, taken, busy))]
            print(f"  {function:12} {megabytes:8,.0f} MB {taken:6.1f} s {busy:6.1f} CPU s, loss "
                  f"{value:.4f}; here / this: memory 1/{1 / ratios[0]:.1f}, time {ratios[1]:.2f}, "
                  f"CPU time {ratios[2]:.2f}", flush=True)


def measure_real(label):
    """Print the MB of a training: weights, gradients, Adam, activations, the base; s per step."""
    from plots.huggingface import real

    run, (model, tokenizer) = real.RUNS[label], real.load("")
    settings = replace(real.Settings(), steps=8, **run.settings)
    rows = real.pieces(real.manual()[0], tokenizer, settings.length, 8 * settings.pairs)
    world = SimpleNamespace(model=model, tokenizer=tokenizer, texts={settings.text: rows},
                            facts={"ABR": ("Available Bit Rate",)})
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = resident("VmRSS")
    _, taken = real.taught(run.method, settings, 0, world)
    needs_base = run.method == "mol" and not (settings.lora_rank or settings.stored)
    megabytes = resident("VmHWM") - start + needs_base * model.get_memory_footprint() / 2**20
    print(f"{megabytes:,.0f} MB, {taken / settings.steps:.1f} s per step")


def on_real():
    from plots.huggingface import real
    for label in real.RUNS:
        command = [sys.executable, "-W", "ignore", __file__, "--measure-real", label]
        printed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 text=True, check=True).stdout
        print(f"{label:24} {printed.splitlines()[-1]}", flush=True)


def bases(steps=16):
    """Each base's size, its KL to the base in float32, and that of a model trained with it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

    from plots.huggingface import real
    from plots.huggingface.recipe import MolTrainer, collate

    model, tokenizer = real.load("")
    learnt, held_out = real.manual()
    general = real.pieces(learnt, tokenizer, 64, 4 * steps)
    domain = real.pieces(inspect.getsource(email.message), tokenizer, 64, 4 * steps)
    pairs = [((d, True), (g, False)) for d, g in zip(domain, general)]
    tokens = torch.tensor(real.pieces(held_out, tokenizer, 64, 16))

    @torch.no_grad()
    def kl(other):
        logits, base_logits = (m(input_ids=tokens).logits.float() for m in (other, model))
        return losses.kl_divergence(logits, base_logits).mean()

    plain = copy.deepcopy(model)
    del plain.config.quantization_config  # it is that of the .gguf file
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        for name, options in {
                "float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.bfloat16},
                "8 bit": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
                "4 bit": {"quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4")}}.items():
            base = AutoModelForCausalLM.from_pretrained(folder, **options)
            trained = copy.deepcopy(plain)
            torch.manual_seed(0)
            MolTrainer(trained, TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-4,
                save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
                use_cpu=True), collate, pairs, base=base).train()
            print(f"base in {name}: {base.get_memory_footprint() / 2**20:.0f} MB, KL "
                  f"{kl(base):.4f}; after {steps} steps of mol KL {kl(trained.eval()):.4f}",
                  flush=True)


def setup(rows):
    """-> settings, the world of seed 0, an untrained base, a batch of both texts, of the domain."""
    s = train.parse([])
    world = data.make_world(s, 0)
    torch.manual_seed(0)
    base = GPT(GPTConfig(world.tokenizer.n_vocab, s.block_size, s.n_layer, s.n_head, s.n_embd))
    base.to(s.device).requires_grad_(False)
    return s, world, base, *(next(data.batches(world.domain, world.general, rows, n, s.block_size,
                                               0)) for n in (rows, 0))


def step_of(name, s, world, base, both, domain):
    """-> a function that makes one step of a method of METHODS, with or without LoRA."""
    method = train.METHODS[name.removeprefix("LoRA ")]
    prepared = [method.prepare(base, world, s, 0)] if method.prepare else []
    return trainer(base, lambda model, batch: method.loss(model, base, batch, s, *prepared)[0],
                   both if method.reads_general else domain, s, lora=name.startswith("LoRA"))


NAMES = ["ce", "replay", "mol", "LoRA ce", "LoRA replay", "LoRA mol", "argmax", "sampled",
         "likely_tokens", "ce_and_kl", "masked_kl", "domain_kl", "l2sp", "ewc", "asft", "disc",
         "ce, attention"]


def measure_step(name):
    """Print the memory that steps of 128 rows, or 64 without general rows, take above the start."""
    parts = setup(64)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB
    step = step_of(name, *parts)
    for _ in range(3):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)


def methods():
    """Each method's step and memory (of a CPU) in ratio to replay, and what preparations take."""
    megabytes = {name: float(subprocess.run(
        [sys.executable, __file__, "--measure-step", name], stdout=subprocess.PIPE, text=True,
        check=True).stdout) for name in NAMES}
    s, world, base, both, domain = setup(train.Settings().batch_size)
    steps = {name: step_of(name, s, world, base, both, domain) for name in NAMES}
    taken = {name: [] for name in NAMES}
    for _ in range(ROUNDS + 3):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    t = {name: median(times[3:]) for name, times in taken.items()}
    print(f"{s.device}, {torch.get_num_threads()} threads; replay: {t['replay']:.3f} s per step, "
          f"{megabytes['replay']:.0f} MB for 128 rows")
    for name in NAMES:
        print(f"{name:14} step {t[name] / t['replay']:.2f}, "
              f"memory {megabytes[name] / megabytes['replay']:.2f}")
    base = train.get_base(s, 0, world)
    for name, prepare in {
            "ewc: Fisher information": lambda: fisher_of_base(base, world, s, 0),
            "the base's answers": lambda: texts.answered(s, 0, world, base),
            "own samples": lambda: texts.own_samples(s, 0, world, base),
            "likely documents": lambda: texts.likely_documents(s, 0, world, base, 5.0)}.items():
        print(f"{name}: {median(seconds(prepare) for _ in range(3)) / t['mol']:.0f} steps of mol")


def main(paths):
    s, world, base, both, domain = setup(train.Settings().batch_size)

    # The last hidden states of the base on the general rows, computed once: n_embd numbers per
    # token, where the logits are vocab_size numbers.
    states = []
    hook = base.ln_f.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        base(both.tokens[~both.is_domain])
    hook.remove()

    def kept(model, batch):
        with torch.no_grad():
            base_logits = base.head(states[0])  # (G, T, V)
        logits = model(batch.tokens)  # (B, T, V)
        return losses.mixture_of_losses(logits, batch.targets, batch.is_domain, base_logits)[0]

    def ce(model, batch):
        return train.next_token_loss(model, base, batch, s)[0]

    def mol(model, batch):
        return train.mol_loss(model, base, batch, s)[0]

    steps = {"ce": trainer(base, ce, domain, s), "replay": trainer(base, ce, both, s),
             "mol": trainer(base, mol, both, s), "mol, base kept": trainer(base, kept, both, s),
             "evaluation": lambda: evaluate(base, base, world)}
    for path in paths:
        rows = both._replace(tokens=both.tokens.contiguous(), targets=both.targets.contiguous())
        steps[path] = trainer(other_model(path, base.config).to(s.device),
                              lambda model, batch: model(batch.tokens, batch.targets)[1], rows, s)
    taken = {name: [] for name in steps}
    for _ in range(ROUNDS + 3):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    t = {name: median(times[3:]) for name, times in taken.items()}  # the first ones warm up

    evaluation = (1 + 3 * (1 + s.steps // s.eval_every)) * t["evaluation"]
    pretraining = s.base_steps * t["replay"] * s.base_batch_size / len(both.tokens)
    training = s.steps * (t["ce"] + t["replay"] + t["mol"]) + pretraining
    print(f"{s.device} in {s.dtype}, {torch.get_num_threads()} CPU threads; "
          f"medians of {ROUNDS} steps")
    print(f"mol step / replay step                     {t['mol'] / t['replay']:.2f}"
          "   (compute alone: 3.5 / 3 = 1.17)")
    print(f"mol step with the base kept / replay step  {t['mol, base kept'] / t['replay']:.2f}")
    print(f"replay step / two ce steps                 {t['replay'] / t['ce'] / 2:.2f}"
          "   (the same tokens)")
    print(f"evaluation's share of the default run      {evaluation / (evaluation + training):.2f}")
    print(f"tokens per second of a replay step         {both.tokens.numel() / t['replay']:,.0f}")
    for path in paths:
        print(f"step of {path} / replay step   {t[path] / t['replay']:.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--memory"]:
        memory()
    elif sys.argv[1:] == ["--methods"]:
        methods()
    elif sys.argv[1:2] == ["--measure-step"]:
        measure_step(sys.argv[2])
    elif sys.argv[1:] == ["--bases"]:
        bases()
    elif sys.argv[1:] == ["--real"]:
        on_real()
    elif sys.argv[1:2] == ["--measure-real"]:
        measure_real(sys.argv[2])
    elif sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1:])
