"""MoL on two folders of your own text: train, evaluate, save, continue, merge and generate.

    python -m plots.example MODEL DOMAIN_FOLDER GENERAL_FOLDER OUT_FOLDER

Run it again to continue after an interruption. To copy it, take recipe.py and losses.py along.
"""

import random
import sys
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from plots.recipe import MolTrainer, collate

name, domain, general, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(name)


def rows_of(folder, length=512):
    """Files of text -> rows of tokens. Documents follow each other with an end token between."""
    tokens = []
    for file in sorted(Path(folder).rglob("*.txt")):
        tokens += tokenizer.encode(file.read_text(encoding="utf-8")) + [tokenizer.eos_token_id]
    rows = [tokens[i:i + length] for i in range(0, len(tokens) - 1, length)]
    return random.Random(0).sample(rows, len(rows))


def split(rows):
    held = max(len(rows) // 10, 1)
    return rows[held:], rows[:held]


domain, held_domain = split(rows_of(domain))
general, held_general = split(rows_of(general))
# The general rows are used again if there are fewer of them than domain rows.
pairs = [((d, True), (g, False)) for d, g in zip(domain, cycle(general))]
held_out = {"domain": [((row, True),) for row in held_domain],  # eval_domain_loss: CE
            "general": [((row, False),) for row in held_general]}  # eval_general_loss: KL

# With adapters the base needs no memory. To train all weights: leave out the next line, give
# base=copy.deepcopy(model) to MolTrainer, and take a tenth of the learning rate.
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
args = TrainingArguments(
    out, num_train_epochs=3, per_device_train_batch_size=4, learning_rate=1e-3, warmup_steps=10,
    lr_scheduler_type="cosine", bf16=torch.cuda.is_available(), logging_steps=10,
    eval_strategy="steps", eval_steps=50, save_steps=50, save_total_limit=2, report_to=[])
trainer = MolTrainer(model, args, collate, pairs, eval_dataset=held_out)
last = Path(out).exists() and get_last_checkpoint(out)
trainer.train(resume_from_checkpoint=last or None)
print(trainer.evaluate())

merged = model.merge_and_unload()
merged.save_pretrained(f"{out}/merged")
tokenizer.save_pretrained(f"{out}/merged")
prompt = tokenizer.decode(held_domain[0][:16])
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(merged.device)
print(tokenizer.decode(merged.generate(**inputs, max_new_tokens=32)[0]))
