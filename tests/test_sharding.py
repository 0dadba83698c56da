"""Two CPU processes, with the model and the base in shards or not, learn what one process learns.

Each kind of sharding runs all its cases in one pair of processes, which run this file as a program.
Skipped without transformers, accelerate and peft; ZeRO needs deepspeed too. CI has them all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pytest.importorskip("transformers")
from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from transformers import AutoModelForCausalLM, TrainingArguments  # noqa: E402

from plots.huggingface.recipe import MolTrainer, collate, mol_loss, store  # noqa: E402
from test_recipe import llama, pairs_of_rows  # noqa: E402

FSDP = {"fsdp": True, "fsdp_config": {
    "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": "FULL_STATE_DICT"}}
ZERO = [{"deepspeed": {  # left alone, DeepSpeed clips gradients at 1
    "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True,
                          "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}} for stage in range(4)]
KINDS = {"one": {}, "DDP": {}, "FSDP2": FSDP, "plain FSDP2": {}, "ZeRO-2": ZERO[2],
         "ZeRO-3": ZERO[3]}
SGD = {"lr": 0.1, "momentum": 0.5}
# The head is tied; there are adapters; there is a base, or its stored tokens; uneven: the first of
# two processes has only domain rows; last: the model is loaded after TrainingArguments; stop: it
# stops and continues.
CASES = {
    "all weights": "base",
    "tied head, uneven": "tied base uneven last",
    "adapters, uneven": "adapters uneven",
    "adapters and base, two micro-batches": "tied adapters base accumulate",
    "checkpointing, two micro-batches, uneven": "base uneven accumulate checkpointing",
    "adapters, loaded last": "tied adapters last checkpointing",
    "stored tokens, uneven": "stored uneven",
    "loaded last and continued": "base last stop"}


def shared_rows(uneven):
    pairs = pairs_of_rows(16)
    return [(a, a) if i % 4 < 2 else (b, b) for i, (a, b) in enumerate(pairs)] if uneven else pairs


def learn(folder, kind, case, micro):
    """Two steps of SGD, with weights and losses saved -> bytes of weights in this process."""
    how, out = CASES[case].split(), folder / kind / case

    def load():
        model, base = (AutoModelForCausalLM.from_pretrained(
            folder / f"{seed} {'tied' in how}", dtype=torch.float32) for seed in (0, 1))
        if "adapters" in how:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        return model, base if "base" in how else None

    rows = torch.load(folder / "rows") if "stored" in how else shared_rows("uneven" in how)
    if kind == "plain FSDP2":
        return with_a_loop_of_its_own(*load(), rows, how, out)
    for resumed in (False, True) if "stop" in how else (False,):
        models = None if "last" in how else load()
        args = TrainingArguments(
            str(out), use_cpu=True, report_to=[], per_device_train_batch_size=micro,
            gradient_accumulation_steps=1 + ("accumulate" in how), max_grad_norm=0.0, max_steps=2,
            gradient_checkpointing="checkpointing" in how, learning_rate=0.1,
            lr_scheduler_type="constant", logging_steps=1, train_sampling_strategy="sequential",
            save_strategy="steps" if "stop" in how else "no", save_steps=1, disable_tqdm=True,
            **KINDS[kind])
        if kind == "FSDP2":  # accelerate shards on GPUs and the like only: call this one like that
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        model, base = models or load()
        trainer = MolTrainer(model, args, collate, rows, base=base, chunk=3,
                             optimizer_cls_and_kwargs=(torch.optim.SGD, SGD))
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-1") if resumed else None)
        log = [log for log in trainer.state.log_history if "loss" in log]
    trainer.save_model(out)
    torch.save([[step[name] for name in ("loss", "ce", "kl") if name in step] for step in log],
               out / "log")
    return bytes_of(trainer.model), bytes_of(trainer.base) if base else 0


def with_a_loop_of_its_own(model, base, pairs, how, out):
    """As in a training loop without Trainer and accelerate."""
    rank = torch.distributed.get_rank()
    for some in (model, base) if base else (model,):
        for layer in (*getattr(some, "get_base_model", lambda: some)().model.layers, some):
            fully_shard(layer)
    if "checkpointing" in how:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    count, log = 1 + ("accumulate" in how), []
    for step in range(2):
        losses = []
        for i in range(count):
            begin = 4 * (step * count + i) + 2 * rank
            losses.append(mol_loss(model.train(), base, collate(pairs[begin:begin + 2]),
                                   chunk=3)[0] / count)
            losses[-1].backward()
        log.append([torch.stack(losses).sum().detach()])
        torch.distributed.all_reduce(log[-1][0])
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        save_file(whole, out / "model.safetensors")
        torch.save([[loss.item() / 2] for loss, in log], out / "log")
    return bytes_of(model), bytes_of(base) if base else 0


def bytes_of(model):
    """Of the weights in this process."""
    return sum(getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p).numel() * 4
               for p in model.parameters())


def weights_and_log(folder, kind, case):
    file, = (folder / kind / case).glob("*model.safetensors")
    weights = {name.replace(".default", ""): x for name, x in load_file(file).items()}
    return weights, torch.load(folder / kind / case / "log")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("sharding")
    for seed in (0, 1):
        for tied in (False, True):
            llama(seed, tie_word_embeddings=tied).save_pretrained(folder / f"{seed} {tied}")
    base = AutoModelForCausalLM.from_pretrained(folder / "1 False")
    torch.save([[row if row[1] else store(base, [{"input_ids": row[0], "is_domain": False}], 8)[0]
                 for row in pair] for pair in shared_rows("uneven")], folder / "rows")
    for case in CASES:
        learn(folder, "one", case, 4)
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one"])
def test_two_processes_learn_what_one_learns(kind, folder):
    if "ZeRO" in kind and not os.environ.get("CI"):
        pytest.importorskip("deepspeed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
         "--nproc_per_node", "2", __file__, kind, folder], capture_output=True, text=True,
        timeout=400, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    for case, how in CASES.items():
        (weights, log), (expected, expected_log) = (
            weights_and_log(folder, some, case) for some in (kind, "one"))
        assert len(log) == len(expected_log) == 2
        assert "stored" not in how or expected_log[1][2] > 0
        for step, expected_step in zip(log, expected_log):
            assert step == pytest.approx(expected_step[:len(step)], rel=1e-5, abs=1e-6), case
        for name, weight in expected.items():  # 0.1 times two gradients apart from the start
            if name in weights or name != "lm_head.weight":  # a tied head may be saved twice
                torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=0)
        if kind not in ("DDP", "ZeRO-2"):
            of_model, of_base = torch.load(folder / kind / case / "bytes")
            whole = bytes_of(llama(tie_word_embeddings="tied" in how))
            assert of_model < 0.65 * whole and of_base < 0.55 * whole, case


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "plain FSDP2":
        torch.distributed.init_process_group("gloo")
    for case in CASES:
        found = learn(folder, kind, case, 2)
        if os.environ["RANK"] == "0":
            print(kind, case, "bytes of weights in a process, of model and base:", *found)
            torch.save(found, folder / kind / case / "bytes")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
