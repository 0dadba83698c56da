"""Two CPU processes, with the model in shards or not, learn what one process learns.

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
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, TrainingArguments  # noqa: E402

from plots.huggingface.recipe import MolTrainer, collate, mol_loss  # noqa: E402
from test_recipe import llama, pairs_of_rows  # noqa: E402

ZERO = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
FSDP = {"fsdp": True, "fsdp_config": {
    "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "state_dict_type": "FULL_STATE_DICT"}}
KINDS = {"DDP": {}, "FSDP2": FSDP, "ZeRO-2": {"deepspeed": ZERO | {
    "zero_optimization": {"stage": 2}}}, "ZeRO-3": {"deepspeed": ZERO}}
CASES = {  # name: (tied head, adapters, base, more)
    "all weights": (False, False, True, {}),
    "tied head, uneven rows": (True, False, True, {"uneven": True}),
    "adapters alone, uneven rows": (False, True, False, {"uneven": True}),
    "adapters with a base, two micro-batches": (True, True, True, {"accumulate": 2}),
    "uneven micro-batches, checkpointing": (False, False, True, {
        "uneven": True, "accumulate": 2, "gradient_checkpointing": True}),
    "continued": (False, False, True, {"stop": True}),
    "model loaded last": (False, False, True, {"last": True, "uneven": True}),
    "model with adapters loaded last": (True, True, False, {"last": True}),
}


def rows(uneven, count=16):
    """Of two processes, the first has only domain rows if they are uneven."""
    pairs = pairs_of_rows(count)
    return [(a, a) if i % 4 < 2 else (b, b) for i, (a, b) in enumerate(pairs)] if uneven else pairs


def learn(folder, kind, case, out, micro):
    """Two steps of SGD -> the log; the weights are saved in `out`."""
    tied, has_adapters, has_base, more = CASES[case]
    more = {**more}
    uneven, last, stop = (more.pop(name, False) for name in ("uneven", "last", "stop"))
    accumulate = more.pop("accumulate", 1)

    def load(seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder / f"{seed} {tied}", dtype=torch.float32)
        return model

    models = [] if last else [load(0), load(1)]
    args = TrainingArguments(
        str(out), use_cpu=True, report_to=[], per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, max_grad_norm=0.0, disable_tqdm=True, max_steps=2,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="steps" if stop else "no", save_steps=1,
        **more, **KINDS.get(kind, {}))
    model, base = models or (load(0), load(1))
    if kind == "FSDP2":  # accelerate has FSDP for GPUs and the like only
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if has_adapters:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trainer = MolTrainer(model, args, collate, rows(uneven), base=base if has_base else None,
                         chunk=3)
    trainer.train(resume_from_checkpoint=out / "checkpoint-1" if more.get("resume") else None)
    trainer.save_model(str(out / "saved"))
    return [{key: log[key] for key in ("loss", "ce", "kl") if key in log}
            for log in trainer.state.log_history if "loss" in log]


def saved(out):
    return {key: value for file in out.glob("saved/*.safetensors")
            for key, value in load_file(file).items()}


def program(kind, folder):
    for case in CASES:
        try:
            log = learn(folder, kind, case, folder / kind / case, 2)
            torch.save(log, folder / kind / case / f"log {os.environ['RANK']}")
            print("ok", kind, case, log, flush=True)
        except Exception as e:
            import traceback; traceback.print_exc()
            print("FAILED", kind, case, str(e)[:300], flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]))
