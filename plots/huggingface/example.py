"""MoL on two folders of your own text: train, evaluate, save, continue, merge and generate.

    python -m plots.huggingface.example MODEL DOMAIN_FOLDER GENERAL_FOLDER OUT_FOLDER

Run it again to continue after an interruption. To copy it, take recipe.py and losses.py along and
import from recipe in place of plots.huggingface.recipe.
"""

import random
import sys
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from plots.huggingface.recipe import MolTrainer

if len(sys.argv) != 5:
    sys.exit(__doc__)
name, domain, general, out = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(name)


def rows_of(folder, length=512):
    """The .txt files of a folder, an end token after each -> (rows to train on, held-out rows)."""
    tokens = []
    for file in sorted(Path(folder).rglob("*.txt")):
        tokens += tokenizer.encode(file.read_text(encoding="utf-8") + tokenizer.eos_token)
    rows = [tokens[i:i + length] for i in range(0, len(tokens), length)]
    if len(rows) < 8:
        sys.exit(f"{folder} has {len(tokens)} tokens in .txt files; {8 * length} are needed")
    random.Random(0).shuffle(rows)
    return rows[len(rows) // 8:], rows[:len(rows) // 8]


(domain, held_domain), (general, held_general) = rows_of(domain), rows_of(general)
# If there are fewer general rows than domain rows they are used again; if more, not all are used.
pairs = [((d, True), (g, False)) for d, g in zip(domain, cycle(general))]
held_out = {"domain": [((row, True),) for row in held_domain],  # its loss is the CE
            "general": [((row, False),) for row in held_general]}  # strength * KL

# With adapters the base needs no memory. To train all weights: remove the next line and
# merge_and_unload, give base=copy.deepcopy(model) to MolTrainer, and use learning_rate=1e-4.
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
args = TrainingArguments(
    out, num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=10,
    lr_scheduler_type="cosine", bf16=torch.cuda.is_available(), logging_steps=10,
    eval_strategy="steps", eval_steps=50, save_steps=50, save_total_limit=2, report_to=[])
trainer = MolTrainer(model, args, train_dataset=pairs, eval_dataset=held_out)
last = get_last_checkpoint(out) if Path(out).exists() else None
print(f"continues from {last}" if last else "begins")
trainer.train(resume_from_checkpoint=last)
print(trainer.evaluate())

merged = model.merge_and_unload()
merged.save_pretrained(f"{out}/merged")
tokenizer.save_pretrained(f"{out}/merged")
prompt = torch.tensor([held_domain[0][:16]], device=merged.device)
print(tokenizer.decode(merged.generate(prompt, max_new_tokens=32)[0]))
