"""MoL on two folders of your own text: train, evaluate, save, continue, merge and generate.

    python -m plots.huggingface.example MODEL DOMAIN_FOLDER GENERAL_FOLDER OUT_FOLDER

MODEL is a name, a folder or a .gguf file. Each folder needs two .txt files or more; an eighth of
the files is held out. Run it again to continue after an interruption. sharded.sh runs it in several
processes. To copy it, take recipe.py, hidden.py and losses.py along and shorten the imports.
"""

import argparse
import random
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from plots.huggingface.recipe import MolTrainer

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "domain", "general", "out"):
    parser.add_argument(name)
parser.add_argument("--deepspeed", metavar="JSON", help="a configuration of DeepSpeed")
given = parser.parse_args()
out = given.out
set_seed(0)
args = TrainingArguments(
    out, max_steps=60, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=10,
    lr_scheduler_type="cosine", bf16=torch.cuda.is_available(), logging_steps=10,
    use_cpu=not torch.accelerator.is_available(),  # otherwise DeepSpeed on CPUs shares no rows out
    eval_strategy="steps", eval_steps=30, save_steps=30, save_total_limit=2, report_to=[],
    deepspeed=given.deepspeed)


def load(where=given.model, more={}):
    """The model and its tokenizer."""
    if where.endswith(".gguf"):
        where, more = Path(where).parent, {"gguf_file": Path(where).name}
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
        tokenizer = AutoTokenizer.from_pretrained(where, **more)
    except Exception as error:  # of many kinds: a missing, damaged or unknown file
        parser.error(f"{given.model}: no causal language model there: {str(error).splitlines()[0]}")
    if more:  # the weights are whole now, but marked otherwise they could not be trained and saved
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return model, tokenizer


def rows_of(folder, length=64):
    """The .txt files of a folder, an end token after each -> (rows to train on, held-out rows)."""
    files, rows = sorted(Path(folder).rglob("*.txt")), ([], [])
    random.Random(0).shuffle(files)
    for some, part in zip((files[len(files) // 8 + 1:], files[:len(files) // 8 + 1]), rows):
        tokens = []
        for file in some:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                parser.error(f"{file}: {error}")
            tokens += tokenizer.encode(text) + [tokenizer.eos_token_id]
        part += [tokens[i:i + length] for i in range(0, len(tokens) - 1, length)]
        if not part:
            parser.error(f"{folder} needs two .txt files or more; it has {len(files)}")
        random.Random(0).shuffle(part)
    return rows[0], rows[1][:32]


model, tokenizer = load()
if tokenizer.eos_token_id is None:
    parser.error(f"{given.model}: the tokenizer has no end token")
(domain, held_domain), (general, held_general) = rows_of(given.domain), rows_of(given.general)
# If there are fewer general rows than domain rows they are used again; if more, not all are used.
pairs = [((d, True), (g, False)) for d, g in zip(domain, cycle(general))]
held_out = {"domain": [((row, True),) for row in held_domain],  # its loss is the CE
            "general": [((row, False),) for row in held_general]}  # strength * KL

# With adapters the base needs no memory. To train all weights, remove the next line, give
# base=load()[0] to MolTrainer, use learning_rate=1e-4, and save the model where it is merged now.
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
trainer = MolTrainer(model, args, train_dataset=pairs, eval_dataset=held_out)
last = get_last_checkpoint(out) if Path(out).exists() else None
print(f"continues from {last}" if last else "begins")
trainer.train(resume_from_checkpoint=last)
print(trainer.evaluate())
trainer.save_model(f"{out}/adapters")

if trainer.is_world_process_zero():  # the adapters are whole in their folder, whatever was sharded
    unset_hf_deepspeed_config()
    merged = PeftModel.from_pretrained(load()[0], f"{out}/adapters").merge_and_unload()
    merged.save_pretrained(f"{out}/merged")
    tokenizer.save_pretrained(f"{out}/merged")
    prompt = torch.tensor([held_domain[0][:16]], device=merged.device)
    print(tokenizer.decode(merged.generate(prompt, max_new_tokens=32)[0]))
